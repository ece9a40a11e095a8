"""Are the metrics right? Known corruptions on a ladder of strengths, and what each of them moves.

Effects are paired: a metric of the spoiled pictures minus that of the same pictures unspoiled, in
units of half the width of the null band, the spread of that metric between sets of real pictures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypedDict

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor

from turbo_lab import claims as cl
from turbo_lab.claims import Claim, Interval
from turbo_lab.measure import corruptions
from turbo_lab.postcards import Scenes, draw_scenes, render
from turbo_lab.progress import progress
from turbo_lab.studies import every_metric as em
from turbo_lab.studies.every_metric import METRICS, RATES, Found
from turbo_lab.studies.validation_cases import CASES, CONTROL

NOTEBOOK = "06_two_step_turbo"
RESOLUTION = {"coverage": 0.04, "clipped": 1 / 1024}
"""Least half width: half the rarest mode, one pixel a picture; real pictures never differ here."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much a profile measures; the code is the same."""

    captions: int
    each: int
    sets: int
    strengths: tuple[float, ...]
    resamples: int

    @property
    def pictures(self) -> int:
        """Pictures of one set."""
        return self.captions * self.each


BUDGETS: Mapping[str, Budget] = MappingProxyType(
    {
        "smoke": Budget(captions=6, each=4, sets=3, strengths=(0.5, 1.0), resamples=10),
        "quick": Budget(
            captions=21, each=8, sets=10, strengths=(0.25, 0.5, 0.75, 1.0), resamples=100
        ),
        "paper": Budget(
            captions=60, each=8, sets=20, strengths=(0.2, 0.4, 0.6, 0.8, 1.0), resamples=400
        ),
    }
)


@dataclass(frozen=True, kw_only=True)
class Band:
    """Where a metric of another set of real pictures lies: ``value`` plus or minus ``half``."""

    value: float
    half: float


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Everything that was measured.

    Attributes:
        budget: how much.
        bands: the null band by metric.
        clean: the real pictures that are spoiled.
        found: the same pictures spoiled, by corruption and strength.
    """

    budget: Budget
    bands: Mapping[str, Band]
    clean: Found
    found: Mapping[tuple[str, float], Found]

    def effect(self, name: str, strength: float, metric: str, rows: np.ndarray) -> float:
        """Effect of a corruption on a metric in half widths of its band, for some pictures."""
        captions = self.captions(rows)
        spoiled = self.found[name, strength].value(metric, rows, captions)
        return (spoiled - self.clean.value(metric, rows, captions)) / self.bands[metric].half

    def captions(self, rows: np.ndarray) -> np.ndarray:
        """A draw of captions that belongs to a draw of pictures; everyone's is every caption."""
        return rows[: self.budget.captions] % self.budget.captions

    @property
    def everyone(self) -> np.ndarray:
        """Index of every picture."""
        return np.arange(self.budget.pictures)


def validate(profile: str = "quick", *, seed: int = 0) -> Validation:
    """Measure real pictures, and the same ones spoiled in every way and strength.

    Args:
        profile: one of `BUDGETS`.
        seed: of the captions, the pictures and the corruptions, at least 0.
    """
    budget, real = BUDGETS[profile], em.reference(seed=seed)
    fields = _captions(budget, seed)

    def drawn(k: int) -> Scenes:
        return em.real_pictures(fields, seed=seed, skip=real.n + k * budget.pictures)

    def grids(images: Tensor) -> Tensor:
        return images.unflatten(0, (-1, budget.each))

    jobs = [(name, strength) for name in corruptions.ALL for strength in budget.strengths]
    null, found = [], {}
    with progress(budget.sets + len(jobs), "spoiling pictures") as tick:
        for k in range(budget.sets):
            scenes = drawn(k)
            images = render(scenes)
            null.append(em.find(images, scenes, real, grids(images)))
            tick(k + 1, "")
        scenes = drawn(budget.sets)
        images = render(scenes)
        clean = em.find(images, scenes, real, grids(images))
        for name, strength in jobs:
            spoiled = corruptions.corrupted(name, scenes, strength, seed=seed)
            found[name, strength] = em.find_changed(spoiled, images, scenes, clean, grids(spoiled))
            tick(budget.sets + len(found), "")
    return Validation(budget=budget, bands=null_bands(null), clean=clean, found=found)


