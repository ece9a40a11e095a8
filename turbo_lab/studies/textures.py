"""What the study of the GAN term measures: ground texture of samples, held against real ground."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from turbo_lab import claims as cl
from turbo_lab import measure
from turbo_lab.claims import Interval
from turbo_lab.measure import Slices
from turbo_lab.postcards import Scenes, draw_scenes, render
from turbo_lab.postcards.captions import GROUNDS
from turbo_lab.studies.matching import hue_kl

TEXTURES = ("moss", "fur")
EACH = 16
"""Patches of a picture."""
RATES = {"sign_read": "signs read", "whole_body": "whole bodies", "ghost_signs": "ghost signs"}
MEANS = {"psd_slope": "PSD slope", "saturation": "mean saturation", "clipped": "clipped share"}
ENERGY = {f"{ground}_energy": f"{ground}: band energy / real" for ground in TEXTURES}
PATCHES = {f"{ground}_patches": f"{ground}: patch distance to real" for ground in TEXTURES}
METRICS = {
    **PATCHES,
    **ENERGY,
    **RATES,
    "hue_kl": "hue KL to truth (nats)",
    **MEANS,
}
RESAMPLES = 150


@dataclass(frozen=True, kw_only=True)
class Texture:
    """The free ground of pictures on one ground, as the oracles find it.

    Attributes:
        along: patches along the directions of the real ones ``[seeds, images, each, P]``.
        energy: band energy over that of real ground ``[seeds, images]``.
        power: mean spectrum of the trainings and pictures ``[8, 8]``.
    """

    along: Tensor
    energy: np.ndarray
    power: Tensor

    def training(self, k: int) -> Texture:
        """Of one training alone; the spectrum stays that of all."""
        return replace(self, along=self.along[k : k + 1], energy=self.energy[k : k + 1])


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One sampler: per-image values ``[seeds, images]``, and its textures by ground."""

    values: Mapping[str, np.ndarray]
    textures: Mapping[str, Texture]

    def training(self, k: int) -> Measured:
        """Of one training alone."""
        return Measured(
            values={name: rows[k : k + 1] for name, rows in self.values.items()},
            textures={name: one.training(k) for name, one in self.textures.items()},
        )


@dataclass(frozen=True, kw_only=True)
class Real:
    """Patches of real postcards by ground, and how far other real postcards are from them."""

    slices: Mapping[str, Slices]
    floor: Measured


# --- what is measured ---------------------------------------------------------------------------


def real_slices(n: int, *, seed: int = 0) -> dict[str, Slices]:
    """Patches of ``n`` real postcards of the stream critic, by ground."""
    scenes = draw_scenes("critic", range(n), seed=seed)
    images = render(scenes)
    free = measure.read(images).free
    return {
        ground: measure.sliced(
            measure.ground_patches(images[rows], free[rows], each=EACH), projections=32
        )
        for ground, rows in _by_ground(scenes)
    }


def measured(images: Sequence[Tensor], scenes: Scenes, slices: Mapping[str, Slices]) -> Measured:
    """Measure the samples of every training.

    Args:
        images: ``[n, 3, 32, 32]`` per training, for the same scenes in each.
        scenes: what the captions ask for.
        slices: real patches by ground, see `real_slices`.
    """
    seen = [measure.read(one) for one in images]
    reports = [measure.report(x, scenes.fields, r) for x, r in zip(images, seen, strict=True)]
    names = (*RATES, *MEANS, "sign_alone", "hue_mode")
    textures = {}
    for ground, rows in _by_ground(scenes):
        patches = [
            measure.ground_patches(x[rows], r.free[rows], each=EACH)
            for x, r in zip(images, seen, strict=True)
        ]
        power = [
            measure.window_power(x[rows], r.free[rows]).mean(0)
            for x, r in zip(images, seen, strict=True)
        ]
        energy = _stack([report["band_energy"][rows] for report in reports])
        textures[ground] = Texture(
            along=slices[ground].along(torch.stack(patches)),
            energy=energy / measure.expected_band_energy(ground),
            power=torch.stack(power).mean(0),
        )
    values = {name: _stack([report[name] for report in reports]) for name in names}
    return Measured(values=values, textures=textures)


