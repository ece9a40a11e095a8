"""Notebook 03: what distribution matching repairs at few steps, and what it breaks at two."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from turbo_lab import claims as cl
from turbo_lab import measure
from turbo_lab.claims import Claim, Interval
from turbo_lab.lab import Lab, Samples
from turbo_lab.progress import progress
from turbo_lab.recipes import FAMILIES, Profile, Recipe, student_recipe
from turbo_lab.recipes.distribution import DMD2_STEPS, LONG, LONGER, SECOND, VARIANTS
from turbo_lab.recipes.trajectory import FAMILIES as TRAJECTORY
from turbo_lab.sampling import Sampling
from turbo_lab.studies import matching
from turbo_lab.studies.matching import METRICS as METRICS  # names of the study, kept in matching
from turbo_lab.studies.matching import REAL, Measured, hue_kl, like, ratio
from turbo_lab.studies.matching import claim_row as _row
from turbo_lab.studies.matching import wide as wide
from turbo_lab.studies.students import Drawn, Key, draw_students
from turbo_lab.training import history

NOTEBOOK = "03_dmd2_and_mode_collapse"
SOURCE = "account of the 2-step Qwen-Image-2512 LoRA by its authors, January 2026"
TITLES = {
    "dmd2": FAMILIES["dmd2"].title,
    **{name: family.title for name, family in TRAJECTORY.items()},
    "teacher": "teacher, 40 steps",
}
FEW = 2
FEW_TIMES = f"1, {SECOND:g}"
"""Times of the plain student's two steps, as labels name them: other notebooks have others."""

Sampler = tuple[str, int]
"""Family and steps; the teacher has 40."""
TEACHER: Sampler = ("teacher", 40)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much a profile measures; the code is the same."""

    captions: int
    seeds: int
    steps: tuple[int, ...] = DMD2_STEPS
    prompts: int = 6
    noises: int = 24
    variants: tuple[str, ...] = tuple(VARIANTS)


BUDGETS: Mapping[str, Budget] = MappingProxyType(
    {
        "smoke": Budget(
            captions=6, seeds=1, steps=(4, 2), prompts=2, noises=4, variants=("guidance-2",)
        ),
        "quick": Budget(captions=128, seeds=3),
        "paper": Budget(captions=512, seeds=6, prompts=16),
    }
)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The teacher and the students on the same captions and noise, and many noises of a few."""

    lab: Lab
    budget: Budget
    teacher: Samples
    teacher_prompts: Samples
    drawn: Drawn
    prompts: Drawn

    @property
    def keys(self) -> tuple[str, ...]:
        """Artefact keys of the students and of all samples."""
        own = (self.teacher.key, self.teacher_prompts.key)
        return tuple(dict.fromkeys((*self.drawn.keys, *self.prompts.keys, *own)))

    @cached_property
    def samplers(self) -> tuple[Sampler, ...]:
        """Every family and number of steps, the teacher first."""
        return (TEACHER, *sorted({(f, n) for f, n, _ in self.drawn.samples}))

    @cached_property
    def measured(self) -> dict[Sampler, Measured]:
        """Everything measured, by sampler."""
        out = {}
        with progress(len(self.samplers), "reading the pictures") as tick:
            for done, sampler in enumerate(self.samplers, start=1):
                out[sampler] = matching.measured(
                    images_of(self, sampler),
                    images_of(self, sampler, prompts=True),
                    self.teacher.scenes.fields,
                    self.budget.noises,
                )
                tick(done, TITLES.get(sampler[0], sampler[0]))
        return out

    @cached_property
    def real_cdf(self) -> np.ndarray:
        """Cumulative chroma histogram of real postcards ``[bins]``."""
        return measure.chroma_cdf(self.lab.testbed.real(REAL)).numpy().mean(0)


def images_of(comparison: Comparison, sampler: Sampler, *, prompts: bool = False) -> list[Tensor]:
    """Images of a sampler, one tensor ``[n, 3, 32, 32]`` per training.

    Args:
        comparison: of all samplers.
        sampler: family and steps.
        prompts: many noises of a few captions instead of one noise of many; empty for samplers
            of which these were not drawn.
    """
    if sampler == TEACHER:
        own = comparison.teacher_prompts if prompts else comparison.teacher
        return [own.images]
    drawn = comparison.prompts if prompts else comparison.drawn
    found = {k: s.images for (f, n, k), s in drawn.samples.items() if (f, n) == sampler}
    return [found[k] for k in sorted(found)]


