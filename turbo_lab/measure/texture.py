"""Texture of the ground: band energy, spectra and patches where neither figure nor sign is.

The grain is compared in 8x8 windows that touch no figure and no plate, as found by the oracles:
nothing is told about the sample but which ground its caption asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from turbo_lab.errors import BadInput
from turbo_lab.measure.anatomy import BodyReading
from turbo_lab.measure.legibility import SignReading
from turbo_lab.measure.views import LUMA, luma, unit
from turbo_lab.postcards.captions import GROUNDS
from turbo_lab.postcards.render import (
    GRAIN_COLOUR,
    GRAIN_CUT,
    GROUND_COLOUR,
    SIZE,
    ground_filters,
)
from turbo_lab.streams import rng

WINDOW = 8
PATCH = 5
FIGURE_BOX = (8.5, 3.5, 20.0)
"""Half width, height above and below the head's centre that a figure may cover (pixels)."""


def free_ground(signs: SignReading, bodies: BodyReading) -> Tensor:
    """Pixels ``[B, 32, 32]`` (bool) that belong to no plate found and not to the figure's box."""
    centres = torch.arange(SIZE) + 0.5
    across = (centres - bodies.x[:, None]).abs() <= FIGURE_BOX[0]
    down = centres - bodies.y[:, None]
    along = (down >= -FIGURE_BOX[1]) & (down <= FIGURE_BOX[2])
    return ~(signs.cover | (along[:, :, None] & across[:, None, :]))


def read_grounds(images: Tensor, free: Tensor) -> Tensor:
    """Index into GROUNDS ``[B]`` whose colour is nearest to the mean of the free pixels."""
    weight = free[:, None].float()
    mean = (unit(images) * weight).sum((2, 3)) / weight.sum((2, 3)).clamp_min(1)
    return torch.cdist(mean, torch.tensor([GROUND_COLOUR[g] for g in GROUNDS])).argmin(1)


def window_power(images: Tensor, free: Tensor) -> Tensor:
    """Power spectrum ``[B, 8, 8]`` of the luminance, mean over the free 8x8 windows.

    Hann windows at every second pixel, mean removed; scaled so that white noise of variance s^2
    gives a spectrum whose sum is s^2. An image without any free window is measured where its
    windows are freest.
    """
    taper = _taper()
    windows = _unfold(luma(images), WINDOW, 2)  # [B, W, 8, 8]
    openness = _unfold(free.float(), WINDOW, 2).mean((2, 3))
    usable = openness >= openness.amax(1, keepdim=True)
    owner, chosen = usable.nonzero()[:, 0], windows[usable]
    chosen = chosen - (chosen * taper).sum((1, 2), keepdim=True) / taper.sum()
    power = torch.fft.fft2(chosen * taper).abs().square()
    total = torch.zeros(len(windows), WINDOW, WINDOW).index_add_(0, owner, power)
    return total / (usable.sum(1)[:, None, None] * WINDOW**2 * taper.square().sum())


def band_energy(images: Tensor, grounds: Tensor, free: Tensor) -> Tensor:
    """Variance ``[B]`` of the luminance in the band of each image's own ground.

    Moss: 0.20 to 0.40 cycles per pixel in any direction. Fur: 0.15 to 0.35 across, below 0.07
    along the hairs. Sky: the lowest frequencies of a window, up to 0.13.

    Args:
        images: ``[B, 3, 32, 32]`` in [-1, 1].
        grounds: ``[B]`` long, the ground each caption asks for.
        free: ``[B, 32, 32]`` bool, see `free_ground`.
    """
    return (window_power(images, free) * _bands()[grounds]).sum((1, 2))


