"""Paint scenes: textured ground, figure of capsules, sign with two digits. Vectorised."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from turbo_lab.postcards.captions import GROUNDS
from turbo_lab.postcards.scenes import SIGN_HEIGHT, SIGN_WIDTH, SIZE, Scenes

SKIN = (0.97, 0.80, 0.66)
PLATE, INK = 0.97, 0.06
HEAD_RADIUS, TORSO_RADIUS, LIMB_RADIUS = 2.3, 2.1, 1.0
ARM_LENGTH, LEG_LENGTH = 6.4, 7.6
SHOULDER = (1.7, 4.2)
"""Shoulder from the head's centre: sideways, down (pixels)."""
HIP = (1.5, 10.2)
"""Hip from the head's centre: sideways, down (pixels)."""

GROUND_COLOUR = {"moss": (0.28, 0.47, 0.19), "fur": (0.47, 0.34, 0.22), "sky": (0.52, 0.73, 0.93)}
GRAIN_COLOUR = {"moss": (0.10, 0.17, 0.07), "fur": (0.16, 0.12, 0.08), "sky": (0.09, 0.06, 0.02)}
"""Colour of one standard deviation of the grain."""
GRAIN_CUT = 2.6
"""The grain is cut at so many standard deviations; with the colours above nothing clips."""

_FONT = {
    0: ("###", "# #", "# #", "# #", "###"),
    1: (" # ", "## ", " # ", " # ", "###"),
    2: ("###", "  #", "###", "#  ", "###"),
    3: ("###", "  #", " ##", "  #", "###"),
    4: ("# #", "# #", "###", "  #", "  #"),
    5: ("###", "#  ", "###", "  #", "###"),
    6: ("###", "#  ", "###", "# #", "###"),
    7: ("###", "  #", " # ", " # ", " # "),
    8: ("###", "# #", "###", "# #", "###"),
    9: ("###", "# #", "###", "  #", "###"),
}


@cache
def glyphs() -> Tensor:
    """The digits 0-9 as ``[10, 5, 3]``, 1 where there is ink."""
    return torch.tensor([[[float(c == "#") for c in row] for row in _FONT[d]] for d in range(10)])


@cache
def plates() -> Tensor:
    """The hundred sign plates ``[100, 7, 9]`` in [0, 1]: white, two digits of ink."""
    ink = torch.zeros(10, 10, SIGN_HEIGHT, SIGN_WIDTH)
    ink[:, :, 1:6, 1:4] = glyphs()[:, None]
    ink[:, :, 1:6, 5:8] = glyphs()[None, :]
    return (PLATE + (INK - PLATE) * ink).reshape(100, SIGN_HEIGHT, SIGN_WIDTH)