def compare(
    lab: Lab, budget: Budget, *, seed: int, profile: Profile = "quick", fresh: bool = False
) -> Comparison:
    """Sample the teacher, notebook 02's students and the DMD2 students.

    Args:
        lab: with the teacher.
        budget: how much is measured.
        seed: of the noise.
        profile: with ``fresh``, the budget that students are trained by; otherwise the shipped
            students (those of ``quick``) serve every profile.
        fresh: train the DMD2 students again.
    """
    chosen = profile if fresh else "quick"
    longer = [(f"dmd2-{name}", of.steps) for name, of in LONGER.items()]
    seeded = [*product(("dmd2",), budget.steps), *longer]
    ours: list[Key] = [(family, steps, k) for family, steps in seeded for k in range(budget.seeds)]
    ours += [(f"dmd2-{name}", FEW, 0) for name in budget.variants]
    if fresh:
        for family, steps, k in ours:
            recipe = student_recipe(family, steps=steps, profile=profile, seed=k)
            lab.trained(recipe, fresh=True)
    older = list(product(TRAJECTORY, budget.steps, range(budget.seeds)))
    teacher = Sampling(n=budget.captions, seed=seed)
    many = {"n": budget.prompts * budget.noises, "noises": budget.noises}
    return Comparison(
        lab=lab,
        budget=budget,
        teacher=lab.samples(teacher, "teacher, 40 steps"),
        teacher_prompts=lab.samples(
            teacher.model_copy(update=many), "teacher, many noises of a caption"
        ),
        drawn=draw_students(
            lab, [*ours, *older], captions=budget.captions, seed=seed, profile=chosen
        ),
        prompts=draw_students(
            lab,
            ours,
            captions=budget.prompts,
            noises=budget.noises,
            seed=seed,
            profile=chosen,
        ),
    )


# --- statistics ---------------------------------------------------------------------------------


def intervals(comparison: Comparison, sampler: Sampler) -> dict[str, Interval]:
    """Every metric of a sampler, with intervals over trainings and images."""
    measured = comparison.measured
    return matching.intervals(measured[sampler], measured[TEACHER], comparison.real_cdf)


def table(comparison: Comparison) -> pd.DataFrame:
    """Every metric of every sampler; long form ``family, steps, metric, value, low, high``."""
    rows = []
    with progress(len(comparison.samplers), "intervals") as tick:
        for done, (family, steps) in enumerate(comparison.samplers, start=1):
            for metric, interval in intervals(comparison, (family, steps)).items():
                at = np.nan if family == "teacher" else steps
                rows.append({"family": family, "steps": at, "metric": metric, **vars(interval)})
            tick(done, "")
    return pd.DataFrame(rows)


def variant_titles(comparison: Comparison) -> dict[str, str]:
    """Families of the 2-step students, plain and changed, and their titles."""
    changed = {f"dmd2-{name}": VARIANTS[name].title for name in comparison.budget.variants}
    plain = f"DMD2, second time {SECOND:g}"
    return {"teacher": TITLES["teacher"], "dmd2": plain, **changed}


def steps_title(family: str, steps: int) -> str:
    """A family's title and its number of steps, and the times of DMD2's two."""
    times = f" ({FEW_TIMES})" if (family, steps) == ("dmd2", FEW) else ""
    return f"{FAMILIES[family].title}, {steps} steps{times}"


def longer_titles() -> dict[str, str]:
    """Families of students that were trained longer, after the plain one, and their titles."""
    changed = {f"dmd2-{name}": of.title for name, of in LONGER.items()}
    return {"teacher": TITLES["teacher"], "dmd2": "DMD2", **changed}


