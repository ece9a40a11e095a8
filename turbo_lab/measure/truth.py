"""Are the oracles right? Their accuracy on fresh postcards and on edited ground truth.

Counts, not rates: k right of n, for whoever puts the interval on. The thresholds of the oracles
were chosen on the ``select`` stream; these tables draw from ``eval``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain

import pandas as pd
import torch
from torch import Tensor

from turbo_lab.errors import BadInput
from turbo_lab.measure.anatomy import read_bodies
from turbo_lab.measure.legibility import read_signs
from turbo_lab.measure.oracles import Reading, read
from turbo_lab.postcards import HUE_MODES, SIZE, Scenes, draw_scenes, render
from turbo_lab.postcards.render import SKIN, plates
from turbo_lab.postcards.scenes import PARTS, SIGN_HEIGHT, SIGN_WIDTH
from turbo_lab.streams import generator

GHOST_OPACITIES = (0.4, 0.6, 1.0)


def fresh_truth(seed: int = 0, n: int = 1000, *, noise: float = 0.0) -> pd.DataFrame:
    """Accuracy of every oracle on fresh renders.

    Args:
        seed: base seed of the scenes, at least 0.
        n: number of scenes, at least 1.
        noise: standard deviation of added Gaussian noise, images being in [-1, 1].

    Returns:
        Columns ``oracle``, ``right`` (k) and ``n``.

    Raises:
        BadInput: n below 1 or a negative seed.
    """
    scenes = _scenes(seed, n)
    images = render(scenes)
    if noise > 0:
        draw = torch.randn(images.shape, generator=generator(seed, "truth", "noise"))
        images = images + noise * draw
    rows = [("fresh", name, right) for name, right in _agreement(read(images), scenes).items()]
    return _table(rows).drop(columns="edit")


def edited_truth(seed: int = 0, n: int = 1000) -> pd.DataFrame:
    """How often the oracles detect an edit of the ground truth, edit by edit.

    Parts removed (the count one lower and the body not whole), a third arm or leg added, digits
    swapped (the prompted number is not read, the new one is), the hue moved to another mode, and
    second signs pasted on free places at several opacities.

    Args:
        seed: base seed of the scenes, at least 0.
        n: scenes per edit, at least 1.

    Returns:
        Columns ``edit``, ``oracle``, ``right`` (k, edits detected) and ``n``.

    Raises:
        BadInput: n below 1 or a negative seed.
    """
    scenes = _scenes(seed, n)
    edits = (_parts(scenes), _extra_limbs(scenes), _digits(scenes), _hues(scenes))
    return _table([*chain(*edits), *_ghosts(scenes, seed)])


def paste_sign(images: Tensor, x: Tensor, y: Tensor, number: Tensor, opacity: float) -> Tensor:
    """Blend plates into images: ``(1 - opacity) image + opacity plate``.

    Args:
        images: ``[B, 3, 32, 32]`` in [-1, 1].
        x: ``[B]`` long, left column, 0 to 23.
        y: ``[B]`` long, top row, 0 to 25.
        number: ``[B]`` long, 0 to 99.
        opacity: in [0, 1].
    """
    at = sign_pixels(x, y)
    out = images.permute(0, 2, 3, 1).clone()
    out[at] = torch.lerp(out[at], (plates()[number] * 2 - 1)[..., None], opacity)
    return out.permute(0, 3, 1, 2).contiguous()


def sign_pixels(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Index of plates' pixels ``[B, 7, 9]`` in images ``[B, 32, 32, ...]``, corners at (x, y)."""
    rows = (y[:, None] + torch.arange(SIGN_HEIGHT))[:, :, None]
    columns = (x[:, None] + torch.arange(SIGN_WIDTH))[:, None, :]
    return torch.arange(len(x))[:, None, None], rows, columns


def free_places(scenes: Scenes, seed: int) -> tuple[Tensor, Tensor]:
    """Random places (x, y) ``[B]`` for a second plate that does not touch the first."""
    draw = generator(seed, "truth", "places")
    xs = torch.randint(SIZE - SIGN_WIDTH + 1, (len(scenes), 64), generator=draw)
    ys = torch.randint(SIZE - SIGN_HEIGHT + 1, (len(scenes), 64), generator=draw)
    clear = (xs - scenes.sign[:, :1]).abs() >= SIGN_WIDTH
    clear |= (ys - scenes.sign[:, 1:]).abs() >= SIGN_HEIGHT
    first = clear.float().argmax(1, keepdim=True)
    return xs.gather(1, first)[:, 0], ys.gather(1, first)[:, 0]


def third_arm(scenes: Scenes) -> Tensor:
    """Pictures ``[B, 3, 32, 32]`` of the scenes with a second left arm, mirrored up and down."""
    turned = scenes.arm_angles.clone()
    turned[:, 0] = torch.pi - turned[:, 0]
    return _overlay(scenes, replace(scenes, arm_angles=turned))


