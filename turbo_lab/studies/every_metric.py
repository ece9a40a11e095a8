"""Every metric of postcards in one table, each beside what other real postcards give.

`METRICS` says of each metric what it means, which way is better and in what unit. The numbers are
those of the notebooks: the same functions of `measure`, trainings averaged and never pooled,
intervals over trainings and pictures at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from turbo_lab import claims as cl
from turbo_lab import measure
from turbo_lab.claims import Interval
from turbo_lab.errors import BadInput
from turbo_lab.measure import Slices
from turbo_lab.postcards import Scenes, asked, draw_scenes, render
from turbo_lab.postcards.captions import GROUNDS
from turbo_lab.studies.matching import REAL
from turbo_lab.studies.textures import EACH, TEXTURES, real_slices

Better = Literal["more", "less", "as real"]
RESAMPLES = 150


class Metric(NamedTuple):
    """What a metric is, in words."""

    title: str
    meaning: str
    better: Better
    unit: str

    @property
    def axis(self) -> str:
        """Title of an axis that shows it: what it means, and in brackets its unit, in one piece."""
        return f"{self.meaning} ({self.unit.replace(' ', chr(0xA0))})"


METRICS: Mapping[str, Metric] = {
    "sign_read": Metric("signs read", "both digits right and crisp", "more", "share"),
    "sign_alone": Metric("one sign, read", "signs read, and no second one", "more", "share"),
    "digits_right": Metric("digits right", "both right, however faint", "more", "share"),
    "ghost_signs": Metric("ghost signs", "pictures with more than one sign", "less", "share"),
    "sign_lost": Metric("signs lost", "pictures without a sign", "less", "share"),
    "whole_body": Metric("whole bodies", "all parts once, none more", "more", "share"),
    "pose_right": Metric("pose right", "arms and legs as the caption says", "more", "share"),
    "all_right": Metric("all right", "one sign, read; body whole; pose", "more", "share"),
    "hue_kl": Metric("hue KL", "unprompted hue modes against the truth", "less", "nats"),
    "coverage": Metric("coverage", "truth of the hue modes that are there", "more", "share"),
    "diversity": Metric("diversity", "distance of one caption's pictures", "as real", "RMS"),
    "saturation": Metric("saturation", "mean HSV saturation", "as real", "0 to 1"),
    "chroma_w1": Metric("chroma W1", "chroma of pixels, distance to real", "less", "0 to 1"),
    "clipped": Metric("clipped", "values at black or white", "less", "share"),
    "contrast": Metric("contrast", "deviation of the luminance", "as real", "of [-1, 1]"),
    "high_frequency_share": Metric(
        "high frequencies", "share of power above 0.25 per pixel", "as real", "share"
    ),
    "psd_slope": Metric("PSD slope", "log power over log frequency", "as real", "exponent"),
    "moss_slope": Metric("moss: PSD slope", "the same on moss", "as real", "exponent"),
    "fur_slope": Metric("fur: PSD slope", "the same on fur", "as real", "exponent"),
    "moss_energy": Metric("moss: energy", "power in the grain's band", "as real", "of real"),
    "fur_energy": Metric("fur: energy", "power in the hairs' band", "as real", "of real"),
    "moss_patches": Metric("moss: patches", "sliced W1 of patches to real", "less", "luminance"),
    "fur_patches": Metric("fur: patches", "sliced W1 of patches to real", "less", "luminance"),
}
"""By name; the order is that of tables and figures."""
RATES = ("sign_read", "sign_alone", "digits_right", "ghost_signs", "sign_lost", "whole_body",
         "pose_right", "all_right")  # fmt: skip
DISTANCES = ("hue_kl", "chroma_w1", "moss_patches", "fur_patches")
"""To real pictures or to the truth: at least 0, and above it for real pictures too."""
MEANS = ("saturation", "clipped", "contrast", "high_frequency_share", "psd_slope")


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Real postcards of the stream ``critic`` that distances are measured to.

    Attributes:
        n: how many.
        seed: of the scenes.
        slices: their ground patches along fixed directions, by ground.
        cdf: cumulative chroma histogram of their pixels ``[bins]``.
    """

    n: int
    seed: int
    slices: Mapping[str, Slices]
    cdf: np.ndarray