def curves(comparison: Comparison) -> pd.DataFrame:
    """Training history of the first training of each plain student, and with other fake updates.

    Columns ``student``, ``calls`` (network calls per sample so far), ``term``, ``value``.
    """
    rows = []
    shown = [("dmd2", steps, f"{steps} steps") for steps in comparison.budget.steps]
    shown += [
        (f"dmd2-{name}", FEW, f"{FEW} steps, {VARIANTS[name].title}")
        for name in comparison.budget.variants
        if name.startswith("updates")
    ]
    for family, steps, name in shown:
        recipe = student_recipe(family, steps=steps)
        student = comparison.drawn.students[family, steps, 0]
        for line in history(student.artefact):
            at = line["step"] * _calls_per_round(recipe)
            for term, value in line["terms"].items():
                rows.append({"student": name, "calls": at, "term": term, "value": value})
    return pd.DataFrame(rows)


def _calls_per_round(recipe: Recipe) -> float:
    from turbo_lab.recipes.distribution import calls_per_round

    options = recipe.stages[-1].options
    return calls_per_round(len(recipe.times), int(str(options["rival_updates"])))


def training_cost(comparison: Comparison) -> pd.DataFrame:
    """What training each DMD2 student took: students, seconds, megabytes."""
    groups: dict[str, list[Any]] = {}
    for (family, steps, _), student in comparison.drawn.students.items():
        if family.startswith("dmd2"):
            groups.setdefault(steps_title(family, steps), []).append(student.artefact)
    rows = [
        {
            "student": name,
            "trainings": len(found),
            "seconds each": round(sum(a.card.get("seconds", 0.0) for a in found) / len(found)),
            "MB each": found[0].file("weights.safetensors").stat().st_size / 1e6,
        }
        for name, found in groups.items()
    ]
    return pd.DataFrame(rows).set_index("student").round(2)


# --- claims -------------------------------------------------------------------------------------


def claims(comparison: Comparison, *, profile: str) -> list[Claim]:
    """C2 at 4 and 8 steps, trained longer too, and C3 at 2, part by part."""
    repaired = [n for n in comparison.budget.steps if n > FEW]
    made = [one for n in sorted(repaired) for one in _repairs(comparison, n)]
    made += [*_trained_longer(comparison), *_breaks(comparison)]
    common: dict[str, Any] = {
        "notebook": NOTEBOOK,
        "source": SOURCE,
        "seeds": comparison.budget.seeds,
        "samples": comparison.budget.captions,
        "profile": profile,
        "artefact_keys": comparison.keys,
    }
    return [Claim(**one, **common) for one in made]


def _repairs(comparison: Comparison, steps: int) -> list[dict[str, Any]]:
    """C2: details come back, against the best trajectory student of as many calls."""
    own, teacher = comparison.measured["dmd2", steps], comparison.measured[TEACHER]
    others = [comparison.measured[f, steps] for f in TRAJECTORY]
    share = "high_frequency_share"
    sharp = own.values[share], like(teacher.values[share], own.values[share])
    read = own.values["sign_read"], like(teacher.values["sign_read"], own.values["sign_read"])

    def beats(metric: str) -> Interval:
        rows = [own.values[metric] - other.values[metric] for other in others]
        return cl.crossed_bootstrap(*rows, statistic=lambda *of: min(float(d.mean()) for d in of))

    return [
        _row(f"C2-read-{steps}", f"DMD2 at {steps} steps reads more signs than any trajectory "
             "student", "signs read, minus the best of 4 methods", beats("sign_read"), "above", 0),
        _row(f"C2-sharp-{steps}", f"DMD2 at {steps} steps is sharper than any trajectory student",
             "high-frequency share, minus the largest of 4 methods", beats(share), "above", 0),
        _row(f"C2-teacher-read-{steps}", f"DMD2 at {steps} steps reads nearly as many signs as "
             "its teacher", "signs read, of the teacher's",
             cl.crossed_bootstrap(*read, statistic=ratio), "above", 0.95),
        _row(f"C2-teacher-sharp-{steps}", f"DMD2 at {steps} steps is not blurred",
             "high-frequency share, of the teacher's",
             cl.crossed_bootstrap(*sharp, statistic=ratio), "above", 0.9),
    ]  # fmt: skip


