"""Notebook 03, part A: what matching distributions keeps and loses, on exact points."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from turbo_lab.claims import Claim, Interval, bootstrap, crossed_bootstrap
from turbo_lab.point_students import CLOUD
from turbo_lab.progress import progress
from turbo_lab.studies.distribution import NOTEBOOK
from turbo_lab.studies.points_density import TITLES, measured
from turbo_lab.studies.points_maps import outside
from turbo_lab.studies.points_plane import WORLD, PlaneRuns, plane_runs
from turbo_lab.studies.points_runs import (
    BUDGETS,
    LITTLE_NOISE,
    ROLLOUT_WORLDS,
    WORLDS,
    Budget,
    Key,
    Runs,
    training_runs,
)
from turbo_lab.studies.points_runs import TITLES as VARIANT_TITLES
from turbo_lab.studies.points_tilt import TiltRuns, place_of, tilt_runs
from turbo_lab.testbeds.points import points

__all__ = [
    "BUDGETS",
    "Budget",
    "Runs",
    "claims",
    "course",
    "floor",
    "plane_runs",
    "summary",
    "table",
    "tilt_runs",
    "training_runs",
]

RARE_MODES = (3, 4)
"""Of the world rare: 5% of the data together."""


# --- tables -------------------------------------------------------------------------------------


def course(runs: Runs) -> pd.DataFrame:
    """Measure the clouds along training of students that show what reverse KL does.

    Columns ``variant``, ``world``, ``steps``, ``seed``, ``round``, ``part`` (of the training, up
    to 1) and those of `turbo_lab.studies.points_density.measured`.
    """
    picked = [k for k in runs.runs if k.variant in ("plain", "little noise")]
    rows = []
    with progress(len(picked), "along training") as tick:
        for done, key in enumerate(picked):
            tick(done, f"{key.world}, {key.steps} steps")
            for run in runs.runs[key]:
                for at, x in run.clouds.items():
                    where = {"seed": run.seed, "round": at, "part": at / run.rounds}
                    rows.append({**key._asdict(), **where, **measured(key.world, x)})
    return pd.DataFrame(rows)


def table(runs: Runs) -> pd.DataFrame:
    """Measure the finished students: a row per student and seed, columns as in `course`."""
    rows = []
    with progress(len(runs.samples), "finished students") as tick:
        for done, (key, clouds) in enumerate(runs.samples.items()):
            tick(done, f"{key.world}, {key.variant}, {key.steps} steps")
            for k, x in enumerate(clouds):
                rows.append({**key._asdict(), "seed": k, **measured(key.world, x)})
    return pd.DataFrame(rows)


def floor(budget: Budget) -> pd.DataFrame:
    """The same numbers for exact data: a row per world, number of samples ``n`` and ``seed``."""
    rows = [
        {"world": world, "n": n, "seed": k, **measured(world, points(world).real(n, seed=k).x)}
        for world in WORLDS
        for n in (CLOUD, budget.samples)
        for k in range(budget.floors)
    ]
    return pd.DataFrame(rows)


def summary(finished: pd.DataFrame, exact: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds of `table`, and beside them those of as many exact data from `floor`."""
    data = exact[exact["n"] == exact["n"].max()].assign(variant="exact data", steps=0)
    both = pd.concat([finished, data])
    both["variant"] = both["variant"].map({**VARIANT_TITLES, "exact data": "exact data"})
    found = both.groupby(["world", "variant", "steps"], sort=False)[list(TITLES)].mean()
    return found.sort_index().rename(columns=TITLES)


# --- claims -------------------------------------------------------------------------------------


def claims(runs: Runs, plane: PlaneRuns, tilt: TiltRuns, profile: str) -> list[Claim]:
    """The claims of part A; a student that blew up has nothing within 3 sigma and no modes."""
    return [*_of_runs(runs, profile), *_of_plane(plane, profile), *_of_tilt(tilt, profile)]


_DMD2, _F_DISTILL = "Yin et al. 2024 (DMD2), arXiv 2405.14867", "Xu et al. 2025, arXiv 2502.15681"
_GUIDANCE = "Bradley & Nakkiran 2024, arXiv 2408.09000"


def _of_runs(runs: Runs, profile: str) -> list[Claim]:
    found = {key: _inside(key.world, x) for key, x in runs.samples.items()}
    modes = {key: _modes(key.world, x) for key, x in runs.samples.items()}
    plain = {(w, n): Key("plain", w, n) for w in WORLDS for n in (1, 2)}
    forward = {w: Key("forward", w, 2) for w in ROLLOUT_WORLDS}
    weights = {w: points(w).teacher.log_weights()[0].exp().numpy() for w in WORLDS}
    one, little = plain["rare", 1], Key("little noise", "rare", 1)
    rare = np.isin(modes[one], RARE_MODES) - weights["rare"][list(RARE_MODES)].sum()
    second = [found[plain[w, 2]] - found[plain[w, 1]] for w in WORLDS]
    rollout = [found[plain[w, 2]] - found[forward[w]] for w in ROLLOUT_WORLDS]

    def lost(less: np.ndarray, more: np.ndarray) -> float:
        return _lost(less, weights["rare"]) - _lost(more, weights["rare"])

    def off(*pairs: np.ndarray) -> float:
        own, noised = pairs[::2], pairs[1::2]
        found = zip(ROLLOUT_WORLDS, own, noised, strict=True)
        return min(_off(b, weights[w]) - _off(a, weights[w]) for w, a, b in found)

    pairs = [modes[key] for w in ROLLOUT_WORLDS for key in (plain[w, 2], forward[w])]
    claim = _builder(profile, runs.budget.seeds, runs.budget.samples, runs.keys)
    limit = f"t up to {LITTLE_NOISE[1]:g}"
    return [
        claim("P3", "Reverse KL drops rare modes", _F_DISTILL,
              "share of samples at the two rarest modes, minus their weights; compared at all t",
              crossed_bootstrap(rare), "below"),
        claim("P4", "Without high noise in the comparison, reverse KL drops modes", _F_DISTILL,
              f"mode weights not in common with the data, compared at {limit} minus at all t",
              crossed_bootstrap(modes[little], modes[one], statistic=lost, centred=True), "above"),
        claim("P5", "A second step brings samples to the modes", _DMD2,
              "within 3 sigma of a mode, 2 steps minus 1; least of 3 worlds",
              crossed_bootstrap(*second, statistic=_least), "above"),
        claim("P6", "Students fed with noised data end with fewer samples on modes", _DMD2,
              "within 3 sigma of a mode, own states minus noised data; least of 2 worlds",
              crossed_bootstrap(*rollout, statistic=_least), "above"),
        claim("P7", "Students fed with noised data end further from the mode weights", _DMD2,
              "KL of mode shares from their weights, noised data minus own; least of 2 worlds",
              crossed_bootstrap(*pairs, statistic=off, resamples=500, centred=True), "above"),
        claim("P8", "A fake that lags behind costs quality at equal network calls", _DMD2,
              "within 3 sigma of a mode, 5 updates of the fake minus 1",
              crossed_bootstrap(found[one] - found[Key("rivals-1", "rare", 1)]), "above"),
    ]  # fmt: skip


