"""Notebook 06: the whole recipe at two steps, and a ladder of what it is made of.

Everyone is sampled for the same captions from the same noise. A rung is a sampler: the guided
teacher at 50, 40 and 2 steps, or a family of 2-step students with a training for every seed. The
students of the ladder spent equally many network calls; two beside it spent more, and one of these
has a teacher of its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from turbo_lab.atomic import atomic_write_text
from turbo_lab.lab import Lab, Samples
from turbo_lab.postcards import Scenes, render
from turbo_lab.progress import progress
from turbo_lab.recipes import FAMILIES, Profile, six_blocks, student_recipe
from turbo_lab.recipes.adversarial import CONTROL
from turbo_lab.recipes.turbo import LADDER, LONG, RUNGS, SECOND, TURBO
from turbo_lab.recipes.warm import STEPS
from turbo_lab.sampling import TEACHER_GUIDANCE, Sampling
from turbo_lab.studies.every_metric import (
    METRICS,
    Found,
    Reference,
    difference,
    find,
    floor,
    interval,
    reference,
)
from turbo_lab.studies.paired import holm, swapped
from turbo_lab.studies.students import Drawn, Key, draw_students

NOTEBOOK = "06_two_step_turbo"
SLOW, TEACHER, NAIVE, REAL = "teacher-50", "teacher", "naive", "real"
COLD, WARM = "dmd2-more", CONTROL
SIX, SIX_TEACHER = six_blocks.TURBO, "teacher-six"
TITLES = {
    REAL: "real, other pictures",
    SLOW: "teacher, 50 steps",
    TEACHER: "teacher, 40 steps",
    NAIVE: "teacher, 2 steps",
    "progressive-more": "progressive",
    "consistency-more": "consistency",
    COLD: "DMD2",
    WARM: "PCM, DMD2",
    **{name: rung.title for name, rung in RUNGS.items() if name != COLD},
    LONG: FAMILIES[LONG].title,
    SIX: FAMILIES[SIX].title,
    SIX_TEACHER: "its teacher, 40 steps",
}
"""Who is compared, from the top of tables and figures to the bottom."""
ABLATIONS = tuple(name for name in RUNGS if name not in (TURBO, COLD))
"""The whole recipe with one ingredient removed; without its GAN term it is `WARM`."""
RIVALS = (TEACHER, NAIVE, *(name for name in LADDER if name != TURBO))
"""Who the turbo student is tested against."""
PRIMARY = ("sign_read", "whole_body", "hue_kl", "chroma_w1", "moss_patches", "fur_patches")
"""Metrics that are tested; the others are shown."""
SHOWN = (*PRIMARY, "sign_alone", "ghost_signs", "sign_lost", "pose_right", "all_right",
         "saturation", "clipped", "contrast", "moss_energy", "fur_energy", "high_frequency_share",
         "diversity", "coverage", "psd_slope")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much a profile measures; the code is the same.

    Args:
        captions: of the table.
        seeds: trainings of each family.
        most: trainings of the families that have more of them, `MANY`.
        prompts: captions with many noises, for the diversity.
        noises: of each.
        real: postcards that distances are to.
        swaps: of each permutation test.
    """

    captions: int
    seeds: int
    most: int
    prompts: int = 8
    noises: int = 8
    real: int = 1024
    swaps: int = 999


MANY = (TURBO, WARM)
TRAININGS = 3
"""Of `SIX`, from one start; each takes an hour of a core, the start two and a half."""
BUDGETS: Mapping[str, Budget] = MappingProxyType(
    {
        "smoke": Budget(captions=32, seeds=1, most=1, prompts=2, noises=3, real=128, swaps=19),
        "quick": Budget(captions=160, seeds=3, most=6, swaps=299),
        "paper": Budget(captions=1024, seeds=6, most=6, prompts=32, real=8192, swaps=9999),
    }
)


