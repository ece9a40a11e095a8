"""Views of a batch of images that the measurements share: unit range, luminance, chroma."""

from __future__ import annotations

import torch
from torch import Tensor

from turbo_lab.errors import BadInput
from turbo_lab.postcards import SIZE

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in luminance (Rec. 601)."""


def checked(images: Tensor) -> Tensor:
    """Return ``[B, 3, 32, 32]`` images on the CPU in float32, unclipped.

    Raises:
        BadInput: another shape, or a value that is not finite.
    """
    if images.dim() != 4 or images.shape[1:] != (3, SIZE, SIZE):
        raise BadInput("images", tuple(images.shape), f"use a batch [B, 3, {SIZE}, {SIZE}]")
    images = images.detach().to("cpu", torch.float32)
    if not bool(images.isfinite().all()):
        raise BadInput("images", "NaN or infinite values", "use finite numbers, around [-1, 1]")
    return images


def unit(images: Tensor) -> Tensor:
    """Map images from [-1, 1] to [0, 1], clipped there as a screen would."""
    return ((checked(images) + 1) / 2).clamp(0, 1)


def luma(images: Tensor) -> Tensor:
    """Luminance ``[B, 32, 32]`` (Rec. 601 weights) in [-1, 1]."""
    return torch.einsum("bchw,c->bhw", checked(images), torch.tensor(LUMA))


def chroma(images: Tensor) -> Tensor:
    """HSV chroma of each pixel ``[B, 32, 32]`` in [0, 1]: largest minus smallest channel."""
    picture = unit(images)
    return picture.amax(1) - picture.amin(1)


def hue_degrees(colours: Tensor) -> Tensor:
    """HSV hue in degrees, [0, 360), of colours ``[..., 3]`` in [0, 1]; grey gives 0."""
    red, green, blue = colours.unbind(-1)
    top, span = colours.amax(-1), colours.amax(-1) - colours.amin(-1)
    safe = span.clamp_min(1e-6)
    sector = torch.where(
        top == red,
        (green - blue) / safe % 6,
        torch.where(top == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    return torch.where(span > 0, 60 * sector, 0.0) % 360
