"""Notebook 02: what trajectory distillation loses at few steps, method by method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from turbo_lab import claims as cl
from turbo_lab import measure
from turbo_lab.claims import Claim, Interval
from turbo_lab.lab import Lab, Samples, Student
from turbo_lab.measure.areas import AREAS, area_errors, area_masks
from turbo_lab.measure.oracles import Reading
from turbo_lab.progress import progress
from turbo_lab.recipes import FAMILIES, Profile, resolve
from turbo_lab.sampling import Sampling
from turbo_lab.studies.students import draw_students

NOTEBOOK = "02_blur_in_trajectory_distillation"
TRAJECTORY = ("direct", "progressive", "consistency", "continuous")
TITLES = {
    **{name: FAMILIES[name].title for name in TRAJECTORY},
    "naive": "teacher, as few steps",
    "teacher": "teacher, 40 steps",
}
FEW, MANY = 2, 8
RATES = {
    "sign_read": "signs read",
    "whole_body": "whole bodies",
    "ghost_signs": "ghost signs",
    "sign_lost": "signs lost",
}
LEVELS = {
    "high_frequency_share": "high-frequency share / teacher",
    "psd_slope": "slope of the spectrum",
}
ERRORS = {f"error_{area}": f"error in the {area} / variance" for area in AREAS}
METRICS = {**RATES, **LEVELS, **ERRORS}


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much a profile measures; the code is the same."""

    captions: int
    seeds: int
    steps: tuple[int, ...] = (1, 2, 4, 8)


BUDGETS: Mapping[str, Budget] = MappingProxyType(
    {
        "smoke": Budget(captions=8, seeds=1, steps=(2, 8)),
        "quick": Budget(captions=128, seeds=3),
        "paper": Budget(captions=512, seeds=6),
    }
)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Per-image values of one sampler: ``[seeds, images]``, and of each area error and spread."""

    values: Mapping[str, np.ndarray]
    errors: Mapping[str, np.ndarray]
    spreads: Mapping[str, np.ndarray]
    details: Mapping[str, np.ndarray]
    power: np.ndarray  # [rings], mean radial power


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Samples of every student and of the teacher, for the same captions from the same noise."""

    budget: Budget
    teacher: Samples
    naive: Mapping[int, Samples]
    students: Mapping[tuple[str, int, int], Student]
    samples: Mapping[tuple[str, int, int], Samples]

    @property
    def keys(self) -> tuple[str, ...]:
        """Artefact keys of the students and of all samples."""
        drawn = [self.teacher, *self.naive.values(), *self.samples.values()]
        trained = sorted({s.artefact.key for s in self.students.values()})
        return (*trained, *(s.key for s in drawn))

    @cached_property
    def reading(self) -> Reading:
        """The oracles' reading of the teacher's pictures."""
        return measure.read(self.teacher.images)

    @cached_property
    def masks(self) -> dict[str, Tensor]:
        """The areas of the teacher's pictures."""
        return area_masks(self.teacher.images, self.reading)

    @cached_property
    def measured(self) -> dict[tuple[str, int], Measured]:
        """Everything measured, by family and steps; the teacher has 0 steps."""
        wanted = {(f, s) for f, s, _ in self.samples}
        out = {("teacher", 0): self._measure([self.teacher.images])}
        with progress(len(wanted) + len(self.naive), "reading the pictures") as tick:
            for steps, drawn in self.naive.items():
                out["naive", steps] = self._measure([drawn.images])
                tick(len(out) - 1, "")
            for family, steps in sorted(wanted):
                seeds = range(self.budget.seeds)
                images = [self.samples[family, steps, seed].images for seed in seeds]
                out[family, steps] = self._measure(images)
                tick(len(out) - 1, "")
        return out

    def _measure(self, images: Sequence[Tensor]) -> Measured:
        fields = self.teacher.scenes.fields
        reports = [measure.report(one, fields) for one in images]
        areas = [area_errors(one, self.teacher.images, self.masks) for one in images]

        power = torch.stack([measure.radial_power(one).mean(0) for one in images])
        return Measured(
            values={m: _stack([r[m] for r in reports]) for m in (*RATES, *LEVELS)},
            errors={a: _stack([found[a].error for found in areas]) for a in AREAS},
            spreads={a: _stack([found[a].spread for found in areas]) for a in AREAS},
            details={a: _stack([found[a].detail for found in areas]) for a in AREAS},
            power=power.mean(0).numpy(),
        )

    def steps_of(self, family: str) -> list[int]:
        """The numbers of steps a family was measured at."""
        return sorted(s for f, s in self.measured if f == family)