@cache
def reference(n: int = REAL, seed: int = 0) -> Reference:
    """Draw and measure real postcards.

    Args:
        n: how many, at least 1.
        seed: of the scenes, at least 0.
    """
    if n < 1:
        raise BadInput("n", n, "use at least 1 postcard")
    scenes = draw_scenes("critic", range(n), seed=seed)
    cdf = measure.chroma_cdf(render(scenes)).numpy().mean(0)
    return Reference(n=n, seed=seed, slices=real_slices(n, seed=seed), cdf=cdf)


@dataclass(frozen=True, kw_only=True)
class Found:
    """What was found in one set of pictures (one training), picture by picture.

    Attributes:
        values: per picture ``[n]``, see `measure.report`.
        ground: index of the ground each caption asks for ``[n]``.
        cdf: cumulative chroma histograms ``[n, bins]``.
        along: ground patches along the directions of the reference ``[n, each, P]``.
        distances: of each caption's own pictures ``[captions]``; empty if there are none.
        real: what distances are to.
    """

    values: Mapping[str, np.ndarray]
    ground: np.ndarray
    cdf: np.ndarray
    along: Tensor
    distances: np.ndarray
    real: Reference

    def __len__(self) -> int:
        return len(self.ground)

    def value(self, metric: str, rows: np.ndarray, captions: np.ndarray | None = None) -> float:
        """One metric of the pictures with these indices; NaN when none can tell.

        Args:
            metric: one of `METRICS`.
            rows: which pictures; an index may come twice.
            captions: which captions' own pictures; all without.
        """
        if metric == "diversity":
            chosen = self.distances if captions is None else self.distances[captions]
            return float(chosen.mean()) if len(chosen) else float("nan")
        kind = metric.partition("_")[0]
        if kind in TEXTURES:
            rows = rows[self.ground[rows] == GROUNDS.index(kind)]
        return _STATISTICS[metric](self, rows) if len(rows) else float("nan")

    def all_values(self, metrics: Sequence[str] = tuple(METRICS)) -> dict[str, float]:
        """The metrics of all pictures."""
        rows = np.arange(len(self))
        return {metric: self.value(metric, rows) for metric in metrics}


def _mean(name: str) -> Callable[[Found, np.ndarray], float]:
    return lambda found, rows: float(found.values[name][rows].mean())


def _modes(statistic: Callable[[Tensor], float]) -> Callable[[Found, np.ndarray], float]:
    return lambda found, rows: statistic(torch.from_numpy(found.values["hue_mode"][rows]).long())


def _energy(ground: str) -> Callable[[Found, np.ndarray], float]:
    expected = cache(measure.expected_band_energy)
    return lambda found, rows: float(found.values["band_energy"][rows].mean()) / expected(ground)


def _patches(ground: str) -> Callable[[Found, np.ndarray], float]:
    return lambda found, rows: found.real.slices[ground].distance(
        found.along[torch.from_numpy(rows)]
    )


_STATISTICS: dict[str, Callable[[Found, np.ndarray], float]] = {
    **{name: _mean(name) for name in (*RATES, *MEANS)},
    "hue_kl": _modes(measure.hue_kl),
    "coverage": _modes(measure.mode_coverage),
    "chroma_w1": lambda found, rows: float(np.abs(found.cdf[rows].mean(0) - found.real.cdf).mean()),
    **{f"{ground}_slope": _mean("psd_slope") for ground in TEXTURES},
    **{f"{ground}_energy": _energy(ground) for ground in TEXTURES},
    **{f"{ground}_patches": _patches(ground) for ground in TEXTURES},
}


