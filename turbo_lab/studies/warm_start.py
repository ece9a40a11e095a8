"""Notebook 04: what a warm start by phased consistency does for distribution matching."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
from turbo_lab.recipes import FAMILIES, Profile, six_blocks, student_recipe
from turbo_lab.recipes.distribution import SECOND
from turbo_lab.recipes.warm import SHARE, STARTS, STEPS, TIMES
from turbo_lab.sampling import Sampling
from turbo_lab.studies import matching
from turbo_lab.studies.distribution import SOURCE
from turbo_lab.studies.matching import METRICS, PARTS, Measured, claim_row, hue_kl, like
from turbo_lab.studies.students import Drawn, Key, draw_students

NOTEBOOK = "04_pcm_warm_start"
TEACHER, NAIVE, ALONE, START, DIRECT, WARM = (
    "teacher", "naive", "pcm", "warm-start", "dmd2", "warm",
)  # fmt: skip
STUDENTS = (ALONE, START, DIRECT, WARM)
"""Families with a student for every seed of the training; those of a sweep have the first seed."""
EARLIER = "warm-second-0.5"
"""The one of a sweep that has every seed as well, and so has direct DMD2 of its second time: where
bodies come out best with or without a warm start."""
LATER = six_blocks.PCM
"""PCM alone by more calls, of the teacher of six blocks and with another edge; one training."""
TITLES = {
    TEACHER: "teacher, 40 steps",
    NAIVE: f"teacher, {STEPS} steps",
    ALONE: "PCM alone",
    START: f"warm start ({SHARE:.0%} of the calls)",
    DIRECT: "DMD2 directly",
    WARM: "PCM, then DMD2",
}
RIGHT = {"heads_right": "1 head", "arms_right": "2 arms", "legs_right": "2 legs"}
"""Share of pictures with the right count of a part."""
ALL_METRICS = {**RIGHT, **METRICS}
MOST = 3
"""Found parts are counted as 0, 1, 2 and 3 or more."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much a profile measures; the code is the same."""

    captions: int
    seeds: int
    prompts: int = 6
    noises: int = 24
    sweep: tuple[str, ...] = tuple(name for name in STARTS if name != WARM)