def _captions(budget: Budget, seed: int) -> Tensor:
    """Fields of the captions ``[pictures, 5]``: each ``each`` times, grounds in turns."""
    fields = draw_scenes("eval", range(budget.captions), seed=seed).fields
    fields[:, 2] = torch.arange(budget.captions) % 3
    return fields.repeat_interleave(budget.each, 0)


def null_bands(null: list[Found]) -> dict[str, Band]:
    """The null band of every metric from sets of real pictures.

    Half its width is ``t s sqrt(1 + 1 / sets)``, with t such that one more real set has all its
    metrics inside with 95% (Bonferroni); it is at least the Wilson interval of a rate, or
    `RESOLUTION`.

    Args:
        null: at least two sets of as many pictures.
    """
    sets, out = len(null), {}
    wide = stats.t.ppf(1 - 0.05 / 2 / len(METRICS), sets - 1) * (1 + 1 / sets) ** 0.5
    for metric, values in em.per_training(null).items():
        mean, half = float(values.mean()), float(wide * values.std(ddof=1))
        if metric in RATES:
            rate = cl.wilson(round(mean * len(null[0])), len(null[0]))
            half = max(half, rate.high - rate.value, rate.value - rate.low)
        out[metric] = Band(value=mean, half=max(half, RESOLUTION.get(metric, 0.0)))
    return out


# --- tables -------------------------------------------------------------------------------------


def ladders(validation: Validation) -> pd.DataFrame:
    """Every metric along every ladder, strength 0 included.

    Returns:
        Columns ``corruption``, ``strength``, ``metric``, ``value``, ``effect`` (half widths of the
        band), ``low``, ``high`` (the band) and ``role``: ``own``, ``listed`` or ``quiet``.
    """
    rows, everyone = [], validation.everyone
    for name, case in CASES.items():
        for metric, band in validation.bands.items():
            role = "own" if metric in case.own else "listed" if metric in case.listed else "quiet"
            for strength in (0.0, *validation.budget.strengths):
                found = validation.found[name, strength] if strength else validation.clean
                effect = validation.effect(name, strength, metric, everyone) if strength else 0.0
                rows.append(
                    {
                        "corruption": name,
                        "strength": strength,
                        "metric": metric,
                        "value": found.value(metric, everyone),
                        "effect": effect,
                        "low": band.value - band.half,
                        "high": band.value + band.half,
                        "role": role,
                    }
                )
    return pd.DataFrame(rows)


def matrix(validation: Validation) -> pd.DataFrame:
    """Effect of each corruption (rows) at full strength on each metric, in half widths."""
    rows = ladders(validation)
    full = rows[rows["strength"] == max(validation.budget.strengths)]
    pivot = full.pivot(index="corruption", columns="metric", values="effect")
    return pivot.loc[list(CASES), list(METRICS)]


def couplings() -> pd.DataFrame:
    """The written list: corruption, metrics that it may move beside its own, and why."""
    rows = [
        {"corruption": name, "metrics": ", ".join(METRICS[m].title for m in metrics), "why": why}
        for name, case in CASES.items()
        for why, metrics in case.coupled.items()
    ]
    return pd.DataFrame(rows).set_index("corruption")


# --- claims -------------------------------------------------------------------------------------


