"""Notebook 05: what a GAN term does for texture at two steps, and what it costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from turbo_lab import measure
from turbo_lab.lab import Lab, Samples
from turbo_lab.postcards import Scenes, draw_scenes, render
from turbo_lab.progress import progress
from turbo_lab.recipes import Profile, student_recipe
from turbo_lab.recipes.adversarial import AGAINST, CONTROL, LOOKS, START, TURBO
from turbo_lab.recipes.warm import STEPS
from turbo_lab.sampling import Sampling
from turbo_lab.studies import matching
from turbo_lab.studies.students import Drawn, Key, draw_students
from turbo_lab.studies.textures import (
    METRICS,
    RATES,
    TEXTURES,
    Measured,
    Real,
    intervals,
    measured,
    nearer,
    real_slices,
    spectrum,
)
from turbo_lab.studies.warm_start import direct_of
from turbo_lab.training import history

NOTEBOOK = "05_gan_texture"
TEACHER, EIGHT, DIRECT, GAN = "teacher", "dmd2", direct_of(START), TURBO
TITLES = {
    TEACHER: "teacher, 40 steps",
    EIGHT: "DMD2, 8 steps",
    DIRECT: "DMD2, 2 steps",
    START: "PCM, then DMD2",
    CONTROL: "  + more DMD2",
    GAN: "  + DMD2 with a GAN",
}
"""Who is compared; the students have a training for every seed."""
STUDENTS = tuple(name for name in TITLES if name != TEACHER)
SWEEP = tuple(name for name in AGAINST if name != GAN)
"""Families with one training, the main one with one thing changed."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much a profile measures; the code is the same."""

    captions: int
    seeds: int
    sweep: tuple[str, ...] = SWEEP
    real: int = 1024
    main: tuple[str, ...] = tuple(TITLES)


BUDGETS: Mapping[str, Budget] = MappingProxyType(
    {
        "smoke": Budget(captions=12, seeds=1, sweep=("turbo-teacher-data",), real=128),
        "quick": Budget(captions=192, seeds=3),
        "paper": Budget(captions=1024, seeds=6, real=8192),
    }
)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Teacher and students on the same captions and noise."""

    lab: Lab
    budget: Budget
    teacher: Samples | None
    drawn: Drawn

    @property
    def keys(self) -> tuple[str, ...]:
        """Artefact keys of the students and of all samples."""
        return (*self.drawn.keys, *((self.teacher.key,) if self.teacher else ()))

    @property
    def families(self) -> tuple[str, ...]:
        """Everyone who was sampled."""
        students = dict.fromkeys(family for family, _, _ in self.drawn.samples)
        return (*((TEACHER,) if self.teacher else ()), *students)

    @property
    def scenes(self) -> Scenes:
        """What the captions ask for."""
        return next(iter(self.drawn.samples.values())).scenes

    @cached_property
    def real(self) -> Real:
        """Real postcards, and as many others as there are captions."""
        n = self.budget.real
        slices = real_slices(n)
        others = draw_scenes("critic", range(n, n + self.budget.captions))
        return Real(slices=slices, floor=measured([render(others)], others, slices))

    @cached_property
    def measured(self) -> dict[str, Measured]:
        """Everything measured, by family."""
        out = {}
        with progress(len(self.families), "reading the pictures") as tick:
            for done, family in enumerate(self.families, start=1):
                pictures = images_of(self, family)
                out[family] = measured(pictures, self.scenes, self.real.slices)
                tick(done, family)
        return out


def steps_of(family: str) -> int:
    """Steps of a family's students here."""
    return 8 if family == EIGHT else STEPS


def images_of(comparison: Comparison, family: str) -> list[Tensor]:
    """Images of a family, one tensor ``[n, 3, 32, 32]`` per training."""
    if family == TEACHER:
        assert comparison.teacher is not None
        return [comparison.teacher.images]
    drawn = comparison.drawn.samples
    return [drawn[key].images for key in sorted(drawn) if key[0] == family]


