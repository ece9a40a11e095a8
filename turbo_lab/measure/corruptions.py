"""Known ways to spoil postcards, each with a strength: what the measurements are validated by.

Every corruption is ``(scenes, strength, seed) -> images [B, 3, 32, 32]`` in [-1, 1]: it paints the
scenes and spoils them. Strength 0 gives the very pictures of `render`, strength 1 the most; those
that spoil some pictures wholly and leave the others spoil a share ``strength`` of them, the same
ones at every greater strength. Captions stay what they were.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from turbo_lab.errors import BadInput
from turbo_lab.measure.sharpness import scrambled
from turbo_lab.measure.truth import move_hues, paste_sign, sign_pixels, swap_digit, third_arm
from turbo_lab.measure.views import LUMA
from turbo_lab.postcards import HUE_MODES, SIZE, Scenes, asked, render
from turbo_lab.postcards.captions import GROUNDS
from turbo_lab.postcards.render import PLATE, plates, render_posters
from turbo_lab.postcards.scenes import SIGN_HEIGHT
from turbo_lab.streams import generator

BLUR = 1.0
"""Pixels: standard deviation of the strongest blur; its square grows with the strength."""
SHARPEN, SHARPEN_WIDTH = 1.2, 1.0
"""Most of what a blur of so many pixels takes away that is added."""
NOISE = 0.3
"""Standard deviation of the strongest noise, pictures being in [-1, 1]."""
CHROMA, CONTRAST = 0.5, 0.5
"""Most that colours move away from grey, and values from the mean."""
EROSION = 0.3
"""Largest share of the ink that is lost."""
GHOST = 0.8
"""Opacity of a second sign."""

Corruption = Callable[[Scenes, float, int], Tensor]


def spoiled(n: int, strength: float, seed: int, name: str) -> Tensor:
    """Which of ``n`` pictures are spoiled ``[n]``: a share ``strength``, nested in greater ones."""
    order = torch.randperm(n, generator=generator(seed, "corruptions", name))
    return order < round(strength * n)


# --- whole pictures -----------------------------------------------------------------------------


def blur(scenes: Scenes, strength: float, seed: int = 0) -> Tensor:
    """Blur by a Gaussian of ``sqrt(strength) * BLUR`` pixels; the seed is not used."""
    return _blurred(render(scenes), strength**0.5 * BLUR)


def sharpen(scenes: Scenes, strength: float, seed: int = 0) -> Tensor:
    """Unsharp mask ``x + a (x - blur(x))``, cut at [-1, 1]; the seed is not used."""
    images = render(scenes)
    detail = images - _blurred(images, SHARPEN_WIDTH)
    return (images + strength * SHARPEN * detail).clamp(-1, 1)


def add_noise(scenes: Scenes, strength: float, seed: int = 0) -> Tensor:
    """Add white noise to every value, cut at [-1, 1]."""
    images = render(scenes)
    draw = torch.randn(images.shape, generator=generator(seed, "corruptions", "noise"))
    return (images + strength * NOISE * draw).clamp(-1, 1)


def gain_contrast(scenes: Scenes, strength: float, seed: int = 0) -> Tensor:
    """Move values away from the mean of their picture, cut at [-1, 1]."""
    images = render(scenes)
    away = images - images.mean((1, 2, 3), keepdim=True)
    return (images + strength * CONTRAST * away).clamp(-1, 1)


def gain_chroma(scenes: Scenes, strength: float, seed: int = 0) -> Tensor:
    """Move colours away from grey of the same luminance, cut at [-1, 1]."""
    images = render(scenes)
    grey = (images * torch.tensor(LUMA)[:, None, None]).sum(1, keepdim=True)
    return (images + strength * CHROMA * (images - grey)).clamp(-1, 1)


def scramble_phases(scenes: Scenes, strength: float, seed: int = 0) -> Tensor:
    """Draw the phases of a share of the pictures anew: every spectrum stays, nothing is seen."""
    images = render(scenes)
    chosen = spoiled(len(scenes), strength, seed, "scramble phases")
    return _pick(chosen, scrambled(images, seed=seed), images)


# --- hues ---------------------------------------------------------------------------------------


def collapse_hues(scenes: Scenes, strength: float, seed: int = 0) -> Tensor:
    """Put a share ``sqrt(strength)`` of the figures into the most frequent hue.

    The root, for a divergence grows with the square of a small share.
    """
    most = max(range(len(HUE_MODES)), key=lambda k: [*HUE_MODES.values()][k][1])
    chosen = spoiled(len(scenes), strength**0.5, seed, "collapse hues")
    return render(move_hues(scenes, torch.where(chosen, most, scenes.hue_mode)))


def lose_hues(scenes: Scenes, strength: float, seed: int = 0) -> Tensor:
    """Lose hue modes one by one, the rarest first, all but one at strength 1.

    Figures of a lost mode take one of those left, with its share among them.
    """
    share = torch.tensor([p for _, p in HUE_MODES.values()])
    lost = torch.zeros(len(share), dtype=torch.bool)
    lost[share.argsort()[: round(strength * (len(share) - 1))]] = True
    left = torch.where(lost, 0.0, share).cumsum(0)
    draw = torch.rand(len(scenes), generator=generator(seed, "corruptions", "lose hues"))
    other = torch.searchsorted(left, draw * left[-1], right=True).clamp_max(len(share) - 1)
    return render(move_hues(scenes, torch.where(lost[scenes.hue_mode], other, scenes.hue_mode)))


def repeat_layouts(scenes: Scenes, strength: float, seed: int = 0) -> Tensor:
    """Give a share of the pictures the places and pose of their caption's first picture.

    Garments and grain still differ: what a sampler does that has one layout per caption.
    """
    _, caption = scenes.fields.unique(dim=0, return_inverse=True)
    index = torch.arange(len(scenes))
    first = torch.full((len(scenes),), len(scenes)).scatter_reduce(0, caption, index, "amin")
    chosen = spoiled(len(scenes), strength, seed, "repeat layouts")
    like = torch.where(chosen, first[caption], index)
    names = ("head", "sign", "arm_angles", "leg_angles")
    return render(replace(scenes, **{name: getattr(scenes, name)[like] for name in names}))


# --- figure -------------------------------------------------------------------------------------


def edit_limbs(scenes: Scenes, strength: float, seed: int = 0) -> Tensor:
    """Take one of the four limbs from a share of the figures, or give a third arm to them."""
    edit = torch.arange(len(scenes)) % 5
    limb = torch.arange(2, 6)[edit.clamp_max(3)]
    parts = scenes.parts.scatter(1, limb[:, None], 0.0)
    edited = render(replace(scenes, parts=parts))
    edited = _pick(edit == 4, third_arm(scenes), edited)
    return _pick(spoiled(len(scenes), strength, seed, "edit limbs"), edited, render(scenes))


def swap_poses(scenes: Scenes, strength: float, seed: int = 0) -> Tensor:
    """Lower the raised arms of a share of the figures and raise the lowered ones."""
    fields = scenes.fields.clone()
    fields[:, 0] = 1 - fields[:, 0]
    chosen = spoiled(len(scenes), strength, seed, "swap poses")
    return _pick(chosen, render(asked(scenes, fields)), render(scenes))


# --- sign ---------------------------------------------------------------------------------------


def erode_glyphs(scenes: Scenes, strength: float, seed: int = 0) -> Tensor:
    """Lose a share of the digits' pixels: each turns plate-white, the same ones and more."""
    ink = plates()[scenes.fields[:, 3] * 10 + scenes.fields[:, 4]] < PLATE / 2
    draw = torch.rand(ink.shape, generator=generator(seed, "corruptions", "erode glyphs"))
    gone = ink & (draw < strength * EROSION)
    images = render(scenes)
    window = _window(images, scenes).masked_fill(gone[:, None], PLATE * 2 - 1)
    return _with_window(images, scenes, window)


