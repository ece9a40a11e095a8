"""Notebook 04, part A: where a warm start puts samples before distribution matching, on points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from types import MappingProxyType
from typing import Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from turbo_lab.claims import Claim, Interval, crossed_bootstrap
from turbo_lab.path import mix
from turbo_lab.point_recipes import STARTS, WARM_SHARE
from turbo_lab.point_students import (
    CLOUD,
    PointRecipe,
    load,
    path_end,
    stage_samples,
    trained,
    warm_recipe,
)
from turbo_lab.progress import progress
from turbo_lab.store import Artefact, Store
from turbo_lab.streams import generator, noise
from turbo_lab.studies.points_budget import PointBudget, budgets
from turbo_lab.studies.points_density import TITLES as DENSITY_TITLES
from turbo_lab.studies.points_density import measured
from turbo_lab.studies.points_maps import outside
from turbo_lab.testbeds.points import points

NOTEBOOK = "04_pcm_warm_start"
WORLDS = ("grid25", "rare")
STEPS = 2
TITLES: Mapping[str, str] = MappingProxyType(
    {
        "cold": "cold",
        "consistency": "consistency",
        "pcm": "PCM",
        "pcm-fake": "PCM, fake warm too",
        "transition": "transition matching",
    }
)
TIMES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Noise at which the teacher is asked about a student's samples."""
ASKED = 0.5
"""The time of these that the claim is about."""
_SOURCE = "Wang et al. 2024 (PCM), arXiv 2405.18407, before Yin et al. 2024 (DMD2)"


BUDGETS = budgets(quick=4096, paper=16_384)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training, by its last stage, and what that stage started from."""

    recipe: PointRecipe
    artefact: Artefact
    before: Artefact

    def samples(self, n: int, *, seed: int) -> tuple[Tensor, Tensor]:
        """Samples ``[n, 2]`` before distribution matching and after it, from the same noise."""
        earlier = self.recipe.before or self.recipe.base
        assert earlier is not None
        fields = load(earlier, self.before), load(self.recipe, self.artefact)
        stage = self.recipe.stages[-1]
        before, after = (stage_samples(stage, field, n=n, seed=seed) for field in fields)
        return before, after

    @property
    def began(self) -> float:
        """Share of all network calls that its start has spent."""
        return WARM_SHARE if self.recipe.before else 0.0

    @property
    def clouds(self) -> dict[float, Tensor]:
        """Samples on the way, by the share of all network calls that were spent."""
        found, rounds = self.artefact.tensors("clouds.safetensors"), self.recipe.stages[-1].steps
        return {
            self.began + (1 - self.began) * int(name) / rounds: x.float()
            for name, x in sorted(found.items(), key=lambda item: int(item[0]))
        }


Key = tuple[str, str]
"""World and start."""


@dataclass(frozen=True, kw_only=True)
class Runs:
    """All trainings, by world and start, one per seed.

    Attributes:
        budget: they were trained with.
        runs: one per seed.
        seed: of the sampling noise.
    """

    budget: PointBudget
    runs: Mapping[Key, tuple[Run, ...]]
    seed: int = 0

    @cached_property
    def samples(self) -> Mapping[Key, Tensor]:
        """Samples ``[2, seeds, samples, 2]`` before and after distribution matching."""
        out = {}
        for key, runs in self.runs.items():
            pairs = [run.samples(self.budget.samples, seed=self.seed) for run in runs]
            out[key] = torch.stack([torch.stack(side) for side in zip(*pairs, strict=True)])
        return out

    @cached_property
    def ends(self) -> Mapping[str, Tensor]:
        """Ends ``[samples, 2]`` of the teacher's exact paths from the same noise, by world."""
        z = noise((2,), seed=self.seed, stream="z", indices=range(self.budget.samples))
        return {w: path_end(points(w).teacher, z.double()).float() for w in WORLDS}

    @property
    def keys(self) -> tuple[str, ...]:
        """Artefact keys."""
        flat = [run for runs in self.runs.values() for run in runs]
        return tuple(sorted({a.key for run in flat for a in (run.before, run.artefact)}))