def compare(
    lab: Lab, budget: Budget, *, seed: int, profile: Profile = "quick", fresh: bool = False
) -> Comparison:
    """Sample the teacher and every student for the same captions from the same noise.

    Args:
        lab: with the teacher.
        budget: how much is measured.
        seed: of the noise.
        profile: with ``fresh``, the budget that students are trained by; otherwise the shipped
            students (those of ``quick``) serve every profile.
        fresh: train the students again.
    """
    if fresh:
        _retrain(lab, budget, profile)
    chosen = profile if fresh else "quick"
    teacher = lab.samples(Sampling(n=budget.captions, seed=seed), "teacher, 40 steps")
    naive = {
        steps: lab.samples(Sampling(steps=steps, n=budget.captions, seed=seed))
        for steps in budget.steps
    }
    drawn = draw_students(
        lab,
        product(TRAJECTORY, budget.steps, range(budget.seeds)),
        captions=budget.captions,
        seed=seed,
        profile=chosen,
    )
    return Comparison(
        budget=budget,
        teacher=teacher,
        naive=naive,
        students=drawn.students,
        samples=drawn.samples,
    )


def _retrain(lab: Lab, budget: Budget, profile: Profile) -> None:
    """Train every student of the comparison anew, each once."""
    names = ("progressive", "consistency", "continuous", *(f"direct-{n}" for n in budget.steps))
    for name, k in product(names, range(budget.seeds)):
        lab.trained(resolve(name, profile=profile, seed=k), fresh=True)


# --- tables -------------------------------------------------------------------------------------


def table(comparison: Comparison) -> pd.DataFrame:
    """Every metric by family and steps, with intervals over seeds and images.

    Long form: ``family``, ``steps`` (NaN for the teacher), ``metric``, ``value``, ``low``,
    ``high``. The high-frequency share is that of the teacher's own pictures from the same noise;
    errors are normalised by the variance of their area.
    """
    rows = []
    for (family, steps), found in comparison.measured.items():
        for metric, interval in _intervals(comparison, found).items():
            at = steps if steps else np.nan
            rows.append({"family": family, "steps": at, "metric": metric, **vars(interval)})
    return pd.DataFrame(rows)


def _intervals(comparison: Comparison, found: Measured) -> dict[str, Interval]:
    out = {m: cl.crossed_bootstrap(found.values[m]) for m in (*RATES, "psd_slope")}
    out["high_frequency_share"] = cl.crossed_bootstrap(
        found.values["high_frequency_share"],
        _like(comparison, "high_frequency_share", found),
        statistic=ratio,
    )
    for area in AREAS:
        pair = found.errors[area], found.spreads[area]
        out[f"error_{area}"] = cl.crossed_bootstrap(*pair, statistic=ratio)
    return out


def _like(comparison: Comparison, metric: str, found: Measured) -> np.ndarray:
    """The teacher's values, one row per seed of the student."""
    teacher = comparison.measured["teacher", 0].values[metric]
    return np.repeat(teacher, len(found.values[metric]), axis=0)


def _stack(rows: Sequence[Tensor]) -> np.ndarray:
    return torch.stack([row.float() for row in rows]).numpy()


def ratio(a: np.ndarray, b: np.ndarray) -> float:
    """Ratio of the sums."""
    return float(a.sum() / max(b.sum(), 1e-12))


def wide(rows: pd.DataFrame, metrics: Sequence[str]) -> pd.DataFrame:
    """One row per family and steps, one column per metric, as ``value [low, high]``."""
    shown = rows[rows["metric"].isin(metrics)].copy()
    shown["text"] = [f"{r.value:.2f} [{r.low:.2f}, {r.high:.2f}]" for r in shown.itertuples()]
    shown["steps"] = shown["steps"].fillna(40).astype(int)
    shown["family"] = [TITLES[f] for f in shown["family"]]
    pivot = shown.pivot(index=["family", "steps"], columns="metric", values="text")
    return pivot[list(metrics)].rename(columns=METRICS)