@dataclass(frozen=True, kw_only=True)
class Ladder:
    """Samples of every rung, and what was found in them.

    ``plain`` are the teacher's by rung: for the captions, and many noises of a few of them.
    """

    lab: Lab
    budget: Budget
    plain: Mapping[str, tuple[Samples, Samples]]
    drawn: Drawn
    prompts: Drawn

    @property
    def keys(self) -> tuple[str, ...]:
        """Artefact keys of the students and of all samples."""
        own = [samples.key for pair in self.plain.values() for samples in pair]
        return tuple(dict.fromkeys((*self.drawn.keys, *self.prompts.keys, *own)))

    @property
    def rungs(self) -> tuple[str, ...]:
        """Everyone who was sampled, in the order of `TITLES`."""
        here = {*self.plain, *(family for family, _, _ in self.drawn.samples)}
        return tuple(name for name in TITLES if name in here)

    @property
    def scenes(self) -> Scenes:
        """What the captions ask for."""
        return self.plain[TEACHER][0].scenes

    @cached_property
    def reference(self) -> Reference:
        """Real postcards that distances are to."""
        return reference(self.budget.real)

    @cached_property
    def found(self) -> dict[str, list[Found]]:
        """What was found in each training of each rung, and in other real postcards."""
        few = {"captions": self.budget.prompts, "each": self.budget.noises}
        out = {REAL: floor(self.scenes, self.reference, **few)}
        with progress(len(self.rungs), "reading the pictures") as tick:
            for done, rung in enumerate(self.rungs, start=1):
                pairs = zip(images_of(self, rung), grids_of(self, rung), strict=True)
                out[rung] = [find(x, self.scenes, self.reference, g) for x, g in pairs]
                tick(done, rung)
        return out

    def nfe(self, rung: str) -> float:
        """Network forward passes per image."""
        if rung in self.plain:
            return self.plain[rung][0].nfe
        return next(s.nfe for (name, _, _), s in self.drawn.samples.items() if name == rung)


def images_of(ladder: Ladder, rung: str) -> list[Tensor]:
    """Images of a rung, one tensor ``[n, 3, 32, 32]`` per training."""
    if rung == REAL:
        return [render(ladder.scenes)]
    if rung in ladder.plain:
        return [ladder.plain[rung][0].images]
    drawn = ladder.drawn.samples
    return [drawn[key].images for key in sorted(drawn) if key[0] == rung]


def grids_of(ladder: Ladder, rung: str) -> list[Tensor]:
    """Many pictures of each of a few captions ``[captions, K, 3, 32, 32]`` per training."""
    if rung in ladder.plain:
        images = [ladder.plain[rung][1].images]
    else:
        drawn = ladder.prompts.samples
        images = [drawn[key].images for key in sorted(drawn) if key[0] == rung]
    return [one.unflatten(0, (-1, ladder.budget.noises)) for one in images]


def teachers() -> dict[str, Sampling]:
    """How teachers are sampled for each of their rungs; at 2 steps, at the students' times."""
    guided = Sampling(guidance_scale=TEACHER_GUIDANCE)
    return {
        SLOW: guided.model_copy(update={"steps": 50}),
        TEACHER: guided,
        NAIVE: guided.model_copy(update={"steps": STEPS, "times": (1.0, SECOND)}),
        SIX_TEACHER: guided,
    }