def find(images: Tensor, scenes: Scenes, real: Reference, grids: Tensor | None = None) -> Found:
    """Measure one set of pictures.

    Args:
        images: ``[n, 3, 32, 32]`` in [-1, 1], one per scene.
        scenes: what the captions ask for.
        real: what distances are to, see `reference`.
        grids: many pictures of each of a few captions ``[captions, K, 3, 32, 32]``, K >= 2, for
            the diversity; without them it is NaN.

    Raises:
        BadInput: shapes that do not fit, or values that are not finite.
    """
    seen = measure.read(images)
    report = measure.report(images, scenes.fields, seen)
    names = (*RATES, *MEANS, "third_digit", "hue_mode", "band_energy")
    patches = measure.ground_patches(images, seen.free, each=EACH)
    # Directions depend on the seed alone, so those of one ground are those of all.
    slices = real.slices[TEXTURES[0]]
    return Found(
        values={name: report[name].float().numpy() for name in names},
        ground=scenes.fields[:, 2].numpy(),
        cdf=measure.chroma_cdf(images).numpy(),
        along=slices.along(patches),
        distances=np.empty(0) if grids is None else measure.pairwise_distance(grids).numpy(),
        real=real,
    )


def find_changed(
    images: Tensor, before: Tensor, scenes: Scenes, found: Found, grids: Tensor | None = None
) -> Found:
    """`find` for pictures of which some are those of before: only the others are measured.

    Args:
        images: ``[n, 3, 32, 32]`` in [-1, 1].
        before: the same shape; a picture counts as changed where it is not equal bit by bit.
        scenes: what the captions ask for.
        found: in the pictures before; its reference is used.
        grids: see `find`.
    """
    rows = (images != before).flatten(1).any(1).nonzero()[:, 0]
    values, cdf, along = {k: v.copy() for k, v in found.values.items()}, found.cdf, found.along
    if len(rows):
        part = find(images[rows], scenes[rows], found.real)
        for name, column in values.items():
            column[rows.numpy()] = part.values[name]
        cdf, along = cdf.copy(), along.clone()
        cdf[rows.numpy()], along[rows] = part.cdf, part.along
    distances = np.empty(0) if grids is None else measure.pairwise_distance(grids).numpy()
    return replace(found, values=values, cdf=cdf, along=along, distances=distances)


# --- tables -------------------------------------------------------------------------------------


def every_metric(
    images: Sequence[Tensor],
    scenes: Scenes,
    real: Reference,
    *,
    grids: Sequence[Tensor] = (),
    resamples: int = RESAMPLES,
) -> pd.DataFrame:
    """Every metric of the pictures of several trainings, with 95% intervals.

    Args:
        images: ``[n, 3, 32, 32]`` in [-1, 1] per training, for the same scenes in each.
        scenes: what the captions ask for.
        real: what distances are to, see `reference`.
        grids: ``[captions, K, 3, 32, 32]`` per training, see `find`; none, or one per training.
        resamples: of the bootstrap.

    Returns:
        Columns ``metric``, ``value``, ``low``, ``high``: means over trainings, intervals over
        trainings and pictures at once.
    """
    many: Sequence[Tensor | None] = grids or [None] * len(images)
    found = [find(x, scenes, real, grid) for x, grid in zip(images, many, strict=True)]
    return table(found, resamples=resamples)


def table(found: Sequence[Found], *, resamples: int = RESAMPLES) -> pd.DataFrame:
    """The table of `every_metric` from what was found in each training."""
    rows = [
        {"metric": metric, **vars(interval(found, metric, resamples=resamples))}
        for metric in METRICS
    ]
    return pd.DataFrame(rows)


def per_training(found: Sequence[Found]) -> dict[str, np.ndarray]:
    """Every metric of each training ``[trainings]``: the pairs of a paired test."""
    values = [one.all_values() for one in found]
    return {metric: np.array([v[metric] for v in values]) for metric in METRICS}


