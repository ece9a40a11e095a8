"""Count the parts of the body: find head and torso, then walk arcs around shoulders and hips.

Nothing is told: the figure is looked for over the whole picture on half pixels. Thresholds were
chosen on the ``select`` stream (1,000 scenes, fresh, with noise of standard deviation 0.04 and
with each part removed), never on ``eval``, midway between what is there and what is not:

- `SKIN_FULL`, `SKIN_NONE`: skin lies within 0.01 of its colour, 99.9% of every ground beyond 0.29.
- `HEAD`: disc mean at a head at least 0.91, elsewhere or without the head at most 0.79.
- `TORSO`: mean at a torso at least 0.77, and 0 without it.
- `ARM`: ray mean of an arm at least 0.87, where it was removed at most 0.50.
- `LEG`: ring mean of a leg at least 0.70 (a ring about the hips meets legs askew), where it was
  removed at most 0.44. A second limb counts after a dip below `ARM_GAP`, `LEG_GAP`; between two
  legs the profile falls to 0.16 or less.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import conv2d, grid_sample, pad

from turbo_lab.measure.views import chroma, unit
from turbo_lab.postcards.render import HEAD_RADIUS, HIP, SHOULDER, SIZE, SKIN, TORSO_RADIUS

SKIN_FULL, SKIN_NONE = 0.10, 0.45
GARMENT_NONE, GARMENT_FULL = 0.45, 0.55
"""Chroma where a pixel stops and starts to look like cloth; garments have 0.55 to 0.75."""
HEAD, TORSO = 0.85, 0.60
ARM, ARM_GAP = 0.60, 0.40
LEG, LEG_GAP = 0.55, 0.30
RAISED_ABOVE = 88.0
"""Degrees from hanging; drawn arms are at 34-54 or 122-142."""
APART_ABOVE = 14.5
"""Degrees from hanging; drawn legs are at 3-8 or 22-32, and the mean of two legs reads as at
most 9.5 or at least 19.3."""
ASKEW = 5.0
"""A side may lie on the wrong side of the border by this much: half-pixel places tilt rays."""

_ANCHOR_X, _ANCHOR_Y, _WIDTH, _HEIGHT = 7, 5, 15, 23  # kernel box around the head's centre
_HEAD, _TORSO = (0.0, 0.0), (SHOULDER[1] + 0.6, HIP[1])  # top and bottom of the capsules' axes
_ARM_ANGLES = torch.arange(15, 166, 3.0)
_ARM_RADII = torch.arange(2.75, 6.1, 0.5)
_HIP_ANGLES = torch.arange(-75, 76, 3.0)
_HIP_RADII = torch.arange(4.5, 7.6, 0.5)
_LEG_ANGLES = torch.arange(-12, 61, 3.0)
_LEG_RADII = torch.arange(3.0, 6.6, 0.5)


@dataclass(frozen=True, kw_only=True)
class BodyReading:
    """The bodies found; every field is ``[B]``."""

    x: Tensor  # centre of the head, pixels from the left edge
    y: Tensor  # pixels from the top edge
    heads: Tensor  # long, anywhere in the picture
    torso: Tensor  # bool
    arms: Tensor  # long
    legs: Tensor  # long
    arm_pose: Tensor  # long, index into captions.ARMS; -1 when the arms disagree or one lacks
    leg_pose: Tensor  # long, index into captions.LEGS; -1 when the legs disagree or one lacks
    whole: Tensor  # bool: one head, torso, one arm and one leg on each side, nothing more

    @property
    def arms_raised(self) -> Tensor:
        """Whether both arms are up ``[B]``."""
        return self.arm_pose == 0

    @property
    def legs_apart(self) -> Tensor:
        """Whether both legs are spread ``[B]``."""
        return self.leg_pose == 0


def read_bodies(images: Tensor) -> BodyReading:
    """Find the figure and count its parts.

    Args:
        images: ``[B, 3, 32, 32]`` in [-1, 1].

    Raises:
        BadInput: another shape, or values that are not finite.
    """
    skin, cloth = skin_map(images), cloth_map(images)
    score, heads, torso = _responses(skin, cloth)
    place = score.flatten(1).argmax(1)
    centre = torch.stack([place % (2 * SIZE), place // (2 * SIZE)], 1) / 2
    at_head = _near(centre, 1.2)
    has_torso = (torso * at_head).flatten(1).amax(1) >= TORSO
    head_here = (heads * at_head).flatten(1).amax(1) >= HEAD

    arm = _rays(skin, centre, SHOULDER, _ARM_ANGLES, _ARM_RADII)
    per_arm = _count_peaks(arm, ARM, ARM_GAP)
    hips = _rays(skin, centre, (0.0, HIP[1]), _HIP_ANGLES, _HIP_RADII)[:, 1]
    legs = _count_peaks(hips, LEG, LEG_GAP)
    half = len(_HIP_ANGLES) // 2
    two_sided = (hips[:, :half].amax(1) >= LEG) & (hips[:, half + 1 :].amax(1) >= LEG)
    leg = _rays(skin, centre, HIP, _LEG_ANGLES, _LEG_RADII)
    count = _count_heads(heads)
    whole = (count == 1) & head_here & has_torso & (per_arm == 1).all(1) & (legs == 2) & two_sided
    return BodyReading(
        x=centre[:, 0],
        y=centre[:, 1],
        heads=count,
        torso=has_torso,
        arms=per_arm.sum(1),
        legs=legs,
        arm_pose=_pose(_angle(arm, _ARM_ANGLES), RAISED_ABOVE, (per_arm > 0).all(1)),
        leg_pose=_pose(_angle(leg, _LEG_ANGLES), APART_ABOVE, (leg.amax(2) >= LEG).all(1)),
        whole=whole,
    )


def skin_map(images: Tensor) -> Tensor:
    """How much each pixel looks like skin, ``[B, 32, 32]`` in [0, 1]."""
    distance = (unit(images) - torch.tensor(SKIN)[:, None, None]).square().sum(1).sqrt()
    return ((SKIN_NONE - distance) / (SKIN_NONE - SKIN_FULL)).clamp(0, 1)


def cloth_map(images: Tensor) -> Tensor:
    """How much each pixel looks like a garment of any hue, ``[B, 32, 32]`` in [0, 1]."""
    return ((chroma(images) - GARMENT_NONE) / (GARMENT_FULL - GARMENT_NONE)).clamp(0, 1)


def capsule(x: Tensor, y: Tensor, top: float, bottom: float, radius: float) -> Tensor:
    """Anti-aliased upright capsule: coverage at (x, y) about the axis x = 0, top to bottom."""
    along = y - y.clamp(top, bottom)
    return (radius + 0.5 - (x**2 + along**2).sqrt()).clamp(0, 1)


@cache
def _kernels() -> Tensor:
    """Filters ``[4 half-pixel shifts * 3, 2, H, W]``: figure, head disc, torso core."""
    shifts = ((0.0, 0.0), (0.5, 0.0), (0.0, 0.5), (0.5, 0.5))
    return torch.cat([_kernels_at(*shift) for shift in shifts])


def _kernels_at(right: float, down: float) -> Tensor:
    x = (torch.arange(_WIDTH) + 0.5 - _ANCHOR_X - right)[None, :]
    y = (torch.arange(_HEIGHT) + 0.5 - _ANCHOR_Y - down)[:, None]

    def mean(span: tuple[float, float], outer: float, inner: float = -1.0) -> Tensor:
        shape = capsule(x, y, *span, outer) - capsule(x, y, *span, inner)
        return shape / shape.sum()

    none = torch.zeros(_HEIGHT, _WIDTH)
    face = mean(_HEAD, HEAD_RADIUS) - mean(_HEAD, HEAD_RADIUS + 1.9, HEAD_RADIUS + 0.5)
    tunic = mean(_TORSO, TORSO_RADIUS) - mean(_TORSO, TORSO_RADIUS + 1.9, TORSO_RADIUS + 0.5)
    limbs = mean(_TORSO, 6.5, TORSO_RADIUS + 0.5)  # skin around the torso: a body is near
    figure = torch.stack([face + limbs, tunic])
    head = torch.stack([mean(_HEAD, HEAD_RADIUS - 0.5), none])
    torso = torch.stack([none, mean(_TORSO, TORSO_RADIUS - 0.5)])
    return torch.stack([figure, head, torso])


def _responses(skin: Tensor, cloth: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Filter responses ``[B, 64, 64]`` for a head centred at each half pixel."""
    margins = (_ANCHOR_X, _WIDTH - 1 - _ANCHOR_X, _ANCHOR_Y, _HEIGHT - 1 - _ANCHOR_Y)
    out = conv2d(pad(torch.stack([skin, cloth], 1), margins), _kernels())
    out = out.reshape(-1, 2, 2, 3, SIZE, SIZE).permute(0, 3, 4, 1, 5, 2)  # kind, y, dy, x, dx
    figure, head, torso = out.reshape(-1, 3, 2 * SIZE, 2 * SIZE).unbind(1)
    return figure, head, torso