def own_step(validation: Validation, name: str) -> Interval:
    """Smallest step up the ladder over a corruption's own metrics, in half widths of the band.

    Above 0 every own metric is monotone in the strength, strength 0 included.
    """
    case, strengths = CASES[name], validation.budget.strengths
    found = [validation.clean, *(validation.found[name, s] for s in strengths)]

    def smallest(rows: np.ndarray) -> float:
        captions = validation.captions(rows)
        steps = []
        for metric, sign in case.own.items():
            path = np.array([one.value(metric, rows, captions) for one in found])
            steps.append((sign * np.diff(path)).min() / validation.bands[metric].half)
        return float(min(steps))

    # Centred, for the smallest of several steps is smaller in resamples.
    return cl.bootstrap(
        validation.everyone,
        statistic=smallest,
        resamples=validation.budget.resamples,
        centred=True,
    )


def loudest(validation: Validation, name: str) -> tuple[str, float]:
    """The quiet metric that a corruption moves most at any strength: name and strength."""
    cells = [(m, s) for m in CASES[name].quiet for s in validation.budget.strengths]
    everyone = validation.everyone
    size = [abs(validation.effect(name, s, m, everyone)) for m, s in cells]
    return cells[int(np.nanargmax(size))]


def leak(validation: Validation, name: str) -> Interval:
    """Size of the effect on the `loudest` metric, in half widths of its band."""
    metric, strength = loudest(validation, name)
    return cl.bootstrap(
        validation.everyone,
        statistic=lambda rows: abs(validation.effect(name, strength, metric, rows)),
        resamples=validation.budget.resamples,
    )


def outside(validation: Validation, name: str = CONTROL) -> Interval:
    """Share of a control's cells (metric, strength) beyond the difference of two real sets.

    The control draws new grain, so its effects are differences of two draws: sqrt 2 half widths.
    """
    rows = ladders(validation)
    cells = rows[(rows["corruption"] == name) & (rows["strength"] > 0)]["effect"].dropna()
    return cl.wilson(int((cells.abs() > 2**0.5).sum()), len(cells))


def claims(validation: Validation, *, profile: str) -> list[Claim]:
    """What the validation says of every corruption, and of the control.

    Args:
        validation: of `validate`.
        profile: its budget's name.

    Returns:
        Two claims per corruption, that its own metrics are monotone (``V-own-...``) and that the
        others stay in their bands (``V-rest-...``); and ``V-control``.
    """
    made = []
    for name, case in CASES.items():
        if case.own:
            made += [_own(validation, name, profile), _rest(validation, name, profile)]
    return [*made, _control(validation, profile)]


def _own(validation: Validation, name: str, profile: str) -> Claim:
    titles = ", ".join(METRICS[m].title for m in CASES[name].own)
    return Claim(
        id=f"V-own-{name.replace(' ', '-')}",
        statement=f"{name}: own metric monotone ({titles})",
        statistic="smallest step up the ladder, half widths of the null band",
        interval=own_step(validation, name),
        side="above",
        threshold=0.0,
        **_common(validation, profile),
    )


def _rest(validation: Validation, name: str, profile: str) -> Claim:
    case, worst = CASES[name], METRICS[loudest(validation, name)[0]].title
    return Claim(
        id=f"V-rest-{name.replace(' ', '-')}",
        statement=f"{name}: others within their band but for the listed couplings",
        statistic=f"largest effect on the {len(case.quiet)} others, half widths ({worst})",
        interval=leak(validation, name),
        side="below",
        threshold=1.0,
        **_common(validation, profile),
    )


def _control(validation: Validation, profile: str) -> Claim:
    return Claim(
        id="V-control",
        statement=f"{CONTROL}: a control that gives other real pictures moves no metric",
        statistic="share of metrics and strengths beyond the difference of two real sets",
        interval=outside(validation),
        side="below",
        threshold=0.05,
        **_common(validation, profile),
    )


class _Common(TypedDict):
    notebook: str
    source: str
    seeds: int
    samples: int
    profile: str


def _common(validation: Validation, profile: str) -> _Common:
    return {
        "notebook": NOTEBOOK,
        "source": "validation of the metrics, this package",
        "seeds": validation.budget.sets,
        "samples": validation.budget.pictures,
        "profile": profile,
    }