@cache
def ground_filters() -> Tensor:
    """Amplitude filters of the grounds ``[3, 32, 17]`` on the rfft2 grid, unit output variance.

    Moss is an isotropic band around 0.30 cycles per pixel, fur fast across and slow along its
    vertical hairs, sky smooth.
    """
    fy = torch.fft.fftfreq(SIZE)[:, None]
    fx = torch.fft.rfftfreq(SIZE)[None, :]
    radius = (fx**2 + fy**2).sqrt()
    moss = torch.exp(-(((radius - 0.30) / 0.08) ** 2) / 2)
    fur = torch.exp(-(((fx - 0.25) / 0.08) ** 2) / 2 - ((fy / 0.05) ** 2) / 2)
    sky = torch.exp(-((radius / 0.045) ** 2) / 2)
    filters = torch.stack([moss, fur, sky])
    filters[:, 0, 0] = 0.0  # the mean colour belongs to the palette, not to the grain
    # Parseval on the half grid: inner columns stand for two frequencies each.
    twice = torch.full((SIZE // 2 + 1,), 2.0)
    twice[0] = twice[-1] = 1.0
    power = (filters**2 * twice).sum(dim=(1, 2), keepdim=True) / SIZE**2
    return filters / power.sqrt()


def render(scenes: Scenes) -> Tensor:
    """Paint scenes as images ``[B, 3, 32, 32]`` float32 in [-1, 1].

    Deterministic; image i depends on scene i alone (bit for bit on one machine and thread
    count, whatever the batch).
    """
    picture = _ground(scenes)
    for alpha, colour in _figure(scenes):
        picture = picture + alpha[:, None] * (colour[:, :, None, None] - picture)
    return _with_sign(picture, scenes, scenes.sign) * 2 - 1


def render_posters(scenes: Scenes, places: Tensor) -> Tensor:
    """Paint the ground and many copies of the sign instead of one and a figure.

    Not postcards, but practice for a network: every picture shows its two digits at as many
    offsets as it has plates.

    Args:
        scenes: B scenes, of which the ground and the number are used.
        places: ``[B, P, 2]`` long, top-left pixels (x, y) of the plates.

    Returns:
        ``[B, 3, 32, 32]`` in [-1, 1].
    """
    picture = _ground(scenes)
    for place in places.unbind(1):
        picture = _with_sign(picture, scenes, place)
    return picture * 2 - 1


def render_busts(scenes: Scenes, figures: Sequence[Scenes]) -> Tensor:
    """Paint the ground and many heads and torsos instead of a figure and a sign.

    Practice like posters, of garments: every picture shows as many hues as it has figures.

    Args:
        scenes: B scenes, of which the ground is used.
        figures: B scenes each, of which the head's place and the garment's colour are used.

    Returns:
        ``[B, 3, 32, 32]`` in [-1, 1].
    """
    picture = _ground(scenes)
    for figure in figures:
        _, torso, face = _figure(figure)
        for alpha, colour in (torso, face):
            picture = picture + alpha[:, None] * (colour[:, :, None, None] - picture)
    return picture * 2 - 1


def garment_colour(scenes: Scenes) -> Tensor:
    """RGB ``[B, 3]`` in [0, 1] of the tunic (HSV to RGB)."""
    k = (torch.tensor([5.0, 3.0, 1.0]) + scenes.hue[:, None] / 60) % 6
    ramp = torch.minimum(k, 4 - k).clamp(0, 1)
    return scenes.value[:, None] * (1 - scenes.saturation[:, None] * ramp)


def limb_ends(scenes: Scenes) -> tuple[Tensor, Tensor]:
    """Starts and ends ``[B, 4, 2]`` of left arm, right arm, left leg, right leg (x, y)."""
    side = torch.tensor([-1.0, 1.0, -1.0, 1.0])
    root = torch.tensor([SHOULDER, SHOULDER, HIP, HIP]) * torch.stack([side, torch.ones(4)], dim=1)
    angles = torch.cat([scenes.arm_angles, scenes.leg_angles], dim=1)
    length = torch.tensor([ARM_LENGTH, ARM_LENGTH, LEG_LENGTH, LEG_LENGTH])
    reach = torch.stack([side * angles.sin(), angles.cos()], dim=2) * length[:, None]
    start = scenes.head[:, None, :] + root
    return start, start + reach


def _ground(scenes: Scenes) -> Tensor:
    kind = scenes.fields[:, 2]
    spectrum = torch.fft.rfft2(scenes.grain) * ground_filters()[kind]
    grain = torch.fft.irfft2(spectrum, s=(SIZE, SIZE)).clamp(-GRAIN_CUT, GRAIN_CUT)
    base = torch.tensor([GROUND_COLOUR[g] for g in GROUNDS])[kind]
    tint = torch.tensor([GRAIN_COLOUR[g] for g in GROUNDS])[kind]
    return base[:, :, None, None] + tint[:, :, None, None] * grain[:, None]


def _figure(scenes: Scenes) -> list[tuple[Tensor, Tensor]]:
    """Coverage ``[B, 32, 32]`` and colour ``[B, 3]`` of each layer, back to front."""
    skin = torch.tensor(SKIN).expand(len(scenes), 3)
    head, down = scenes.head, torch.tensor([0.0, 1.0])
    start, end = limb_ends(scenes)
    limbs = _capsule(start, end, LIMB_RADIUS) * scenes.parts[:, 2:, None, None]
    torso = _capsule(
        (head + down * (SHOULDER[1] + 0.6))[:, None], (head + down * HIP[1])[:, None], TORSO_RADIUS
    )[:, 0]
    face = _capsule(head[:, None], head[:, None], HEAD_RADIUS)[:, 0]
    return [
        (limbs.amax(dim=1), skin),
        (torso * scenes.parts[:, 1, None, None], garment_colour(scenes)),
        (face * scenes.parts[:, 0, None, None], skin),
    ]


def _capsule(start: Tensor, end: Tensor, radius: float) -> Tensor:
    """Anti-aliased coverage ``[B, P, 32, 32]`` of capsules between points ``[B, P, 2]``."""
    centres = torch.arange(SIZE) + 0.5
    px = centres - start[..., 0, None]
    py = centres - start[..., 1, None]
    dx, dy = (end - start).unbind(-1)
    length2 = (dx**2 + dy**2).clamp_min(1e-9)
    along = (px * (dx / length2)[..., None])[..., None, :] + (py * (dy / length2)[..., None])[
        ..., :, None
    ]
    along = along.clamp_(0, 1)
    ex = px[..., None, :] - along * dx[..., None, None]
    ey = py[..., :, None] - along * dy[..., None, None]
    distance = (ex.square_() + ey.square_()).sqrt_()
    return (radius + 0.5 - distance).clamp_(0, 1)


def _with_sign(picture: Tensor, scenes: Scenes, places: Tensor) -> Tensor:
    plate = plates()[scenes.fields[:, 3] * 10 + scenes.fields[:, 4]]
    rows = places[:, 1, None] + torch.arange(SIGN_HEIGHT)
    columns = places[:, 0, None] + torch.arange(SIGN_WIDTH)
    batch = torch.arange(len(scenes))[:, None, None]
    picture = picture.permute(0, 2, 3, 1).contiguous()
    picture[batch, rows[:, :, None], columns[:, None, :]] = plate[..., None]
    return picture.permute(0, 3, 1, 2).contiguous()