def swap_digits(scenes: Scenes, strength: float, seed: int = 0) -> Tensor:
    """Paint another digit in the units of a share of the signs, crisp."""
    chosen = spoiled(len(scenes), strength, seed, "swap digits")
    return _pick(chosen, render(swap_digit(scenes, 4)), render(scenes))


def lose_signs(scenes: Scenes, strength: float, seed: int = 0) -> Tensor:
    """Paint bare ground in place of a share of the signs."""
    images = render(scenes)
    bare = render_posters(scenes, scenes.sign[:, None][:, :0])
    gone = _with_window(images, scenes, _window(bare, scenes))
    return _pick(spoiled(len(scenes), strength, seed, "lose signs"), gone, images)


def add_ghosts(scenes: Scenes, strength: float, seed: int = 0) -> Tensor:
    """Paint a second sign, nearly opaque, above or below the first of a share of the pictures."""
    rows = SIZE - SIGN_HEIGHT + 1
    draw = generator(seed, "corruptions", "add ghosts")
    number = torch.randint(100, (len(scenes),), generator=draw)
    images = render(scenes)
    x, y = scenes.sign.unbind(1)
    ghosts = paste_sign(images, x, (y + rows // 2) % rows, number, GHOST)
    return _pick(spoiled(len(scenes), strength, seed, "which ghosts"), ghosts, images)


# --- ground -------------------------------------------------------------------------------------


def comb_moss(scenes: Scenes, strength: float, seed: int = 0) -> Tensor:
    """Comb the moss along one direction: its power times ``1 - a + a 8/3 cos(angle)^4``.

    The mean over all angles is 1, so the power at every radius stays, and with it every energy and
    slope. ``a = sqrt(strength)``; the seed is not used.
    """
    fy, fx = torch.fft.fftfreq(SIZE)[:, None], torch.fft.rfftfreq(SIZE)[None, :]
    across = fx**2 / (fx**2 + fy**2).clamp_min(1e-12)
    gain = (1 + strength**0.5 * (8 / 3 * across**2 - 1)).sqrt()
    combed = torch.fft.irfft2(torch.fft.rfft2(scenes.grain) * gain, s=(SIZE, SIZE))
    moss = scenes.fields[:, 2] == GROUNDS.index("moss")
    grain = torch.where(moss[:, None, None] & (strength > 0), combed, scenes.grain)
    return render(replace(scenes, grain=grain))


def scramble_grain(scenes: Scenes, strength: float, seed: int = 0) -> Tensor:
    """Draw the phases of the grain anew in a share of the pictures.

    A control: the grain is a Gaussian field, whose law is its spectrum, so what comes out is as
    real as before and no metric may move.
    """
    chosen = spoiled(len(scenes), strength, seed, "scramble grain")
    turned = scrambled(scenes.grain[:, None], seed=seed)[:, 0]
    grain = torch.where(chosen[:, None, None], turned, scenes.grain)
    return render(replace(scenes, grain=grain))


ALL: Mapping[str, Corruption] = {
    "blur": blur,
    "sharpen": sharpen,
    "noise": add_noise,
    "contrast": gain_contrast,
    "chroma": gain_chroma,
    "hue collapse": collapse_hues,
    "hue loss": lose_hues,
    "one layout": repeat_layouts,
    "limbs": edit_limbs,
    "pose": swap_poses,
    "glyph erosion": erode_glyphs,
    "digit swap": swap_digits,
    "sign loss": lose_signs,
    "ghost sign": add_ghosts,
    "combed moss": comb_moss,
    "phase scramble": scramble_phases,
    "grain scramble": scramble_grain,
}
"""Every corruption, by a name to print."""


def corrupted(name: str, scenes: Scenes, strength: float, *, seed: int = 0) -> Tensor:
    """Paint scenes and spoil them: ``[B, 3, 32, 32]`` in [-1, 1].

    Args:
        name: one of `ALL`.
        scenes: B scenes.
        strength: in [0, 1].
        seed: of what is random, at least 0.

    Raises:
        BadInput: unknown name, a strength out of range or a negative seed.
    """
    if name not in ALL:
        raise BadInput("corruption", name, f"choose one of {', '.join(ALL)}")
    if not 0 <= strength <= 1:
        raise BadInput("strength", strength, "use a number from 0 to 1")
    return ALL[name](scenes, strength, seed)


def _blurred(images: Tensor, width: float) -> Tensor:
    return torch.from_numpy(gaussian_filter(images.numpy(), (0, 0, width, width)))


def _pick(chosen: Tensor, one: Tensor, other: Tensor) -> Tensor:
    return torch.where(chosen[:, None, None, None], one, other)


def _window(images: Tensor, scenes: Scenes) -> Tensor:
    """The sign's pixels ``[B, 3, 7, 9]``."""
    return images.permute(0, 2, 3, 1)[sign_pixels(*scenes.sign.unbind(1))].permute(0, 3, 1, 2)


def _with_window(images: Tensor, scenes: Scenes, window: Tensor) -> Tensor:
    """Images with these pixels in place of the sign's."""
    out = images.permute(0, 2, 3, 1).clone()
    out[sign_pixels(*scenes.sign.unbind(1))] = window.permute(0, 2, 3, 1)
    return out.permute(0, 3, 1, 2).contiguous()