def _of_plane(plane: PlaneRuns, profile: str) -> list[Claim]:
    rows = plane.table.fillna({"overlap": 0.0})
    line = rows[rows["alpha"] + rows["beta"] == 1]
    overlap = {a: line.loc[line["alpha"] == a, "overlap"].to_numpy() for a in (0.0, 1.0)}
    inside = {a: _inside(WORLD, plane.cell(a, 1 - a)) for a in (0.0, 1.0)}
    claim = _builder(profile, plane.clouds.shape[2], plane.clouds.shape[3], (plane.key,))
    return [
        claim("P9", "Forward KL keeps more of the mode weights than reverse KL", _F_DISTILL,
              "mode weights in common with the data, alpha 1 minus alpha 0; over seeds",
              bootstrap(overlap[1.0] - overlap[0.0]), "above"),
        claim("P10", "Forward KL puts fewer samples on modes than reverse KL", _F_DISTILL,
              "within 3 sigma of a mode, alpha 0 minus alpha 1",
              crossed_bootstrap(inside[0.0] - inside[1.0]), "above"),
    ]  # fmt: skip


def _of_tilt(tilt: TiltRuns, profile: str) -> list[Claim]:
    low, high = min(tilt.clouds), max(tilt.clouds)
    first = {w: _stacked(x, lambda x: place_of(x) == 0) for w, x in tilt.clouds.items()}
    goal = tilt.table.query("what == 'target'").set_index("w")["first"]
    seeds, samples = first[high].shape
    claim = _builder(profile, seeds, samples, (tilt.key,))
    return [
        claim("P11", "Guidance collapses the student onto the likeliest place", _GUIDANCE,
              f"share of the first place, guidance {high:g} minus {low:g}",
              crossed_bootstrap(first[high] - first[low]), "above"),
        claim("P12", "It leans further than the tilted density does", _GUIDANCE,
              f"share of the first place at guidance {high:g}, minus that of p_w",
              crossed_bootstrap(first[high] - float(goal[high])), "above"),
    ]  # fmt: skip


Build = Callable[[str, str, str, str, Interval, Literal["above", "below"]], Claim]


def _builder(profile: str, seeds: int, samples: int, keys: Sequence[str]) -> Build:
    """What the claims of one group share."""

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
            interval=interval, side=side, threshold=0.0, seeds=seeds, samples=samples,
            profile=profile, artefact_keys=tuple(keys),
        )  # fmt: skip

    return build


def _stacked(clouds: Tensor, of: Callable[[Tensor], Tensor]) -> np.ndarray:
    """An outcome per sample: ``[seeds, samples, 2]`` -> ``[seeds, samples]``; 0 where NaN."""
    rows = [(of(x) & x.isfinite().all(1)) for x in clouds]
    return torch.stack(rows).double().numpy()


def _inside(world: str, clouds: Tensor) -> np.ndarray:
    """Whether samples lie within 3 sigma of a mode, ``[seeds, samples]``."""
    return _stacked(clouds, lambda x: ~outside(world, x))


def _modes(world: str, clouds: Tensor) -> np.ndarray:
    """Likeliest mode of every sample, ``[seeds, samples]``."""
    mix = points(world).teacher
    return torch.stack([mix.responsibilities(x).argmax(1) for x in clouds]).numpy()


def _shares(modes: np.ndarray, k: int) -> np.ndarray:
    """Shares of k modes, one row per seed."""
    return np.stack([np.bincount(row.astype(int), minlength=k) for row in modes]) / modes.shape[1]


def _lost(modes: np.ndarray, weights: np.ndarray) -> float:
    """Mode weights not in common with the data, 1 - Σ min(q, p), mean over seeds."""
    return 1 - float(np.minimum(_shares(modes, len(weights)), weights).sum(1).mean())


def _off(modes: np.ndarray, weights: np.ndarray) -> float:
    """KL(shares || weights) in nats, mean over seeds."""
    q = _shares(modes, len(weights))
    return float(np.where(q > 0, q * np.log(np.maximum(q, 1e-12) / weights), 0).sum(1).mean())


def _least(*outcomes: np.ndarray) -> float:
    return min(float(one.mean()) for one in outcomes)