BUDGETS: Mapping[str, Budget] = MappingProxyType(
    {
        "smoke": Budget(captions=6, seeds=1, prompts=2, noises=4, sweep=("warm-share-50",)),
        "quick": Budget(captions=128, seeds=3),
        "paper": Budget(captions=512, seeds=6, prompts=16),
    }
)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Teacher and students on the same captions and noise, and many noises of a few captions."""

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
    def families(self) -> tuple[str, ...]:
        """Everyone who was sampled: teacher, students, sweeps."""
        return (*self.plain, *dict.fromkeys(family for family, _, _ in self.drawn.samples))

    @cached_property
    def measured(self) -> dict[str, Measured]:
        """Everything measured, by family."""
        out, scenes = {}, self.plain[TEACHER][0].scenes
        with progress(len(self.families), "reading the pictures") as tick:
            for done, family in enumerate(self.families, start=1):
                pictures = images_of(self, family), images_of(self, family, prompts=True)
                out[family] = matching.measured(*pictures, scenes.fields, self.budget.noises)
                tick(done, family)
        return out

    @cached_property
    def real_cdf(self) -> np.ndarray:
        """Cumulative chroma histogram of real postcards ``[bins]``."""
        return measure.chroma_cdf(self.lab.testbed.real(matching.REAL)).numpy().mean(0)


def images_of(comparison: Comparison, family: str, *, prompts: bool = False) -> list[Tensor]:
    """Images of a family, one tensor ``[n, 3, 32, 32]`` per training.

    Args:
        comparison: of all families.
        family: a student's, or the teacher's at 40 or at few steps.
        prompts: many noises of a few captions instead of one noise of many.
    """
    if family in comparison.plain:
        return [comparison.plain[family][int(prompts)].images]
    drawn = comparison.prompts if prompts else comparison.drawn
    return [drawn.samples[key].images for key in sorted(drawn.samples) if key[0] == family]


def compare(
    lab: Lab, budget: Budget, *, seed: int, profile: Profile = "quick", fresh: bool = False
) -> Comparison:
    """Sample the teacher, at 40 and at 2 steps, and every 2-step student.

    Args:
        lab: with the teacher.
        budget: how much is measured.
        seed: of the noise.
        profile: with ``fresh``, the budget that students are trained by; otherwise the shipped
            students (those of ``quick``) serve every profile.
        fresh: train the students again, but for `LATER`.
    """
    chosen = profile if fresh else "quick"
    keys: list[Key] = list(product(STUDENTS, (STEPS,), range(budget.seeds)))
    swept = dict.fromkeys((*budget.sweep, *map(direct_of, budget.sweep)))
    for family in swept:
        seeds = budget.seeds if family in (EARLIER, direct_of(EARLIER)) else 1
        keys += [(family, STEPS, k) for k in range(seeds) if family not in STUDENTS]
    keys.append((LATER, STEPS, 0))
    if fresh:
        for family, steps, k in keys:
            # The start is trained as the first stage of `WARM`; the other takes hours.
            if family not in (START, LATER):
                lab.trained(
                    student_recipe(family, steps=steps, profile=profile, seed=k), fresh=True
                )
    sizes = {"captions": (budget.captions, 1), "prompts": (budget.prompts, budget.noises)}
    drawn = {
        name: draw_students(
            lab, keys, captions=captions, noises=noises, seed=seed, profile=chosen
        )
        for name, (captions, noises) in sizes.items()
    }  # fmt: skip
    plain: dict[str, list[Samples]] = {TEACHER: [], NAIVE: []}
    for captions, noises in sizes.values():
        forty = Sampling(n=captions * noises, noises=noises, seed=seed)
        few = forty.model_copy(update={"steps": STEPS, "times": TIMES})
        plain[TEACHER].append(lab.samples(forty, f"{TITLES[TEACHER]}, {noises} of a caption"))
        plain[NAIVE].append(lab.samples(few, TITLES[NAIVE]))
    return Comparison(
        lab=lab,
        budget=budget,
        plain={name: (pair[0], pair[1]) for name, pair in plain.items()},
        drawn=drawn["captions"],
        prompts=drawn["prompts"],
    )


def direct_of(family: str) -> str:
    """The family without a warm start whose student has the same second time."""
    second = STARTS[family].second if family in STARTS else SECOND
    return DIRECT if second == SECOND else f"{DIRECT}-second-{second:g}"


def scaled(budget: Budget, captions: int) -> Budget:
    """The budget with another number of captions; 0 keeps its own."""
    return replace(budget, captions=captions) if captions else budget


# --- tables -------------------------------------------------------------------------------------


def intervals(comparison: Comparison, found: Measured) -> dict[str, Interval]:
    """Every metric of what was measured, with intervals over trainings and images."""
    parts = {
        f"{part}_right": cl.crossed_bootstrap(found.values[part] == n) for part, n in PARTS.items()
    }
    teacher = comparison.measured[TEACHER]
    return {**matching.intervals(found, teacher, comparison.real_cdf), **parts}


def table(comparison: Comparison) -> pd.DataFrame:
    """Every metric of teacher and main students.

    Long form ``family, steps, metric, value, low, high``; the steps of the teacher are NaN.
    """
    rows = []
    with progress(len(TITLES), "intervals") as tick:
        for done, family in enumerate(TITLES, start=1):
            at = np.nan if family == TEACHER else STEPS
            rows += _rows(comparison, family, at)
            tick(done, family)
    return pd.DataFrame(rows)


def _rows(comparison: Comparison, family: str, steps: float) -> list[dict[str, Any]]:
    """The rows of `table` about one family."""
    found = intervals(comparison, comparison.measured[family])
    return [{"family": family, "steps": steps, "metric": m, **vars(found[m])} for m in found]


def wide(rows: pd.DataFrame, *metrics: str) -> pd.DataFrame:
    """One row per sampler, one column per metric, as ``value [low, high]``."""
    found = matching.wide(rows, TITLES, metrics, ALL_METRICS)
    return found.droplevel("steps").reindex(list(TITLES.values()))


def alone(comparison: Comparison, *metrics: str) -> pd.DataFrame:
    """PCM without DMD2, short and long: one column per metric, as ``value [low, high]``."""
    titles, rows = {ALONE: TITLES[ALONE], LATER: FAMILIES[LATER].title}, []
    for family in titles:
        rows += _rows(comparison, family, STEPS)
    shown = matching.wide(pd.DataFrame(rows), titles, metrics, ALL_METRICS)
    return shown.droplevel("steps").reindex(list(titles.values()))


def limb_counts(comparison: Comparison) -> pd.DataFrame:
    """How often 0, 1, 2 and 3 or more heads, arms and legs are found.

    Columns ``family``, ``part``, ``found``, ``share`` of the pictures of all trainings; every
    picture was asked for one head, two arms and two legs.
    """
    rows = []
    for family, part in product(TITLES, PARTS):
        counts = comparison.measured[family].values[part].clip(max=MOST)
        for found in range(MOST + 1):
            share = float((counts == found).mean())
            rows.append({"family": family, "part": part, "found": found, "share": share})
    return pd.DataFrame(rows)


def by_training(comparison: Comparison, metric: str = "whole_body") -> pd.DataFrame:
    """A rate of direct and warm DMD2, seed by seed of the training, and the paired difference."""
    direct, warm = (comparison.measured[f].values[metric] for f in (DIRECT, WARM))
    rows = [
        {
            TITLES[DIRECT]: float(a.mean()),
            TITLES[WARM]: float(b.mean()),
            "difference [95%]": str(cl.paired_difference(b, a)),
        }
        for a, b in zip(direct, warm, strict=True)
    ]
    return pd.DataFrame(rows).rename_axis("training").round(3)


# --- claims -------------------------------------------------------------------------------------


def claims(comparison: Comparison, *, profile: str) -> list[Claim]:
    """C4: warm minus direct, paired by training seed, caption and noise; and PCM by itself."""
    common: dict[str, Any] = {
        "notebook": NOTEBOOK,
        "source": SOURCE,
        "seeds": comparison.budget.seeds,
        "samples": comparison.budget.captions,
        "profile": profile,
        "artefact_keys": comparison.keys,
    }
    return [Claim(**{**common, **one}) for one in (*_gains(comparison), *_alone(comparison))]


def _gains(comparison: Comparison) -> list[dict[str, Any]]:
    """What the warm start changes at equal network calls."""
    warm, direct = comparison.measured[WARM], comparison.measured[DIRECT]

    def more(metric: str) -> Interval:
        return cl.crossed_bootstrap(warm.values[metric] - direct.values[metric])

    def counted(part: str) -> Interval:
        right = [found.values[part] == PARTS[part] for found in (warm, direct)]
        return cl.crossed_bootstrap(right[0].astype(float) - right[1])

    hue = cl.crossed_bootstrap(
        warm.hue_mode, direct.hue_mode, statistic=lambda a, b: hue_kl(a) - hue_kl(b), resamples=300
    )
    teacher = like(comparison.measured[TEACHER].diversity, warm.diversity)
    off = cl.crossed_bootstrap(warm.diversity, direct.diversity, teacher, statistic=_further_off)
    better = "at equal network calls a warm start by PCM"
    rate = "minus those of direct DMD2"
    return [
        claim_row("C4-bodies", f"{better} gives more whole bodies", f"whole bodies, {rate}",
                  more("whole_body"), "above", 0),
        *(_earlier(comparison, rate) if EARLIER in comparison.families else ()),
        *(
            claim_row(f"C4-{part}", f"{better} gives more figures the right number of {part}",
                      f"figures with {RIGHT[f'{part}_right']}, {rate}", counted(part), "above", 0)
            for part in PARTS
        ),
        claim_row("C4-ghosts", f"{better} leaves fewer ghost signs", f"ghost signs, {rate}",
                  more("ghost_signs"), "below", 0),
        claim_row("C4-read", f"{better} gets more signs read", f"signs read, {rate}",
                  more("sign_read"), "above", 0),
        claim_row("C4-hue", f"{better} keeps the garment hues nearer to their distribution",
                  "hue KL to truth, minus that of direct DMD2", hue, "below", 0),
        claim_row("C4-diversity", f"{better} draws one caption as variously as the teacher, nearer "
                  "than direct DMD2 does", "|distance between samples of one caption, of the "
                  "teacher's - 1|, minus that of direct DMD2", off, "below", 0),
    ]  # fmt: skip


def _further_off(warm: np.ndarray, direct: np.ndarray, teacher: np.ndarray) -> float:
    """How much further from 1 the ratio of the one's sum to the teacher's is than the other's."""
    off = [abs(matching.ratio(one, teacher) - 1) for one in (warm, direct)]
    return off[0] - off[1]


