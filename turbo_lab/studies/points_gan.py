"""Notebook 05, part A: what real data can do where the teacher itself is wrong, on points."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from types import MappingProxyType
from typing import Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from turbo_lab.claims import Claim, Interval, bootstrap, crossed_bootstrap
from turbo_lab.point_recipes import PointGan, gan_recipe
from turbo_lab.point_students import path_end, trained
from turbo_lab.progress import progress
from turbo_lab.store import Store
from turbo_lab.streams import noise
from turbo_lab.studies.points_budget import PointBudget, PointRun, budgets
from turbo_lab.studies.points_density import TITLES as DENSITY_TITLES
from turbo_lab.studies.points_density import measured
from turbo_lab.studies.points_gan_measures import (
    between,
    energy_rows,
    folded,
    round_mode,
    share_within,
    weights_off,
    width_of,
)
from turbo_lab.testbeds.points import BLUR, points, truth_of

NOTEBOOK = "05_gan_texture"
TILTED, BLURRED = "ring8-tilted", "ring8-blurred"
WORLDS: Mapping[str, str] = MappingProxyType({TILTED: "wrong weights", BLURRED: "blurred modes"})
"""Wrong teachers, and what is wrong with them; data are of `turbo_lab.testbeds.points.truth_of`."""
RHOS = (0.0, 0.25, 0.5, 0.75, 1.0)
GAN = PointGan(rho=1.0, weight=2.0, r1=0.01, noise_range=(0.0, 0.5))
"""The term of every student but for its rho. Chosen on a training seed that is not measured, one
for both teachers: a larger weight or less noise brought the weights or the width nearer to the
data, and fewer samples to the modes."""
ALONE = "DMD2 alone"
STUDENTS: Mapping[str, PointGan] = MappingProxyType(
    {
        ALONE: GAN.model_copy(update={"weight": 0.0}),
        **{f"rho {rho:g}": GAN.model_copy(update={"rho": rho}) for rho in RHOS},
    }
)
"""GAN terms by student. Of weight 0, a critic of the data learns beside a DMD2 that does not
notice it, so the angle between the two is known there too."""
LATE = 0.75
"""From this share of a training on, the angle is taken for a claim."""
_DMD2 = "Yin et al. 2024 (DMD2), arXiv 2405.14867"
_RATIO = "Goodfellow et al. 2014, arXiv 1406.2661, proposition 1"


BUDGETS = budgets(quick=2048, paper=8192)

Key = tuple[str, str]
"""World and student."""


@dataclass(frozen=True, kw_only=True)
class Runs:
    """All trainings, by world and student, one per seed.

    Attributes:
        budget: they were trained with.
        runs: one per seed.
        seed: of the sampling noise.
    """

    budget: PointBudget
    runs: Mapping[Key, tuple[PointRun, ...]]
    seed: int = 0

    @cached_property
    def samples(self) -> Mapping[Key, Tensor]:
        """Samples ``[seeds, samples, 2]`` of the finished students."""
        n, seed = self.budget.samples, self.seed
        return {
            key: torch.stack([run.samples(n, seed=seed) for run in runs])
            for key, runs in self.runs.items()
        }

    @cached_property
    def exact(self) -> Mapping[str, Tensor]:
        """Ends ``[samples, 2]`` of exact paths from the students' noise: of every world, and truth.

        These are samples of the teachers, and of the data, without any error of a network.
        """
        z = noise((2,), seed=self.seed, stream="z", indices=range(self.budget.samples))
        names = dict.fromkeys((*WORLDS, *map(truth_of, WORLDS)))
        return {name: path_end(points(name).teacher, z.double()).float() for name in names}

    @cached_property
    def far(self) -> Mapping[tuple[str, str, str], np.ndarray]:
        """Rows of `distance_rows` by world, sampler and target (truth, teacher), ``[seeds, N]``.

        Samplers are the students, and ``teacher`` and ``data``, which have one row of samples.
        """
        out = {}
        with progress(len(WORLDS) * (len(STUDENTS) + 2), "distances on points") as tick:
            for done, (world, who) in enumerate(product(WORLDS, (*STUDENTS, "teacher", "data"))):
                tick(done, f"{WORLDS[world]}, {who}")
                for target in ("truth", "teacher"):
                    rows = [distance_rows(world, x, target) for x in self.of(world, who)]
                    out[world, who, target] = torch.stack(rows).numpy()
        return out

    def of(self, world: str, who: str) -> Tensor:
        """Samples ``[seeds, N, 2]`` of a student, or ``[1, N, 2]`` of ``teacher`` or ``data``."""
        exact = {"teacher": world, "data": truth_of(world)}
        return self.exact[exact[who]][None] if who in exact else self.samples[world, who]

    @property
    def keys(self) -> tuple[str, ...]:
        """Artefact keys."""
        return tuple(sorted({run.artefact.key for runs in self.runs.values() for run in runs}))


def gan_runs(
    budget: PointBudget, *, seed: int = 0, store: Store | None = None, fresh: bool = False
) -> Runs:
    """Train (or find) the students of both wrong teachers, in equally many rounds.

    Students of a seed see the same noise and start from one network, fitted to the wrong teacher.

    Args:
        budget: one of `BUDGETS`.
        seed: of the noise that students are sampled from.
        store: where artefacts are.
        fresh: train again.
    """
    wanted = list(product(WORLDS, STUDENTS, range(budget.seeds)))
    runs: dict[Key, tuple[PointRun, ...]] = {}
    with progress(len(wanted), "GAN on points") as tick:
        for done, (world, student, k) in enumerate(wanted):
            tick(done, f"{WORLDS[world]}, {student}, seed {k}")
            recipe = gan_recipe(STUDENTS[student], profile=budget.profile, seed=k, world=world)
            run = PointRun(recipe=recipe, artefact=trained(recipe, store=store, fresh=fresh))
            runs[world, student] = (*runs.get((world, student), ()), run)
    return Runs(budget=budget, runs=runs, seed=seed)


# --- tables -------------------------------------------------------------------------------------


def distance_rows(world: str, x: Tensor, target: str) -> Tensor:
    """Distance of samples ``[N, 2]`` from the data or their wrong teacher, as rows to average.

    It is the energy distance, see `turbo_lab.studies.points_gan_measures`: of positions, where the
    teacher's weights are wrong; of positions within a mode, where its modes are blurred. There it
    is against N(0, 1) and N(0, BLUR²), and a teacher's samples are not quite the latter: 7% of
    them are nearer to another mode than to their own.

    Args:
        world: one of `WORLDS`.
        x: samples.
        target: truth or teacher.
    """
    truth = points(truth_of(world)).teacher
    if world == BLURRED:
        return energy_rows(folded(x, truth), round_mode(BLUR if target == "teacher" else 1.0))
    return energy_rows(x, truth if target == "truth" else points(world).teacher)


def teachers() -> pd.DataFrame:
    """What is wrong with each teacher, exact: nothing is sampled.

    Columns ``energy`` (distance from the data), ``shape`` (the same within a mode), ``mode_kl``
    (weights from the data's), ``heaviest`` (mode over the lightest), ``width`` (mean over modes, 1
    for the data) and ``within`` (share within 3 sigma of a mode of the data).
    """
    rows = []
    for world in dict.fromkeys((*map(truth_of, WORLDS), *WORLDS)):
        truth, wrong = points(truth_of(world)).teacher, points(world).teacher
        width = float((wrong.stds / truth.stds).mean())
        rows.append(
            {
                "teacher": WORLDS.get(world, "the data themselves"),
                "energy": between(wrong, truth),
                "shape": between(round_mode(width), round_mode(1.0)),
                "mode_kl": weights_off(wrong, truth),
                "heaviest": float(wrong.weights.max() / wrong.weights.min()),
                "width": width,
                "within": share_within(wrong, truth),
            }
        )
    return pd.DataFrame(rows).set_index("teacher")


def own_distance(world: str) -> float:
    """The wrong teacher's own distance from the data, exact, in the sense of `distance_rows`."""
    if world == BLURRED:
        return between(round_mode(BLUR), round_mode(1.0))
    return between(points(world).teacher, points(truth_of(world)).teacher)