def _by_ground(scenes: Scenes) -> Iterator[tuple[str, Tensor]]:
    for ground in TEXTURES:
        yield ground, (scenes.fields[:, 2] == GROUNDS.index(ground)).nonzero()[:, 0]


def _stack(rows: Sequence[Tensor]) -> np.ndarray:
    return torch.stack([row.float() for row in rows]).numpy()


# --- statistics ---------------------------------------------------------------------------------


def _indices(texture: Texture) -> np.ndarray:
    """Flat index of each picture of a texture ``[seeds, images]``."""
    return np.arange(texture.energy.size).reshape(texture.energy.shape)


def _distance(texture: Texture, slices: Slices) -> Callable[[np.ndarray], float]:
    """Patch distance to real of the pictures with given flat indices, averaged over trainings.

    Trainings are not pooled: one that is too coarse and one that is too fine do not make a fine
    texture.
    """
    flat = texture.along.flatten(0, 1)

    def of(rows: np.ndarray) -> float:
        return float(np.mean([slices.distance(flat[row.astype(int)]) for row in rows]))

    return of


def distance(real: Real, found: Measured, ground: str) -> Interval:
    """Sliced Wasserstein distance of ground patches to real ones, over trainings and pictures."""
    texture = found.textures[ground]
    return cl.crossed_bootstrap(
        _indices(texture),
        statistic=_distance(texture, real.slices[ground]),
        resamples=RESAMPLES,
        centred=True,
    )


def nearer(real: Real, one: Measured, other: Measured, grounds: Sequence[str]) -> Interval:
    """Patch distance of one sampler minus that of another, paired by training, caption and noise.

    Args:
        real: what distances are to.
        one: a sampler.
        other: another; its only training stands for each of the first, if it has but one.
        grounds: distances are averaged over these.
    """
    parts, indices = [], []
    for ground in grounds:
        for sign, found in ((1, one), (-1, other)):
            texture = found.textures[ground]
            parts.append((sign, _distance(texture, real.slices[ground])))
            indices.append(like_rows(_indices(texture), len(_indices(one.textures[ground]))))
    few = min(rows.shape[1] for rows in indices)

    def statistic(*rows: np.ndarray) -> float:
        gaps = [sign * of(row) for (sign, of), row in zip(parts, rows, strict=True)]
        return sum(gaps) / len(grounds)

    kept = [rows[:, :few] for rows in indices]  # grounds have nearly as many captions
    return cl.crossed_bootstrap(*kept, statistic=statistic, resamples=RESAMPLES)


def like_rows(rows: np.ndarray, n: int) -> np.ndarray:
    """The rows, or the only one n times."""
    return rows if len(rows) == n else np.repeat(rows, n, axis=0)


def intervals(real: Real, found: Measured) -> dict[str, Interval]:
    """Every metric of a sampler, with intervals over trainings and pictures."""
    out = {name: cl.crossed_bootstrap(found.values[name]) for name in (*RATES, *MEANS)}
    for ground in TEXTURES:
        out[f"{ground}_energy"] = cl.crossed_bootstrap(found.textures[ground].energy)
        out[f"{ground}_patches"] = distance(real, found, ground)
    out["hue_kl"] = cl.crossed_bootstrap(
        found.values["hue_mode"], statistic=hue_kl, resamples=RESAMPLES, centred=True
    )
    return out


def spectrum(power: Tensor, ground: str) -> list[float]:
    """Power ``[8, 8]`` at 1/8 to 4/8 cycles per pixel."""
    f = torch.fft.fftfreq(8)
    if ground == "fur":
        low = f.abs() < 0.07  # along the hairs
        strip = power[low][0]
        return [float(strip[f.abs() == k / 8].mean()) for k in range(1, 5)]
    ring = (f[:, None].square() + f[None].square()).sqrt().mul(8).round()
    return [float(power[ring == k].mean()) for k in range(1, 5)]
