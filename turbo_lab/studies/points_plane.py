"""Points: the alpha-beta plane of divergences, trained with exact densities."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from turbo_lab.atomic import save_tensors
from turbo_lab.errors import NonFinite
from turbo_lab.field import Mixture
from turbo_lab.fit import Batch, Player, Turn, fit
from turbo_lab.methods.divergences import alpha_beta_gradient
from turbo_lab.methods.dmd2 import Range, rms, surrogate
from turbo_lab.methods.kinds import TrainableField
from turbo_lab.optimisers import Optimiser
from turbo_lab.path import expand, mix
from turbo_lab.point_students import RIVAL_WIDTH, base_recipe, distilled
from turbo_lab.progress import progress
from turbo_lab.recipes import Profile
from turbo_lab.sample import draw_samples
from turbo_lab.store import Store
from turbo_lab.streams import Draw, seed_for
from turbo_lab.testbeds.points import points

WORLD = "rare"
GRID = (-0.5, 0.0, 0.5, 1.0, 1.5)
"""Values of alpha and of beta: the f-divergences, alpha + beta = 1, lie on a diagonal."""
MEMBERS: Mapping[tuple[float, float], str] = {
    (0.0, 1.0): "reverse KL",
    (0.5, 0.5): "Hellinger",
    (1.0, 0.0): "forward KL",
}
NOISE_RANGE = (0.05, 0.3)
"""Little noise only: noised more, the modes of the plane run together, and then even reverse KL
finds all of them."""
KEPT = 512
"""Samples kept of every cell."""


def noised_density(x_t: Tensor, t: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    r"""Log density and score at x_t of samples noised to time t.

    .. math:: q_t(x_t) = \tfrac1M \sum_j N\big(x_t;\, (1 - t)\, x_j,\, t^2 I\big)

    Args:
        x_t: ``[B, D]``.
        t: ``[B]`` above 0.
        centres: ``[M, D]`` the samples x_j, others than those that x_t was made of: its own
            centre would pull x_t back.

    Returns:
        ``[B]`` in nats and ``[B, D]``.
    """
    t1 = expand(t, x_t)
    shrunk = (1 - t1)[..., None] * centres  # [B, M, D]
    logits = -(x_t[:, None] - shrunk).square().sum(-1) / (2 * t1**2)
    scale = math.log(len(centres)) + x_t.shape[1] * (t * math.sqrt(2 * math.pi)).log()
    mean = (1 - t1) * (logits.softmax(1) @ centres)
    return logits.logsumexp(1) - scale, (mean - x_t) / t1**2


@dataclass(frozen=True, kw_only=True)
class ExactRival:
    r"""A one-step student moved along an alpha-beta divergence, without a fake network.

    As `turbo_lab.methods.DMD2` with the gradient of
    `turbo_lab.methods.divergences.alpha_beta_gradient` for that of reverse KL, in the same
    weight :math:`t^2 / (1 - t)` and divisor, so that (0, 1) is DMD2 with a perfect fake. Teacher
    and student are exact mixtures at every noise level: the student's is that of a second batch
    of its own samples. r is kept inside ``ratio_clip`` (f-distill: 0.1 to 20).

    Args:
        student: the field that learns.
        teacher: the mixture.
        alpha: of the divergence.
        beta: of the divergence.
        noise_range: of t, uniform.
        centres: samples behind the student's density.
        ratio_clip: lowest and highest r = p / q.
        floor: lowest divisor.
    """

    student: TrainableField
    teacher: Mixture
    alpha: float
    beta: float
    noise_range: Range = NOISE_RANGE
    centres: int = 512
    ratio_clip: Range = (0.05, 20.0)
    floor: float = 1e-3

    @property
    def players(self) -> Mapping[str, Player]:
        """The student alone."""
        return {"student": self.student}

    def turns(self) -> Sequence[Turn]:
        """One turn per round."""
        return (Turn(name="student", loss=self.loss, moves=("student",)),)

    def one_step(self, z: Tensor) -> Tensor:
        """Samples of the student, ``x = z - v(z, 1)``."""
        return z - self.student(z, torch.ones(len(z)), None)

    def loss(self, batch: Batch, draw: Draw) -> dict[str, Tensor]:
        """Surrogate per sample ``[B]`` and the size of g."""
        x = self.one_step(draw.normal("z", (2,)))
        low, high = self.noise_range
        t = low + (high - low) * draw.uniform("t")
        x_t = mix(x.detach(), draw.normal("eps", (2,)), t)
        with torch.no_grad():
            others = torch.randn(self.centres, 2, generator=draw.generator("centres"))
            g = self.gradient(x.detach(), x_t, t, self.one_step(others))
        return {"surrogate": surrogate(x, g), "g_norm": rms(g)}

    def gradient(self, x: Tensor, x_t: Tensor, t: Tensor, centres: Tensor) -> Tensor:
        """Return g ``[B, 2]`` at samples x noised to x_t, given other samples of the student."""
        log_q, score_q = noised_density(x_t, t, centres)
        score_p = self.teacher.score(x_t, t)
        low, high = map(math.log, self.ratio_clip)
        log_r = (self.teacher.log_density(x_t, t) - log_q).clamp(low, high)
        g = alpha_beta_gradient(
            log_q + log_r, log_q, score_p, score_q, alpha=self.alpha, beta=self.beta
        )
        t1 = expand(t, x)
        x_hat = (x_t + t1**2 * score_p) / (1 - t1)
        size = (x - x_hat).abs().mean(1, keepdim=True).clamp_min(self.floor)
        return t1**2 / (1 - t1) * g / size


@dataclass(frozen=True, kw_only=True)
class PlaneBudget:
    """How the cells of the plane are trained: seeds and steps of each, batch, values of both."""

    profile: Profile
    seeds: int
    steps: int
    batch_size: int = 256
    centres: int = 512
    grid: tuple[float, ...] = GRID


@dataclass(frozen=True, kw_only=True)
class PlaneRuns:
    """Students of every cell.

    Attributes:
        grid: values of alpha and beta.
        clouds: ``[alpha, beta, seed, KEPT, 2]``; NaN where training blew up.
        key: of the artefact.
    """

    grid: tuple[float, ...]
    clouds: Tensor
    key: str

    def cell(self, alpha: float, beta: float) -> Tensor:
        """Samples of the students of one cell, ``[seed, KEPT, 2]``."""
        return self.clouds[self.grid.index(alpha), self.grid.index(beta)]

    @property
    def table(self) -> pd.DataFrame:
        """A row per cell and seed, and what its samples are like if they are finite.

        Columns ``alpha``, ``beta``, ``seed``, ``finite``, ``within`` (share within 3 sigma of a
        mode), ``overlap`` (mode weights in common with the truth, Σ min(q, p)) and ``covered``
        (modes with at least a tenth of their due within 3 sigma).
        """
        bed, rows = points(WORLD), []
        due = bed.teacher.log_weights()[0].exp()
        for i, alpha in enumerate(self.grid):
            for j, beta in enumerate(self.grid):
                for seed, x in enumerate(self.clouds[i, j]):
                    row = {"alpha": alpha, "beta": beta, "seed": seed, "finite": False}
                    if bool(x.isfinite().all()):
                        found = bed.measure(x)
                        shares = torch.tensor(found["mode_shares"], dtype=torch.float64)
                        row |= {
                            "finite": True,
                            "within": found["within"],
                            "overlap": float(torch.minimum(shares, due).sum()),
                            "covered": found["modes_covered"],
                        }
                    rows.append(row)
        return pd.DataFrame(rows)


def plane_runs(
    budget: PlaneBudget, *, store: Store | None = None, fresh: bool = False
) -> PlaneRuns:
    """Train a one-step student in every cell, or take them from the store."""
    store = store or Store.default()
    base = base_recipe(budget.profile, world=WORLD, width=RIVAL_WIDTH)
    spec = {
        "world": WORLD, "base": base.spec(), "noise_range": list(NOISE_RANGE), "kept": KEPT,
        "seeds": budget.seeds, "steps": budget.steps, "batch_size": budget.batch_size,
        "centres": budget.centres, "grid": list(budget.grid), "version": 1,
    }  # fmt: skip

    def make(folder: Path) -> None:
        n = len(budget.grid)
        clouds = torch.full((n, n, budget.seeds, KEPT, 2), math.nan, dtype=torch.float16)
        with progress(n * n, "alpha-beta plane") as tick:
            for done in range(n * n):
                i, j = divmod(done, n)
                tick(done, f"alpha {budget.grid[i]:g}, beta {budget.grid[j]:g}")
                for seed in range(budget.seeds):
                    clouds[i, j, seed] = _cell(budget, budget.grid[i], budget.grid[j], seed, store)
        save_tensors(folder, "clouds.safetensors", {"clouds": clouds})

    artefact = store.get_or_make("points/plane", spec, make, fresh=fresh)
    clouds = artefact.tensors("clouds.safetensors")["clouds"].float()
    return PlaneRuns(grid=budget.grid, clouds=clouds, key=artefact.key)


def _cell(budget: PlaneBudget, alpha: float, beta: float, seed: int, store: Store) -> Tensor:
    """Samples ``[KEPT, 2]`` of one student; NaN if its training blew up."""
    base = base_recipe(budget.profile, world=WORLD, width=RIVAL_WIDTH)
    student = distilled(base, store=store).requires_grad_(True)
    objective = ExactRival(
        student=student, teacher=points(WORLD).teacher, alpha=alpha, beta=beta,
        centres=budget.centres,
    )  # fmt: skip
    rates = Optimiser(lr=1e-3, weight_decay=0.0, warmup=min(20, budget.steps), final=0.05)
    records = fit(
        objective,
        partial(_rows, budget.batch_size),
        steps=budget.steps,
        batch_size=budget.batch_size,
        seed=seed_for(seed, "plane", f"{alpha:g}", f"{beta:g}"),
        optimisers={"student": rates},
    )
    try:
        for _ in records:
            pass
    except NonFinite:
        return torch.full((KEPT, 2), math.nan)
    grid = torch.tensor([1.0, 0.0])
    return draw_samples(student, grid, (2,), seed=0, indices=range(KEPT), batch=KEPT)


def _rows(n: int, draw: Draw) -> Batch:
    """No data are needed: the teacher's density is."""
    return Batch(torch.zeros(n, 2), None)