def compare(
    lab: Lab, budget: Budget, *, seed: int, profile: Profile = "quick", fresh: bool = False
) -> Comparison:
    """Sample the teacher and every student, as far as the budget names them.

    Args:
        lab: with the teacher.
        budget: how much is measured.
        seed: of the noise.
        profile: with ``fresh``, the budget that students are trained by; otherwise the shipped
            students (those of ``quick``) serve every profile.
        fresh: train again what this notebook adds; what it starts from is notebook 04's.
    """
    main = [f for f in STUDENTS if f in budget.main]
    keys: list[Key] = [(f, steps_of(f), k) for f in main for k in range(budget.seeds)]
    keys += [(f, STEPS, 0) for f in budget.sweep]
    if fresh:
        for family, steps, k in keys:
            if family in (GAN, CONTROL, *budget.sweep):
                recipe = student_recipe(family, steps=steps, profile=profile, seed=k)
                lab.trained(recipe, fresh=True)
    drawn = draw_students(
        lab, keys, captions=budget.captions, seed=seed, profile=profile if fresh else "quick"
    )
    teacher = None
    if TEACHER in budget.main:
        teacher = lab.samples(Sampling(n=budget.captions, seed=seed), TITLES[TEACHER])
    return Comparison(lab=lab, budget=budget, teacher=teacher, drawn=drawn)


def scaled(budget: Budget, captions: int) -> Budget:
    """The budget with another number of captions; 0 keeps its own."""
    return replace(budget, captions=captions) if captions else budget


# --- tables -------------------------------------------------------------------------------------

FLOOR = "real"
ROWS = {FLOOR: "real, other pictures", **TITLES}


def table(comparison: Comparison) -> pd.DataFrame:
    """Every metric of other real pictures, the teacher and the main students.

    Long form ``family, steps, metric, value, low, high``; steps are NaN for real and teacher.
    """
    rows = []
    with progress(len(ROWS), "intervals") as tick:
        for done, family in enumerate(ROWS, start=1):
            own = comparison.real.floor if family == FLOOR else comparison.measured[family]
            at = np.nan if family in (FLOOR, TEACHER) else steps_of(family)
            found = intervals(comparison.real, own)
            rows += [{"family": family, "steps": at, "metric": m, **vars(found[m])} for m in found]
            tick(done, family)
    return pd.DataFrame(rows)


def wide(rows: pd.DataFrame, *metrics: str) -> pd.DataFrame:
    """One row per sampler, one column per metric, as ``value [low, high]``."""
    found = matching.wide(rows, ROWS, metrics, METRICS)
    return found.droplevel("steps").reindex(list(ROWS.values()))


def spectra(comparison: Comparison) -> pd.DataFrame:
    """Power of the ground over that of real ground, whose spectrum is known in closed form.

    Columns ``ground``, ``family``, ``frequency`` (cycles per pixel), ``value``. For moss it is the
    mean of a ring; for fur along the direction across the hairs, where its grain is.
    """
    rows = []
    for ground in TEXTURES:
        real = spectrum(measure.expected_power(ground), ground)
        for family in TITLES:
            own = spectrum(comparison.measured[family].textures[ground].power, ground)
            for k, (ours, theirs) in enumerate(zip(own, real, strict=True), start=1):
                rows.append(
                    {
                        "ground": ground,
                        "family": family,
                        "frequency": k / 8,
                        "value": ours / theirs,
                    }
                )
    return pd.DataFrame(rows)


def ablations(comparison: Comparison) -> pd.DataFrame:
    """Metrics of the first training with one thing changed, beside the main one and the control.

    Long form ``family, metric, value, low, high``, intervals over captions. ``texture`` is the
    patch distance to real, averaged over moss and fur, minus that of the control.
    """
    rows = []
    wanted = (CONTROL, GAN, *comparison.budget.sweep)
    control = comparison.measured[CONTROL].training(0)
    with progress(len(wanted), "intervals of the ablations") as tick:
        for done, family in enumerate(wanted, start=1):
            own = comparison.measured[family].training(0)
            found = intervals(comparison.real, own)
            if family != CONTROL:
                found["texture"] = nearer(comparison.real, own, control, TEXTURES)
            rows += [{"family": family, "metric": m, **vars(found[m])} for m in found]
            tick(done, family)
    return pd.DataFrame(rows)