def _earlier(comparison: Comparison, rate: str) -> Iterator[dict[str, Any]]:
    """The same with the second step earlier in the path, where bodies are best."""
    warm, direct = (
        comparison.measured[f].values["whole_body"] for f in (EARLIER, direct_of(EARLIER))
    )
    second = STARTS[EARLIER].second
    yield claim_row(
        f"C4-bodies-{second:g}",
        f"the same with the second time at {second:g}",
        f"whole bodies, {rate} of that second time",
        cl.crossed_bootstrap(warm - direct),
        "above",
        0,
    )


def _alone(comparison: Comparison) -> list[dict[str, Any]]:
    """PCM without DMD2, by all the calls."""
    own, naive = comparison.measured[ALONE].values, comparison.measured[NAIVE].values
    bodies = own["whole_body"], like(naive["whole_body"], own["whole_body"])
    times = cl.crossed_bootstrap(*bodies, statistic=lambda a, b: float(a.sum() / max(b.sum(), 1)))
    read = cl.crossed_bootstrap(own["sign_read"])
    few = naive["whole_body"].mean()
    later = cl.crossed_bootstrap(comparison.measured[LATER].values["sign_read"])
    return [
        claim_row("C4-pcm-alone-bodies", f"PCM alone gives twice the whole bodies of {STEPS} Euler "
                  f"steps of the teacher, which are whole in {few:.1%}",
                  "whole bodies, of those of the teacher at as few steps", times, "above", 2),
        claim_row("C4-pcm-read", f"PCM alone has its signs read at {STEPS} steps", "signs read",
                  read, "above", 0.95),
        {"seeds": 1, **claim_row("C4-pcm-six-read", "so has PCM of the teacher of six blocks, by "
                                 "eleven times the calls", "signs read", later, "above", 0.95)},
    ]  # fmt: skip