def endpoint_errors(comparison: Comparison) -> dict[str, list[tuple[float, float, str]]]:
    """For each family, by steps: mean squared distance to the teacher's sample, and signs read."""
    out: dict[str, list[tuple[float, float, str]]] = {}
    for family in TRAJECTORY:
        rows = []
        for steps in comparison.steps_of(family):
            found = comparison.measured[family, steps]
            pixels = comparison.teacher.images[0].numel()
            error = sum(e.mean() for e in found.errors.values()) / pixels
            rows.append((float(error), float(found.values["sign_read"].mean()), f"{steps}"))
        out[TITLES[family]] = rows
    return out


def training_cost(comparison: Comparison) -> pd.DataFrame:
    """What training each method's students took: steps, seconds, megabytes."""
    rows = []
    for family in TRAJECTORY:
        own = [s.artefact for (f, _, _), s in comparison.students.items() if f == family]
        found = {artefact.key: artefact for artefact in own}
        size = sum(a.file("weights.safetensors").stat().st_size for a in found.values())
        rows.append(
            {
                "method": TITLES[family],
                "students": len(found),
                "seconds": round(sum(a.card.get("seconds", 0.0) for a in found.values())),
                "MB": round(size / 1e6, 1),
            }
        )
    return pd.DataFrame(rows).set_index("method")


# --- claims -------------------------------------------------------------------------------------


def claims(comparison: Comparison, *, profile: str) -> list[Claim]:
    """C1 for every method: blur; small areas lose most, asked three times; steps repair it."""
    steps = comparison.budget.steps
    few, many = min(steps, key=lambda n: abs(n - FEW)), max(steps)
    made = []
    for family in TRAJECTORY:
        at_few, at_many = comparison.measured[family, few], comparison.measured[family, many]
        name, share = TITLES[family], "high_frequency_share"
        blur = cl.crossed_bootstrap(
            at_few.values[share], _like(comparison, share, at_few), statistic=ratio
        )
        areas = [x[a] for a in ("sign", "ground") for x in (at_few.errors, at_few.spreads)]
        small = cl.crossed_bootstrap(*areas, statistic=_gap)
        areas = [x[a] for a in ("sign", "ground") for x in (at_few.errors, at_few.details)]
        detail = cl.crossed_bootstrap(*areas, statistic=_gap)
        areas = [x[a] for a in ("sign", "figure") for x in (at_few.errors, at_few.spreads)]
        figure = cl.crossed_bootstrap(*areas, statistic=_gap)
        more = cl.crossed_bootstrap(at_many.values["sign_read"] - at_few.values["sign_read"])
        parts = (
            ("blur", f"at {few} steps pictures are blurred",
             "high-frequency share, of the teacher's", blur, "below", 1.0),
            ("small", f"at {few} steps the sign loses more than the ground",
             "normalised error, sign minus ground", small, "above", 0.0),
            ("figure", f"at {few} steps the sign loses more than the figure",
             "normalised error, sign minus figure", figure, "above", 0.0),
            ("detail", f"at {few} steps the sign loses more detail than the ground",
             "error over the variance within each picture, sign minus ground",
             detail, "above", 0.0),
            ("steps", f"{many} steps read more signs than {few}",
             "difference of the rates", more, "above", 0.0),
        )  # fmt: skip
        made += [
            Claim(
                id=f"C1-{part}-{family}",
                statement=f"{name}: {statement}",
                statistic=statistic,
                interval=interval,
                side="below" if side == "below" else "above",
                threshold=threshold,
                **_common(comparison, profile),
            )
            for part, statement, statistic, interval, side, threshold in parts
        ]
    return made


def _common(comparison: Comparison, profile: str) -> dict[str, Any]:
    return {
        "notebook": NOTEBOOK,
        "source": "account of the 2-step Qwen-Image-2512 LoRA by its authors, January 2026",
        "seeds": comparison.budget.seeds,
        "samples": comparison.budget.captions,
        "profile": profile,
        "artefact_keys": comparison.keys,
    }


def _gap(e1: np.ndarray, s1: np.ndarray, e2: np.ndarray, s2: np.ndarray) -> float:
    return ratio(e1, s1) - ratio(e2, s2)