def interval(found: Sequence[Found], metric: str, *, resamples: int = RESAMPLES) -> Interval:
    """One metric, averaged over trainings, with its interval over trainings and pictures."""
    # Distances grow when pictures repeat; means do not, and the rates have borders.
    centred = metric in DISTANCES
    out = _bootstrap([found], metric, lambda values: values[0], resamples, centred=centred)
    return replace(out, low=max(out.low, 0.0)) if centred else out


def difference(
    one: Sequence[Found],
    other: Sequence[Found],
    metric: str,
    *,
    goal: float | None = None,
    resamples: int = RESAMPLES,
) -> Interval:
    """One metric of some trainings minus that of others, paired by training and picture.

    Args:
        one: trainings.
        other: as many, or a single one that stands for each.
        metric: one of `METRICS`.
        goal: with it, distances to this value are compared (for metrics better "as real").
        resamples: of the bootstrap.
    """
    paired = other if len(other) == len(one) else list(other) * len(one)

    def gap(values: list[float]) -> float:
        a, b = values if goal is None else (abs(v - goal) for v in values)
        return a - b

    return _bootstrap([one, paired], metric, gap, resamples, centred=False)


def _bootstrap(
    groups: Sequence[Sequence[Found]],
    metric: str,
    statistic: Callable[[list[float]], float],
    resamples: int,
    *,
    centred: bool,
) -> Interval:
    """Crossed bootstrap over trainings and pictures of a statistic of the groups' means."""
    everyone = [one for group in groups for one in group]
    n = min(len(f.distances if metric == "diversity" else f.ground) for f in everyone)
    if n == 0:
        return Interval(value=np.nan, low=np.nan, high=np.nan)
    trainings, places = np.indices((len(groups[0]), n))

    def of(training: np.ndarray, place: np.ndarray) -> float:
        who, at = training[:, 0].astype(int), place[0].astype(int)
        means = [np.nanmean([g[k].value(metric, at, at) for k in who]) for g in groups]
        return statistic([float(m) for m in means])

    return cl.crossed_bootstrap(
        trainings, places, statistic=of, resamples=resamples, centred=centred
    )


# --- the floor ----------------------------------------------------------------------------------


def real_pictures(fields: Tensor, *, seed: int = 0, skip: int = 0) -> Scenes:
    """Other real scenes for captions: stream ``critic``, past those of the reference.

    Args:
        fields: ``[n, 5]`` long, what the captions ask for; a caption may come often.
        seed: of the scenes, at least 0.
        skip: how many scenes of the stream to leave out.
    """
    drawn = draw_scenes("critic", range(skip, skip + len(fields)), seed=seed)
    return asked(drawn, fields)


def floor(
    scenes: Scenes, real: Reference, *, sets: int = 3, captions: int = 0, each: int = 8
) -> list[Found]:
    """Other real pictures for the same captions: the values at which nothing is wrong.

    Args:
        scenes: of the samples.
        real: what distances are to.
        sets: how many sets of real pictures (they stand where trainings stand), at least 1.
        captions: the first captions of which ``each`` pictures are drawn for the diversity.
        each: pictures of each.

    Returns:
        One `Found` per set, for `table`, `interval` and `per_training`.
    """
    out = []
    step = len(scenes) + captions * each
    for k in range(sets):
        skip = real.n + k * step
        own = real_pictures(scenes.fields, seed=real.seed, skip=skip)
        grids = None
        if captions:
            fields = scenes.fields[:captions].repeat_interleave(each, 0)
            more = real_pictures(fields, seed=real.seed, skip=skip + len(scenes))
            grids = render(more).unflatten(0, (-1, each))
        out.append(find(render(own), own, real, grids))
    return out


def described() -> pd.DataFrame:
    """What each metric is: title, meaning, better direction and unit, by name."""
    return pd.DataFrame([m._asdict() for m in METRICS.values()], index=list(METRICS))