def _near(centre: Tensor, radius: float) -> Tensor:
    """Half-pixel places within a radius of a centre, ``[B, 64, 64]`` bool."""
    grid = torch.arange(2 * SIZE) / 2
    dx, dy = grid - centre[:, :1], grid - centre[:, 1:]
    return (dy**2)[:, :, None] + (dx**2)[:, None, :] <= radius**2


def _count_heads(response: Tensor) -> Tensor:
    """Separate discs of skin, strongest first; discs overlapping one already counted are it."""
    count = torch.zeros(len(response), dtype=torch.long)
    for _ in range(4):
        peak, place = response.flatten(1).max(1)
        count += peak >= HEAD
        centre = torch.stack([place % (2 * SIZE), place // (2 * SIZE)], 1) / 2
        response = response.masked_fill(_near(centre, HEAD_RADIUS + 0.7), 0.0)
    return count


def _rays(
    skin: Tensor, centre: Tensor, root: tuple[float, float], angles: Tensor, radii: Tensor
) -> Tensor:
    """Mean skin ``[B, 2, A]`` along rays from the left and right root; angle 0 hangs down."""
    side = torch.tensor([-1.0, 1.0])
    start = centre[:, None] + torch.stack([side * root[0], torch.full((2,), root[1])], 1)
    radians = angles * (math.pi / 180)
    reach = torch.stack([side[:, None] * radians.sin(), radians.cos().expand(2, -1)], 2)
    points = start[:, :, None, None] + reach[:, :, None] * radii[:, None]
    grid = (points * 2 / SIZE - 1).flatten(1, 2)
    values = grid_sample(skin[:, None], grid, padding_mode="zeros", align_corners=False)
    return values.mean(-1).reshape(len(skin), 2, len(angles))


def _count_peaks(profile: Tensor, high: float, low: float) -> Tensor:
    """Peaks of at least ``high`` along the last axis, with a dip below ``low`` between two."""
    count = torch.zeros(profile.shape[:-1], dtype=torch.long)
    ready = torch.ones(profile.shape[:-1], dtype=torch.bool)
    for value in profile.unbind(-1):
        rise = ready & (value >= high)
        count += rise
        ready = (ready & ~rise) | (value < low)
    return count


def _angle(profile: Tensor, angles: Tensor) -> Tensor:
    """Centre of mass of the skin on an arc, degrees."""
    weight = (profile - 0.3).clamp_min(0)
    return (weight * angles).sum(-1) / weight.sum(-1).clamp_min(1e-6)


def _pose(angle: Tensor, border: float, complete: Tensor) -> Tensor:
    """Index 0 for above the border, 1 for below; -1 when the sides disagree or one lacks.

    The mean decides: a sideways error of the figure's place tilts both sides oppositely.
    """
    above = angle.mean(1) > border
    agree = torch.where(above, angle.amin(1) > border - ASKEW, angle.amax(1) < border + ASKEW)
    return torch.where(complete & agree, torch.where(above, 0, 1), -1)