def table(runs: Runs) -> pd.DataFrame:
    """All students, and as many exact samples of their teacher and of the data.

    Columns ``world``, ``student`` (also teacher, data), ``rho`` (NaN but for GAN students),
    ``seed``, ``to_truth``, ``to_teacher`` (see `distance_rows`), ``width`` of modes, and against
    the data ``within``, ``covered``, ``mode_rkl``, ``rkl`` and ``fkl`` of
    `turbo_lab.studies.points_density.measured`.
    """
    rows = []
    for world, who in product(WORLDS, (*STUDENTS, "teacher", "data")):
        far = [runs.far[world, who, target].mean(1) for target in ("truth", "teacher")]
        for k, x in enumerate(runs.of(world, who)):
            where = {"world": WORLDS[world], "student": who, "rho": rho_of(who), "seed": k}
            apart = {"to_truth": float(far[0][k]), "to_teacher": float(far[1][k])}
            truth = truth_of(world)
            width = width_of(x, points(truth).teacher)
            rows.append({**where, **apart, "width": width, **measured(truth, x)})
    return pd.DataFrame(rows)


def rho_of(who: str) -> float:
    """The share of real data of a student's critic; NaN without one that it follows."""
    return STUDENTS[who].rho if who in STUDENTS and who != ALONE else float("nan")


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds of `table`."""
    far = {"to_truth": "distance to the data", "to_teacher": "distance to the teacher"}
    titles = {**far, "width": "width of modes, 1 for the data", **DENSITY_TITLES}
    by = ["world", "student"]
    return rows.groupby(by, sort=False)[list(titles)].mean().round(3).rename(columns=titles)


def intervals(runs: Runs) -> pd.DataFrame:
    """Both distances of every student with their intervals over seeds and samples.

    Columns ``world``, ``student``, ``rho``, ``target``, ``value``, ``low``, ``high``.
    """
    rows = []
    for world, who, target in product(WORLDS, STUDENTS, ("truth", "teacher")):
        found = crossed_bootstrap(runs.far[world, who, target])
        where = {"world": WORLDS[world], "student": who, "rho": rho_of(who), "target": target}
        rows.append({**where, **dataclasses.asdict(found)})
    return pd.DataFrame(rows)


def angles(runs: Runs) -> pd.DataFrame:
    """How the GAN's gradient lies to DMD2's at the student's samples, along training.

    Columns ``world``, ``student``, ``seed``, ``part`` (of the training), ``cosine`` (mean over
    samples) and ``ratio`` (of the mean sizes, GAN over DMD2, at weight 1).
    """
    rows = []
    for (world, student), found in runs.runs.items():
        for k, run in enumerate(found):
            history, rounds = run.history.dropna(), run.recipe.stages[-1].steps
            rows.append(
                pd.DataFrame(
                    {
                        "world": WORLDS[world], "student": student, "seed": k,
                        "part": history["round"] / rounds,
                        "cosine": history["student/cosine"],
                        "ratio": history["student/gan_pull"] / history["student/method_pull"],
                    }
                )
            )  # fmt: skip
    return pd.concat(rows, ignore_index=True)


# --- claims -------------------------------------------------------------------------------------


def claims(runs: Runs, *, profile: str) -> list[Claim]:
    """The claims of part A; where both teachers are asked, distances are in `own_distance`."""
    far, both = runs.far, f"of {len(WORLDS)} teachers"
    late = angles(runs).query("part > @LATE").groupby(["world", "student", "seed"])["cosine"].mean()

    def against_teacher(world: str, who: str) -> np.ndarray:
        return far[world, who, "truth"] - far[world, "teacher", "truth"]

    def in_units(a: str, b: str, target: str) -> list[np.ndarray]:
        return [(far[w, a, target] - far[w, b, target]) / own_distance(w) for w in WORLDS]

    angle = np.stack(
        [(late[w]["rho 1"] - late[w]["rho 0"]).to_numpy() for w in WORLDS.values()], axis=1
    )
    claim = _builder(runs, profile)
    return [
        claim("P18", "A GAN against real data passes a teacher of wrong weights", _DMD2,
              "energy distance to the data, rho 1 minus teacher",
              crossed_bootstrap(against_teacher(TILTED, "rho 1")), "below"),
        claim("P19", "A GAN against real data passes a teacher of blurred modes", _DMD2,
              "energy distance to the data within a mode, rho 1 minus teacher",
              crossed_bootstrap(against_teacher(BLURRED, "rho 1")), "below"),
        claim("P20", "More real data bring the student nearer to the truth", _RATIO,
              f"distance to the data, rho 1 minus 0; largest {both}",
              crossed_bootstrap(*in_units("rho 1", "rho 0", "truth"), statistic=_most), "below"),
        claim("P21", "More real data take the student away from its teacher", _RATIO,
              f"distance to the teacher, rho 1 minus 0; least {both}",
              crossed_bootstrap(*in_units("rho 1", "rho 0", "teacher"), statistic=_least), "above"),
        claim("P22", "With the teacher's samples alone the GAN does not pass the teacher", _RATIO,
              f"distance to the data, rho 0 minus teacher; least {both}",
              crossed_bootstrap(*in_units("rho 0", "teacher", "truth"), statistic=_least), "above"),
        claim("P23", "It is the GAN that does it, not DMD2", _DMD2,
              f"distance to the data, rho 1 minus DMD2 alone; largest {both}",
              crossed_bootstrap(*in_units("rho 1", ALONE, "truth"), statistic=_most), "below"),
        claim("P24", "Where the critic knows the data, the two gradients part", _RATIO,
              f"mean cosine late in training, rho 1 minus 0; over seeds; largest {both}",
              bootstrap(angle, statistic=_largest), "below"),
    ]  # fmt: skip


Build = Callable[[str, str, str, str, Interval, Literal["above", "below"]], Claim]


def _builder(runs: Runs, profile: str) -> Build:
    """What the claims share."""

    def build(
        id_: str,
        statement: str,
        source: str,
        statistic: str,
        interval: Interval,
        side: Literal["above", "below"],
    ) -> Claim:
        return Claim(
            id=id_, notebook=NOTEBOOK, statement=statement, source=source, statistic=statistic,
            interval=interval, side=side, threshold=0.0, seeds=runs.budget.seeds,
            samples=runs.budget.samples, profile=profile, artefact_keys=runs.keys,
        )  # fmt: skip

    return build


def _most(*outcomes: np.ndarray) -> float:
    return max(float(one.mean()) for one in outcomes)


def _least(*outcomes: np.ndarray) -> float:
    return min(float(one.mean()) for one in outcomes)


def _largest(angle: np.ndarray) -> float:
    """Of the means over seeds ``[seeds, worlds]``."""
    return float(angle.mean(0).max())


def shares(world: str, x: Tensor) -> Sequence[float]:
    """Share of samples at every mode of the data."""
    found: Sequence[float] = points(truth_of(world)).measure(x)["mode_shares"]
    return found