def groups() -> dict[str, dict[str, str]]:
    """Families of each ablation with their labels; the main student is in all of them."""
    main = AGAINST[GAN]
    changes: dict[str, tuple[Callable[[Any], Any], Callable[[Any], str]]] = {
        "features": (lambda a: a.features, lambda a: LOOKS[a.features]),
        "share of real data": (lambda a: a.rho, lambda a: f"rho {a.rho:g}"),
        "weight": (lambda a: a.balance, lambda a: f"balance {a.balance:g}"),
        "loss": (lambda a: a.loss, lambda a: str(a.loss)),
    }
    out: dict[str, dict[str, str]] = {}
    for title, (value, label) in changes.items():
        own = {n: a for n, a in AGAINST.items() if n == GAN or value(a) != value(main)}
        ordered = sorted(own, key=lambda n: value(own[n]))
        out[title] = {n: label(own[n]) + (" (main)" if n == GAN else "") for n in ordered}
    return out


def scramble_table(comparison: Comparison) -> pd.DataFrame:
    """What a spectrum knows of a picture, and what it does not: means over the captions.

    One row each for real postcards, the same with scrambled phases, and the main student.
    """
    real = render(comparison.scenes)
    shown = {
        "real": real,
        "real, phases scrambled": measure.scrambled(real),
        TITLES[GAN]: images_of(comparison, GAN)[0],
    }
    rows = {}
    for title, images in shown.items():
        report = measure.report(images, comparison.scenes.fields)
        rows[title] = {
            "power above 1/4 cycle per pixel": _fine(images),
            **{
                label: report[name].float().mean().item()
                for name, label in RATES.items()
                if name != "ghost_signs"
            },
        }
    return pd.DataFrame(rows).T.rename_axis("pictures").round(3)


def _fine(images: Tensor) -> float:
    """Share of the power of whole pictures, no window, at 1/4 cycle per pixel and above."""
    power = torch.fft.fft2(images - images.mean((2, 3), keepdim=True)).abs().square().sum(1)
    f = torch.fft.fftfreq(images.shape[-1])
    radius = (f[:, None].square() + f[None].square()).sqrt()
    return float((power[:, radius >= 0.25].sum(1) / power.sum((1, 2))).mean())


TERMS = {
    "critic/teacher": "critic's loss, its real side",
    "critic/student": "critic's loss, the student",
    "student/cosine": "cosine of the two gradients",
    "student/gan_weight": "weight of the GAN term",
    "student/method_pull": "gradient of DMD2 at x",
    "student/gan_pull": "gradient of the GAN at x",
}
LOSSES = ("critic/teacher", "critic/student")
"""Those that are log 2 for a critic that guesses."""


def curves(comparison: Comparison) -> pd.DataFrame:
    """History of the GAN's stage: columns ``student``, ``step``, ``term``, ``value``.

    All trainings of the main student, and the first of those with other features.
    """
    wanted = [(GAN, k) for k in range(comparison.budget.seeds)]
    others = [f for f in groups()["features"] if f != GAN and f in comparison.families]
    rows = []
    for family, k in (*wanted, *((f, 0) for f in others)):
        title = f"main, training {k}" if family == GAN else groups()["features"][family]
        lines = history(comparison.drawn.students[family, STEPS, k].artefact)
        last = lines[-1]["stage"]
        rows += [
            {"student": title, "step": line["step"], "term": term, "value": line["terms"][term]}
            for line in lines
            if line["stage"] == last
            for term in TERMS
            if term in line["terms"]
        ]
    return pd.DataFrame(rows)