def warm_runs(
    budget: PointBudget, *, seed: int = 0, store: Store | None = None, fresh: bool = False
) -> Runs:
    """Train (or find) a DMD2 student of 2 steps for every start, at equal network calls.

    Args:
        budget: one of `BUDGETS`.
        seed: of the noise that students are sampled from.
        store: where artefacts are.
        fresh: train again.
    """
    wanted = list(product(WORLDS, STARTS, range(budget.seeds)))
    runs: dict[Key, tuple[Run, ...]] = {}
    with progress(len(wanted), "starts on points") as tick:
        for done, (world, start, k) in enumerate(wanted):
            tick(done, f"{world}, {TITLES[start]}, seed {k}")
            recipe = warm_recipe(start, steps=STEPS, profile=budget.profile, seed=k, world=world)
            artefact = trained(recipe, store=store, fresh=fresh)
            earlier = recipe.before or recipe.base
            assert earlier is not None
            run = Run(recipe=recipe, artefact=artefact, before=trained(earlier, store=store))
            runs[world, start] = (*runs.get((world, start), ()), run)
    return Runs(budget=budget, runs=runs, seed=seed)


# --- tables -------------------------------------------------------------------------------------


def knowing(world: str, x: Tensor, ends: Tensor, t: float) -> Tensor:
    """How much the teacher, asked at x noised to t, means the place where its own path ends.

    Its clean image there is a mean over modes, weighted by how likely each is; this is the weight
    ``[N]`` of the mode that the end of the path is likeliest to be of, averaged over 8 noises.

    Args:
        world: the mixture.
        x: samples ``[N, 2]``.
        ends: ends of the teacher's paths from the same noises, ``[N, 2]``.
        t: in (0, 1).
    """
    teacher = points(world).teacher
    modes = teacher.responsibilities(ends).argmax(1)
    draw = generator(0, "knowing", str(t))
    found = []
    for _ in range(8):
        x_t = mix(x, torch.randn(x.shape, generator=draw), t)
        weights = teacher.responsibilities(x_t, torch.full((len(x),), t))
        found.append(weights.gather(1, modes[:, None])[:, 0])
    return torch.stack(found).mean(0)


def distances(runs: Runs) -> dict[Key, np.ndarray]:
    """Distance of every sample to the end of the teacher's path from its noise.

    By world and start, ``[2, seeds, samples]``: before and after distribution matching.
    """
    return {
        (world, start): (x - runs.ends[world]).norm(dim=-1).numpy()
        for (world, start), x in runs.samples.items()
    }