def expected_power(ground: str) -> Tensor:
    """What `window_power` gives on average for real ground ``[8, 8]``: a closed form.

    In a window with transform W, a stationary grain with power S(f) has
    ``E |Y_k|^2 = sum_f S(f) |W(k - f) - W(k) W(-f) / W(0)|^2``; the second term removes the mean.

    Raises:
        BadInput: unknown ground.
    """
    if ground not in GROUNDS:
        raise BadInput("ground", ground, f"choose one of {', '.join(GROUNDS)}")
    half = ground_filters()[GROUNDS.index(ground)].double()
    mirrored = half[:, 1:-1].flip(1)[(-torch.arange(SIZE)) % SIZE]
    grain = torch.cat([half, mirrored], 1).square() / SIZE**2
    taper = _hann()
    fine, coarse = torch.arange(SIZE) / SIZE, torch.arange(WINDOW) / WINDOW
    row = _transform(taper, coarse[:, None] - fine[None, :])  # W(k - f)
    edge = _transform(taper, coarse)[:, None] * _transform(taper, -fine)[None, :] / taper.sum()
    leak = torch.einsum("ki,lj->klij", row, row) - torch.einsum("ki,lj->klij", edge, edge)
    power = torch.einsum("klij,ij->kl", leak.abs().square(), grain)
    tint = sum(w * c for w, c in zip(LUMA, GRAIN_COLOUR[ground], strict=True))
    scale = (2 * tint) ** 2 * _clipped_variance(GRAIN_CUT)
    return (power * scale / (WINDOW**2 * taper.square().sum() ** 2)).float()


def expected_band_energy(ground: str) -> float:
    """Mean of `band_energy` over real postcards of a ground, in closed form.

    Raises:
        BadInput: unknown ground.
    """
    return float((expected_power(ground) * _bands()[GROUNDS.index(ground)]).sum())


def ground_patches(images: Tensor, free: Tensor, *, each: int = 32, seed: int = 0) -> Tensor:
    """Take 5x5 luminance patches from free ground, their mean removed: ``[B, each, 25]``.

    Every image gives equally many, so that resampling images resamples patches. Places are
    fixed by the seed, whatever the batch; an image with fewer free places repeats them.

    Args:
        images: ``[B, 3, 32, 32]`` in [-1, 1].
        free: ``[B, 32, 32]`` bool, see `free_ground`.
        each: patches per image, at least 1.
        seed: of the places, at least 0.

    Raises:
        BadInput: ``each`` below 1 or a negative seed.
    """
    if each < 1:
        raise BadInput("each", each, "use at least 1 patch per image")
    patches = _unfold(luma(images), PATCH, 1).flatten(2)
    patches = patches - patches.mean(2, keepdim=True)
    openness = _unfold(free.float(), PATCH, 1).mean((2, 3))
    usable = openness >= openness.amax(1, keepdim=True)
    rank = torch.from_numpy(rng(seed, "patch places").permutation(patches.shape[1]))
    order = torch.where(usable, rank, rank + len(rank)).argsort(1)
    cycle = torch.arange(each)[None, :] % usable.sum(1, keepdim=True)
    return patches.gather(1, order.gather(1, cycle)[:, :, None].expand(-1, -1, PATCH**2))


def sliced_wasserstein(a: Tensor, b: Tensor, *, projections: int = 64, seed: int = 0) -> float:
    """Mean Wasserstein-1 distance of two sets of vectors over fixed random directions.

    ``mean_d int_0^1 |F_a,d^-1(u) - F_b,d^-1(u)| du`` (Rabin et al. 2011); exact for sets of equal
    size, otherwise on the quantiles of the smaller set.

    Args:
        a: ``[..., D]``; all leading dimensions are samples.
        b: ``[..., D]``.
        projections: number of directions, at least 1.
        seed: of the directions, at least 0.

    Raises:
        BadInput: different D, an empty set, no projections or a negative seed.
    """
    if a.shape[-1] != b.shape[-1] or a.numel() == 0 or b.numel() == 0:
        raise BadInput("b", tuple(b.shape), f"use vectors of length {a.shape[-1]}, at least one")
    slices = sliced(b, projections=projections, seed=seed)
    return slices.distance(slices.along(a))