def climb(
    lab: Lab, budget: Budget, *, seed: int, profile: Profile = "quick", fresh: bool = False
) -> Ladder:
    """Sample the teacher, every family of the ladder, and the students beside it.

    Args:
        lab: with the teacher.
        budget: how much is measured.
        seed: of the noise.
        profile: with ``fresh``, the budget that students are trained by; otherwise the shipped
            students (those of ``quick``) serve every profile.
        fresh: train the students again, but for `SIX`, whose trainings share a start of hours.
    """
    families = (*LADDER, LONG, SIX)
    seeds = {f: budget.most if f in MANY else budget.seeds for f in families} | {SIX: TRAININGS}
    keys: list[Key] = [(f, STEPS, k) for f in families for k in range(seeds[f])]
    chosen: Profile = profile if fresh else "quick"
    if fresh:
        for family, steps, k in keys:
            recipe = student_recipe(family, steps=steps, profile=profile, seed=k)
            lab.trained(recipe, fresh=family != SIX)
    many, noises = budget.prompts * budget.noises, budget.noises
    drawn = draw_students(lab, keys, captions=budget.captions, seed=seed, profile=chosen)
    plain, other = {}, drawn.students[SIX, STEPS, 0].bench
    for rung, one in teachers().items():
        each = one.model_copy(update={"n": budget.captions, "seed": seed})
        grid = one.model_copy(update={"n": many, "noises": noises, "seed": seed})
        bench = other if rung == SIX_TEACHER else lab
        plain[rung] = bench.samples(each, TITLES[rung]), bench.samples(grid, TITLES[rung])
    return Ladder(
        lab=lab,
        budget=budget,
        plain=plain,
        drawn=drawn,
        prompts=draw_students(
            lab, keys, captions=budget.prompts, noises=noises, seed=seed, profile=chosen
        ),
    )


def scaled(budget: Budget, captions: int) -> Budget:
    """The budget with another number of captions; 0 keeps its own."""
    return replace(budget, captions=captions) if captions else budget


# --- tables -------------------------------------------------------------------------------------


def table(ladder: Ladder) -> pd.DataFrame:
    """Every metric of every rung and of other real postcards.

    Long form ``rung, metric, value, low, high``; means over trainings, 95% intervals over
    trainings and captions.
    """
    rows = []
    with progress(len(ladder.found), "intervals") as tick:
        for done, (rung, found) in enumerate(ladder.found.items(), start=1):
            rows += [
                {"rung": rung, "metric": metric, **vars(interval(found, metric))}
                for metric in METRICS
            ]
            tick(done, rung)
    return pd.DataFrame(rows)


def wide(ladder: Ladder, rows: pd.DataFrame, *metrics: str) -> pd.DataFrame:
    """One row per rung with its NFE, one column per metric, as ``value [low, high]``."""
    out = {}
    for rung in TITLES:
        of = rows[rows["rung"] == rung].set_index("metric")
        nfe = "" if rung == REAL else f"{ladder.nfe(rung):g}"
        texts = {_marked(m): _text(of.loc[m]) for m in metrics}
        out[TITLES[rung]] = {"NFE": nfe, **texts}
    return pd.DataFrame(out).T


def _marked(metric: str) -> str:
    return METRICS[metric].title + ARROWS[METRICS[metric].better]


def _text(row: pd.Series) -> str:
    if np.isnan(row["value"]):
        return ""
    return f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"


def tests(ladder: Ladder) -> pd.DataFrame:
    """The turbo student against each rival, paired by training, caption and noise.

    Columns ``rival, metric, value, low, high, p, holm``: turbo minus rival with its interval over
    trainings and captions; p of the permutation that swaps the two samplers' pictures of a
    caption, and p after Holm's correction over the rivals of that metric. The permutation takes
    the trainings as they are; the interval does not.
    """
    rows = []
    with progress(len(PRIMARY), "paired tests") as tick:
        for done, metric in enumerate(PRIMARY, start=1):
            block = [_test(ladder, rival, metric) for rival in RIVALS]
            corrected = holm([row["p"] for row in block])
            rows += [row | {"holm": p} for row, p in zip(block, corrected, strict=True)]
            tick(done, metric)
    return pd.DataFrame(rows)


def _test(ladder: Ladder, rival: str, metric: str) -> dict[str, Any]:
    ours, theirs = pairs(ladder, TURBO, rival)
    gap = difference(ours, theirs, metric)
    p = swapped(ours, theirs, metric, swaps=ladder.budget.swaps)
    return {"rival": rival, "metric": metric, **vars(gap), "p": p}


