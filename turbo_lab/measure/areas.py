"""Error by area: how much of the teacher's sign, figure and ground a student keeps.

The areas are found on the teacher's picture by the oracles, so both pictures are compared in the
same pixels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from turbo_lab.measure.oracles import Reading, read
from turbo_lab.measure.texture import FIGURE_BOX
from turbo_lab.measure.views import checked, unit
from turbo_lab.postcards import SIZE

AREAS = ("sign", "figure", "ground")
"""From the smallest to the largest."""
GRAIN = 3.0
"""A pixel in the figure's box belongs to the figure when a channel is farther from the mean of
the ground than this many of the ground's own standard deviations."""


def area_masks(images: Tensor, seen: Reading | None = None) -> dict[str, Tensor]:
    """Pixels ``[B, 32, 32]`` (bool) of each of `AREAS`; they do not overlap.

    The sign is every plate found; the figure is what differs from the ground in the box around
    the body; the ground is outside of both.
    """
    seen = read(images) if seen is None else seen
    picture, free = unit(images), seen.free[:, None].float()
    count = free.sum((2, 3), keepdim=True).clamp_min(1)
    mean = (picture * free).sum((2, 3), keepdim=True) / count
    std = (((picture - mean) ** 2 * free).sum((2, 3), keepdim=True) / count).sqrt()
    differs = ((picture - mean).abs() > GRAIN * std.clamp_min(0.02)).any(1)
    sign = seen.sign.cover
    figure = differs & ~sign & _box(seen)
    return {"sign": sign, "figure": figure, "ground": ~(sign | figure)}


def _box(seen: Reading) -> Tensor:
    """The box ``[B, 32, 32]`` that a figure may cover."""
    centres = torch.arange(SIZE) + 0.5
    across = (centres - seen.body.x[:, None]).abs() <= FIGURE_BOX[0]
    down = centres - seen.body.y[:, None]
    along = (down >= -FIGURE_BOX[1]) & (down <= FIGURE_BOX[2])
    return along[:, :, None] & across[:, None, :]


class AreaError(NamedTuple):
    """Sums over the pixels of one area, per image ``[B]``."""

    error: Tensor  # (x - y)^2
    spread: Tensor  # (y - m)^2, m the mean colour of the area over all pictures
    detail: Tensor  # (y - m_i)^2, m_i its mean colour in picture i


def area_errors(images: Tensor, teacher: Tensor, masks: dict[str, Tensor]) -> dict[str, AreaError]:
    """Squared error and variance of each area, summed per image.

    Over images, ``error / spread`` is 1 for painting an area in one colour in all pictures, and
    ``error / detail`` for painting it in its own mean colour in each. The first counts a ground
    of the right colour as mostly right; the second asks for its grain.

    Args:
        images: ``[B, 3, 32, 32]`` in [-1, 1], of the student.
        teacher: the same of the teacher, from the same captions and noise.
        masks: see `area_masks`, of the teacher's pictures.
    """
    x, y = checked(images), checked(teacher)
    out = {}
    for name, mask in masks.items():
        weight = mask[:, None].float()
        m = (y * weight).sum((0, 2, 3), keepdim=True) / weight.sum().clamp_min(1)
        count = weight.sum((2, 3), keepdim=True).clamp_min(1)
        own = (y * weight).sum((2, 3), keepdim=True) / count

        def total(squares: Tensor, weight: Tensor = weight) -> Tensor:
            return (squares * weight).sum((1, 2, 3))

        out[name] = AreaError(
            error=total((x - y).square()),
            spread=total((y - m).square()),
            detail=total((y - own).square()),
        )
    return out