def _trained_longer(comparison: Comparison) -> list[dict[str, Any]]:
    """C2 and C3 once more: what a longer training brings, and what it breaks."""
    steps = LONGER[LONG].steps
    own, plain = comparison.measured[f"dmd2-{LONG}", steps], comparison.measured["dmd2", steps]
    read, before = own.values["sign_read"], plain.values["sign_read"]
    teacher, moss = comparison.measured[TEACHER].values, own.values["moss_energy"]
    theirs = like(teacher["sign_read"], read)
    longer = f"DMD2 at {steps} steps, trained longer in a larger adapter,"
    return [
        _row(f"C2-long-{steps}", f"{longer} reads more signs than the plain one",
             "signs read, minus the plain student's", cl.crossed_bootstrap(read - before),
             "above", 0),
        _row(f"C2-long-teacher-{steps}", f"{longer} reads nearly as many signs as its teacher",
             "signs read, of the teacher's",
             cl.crossed_bootstrap(read, theirs, statistic=ratio), "above", 0.95),
        _row(f"C3-long-sharp-{steps}", f"{longer} over-sharpens moss",
             "band energy on moss, minus the teacher's",
             cl.crossed_bootstrap(moss - like(teacher["moss_energy"], moss)), "above", 0),
    ]  # fmt: skip


def _breaks(comparison: Comparison) -> list[dict[str, Any]]:
    """C3: at two steps, against the teacher on the same captions and noise.

    The hues are held against notebook 02's students too: two steps alone may move them.
    """
    own, teacher = comparison.measured["dmd2", FEW], comparison.measured[TEACHER]

    def more(metric: str) -> Interval:
        rows = own.values[metric]
        return cl.crossed_bootstrap(rows - like(teacher.values[metric], rows))

    modes = own.hue_mode, like(teacher.hue_mode, own.hue_mode)
    hue = cl.crossed_bootstrap(*modes, statistic=lambda a, b: hue_kl(a) - hue_kl(b), resamples=300)
    others = [comparison.measured[f, FEW].hue_mode for f in TRAJECTORY]
    more_than_others = cl.crossed_bootstrap(
        own.hue_mode, *others, statistic=_beyond_the_mean, resamples=300
    )
    distance = own.diversity, like(teacher.diversity, own.diversity)
    w1, w1_teacher = (matching.chroma_distance(m, comparison.real_cdf) for m in (own, teacher))
    at, n = matching.indices(own), own.hue_mode.shape[1]
    chroma_gap = cl.crossed_bootstrap(
        at, statistic=lambda i: w1(i) - w1_teacher(i % n), resamples=300
    )
    few = f"at {FEW} steps DMD2"
    return [
        _row("C3-hue", f"{few} leaves the garment hues' distribution",
             "hue KL to truth, minus the teacher's", hue, "above", 0),
        _row("C3-hue-own", f"{few} leaves the hues' distribution further than the students "
             "of notebook 02", f"hue KL to truth, minus the mean of {len(others)} methods",
             more_than_others, "above", 0),
        _row("C3-diversity", f"{few} draws one caption more alike", "distance between samples of "
             "one caption, of the teacher's", cl.crossed_bootstrap(*distance, statistic=ratio),
             "below", 1),
        _row("C3-saturation", f"{few} over-saturates", "mean saturation, minus the teacher's",
             more("saturation"), "above", 0),
        _row("C3-chroma", f"{few} leaves the real chroma distribution",
             "chroma distance to real, minus the teacher's", chroma_gap, "above", 0),
        _row("C3-clipped", f"{few} clips more pixels", "clipped share, minus the teacher's",
             more("clipped"), "above", 0),
        _row("C3-sharp", f"{few} over-sharpens", "high-frequency share, minus the teacher's",
             more("high_frequency_share"), "above", 0),
        _row("C3-bodies", f"{few} breaks bodies", "whole bodies, minus the teacher's",
             more("whole_body"), "below", 0),
    ]  # fmt: skip


def _beyond_the_mean(own: np.ndarray, *others: np.ndarray) -> float:
    """Hue KL of one method minus the mean over others."""
    return hue_kl(own) - float(np.mean([hue_kl(other) for other in others]))


def scaled(budget: Budget, captions: int) -> Budget:
    """The budget with another number of captions; 0 keeps its own."""
    return replace(budget, captions=captions) if captions else budget