def table(runs: Runs) -> pd.DataFrame:
    """Every training before and after distribution matching.

    Columns ``world``, ``start``, ``seed``, ``when`` (before, after), ``distance`` (median, to the
    end of the teacher's path) and those of `turbo_lab.studies.points_density.measured`.
    """
    far, rows = distances(runs), []
    with progress(len(runs.samples), "starts, measured") as tick:
        for done, (key, clouds) in enumerate(runs.samples.items()):
            tick(done, " ".join(key))
            for side, when in enumerate(("before", "after")):
                for k, x in enumerate(clouds[side]):
                    row = {"world": key[0], "start": TITLES[key[1]], "seed": k, "when": when}
                    near = float(np.median(far[key][side, k]))
                    rows.append({**row, "distance": near, **measured(key[0], x)})
    return pd.DataFrame(rows)


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds of `table`."""
    titles = {"distance": "distance from the end", **DENSITY_TITLES}
    by = ["world", "start", "when"]
    return rows.groupby(by, sort=False)[list(titles)].mean().round(3).rename(columns=titles)


def course(runs: Runs) -> pd.DataFrame:
    """The clouds on the way, the first of them before distribution matching.

    Columns ``world``, ``start``, ``seed``, ``part`` (of all network calls) and those of
    `turbo_lab.studies.points_density.measured`.
    """
    rows = []
    with progress(len(runs.runs), "along training") as tick:
        for done, ((world, start), found) in enumerate(runs.runs.items()):
            tick(done, f"{world}, {TITLES[start]}")
            for k, run in enumerate(found):
                first = {run.began: runs.samples[world, start][0, k, :CLOUD]}
                for part, x in {**first, **run.clouds}.items():
                    where = {"world": world, "start": TITLES[start], "seed": k, "part": part}
                    rows.append({**where, **measured(world, x)})
    return pd.DataFrame(rows)


def pulls(runs: Runs) -> pd.DataFrame:
    """What the teacher says of samples before distribution matching begins.

    ``pcm-fake`` is left out: until then it is PCM.

    Columns ``world``, ``start``, ``seed``, ``t`` and ``knows``, the mean of `knowing`.
    """
    rows = []
    for (world, start), x in runs.samples.items():
        if start == "pcm-fake":
            continue
        for k, t in product(range(x.shape[1]), TIMES):
            knows = float(knowing(world, x[0, k], runs.ends[world], t).mean())
            rows.append({"world": world, "start": TITLES[start], "seed": k, "t": t, "knows": knows})
    return pd.DataFrame(rows)


# --- claims -------------------------------------------------------------------------------------


def claims(runs: Runs, *, profile: str) -> list[Claim]:
    """The claims of part A: PCM against a cold start, the least of two worlds."""
    far = distances(runs)
    nearer = [[far[w, "cold"][k] - far[w, "pcm"][k] for w in WORLDS] for k in (0, 1)]
    knows = [_knows(runs, w, "pcm") - _knows(runs, w, "cold") for w in WORLDS]
    inside = [_inside(runs, w, "pcm") - _inside(runs, w, "cold") for w in WORLDS]
    modes = [_modes(runs, w, start) for w in WORLDS for start in ("cold", "pcm")]

    def claim(id_: str, statement: str, statistic: str, interval: Interval) -> Claim:
        side: Literal["above"] = "above"
        return Claim(
            id=id_, notebook=NOTEBOOK, statement=statement, source=_SOURCE, interval=interval,
            statistic=f"{statistic}; least of {len(WORLDS)} worlds", side=side, threshold=0.0,
            seeds=runs.budget.seeds, samples=runs.budget.samples, profile=profile,
            artefact_keys=runs.keys,
        )  # fmt: skip

    return [
        claim("P13", "PCM puts samples nearer to where the teacher's own path ends",
              "mean distance before distribution matching, cold minus PCM",
              crossed_bootstrap(*nearer[0], statistic=_least)),
        claim("P14", "Of a warm sample the teacher gives more weight to its own path's end",
              f"weight of that place at t = {ASKED:g}, PCM minus cold",
              crossed_bootstrap(*knows, statistic=_least)),
        claim("P15", "After distribution matching they are still nearer",
              "mean distance at the end, cold minus PCM",
              crossed_bootstrap(*nearer[1], statistic=_least)),
        claim("P16", "PCM brings more samples to the modes at equal network calls",
              "within 3 sigma of a mode at the end, PCM minus cold",
              crossed_bootstrap(*inside, statistic=_least)),
        claim("P17", "PCM keeps the mode weights better at equal network calls",
              "KL of mode shares from their weights at the end, cold minus PCM",
              crossed_bootstrap(*modes, statistic=_better, resamples=500, centred=True)),
    ]  # fmt: skip


def _knows(runs: Runs, world: str, start: str) -> np.ndarray:
    x, ends = runs.samples[world, start][0], runs.ends[world]
    return torch.stack([knowing(world, one, ends, ASKED) for one in x]).numpy()


def _inside(runs: Runs, world: str, start: str) -> np.ndarray:
    x = runs.samples[world, start][1]
    return torch.stack([~outside(world, one) for one in x]).double().numpy()


def _modes(runs: Runs, world: str, start: str) -> np.ndarray:
    teacher, x = points(world).teacher, runs.samples[world, start][1]
    return torch.stack([teacher.responsibilities(one).argmax(1) for one in x]).numpy()


def _least(*outcomes: np.ndarray) -> float:
    return min(float(one.mean()) for one in outcomes)


def _better(*modes: np.ndarray) -> float:
    """KL of cold minus that of warm, the least over worlds."""
    pairs = zip(WORLDS, modes[::2], modes[1::2], strict=True)
    return min(_off(w, cold) - _off(w, warm) for w, cold, warm in pairs)


def _off(world: str, modes: np.ndarray) -> float:
    """KL(mode shares || weights) in nats, mean over seeds."""
    due = points(world).teacher.log_weights()[0].exp().numpy()
    rows: Sequence[np.ndarray] = [np.bincount(m.astype(int), minlength=len(due)) for m in modes]
    q = np.stack(rows) / modes.shape[1]
    return float(np.where(q > 0, q * np.log(np.maximum(q, 1e-12) / due), 0).sum(1).mean())
