"""Differentiable augmentation: both sides of a discriminator change in the same ways at random.

A discriminator that only ever sees changed images cannot learn few of them by heart, and the
student is not led to change its own, as the gradient goes through (Zhao et al. 2020, arXiv
2006.10738; amounts are theirs). Every draw is from a named stream, one per row, so that the same
`Draw` changes two batches alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn.functional import pad

from turbo_lab.errors import BadInput
from turbo_lab.streams import Draw

Augment = Callable[[Tensor, Draw], Tensor]
"""Images ``[B, C, H, W]`` in [-1, 1] to as many, changed as a draw says."""


def colour(x: Tensor, draw: Draw) -> Tensor:
    """Change brightness by ±0.5, saturation by factors 0 to 2, contrast by factors 0.5 to 1.5."""
    x = x + _per_row(draw, "brightness", x) - 0.5
    grey = x.mean(1, keepdim=True)
    x = grey + 2 * _per_row(draw, "saturation", x) * (x - grey)
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + (0.5 + _per_row(draw, "contrast", x)) * (x - mean)


def translation(x: Tensor, draw: Draw) -> Tensor:
    """Shift by up to an eighth of each side; what comes in is mid grey, 0."""
    height, width = x.shape[2:]
    down, right = height // 8, width // 8
    top, left = draw.integers("down", 2 * down + 1), draw.integers("right", 2 * right + 1)
    return _windows(pad(x, (right, right, down, down)), top, left, height, width)


def cutout(x: Tensor, draw: Draw) -> Tensor:
    """Paint a rectangle of half the sides mid grey, its centre anywhere in the image."""
    sides = [
        (torch.arange(n)[None] - draw.integers(name, n)[:, None] + n // 4) for name, n in _sides(x)
    ]
    inside = [(at >= 0) & (at < n // 2) for at, (_, n) in zip(sides, _sides(x), strict=True)]
    hole = inside[0][:, None, :, None] & inside[1][:, None, None, :]
    return x.masked_fill(hole.to(x.device), 0.0)


AUGMENTS: Mapping[str, Augment] = MappingProxyType(
    {"colour": colour, "translation": translation, "cutout": cutout}
)


def augmented(names: Sequence[str]) -> Augment:
    """One augmentation after the other, in this order, each from streams of its own.

    Raises:
        BadInput: a name that is not in `AUGMENTS`.
    """
    for name in names:
        if name not in AUGMENTS:
            raise BadInput("augment", name, f"choose from {', '.join(AUGMENTS)}")

    def change(x: Tensor, draw: Draw) -> Tensor:
        for name in names:
            x = AUGMENTS[name](x, draw.sub(name))
        return x

    return change


def random_crop(x: Tensor, draw: Draw, size: int) -> Tensor:
    """A square ``[B, C, size, size]`` from anywhere in each image, another for every row.

    Raises:
        BadInput: the images are smaller.
    """
    height, width = x.shape[2:]
    if not 1 <= size <= min(height, width):
        raise BadInput("size", size, f"use 1 to {min(height, width)}, the shorter side")
    top = draw.integers("top", height - size + 1)
    return _windows(x, top, draw.integers("left", width - size + 1), size, size)


def _windows(x: Tensor, top: Tensor, left: Tensor, height: int, width: int) -> Tensor:
    """Cut ``[height, width]`` out of each image, from its own corner."""
    row = torch.arange(len(x))[:, None, None]
    down = (top[:, None] + torch.arange(height))[:, :, None]
    right = (left[:, None] + torch.arange(width))[:, None, :]
    rows, downs, rights = (i.to(x.device) for i in (row, down, right))
    return x.permute(0, 2, 3, 1)[rows, downs, rights].permute(0, 3, 1, 2)


def _per_row(draw: Draw, name: str, x: Tensor) -> Tensor:
    return draw.uniform(name).to(x)[:, None, None, None]


def _sides(x: Tensor) -> tuple[tuple[str, int], tuple[str, int]]:
    return ("down", x.shape[2]), ("right", x.shape[3])