def pairs(ladder: Ladder, one: str, other: str) -> tuple[Sequence[Found], Sequence[Found]]:
    """Trainings of two rungs that share their seeds; one without trainings stands for each."""
    ours, theirs = ladder.found[one], ladder.found[other]
    if other not in ladder.plain:  # students pair by seed, and have no more pairs than the fewer
        n = min(len(ours), len(theirs))
        ours, theirs = ours[:n], theirs[:n]
    return ours, theirs


COLUMNS = {"sign_read": 2, "whole_body": 2, "all_right": 2, "hue_kl": 2, "moss_patches": 3,
           "fur_patches": 3}  # fmt: skip
"""Metrics of the README's table and their digits."""
ARROWS = {"more": " ↑", "less": " ↓", "as real": ""}
"""Which way is better, as tables mark it."""

HEADLINE = (REAL, TEACHER, NAIVE, "progressive-more", "consistency-more", COLD, WARM, TURBO, LONG,
            SIX, SIX_TEACHER)  # fmt: skip
"""Rows of the README's table."""


def headline(ladder: Ladder, rows: pd.DataFrame) -> dict[str, Any]:
    """What the README's table is made of: columns, rows and a note."""
    out = []
    for rung in HEADLINE:
        of = rows[rows["rung"] == rung].set_index("metric")
        values = {m: [float(of.loc[m, k]) for k in ("value", "low", "high")] for m in COLUMNS}
        values = {m: v for m, v in values.items() if np.isfinite(v).all()}
        nfe = None if rung == REAL else int(ladder.nfe(rung))
        out.append({"title": TITLES[rung], "nfe": nfe, "values": values})
    return {
        "columns": [
            {"key": m, "title": _marked(m), "digits": digits} for m, digits in COLUMNS.items()
        ],
        "rows": out,
        "note": f"{ladder.budget.captions} held-out captions, {ladder.budget.most} trainings of "
        f"the turbo student, {TRAININGS} of that of six blocks and {ladder.budget.seeds} or more "
        "of the others, means with 95% intervals over trainings and captions; students with 2 NFE "
        f"take steps at times 1 and {SECOND:g}, that of six blocks at 1 and {six_blocks.EDGE:g}. "
        "↑ more is better, ↓ less.",
    }


def save_headline(ladder: Ladder, rows: pd.DataFrame, folder: Path) -> Path:
    """Write ``headline.json``, of which the README's table is made, atomically."""
    path = folder / "headline.json"
    told = {**headline(ladder, rows), "figure": "pictures"}
    atomic_write_text(path, json.dumps(told, indent=1, ensure_ascii=False) + "\n")
    return path


FAILURES = {
    "sign_lost": "no sign",
    "ghost_signs": "more than one sign",
    "digits_right": "one sign, wrong digits",
    "third_digit": "one sign, read, and a third digit against it",
    "whole_body": "broken body",
}
"""What can be wrong with a picture, by the metric that tells; a picture may count twice."""


def failures(ladder: Ladder) -> pd.DataFrame:
    """How often pictures of each turbo and of the teachers fail: shares of all."""
    out = {}
    for rung in (TURBO, LONG, SIX, TEACHER, SIX_TEACHER):
        of = ladder.found[rung]
        out[TITLES[rung]] = {
            title: float(np.mean([failed(found, kind).mean() for found in of]))
            for kind, title in FAILURES.items()
        }
    return pd.DataFrame(out).round(3)


def failed(found: Found, kind: str) -> np.ndarray:
    """Which pictures ``[n]`` fail in one way of `FAILURES`."""
    values = found.values
    if kind == "digits_right":
        one = (values["sign_lost"] == 0) & (values["ghost_signs"] == 0)
        return one & (values["sign_read"] == 0)
    if kind == "third_digit":
        return (values["sign_alone"] == 1) & (values["third_digit"] == 1)
    return values[kind] == (0 if kind == "whole_body" else 1)
