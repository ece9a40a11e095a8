"""What is on a postcard: every number behind a picture, drawn by (seed, stream, index)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from turbo_lab.errors import BadInput
from turbo_lab.postcards.captions import ARMS, GROUNDS, LEGS, Caption, tokens_of_fields
from turbo_lab.streams import seed_for

SIZE = 32
STREAMS = ("train", "critic", "eval", "select")
"""Disjoint by construction: each stream has its own key. ``select`` is for choosing
hyperparameters; no notebook reports on it."""

PARTS = ("head", "torso", "left arm", "right arm", "left leg", "right leg")
SIGN_WIDTH, SIGN_HEIGHT = 9, 7

HUE_MODES = {
    "crimson": (350.0, 0.30),
    "amber": (45.0, 0.22),
    "cyan": (185.0, 0.17),
    "blue": (228.0, 0.13),
    "violet": (275.0, 0.10),
    "magenta": (315.0, 0.08),
}
"""Garment hue modes, never in the caption: centre in degrees and probability."""
ARM_DEGREES, LEG_DEGREES = ((122, 142), (34, 54)), ((22, 32), (3, 8))
"""From hanging straight down, by the word of `ARMS` and of `LEGS`."""
HUE_STD = 3.0
"""Standard deviation of a hue around its mode, degrees; draws are cut at 3 sigma."""

_NUMBERS = 24  # uniform numbers per scene; a fixed count keeps the grain after them stable


@dataclass(frozen=True, kw_only=True)
class Scenes:
    """A batch of scenes; every field has the batch first.

    Lengths are in pixels with the origin at the outer corner of the top-left pixel, y down;
    angles are in radians from the vertical; colours in [0, 1].
    """

    fields: Tensor  # [B, 5] long: arms, legs, ground, tens, units
    hue_mode: Tensor  # [B] long, index into HUE_MODES
    hue: Tensor  # [B] degrees
    saturation: Tensor  # [B]
    value: Tensor  # [B]
    head: Tensor  # [B, 2] centre (x, y)
    arm_angles: Tensor  # [B, 2] left, right; 0 hangs down, pi points up
    leg_angles: Tensor  # [B, 2] left, right; 0 hangs down
    sign: Tensor  # [B, 2] long, top-left pixel (x, y)
    parts: Tensor  # [B, 6] 1 where the part of PARTS is drawn
    grain: Tensor  # [B, 32, 32] white noise that the ground filters

    def __len__(self) -> int:
        return len(self.fields)

    def __getitem__(self, rows: slice | Tensor) -> Scenes:
        return Scenes(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    @property
    def tokens(self) -> Tensor:
        """Caption token ids ``[B, 5]``."""
        return tokens_of_fields(self.fields)

    @property
    def captions(self) -> list[Caption]:
        """The captions, one per scene."""
        return [
            Caption(arms=ARMS[a], legs=LEGS[le], ground=GROUNDS[g], number=f"{t}{u}")
            for a, le, g, t, u in self.fields.tolist()
        ]


def draw_scenes(
    stream: str, indices: Sequence[int], *, seed: int = 0, sign_grid: int = 1
) -> Scenes:
    """Draw scenes; scene i of a stream is the same in every batch.

    Args:
        stream: one of `STREAMS`.
        indices: which scenes, each at least 0.
        seed: base seed, at least 0.
        sign_grid: signs lie on multiples of so many pixels, 1 to 4. A curriculum can start with
            4, one place in a token, before a network has to draw digits at every offset.

    Raises:
        BadInput: unknown stream, negative seed or another grid.
    """
    if stream not in STREAMS:
        raise BadInput("stream", stream, f"choose one of {', '.join(STREAMS)}")
    if not 1 <= sign_grid <= 4:
        raise BadInput("sign_grid", sign_grid, "use an integer from 1 to 4")
    key = seed_for(seed, "postcards", stream)
    u = np.empty((len(indices), _NUMBERS))
    grain = np.empty((len(indices), SIZE, SIZE), dtype=np.float32)
    for row, index in enumerate(indices):
        rng = np.random.Generator(np.random.Philox(key=[key, int(index)]))
        rng.random(out=u[row])
        rng.standard_normal(out=grain[row], dtype=np.float32)
    return _scenes(u, grain, sign_grid)


def asked(scenes: Scenes, fields: Tensor) -> Scenes:
    """The same scenes as other captions ask for: pose, ground and number of ``fields``.

    What captions do not say (hue, place, jitter, grain) stays; limbs keep their place within the
    range of their new pose.

    Args:
        scenes: B scenes.
        fields: ``[B, 5]`` long, see `Caption.fields`.

    Raises:
        BadInput: another number of captions.
    """
    if fields.shape != scenes.fields.shape:
        raise BadInput("fields", tuple(fields.shape), f"use {tuple(scenes.fields.shape)}")

    def moved(angles: Tensor, column: int, ranges: tuple[tuple[int, int], ...]) -> Tensor:
        spans = torch.tensor(ranges) * (torch.pi / 180)
        (low, high), (to_low, to_high) = (
            spans[given[:, column]].unbind(1) for given in (scenes.fields, fields)
        )
        share = (angles - low[:, None]) / (high - low)[:, None]
        other = to_low[:, None] + share * (to_high - to_low)[:, None]
        same = scenes.fields[:, column] == fields[:, column]
        return torch.where(same[:, None], angles, other)

    return replace(
        scenes,
        fields=fields,
        arm_angles=moved(scenes.arm_angles, 0, ARM_DEGREES),
        leg_angles=moved(scenes.leg_angles, 1, LEG_DEGREES),
    )


def _scenes(u: np.ndarray, grain: np.ndarray, sign_grid: int) -> Scenes:
    """Map uniform numbers ``[B, 24]`` to scenes."""
    choices = np.floor(u[:, :5] * np.array([2, 2, 3, 10, 10])).astype(np.int64)
    cumulative = np.cumsum([p for _, p in HUE_MODES.values()])
    mode = np.minimum(np.searchsorted(cumulative, u[:, 5], side="right"), len(HUE_MODES) - 1)
    centre = np.array([c for c, _ in HUE_MODES.values()])[mode]
    # Box-Muller from two of the uniforms keeps one stream of numbers per scene.
    normal = np.sqrt(-2 * np.log1p(-u[:, 6])) * np.cos(2 * np.pi * u[:, 7])
    hue = (centre + HUE_STD * np.clip(normal, -3, 3)) % 360

    right = u[:, 8] < 0.5  # side of the sign
    from_edge = _between(u[:, 9], 8.6, 11.4)
    head_x = np.where(right, from_edge, SIZE - from_edge)
    head = np.stack([head_x, _between(u[:, 10], 7.0, 10.0)], axis=1)
    # The plate keeps clear of the arms (their paint ends before 8.4 px) and inside the picture.
    nearest = np.ceil(from_edge + 8.2)
    gap = nearest + np.floor(u[:, 11] * (SIZE - SIGN_WIDTH - nearest + 1))
    sign_x = np.where(right, gap, SIZE - SIGN_WIDTH - gap)
    sign_y = np.floor(u[:, 12] * (SIZE - SIGN_HEIGHT + 1))
    # On a coarser grid a plate moves outwards, away from the figure.
    sign_x = np.where(right, np.ceil(sign_x / sign_grid), np.floor(sign_x / sign_grid)) * sign_grid
    sign_x = np.minimum(sign_x, (SIZE - SIGN_WIDTH) // sign_grid * sign_grid)
    sign_y = np.floor(sign_y / sign_grid) * sign_grid

    raised, apart = choices[:, 0:1] == 0, choices[:, 1:2] == 0
    degrees = np.pi / 180
    arms = np.where(raised, *(_between(u[:, 13:15], *r) for r in ARM_DEGREES))
    legs = np.where(apart, *(_between(u[:, 15:17], *r) for r in LEG_DEGREES))

    def real(a: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(a, dtype=np.float32))

    return Scenes(
        fields=torch.from_numpy(choices),
        hue_mode=torch.from_numpy(mode.astype(np.int64)),
        hue=real(hue),
        saturation=real(_between(u[:, 17], 0.68, 0.82)),
        value=real(_between(u[:, 18], 0.80, 0.92)),
        head=real(head),
        arm_angles=real(arms * degrees),
        leg_angles=real(legs * degrees),
        sign=torch.from_numpy(np.stack([sign_x, sign_y], axis=1).astype(np.int64)),
        parts=torch.ones(len(u), len(PARTS)),
        grain=torch.from_numpy(grain),
    )


def _between(u: np.ndarray, low: float, high: float) -> np.ndarray:
    return low + (high - low) * u
