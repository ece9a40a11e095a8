"""Points: what guidance aims at, and where students of a guided teacher end."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from turbo_lab.atomic import save_tensors
from turbo_lab.field import NULL_LABEL, Field, Mixture, frozen, guided, mixture
from turbo_lab.fit import Batch, Objective, Shadow, fit
from turbo_lab.methods import DMD2, Progressive
from turbo_lab.optimisers import Optimiser
from turbo_lab.point_recipes import RIVAL_ETA
from turbo_lab.point_students import path_end
from turbo_lab.progress import progress
from turbo_lab.sample import draw_samples
from turbo_lab.store import Store
from turbo_lab.streams import Draw, noise, seed_for
from turbo_lab.studies.points_density import (
    Plane,
    divergence,
    kernel_width,
    log_kernels,
    log_tilted,
    plane_around,
    smoothed,
)
from turbo_lab.testbeds.points import PointField

SCALES = (1.0, 2.0, 4.0)
"""Guidance scales w."""
CLASS = 0
KEPT = 1024
"""Samples kept of every student."""
REACH = 4.0
"""Half width of the plane; no student has put a sample outside of it."""
MEDIAN = math.sqrt(2 * math.log(2))
"""Median distance to its mean of a 2-D Gaussian, in standard deviations."""
GAP = 0.1
"""Half the distance between the two classes at a place."""


@cache
def places() -> Mixture:
    """Three places on a circle, two classes beside each other at each of them.

    Class 0 has them with weights 60, 30 and 10%, class 1 with 10, 30 and 60%. Guidance towards
    class 0 therefore leans to the first place, and away from class 1 at all of them.
    """
    angle = 2 * math.pi * torch.arange(3, dtype=torch.float64) / 3 + math.pi / 2
    out = torch.stack([angle.cos(), angle.sin()], 1)
    along = torch.stack([-angle.sin(), angle.cos()], 1)
    centre = math.sqrt(2) * out
    means = torch.cat([centre - GAP * along, centre + GAP * along])
    weights = torch.tensor([0.6, 0.3, 0.1, 0.1, 0.3, 0.6])
    return mixture(means, 0.15, weights, labels=torch.tensor([0, 0, 0, 1, 1, 1]))


def place_of(x: Tensor) -> Tensor:
    """Index of the nearest place of samples ``[N, 2]``, ``[N]``."""
    return torch.cdist(x.double(), places().means.view(2, 3, 2).mean(0)).argmin(1)


def guided_field(w: float) -> Field:
    """The exact field of class 0 guided by w; it takes no notice of the condition it is given."""
    field = guided(places(), torch.tensor([NULL_LABEL]), w)

    def velocity(x_t: Tensor, t: Tensor, c: object = None) -> Tensor:
        return field(x_t, t, torch.full((len(x_t),), CLASS))

    return velocity


@dataclass(frozen=True, kw_only=True)
class TiltBudget:
    """How the students of the guided teacher are trained."""

    seeds: int
    base_steps: int
    rounds: int
    batch_size: int = 256


@dataclass(frozen=True, kw_only=True)
class TiltRuns:
    """Students of the guided teacher.

    Attributes:
        clouds: guidance scale to samples ``[seeds, KEPT, 2]``.
        paths: guidance scale to the ends of exact guided paths from the same noise, ``[KEPT, 2]``.
        key: of the artefact.
    """

    clouds: dict[float, Tensor]
    paths: dict[float, Tensor]
    key: str

    @property
    def table(self) -> pd.DataFrame:
        """What was aimed at and what came out, per guidance scale.

        Columns ``w``, ``what`` ("target" p_w, "paths" of the guided field, "student"), ``seed``
        (-1 but for students), ``first``, ``second``, ``third`` (shares of the places), ``spread``
        (median distance to the mean of the samples of a place, 1 for p(x | c); what lies far
        between the places hardly moves it),
        ``to_truth`` and ``to_target`` (KL from p(x | c) and from p_w, all noised alike, see
        `turbo_lab.studies.points_density.divergences`, in nats).
        """
        rows = []
        for w in SCALES:
            rows.append({"w": w, "what": "target", "seed": -1, **_of_target(w)})
            rows.append({"w": w, "what": "paths", "seed": -1, **_of_samples(self.paths[w], w)})
            for seed, x in enumerate(self.clouds[w]):
                rows.append({"w": w, "what": "student", "seed": seed, **_of_samples(x, w)})
        return pd.DataFrame(rows)


def tilt_runs(budget: TiltBudget, *, store: Store | None = None, fresh: bool = False) -> TiltRuns:
    """Train one-step DMD2 students of the guided exact teacher, or take them from the store."""
    store = store or Store.default()
    spec = {
        "scales": list(SCALES), "gap": GAP, "kept": KEPT, "seeds": budget.seeds,
        "base_steps": budget.base_steps, "rounds": budget.rounds, "batch_size": budget.batch_size,
        "version": 1,
    }  # fmt: skip

    def make(folder: Path) -> None:
        base = _base(budget)
        kept: dict[str, Tensor] = {}
        wanted = [(w, seed) for w in SCALES for seed in range(budget.seeds)]
        with progress(len(wanted), "students of a guided teacher") as tick:
            for done, (w, seed) in enumerate(wanted):
                tick(done, f"guidance {w:g}, seed {seed}")
                kept[f"{w:g}/{seed}"] = _student(base, w, seed, budget).half()
        save_tensors(folder, "clouds.safetensors", kept)

    artefact = store.get_or_make("points/tilted", spec, make, fresh=fresh)
    found = artefact.tensors("clouds.safetensors")
    z = noise((2,), seed=0, stream="z", indices=range(KEPT)).double()
    return TiltRuns(
        clouds={
            w: torch.stack([found[f"{w:g}/{s}"].float() for s in range(budget.seeds)])
            for w in SCALES
        },
        paths={w: path_end(guided_field(w), z).float() for w in SCALES},
        key=artefact.key,
    )


def tilt_plane() -> tuple[Plane, float]:
    """The plane that holds every target of part A, and the kernel h that samples get on it."""
    h = kernel_width(places())
    return plane_around(places(), torch.tensor([[REACH, REACH]]), h=h), h


@cache
def target(w: float) -> Tensor:
    """Log density p_w of class 0 on `tilt_plane`, normalised there, ``[G, G]``."""
    return log_tilted(places(), CLASS, w, tilt_plane()[0])


def _of_target(w: float) -> dict[str, float]:
    """Shares, spread and divergences of p_w, by quadrature."""
    plane, h = tilt_plane()
    p = target(w).exp().flatten() * plane.cell
    truth, goal = smoothed(target(1.0), plane, h), smoothed(target(w), plane, h)
    return {
        **_shares_and_spread(plane.points, p),
        "to_truth": divergence(goal, truth, plane.cell),
        "to_target": 0.0,
    }


def _of_samples(x: Tensor, w: float) -> dict[str, float]:
    plane, h = tilt_plane()
    found = log_kernels(x, plane, h)
    return {
        **_shares_and_spread(x.double(), torch.full((len(x),), 1 / len(x), dtype=torch.float64)),
        "to_truth": divergence(found, smoothed(target(1.0), plane, h), plane.cell),
        "to_target": divergence(found, smoothed(target(w), plane, h), plane.cell),
    }


def _shares_and_spread(x: Tensor, p: Tensor) -> dict[str, float]:
    """Shares of the places and rms distance to their means, of points x with probabilities p."""
    k = torch.nn.functional.one_hot(place_of(x), 3).double()
    shares = p @ k
    means = (k * p[:, None]).T @ x / shares.clamp_min(1e-12)[:, None]
    off, order = (x - k @ means).norm(dim=1).sort()
    median = off[torch.searchsorted(p[order].cumsum(0), 0.5)]
    return {
        **dict(zip(("first", "second", "third"), shares.tolist(), strict=True)),
        "spread": float(median / places().stds[0]) / MEDIAN,
    }


def _base(budget: TiltBudget) -> PointField:
    """A network fitted to the exact field of class 0, as `turbo_lab.point_students.base_recipe`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(0, "tilted", "base"))
        net = PointField(width=64)
    average = copy.deepcopy(net).requires_grad_(False)
    teacher = frozen(guided_field(1.0))
    objective = Progressive(student=net, teacher=teacher, steps=256, teacher_steps=256)
    _train(objective, budget, average, 2e-3, steps=budget.base_steps, seed=0)
    return average