@dataclass(frozen=True, kw_only=True)
class Slices:
    """A set of vectors along fixed directions, ordered once: many samples are held against it.

    Attributes:
        directions: unit vectors ``[D, P]``.
        ordered: the set along each of them, rising, ``[n, P]``.
    """

    directions: Tensor
    ordered: Tensor

    def along(self, vectors: Tensor) -> Tensor:
        """Coordinates ``[..., P]`` of vectors ``[..., D]`` along the directions."""
        return vectors @ self.directions

    def distance(self, coordinates: Tensor) -> float:
        """`sliced_wasserstein` between the set and samples with these coordinates ``[..., P]``."""
        ours = _rising(coordinates.reshape(-1, coordinates.shape[-1]))
        n = min(len(ours), len(self.ordered))
        return float((_quantiles(ours, n) - _quantiles(self.ordered, n)).abs().mean())


def sliced(vectors: Tensor, *, projections: int = 64, seed: int = 0) -> Slices:
    """Order a set of vectors ``[..., D]`` along random directions, see `sliced_wasserstein`.

    Raises:
        BadInput: no projections or a negative seed.
    """
    if projections < 1:
        raise BadInput("projections", projections, "use at least 1")
    width = vectors.shape[-1]
    directions = rng(seed, "slices").standard_normal((width, projections))
    unit_vectors = torch.from_numpy(directions / (directions**2).sum(0) ** 0.5).float()
    return Slices(
        directions=unit_vectors,
        ordered=_rising(vectors.reshape(-1, width) @ unit_vectors),
    )


def _rising(coordinates: Tensor) -> Tensor:
    """Each column of ``[n, P]`` in rising order, by numpy, whose sort is much faster on a CPU."""
    return torch.from_numpy(np.sort(coordinates.numpy(), axis=0))


def _quantiles(ordered: Tensor, n: int) -> Tensor:
    if len(ordered) == n:
        return ordered
    place = ((torch.arange(n) + 0.5) / n * len(ordered) - 0.5).clamp(0, len(ordered) - 1)
    below = place.floor().long()
    above = (below + 1).clamp_max(len(ordered) - 1)
    return torch.lerp(ordered[below], ordered[above], (place - below)[:, None])


def _unfold(planes: Tensor, size: int, stride: int) -> Tensor:
    """Square windows ``[B, W, size, size]`` of planes ``[B, 32, 32]``."""
    return planes.unfold(1, size, stride).unfold(2, size, stride).flatten(1, 2)


def _hann() -> Tensor:
    return torch.hann_window(WINDOW + 2, periodic=False, dtype=torch.float64)[1:-1]  # no zeros


def _taper() -> Tensor:
    return (_hann()[:, None] * _hann()[None, :]).float()


def _bands() -> Tensor:
    """Indicator of each ground's band on the window's frequencies ``[3, 8, 8]``."""
    frequency = torch.fft.fftfreq(WINDOW)
    fy, fx = frequency[:, None].abs(), frequency[None, :].abs()
    radius = (fx**2 + fy**2).sqrt()
    moss = (radius >= 0.20) & (radius <= 0.40)
    fur = (fx >= 0.15) & (fx <= 0.35) & (fy <= 0.07)
    return torch.stack([moss, fur, radius <= 0.13]).float()


def _transform(taper: Tensor, frequency: Tensor) -> Tensor:
    n = torch.arange(len(taper), dtype=torch.float64)
    return (taper * torch.exp(-2j * torch.pi * frequency[..., None] * n)).sum(-1)


def _clipped_variance(cut: float) -> float:
    """Variance of a standard normal number clamped to [-cut, cut]."""
    c = torch.tensor(cut, dtype=torch.float64)
    tail = torch.special.ndtr(-c)
    density = torch.exp(-(c**2) / 2) / (2 * torch.pi) ** 0.5
    return float(1 - 2 * (c * density + tail) + 2 * c**2 * tail)