def move_hues(scenes: Scenes, modes: Tensor) -> Scenes:
    """The scenes in garments of other hue modes ``[B]``, as far from their centre as before."""
    centres = torch.tensor([c for c, _ in HUE_MODES.values()])
    away = (scenes.hue + centres[modes] - centres[scenes.hue_mode]) % 360
    # The sum rounds: a figure that keeps its mode keeps its very hue.
    hue = torch.where(modes == scenes.hue_mode, scenes.hue, away)
    return replace(scenes, hue=hue, hue_mode=modes)


def swap_digit(scenes: Scenes, column: int) -> Scenes:
    """The scenes with another digit: ``column`` 3 for the tens, 4 for the units."""
    swapped = scenes.fields.clone()
    # The scene's own index picks one of the nine other digits.
    step = 1 + torch.arange(len(scenes)) % 9
    swapped[:, column] = (swapped[:, column] + step) % 10
    return replace(scenes, fields=swapped)


def _scenes(seed: int, n: int) -> Scenes:
    if n < 1:
        raise BadInput("n", n, "use at least 1 scene")
    return draw_scenes("eval", range(n), seed=seed)


def _agreement(seen: Reading, scenes: Scenes) -> dict[str, Tensor]:
    sign, body, fields = seen.sign, seen.body, scenes.fields
    digits = (sign.tens == fields[:, 3]) & (sign.units == fields[:, 4])
    place = torch.stack([sign.x, sign.y], 1) == scenes.sign
    return {
        "sign digits": digits & sign.crisp,
        "sign place": place.all(1),
        "sign count": sign.count == 1,
        "whole body": body.whole,
        "arm count": body.arms == 2,
        "leg count": body.legs == 2,
        "arm pose": body.arm_pose == fields[:, 0],
        "leg pose": body.leg_pose == fields[:, 1],
        "hue mode": seen.garment.mode == scenes.hue_mode,
        "ground": seen.ground == fields[:, 2],
    }


_Rows = Iterator[tuple[str, str, Tensor]]


def _parts(scenes: Scenes) -> _Rows:
    for k, part in enumerate(PARTS):
        kept = scenes.parts.clone()
        kept[:, k] = 0
        body = read_bodies(render(replace(scenes, parts=kept)))
        yield f"no {part}", "whole body", ~body.whole
        if part == "head":
            yield f"no {part}", "head count", body.heads == 0
        elif "arm" in part:
            yield f"no {part}", "arm count", (body.arms == 1) & (body.legs == 2)
        elif "leg" in part:
            yield f"no {part}", "leg count", (body.legs == 1) & (body.arms == 2)


def _extra_limbs(scenes: Scenes) -> _Rows:
    body = read_bodies(third_arm(scenes))
    yield "third arm", "arm count", (body.arms == 3) & ~body.whole
    spread = scenes[scenes.fields[:, 1] == 0]
    if len(spread):
        only_leg = torch.zeros_like(spread.parts)
        only_leg[:, PARTS.index("left leg")] = 1
        middle = replace(
            spread,
            parts=only_leg,
            leg_angles=torch.zeros_like(spread.leg_angles),
            head=spread.head + torch.tensor([1.5, 0.0]),  # the left hip moves to the middle
        )
        body = read_bodies(_overlay(spread, middle))
        yield "third leg", "leg count", (body.legs == 3) & ~body.whole


def _digits(scenes: Scenes) -> _Rows:
    for column, name in ((3, "tens"), (4, "units")):
        swapped = swap_digit(scenes, column)
        sign = read_signs(render(swapped))
        said = torch.stack([sign.tens, sign.units], 1)
        seen = (said == swapped.fields[:, 3:]).all(1) & sign.crisp
        yield f"{name} swapped", "sign digits", seen


def _hues(scenes: Scenes) -> _Rows:
    away = 1 + torch.arange(len(scenes)) % (len(HUE_MODES) - 1)
    other = (scenes.hue_mode + away) % len(HUE_MODES)
    mode = read(render(move_hues(scenes, other))).garment.mode
    yield "hue moved", "hue mode", mode == other


def _ghosts(scenes: Scenes, seed: int) -> _Rows:
    x, y = free_places(scenes, seed)
    number = torch.randint(100, (len(scenes),), generator=generator(seed, "truth", "numbers"))
    images = render(scenes)
    for opacity in GHOST_OPACITIES:
        count = read_signs(paste_sign(images, x, y, number, opacity)).count
        yield f"second sign, opacity {opacity:g}", "sign count", count == 2


def _overlay(scenes: Scenes, other: Scenes) -> Tensor:
    """Paint onto the first scenes whatever parts of the other ones are nearer to skin."""
    skin = (torch.tensor(SKIN) * 2 - 1)[:, None, None]
    a, b = render(scenes), render(other)
    bare = render(replace(other, parts=torch.zeros_like(other.parts)))
    nearer = (b - skin).square().sum(1) < (a - skin).square().sum(1)
    painted = (b != bare).any(1)
    return torch.where((nearer & painted)[:, None], b, a)


def _table(rows: list[tuple[str, str, Tensor]]) -> pd.DataFrame:
    return pd.DataFrame(
        [{"edit": e, "oracle": o, "right": int(r.sum()), "n": len(r)} for e, o, r in rows]
    )