def _student(base: PointField, w: float, seed: int, budget: TiltBudget) -> Tensor:
    """Samples ``[KEPT, 2]`` of one student."""
    student, fake = (copy.deepcopy(base).requires_grad_(True) for _ in range(2))
    average = copy.deepcopy(base)
    teacher = frozen(guided_field(w))
    objective = DMD2(student=student, teacher=teacher, fake=fake, times=(1.0,), eta=RIVAL_ETA)
    _train(objective, budget, average, 1e-3, steps=budget.rounds, seed=seed)
    grid = torch.tensor([1.0, 0.0])
    return draw_samples(average, grid, (2,), seed=0, indices=range(KEPT), batch=KEPT)


def _train(
    objective: Objective,
    budget: TiltBudget,
    average: PointField,
    rate: float,
    *,
    steps: int,
    seed: int,
) -> None:
    """Train to the end; the fake learns twice as fast as the student."""
    plain = Optimiser(lr=rate, weight_decay=0.0, warmup=min(20, steps), final=0.05)
    rates = {"student": plain, "fake": replace(plain, lr=2 * rate)}
    records = fit(
        objective,
        _class_rows,
        steps=steps,
        batch_size=budget.batch_size,
        seed=seed_for(seed, "tilted"),
        optimisers={name: rates[name] for name in objective.players},
        shadows=(Shadow(of="student", average=average, decay=0.99),),
    )
    for _ in records:
        pass


def _class_rows(draw: Draw) -> Batch:
    """Exact data of class 0, of which the network knows no other."""
    x, _ = places().only(CLASS).place(draw.uniform("component"), draw.normal("point", (2,)))
    return Batch(x, None)
