"""Quality of samples in one table: rates, divergences and texture, each with its interval.

Rates carry Wilson intervals, everything else a bootstrap over images. Measure real pictures the
same way (`Yardstick.floor`) to see how close "no difference" comes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from turbo_lab import measure
from turbo_lab.claims import Interval, bootstrap, wilson
from turbo_lab.postcards import Scenes, draw_scenes, render
from turbo_lab.postcards.captions import GROUNDS

RATES = {
    "sign_read": "signs read",
    "ghost_signs": "ghost signs",
    "sign_lost": "signs lost",
    "whole_body": "whole bodies",
    "pose_right": "pose as prompted",
    "digits_right": "digits right, however faint",
}
MEASURES = {
    "saturation": "mean saturation",
    "contrast": "contrast",
    "high_frequency_share": "high-frequency share",
}
ENERGY = {f"{g}_energy": f"{g}: band energy / real" for g in GROUNDS}
PATCHES = {f"{g}_patches": f"{g}: patch distance" for g in ("moss", "fur")}
TITLES = {
    **RATES,
    "hue_kl": "hue KL to truth (nats)",
    **ENERGY,
    **PATCHES,
    **MEASURES,
    "chroma_w1": "chroma distance to real",
}
"""Every metric of the table and its title."""


@dataclass(frozen=True, kw_only=True)
class Yardstick:
    """Real pictures that samples are measured against: scenes of the critic stream."""

    n: int = 1024
    seed: int = 0

    def table(self, images: Tensor, scenes: Scenes, *, resamples: int = 400) -> pd.DataFrame:
        """Measure images drawn for scenes; columns ``metric``, ``value``, ``low``, ``high``.

        Args:
            images: ``[B, 3, 32, 32]`` in [-1, 1], one per scene.
            scenes: what the captions asked for.
            resamples: of the bootstrap.
        """
        seen = measure.read(images)
        values = measure.report(images, scenes.fields, seen)
        real, real_scenes, real_free = _reference(self.n, self.seed)
        rows: dict[str, Interval] = {
            name: wilson(int(values[name].sum()), len(images)) for name in RATES
        }
        rows["hue_kl"] = bootstrap(
            values["hue_mode"].numpy(),
            statistic=lambda modes: measure.hue_kl(torch.from_numpy(modes)),
            resamples=resamples,
            centred=True,
        )
        rows |= dict(_energy(values["band_energy"], scenes, resamples))
        ours, theirs = (images, scenes, seen.free), (real, real_scenes, real_free)
        rows |= dict(_patches(ours, theirs))
        rows |= {n: bootstrap(values[n].numpy(), resamples=resamples) for n in MEASURES}
        rows["chroma_w1"] = _chroma(images, real, resamples)
        return pd.DataFrame(
            [{"metric": m, "value": i.value, "low": i.low, "high": i.high} for m, i in rows.items()]
        )

    def floor(self, n: int, *, resamples: int = 400) -> pd.DataFrame:
        """The table of ``n`` other real pictures: the distance at which nothing is wrong."""
        scenes = draw_scenes("critic", range(self.n, self.n + n), seed=self.seed)
        return self.table(render(scenes), scenes, resamples=resamples)


def per_image(images: Tensor, scenes: Scenes) -> dict[str, np.ndarray]:
    """Per-image values ``[B]`` as arrays, for paired comparisons; see `measure.report`."""
    return {name: v.numpy() for name, v in measure.report(images, scenes.fields).items()}


def _energy(energy: Tensor, scenes: Scenes, resamples: int) -> Iterator[tuple[str, Interval]]:
    for index, ground in enumerate(GROUNDS):
        ratio = energy[scenes.fields[:, 2] == index] / measure.expected_band_energy(ground)
        if len(ratio):
            yield f"{ground}_energy", bootstrap(ratio.numpy(), resamples=resamples)


def _chroma(images: Tensor, real: Tensor, resamples: int) -> Interval:
    """Chroma distance; its interval is that of the same distance between histograms."""
    theirs = measure.chroma_cdf(real).mean(0).numpy()
    binned = bootstrap(
        measure.chroma_cdf(images).numpy(),
        statistic=lambda rows: float(np.abs(rows.mean(0) - theirs).mean()),
        resamples=resamples,
        centred=True,
    )
    value = measure.chroma_w1(images, real)
    off = value - binned.value
    return Interval(value=value, low=max(0.0, binned.low + off), high=binned.high + off)


@cache
def _reference(n: int, seed: int) -> tuple[Tensor, Scenes, Tensor]:
    """Real images, their scenes and their free ground."""
    scenes = draw_scenes("critic", range(n), seed=seed)
    images = render(scenes)
    return images, scenes, measure.read(images).free


_Set = tuple[Tensor, Scenes, Tensor]


def _patches(ours: _Set, theirs: _Set, resamples: int = 40) -> Iterator[tuple[str, Interval]]:
    """Sliced-Wasserstein distance of ground patches, resampled over images."""
    for name in PATCHES:
        ground = GROUNDS.index(name.removesuffix("_patches"))
        a, b = (_ground_patches(*s, ground) for s in (ours, theirs))
        if len(a) and len(b):

            def distance(rows: np.ndarray, a: Tensor = a, b: Tensor = b) -> float:
                return measure.sliced_wasserstein(a[torch.from_numpy(rows)], b, projections=32)

            rows = np.arange(len(a))
            yield name, bootstrap(rows, statistic=distance, resamples=resamples, centred=True)


def _ground_patches(images: Tensor, scenes: Scenes, free: Tensor, ground: int) -> Tensor:
    rows = scenes.fields[:, 2] == ground
    return measure.ground_patches(images[rows], free[rows])


def long_table(tables: Sequence[tuple[float | None, pd.DataFrame]], x: str) -> pd.DataFrame:
    """Stack tables under the value of ``x`` each belongs to (None: the real floor)."""
    parts = [t.assign(**{x: np.nan if value is None else value}) for value, t in tables]
    return pd.concat(parts, ignore_index=True)
