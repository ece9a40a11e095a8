"""Consistency distillation, discrete: neighbours on one teacher path point at the same place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from turbo_lab.errors import BadInput
from turbo_lab.field import Field, frozen
from turbo_lab.fit import Batch, Player, Turn
from turbo_lab.methods.kinds import DISTANCES, SOLVERS, TrainableField, chosen, times_at
from turbo_lab.path import mix, step, time_grid
from turbo_lab.streams import Draw

TARGETS = ("current", "average")


@dataclass(frozen=True, kw_only=True)
class Consistency:
    r"""Make two neighbouring points of a teacher path predict the same end of their phase.

    With phase edges 0 = s_0 < ... < s_M = 1 and t in (s_m, s_{m+1}], one Euler step to the edge is

    .. math:: f(x_t, t) = x_t + (s_m - t)\, v_\theta(x_t, t, c), \qquad
              L = E\, d\big(f_\theta(x_t, t),\; \mathrm{sg}\, f_{\theta^-}(x_r, r)\big)

    where x_r is one solver step of the teacher down the grid, inside the phase. At t = s_m, f is
    the identity, whatever the network says. One phase (``edges`` empty) is consistency
    distillation (Song et al. 2023, arXiv 2303.01469, algorithm 2): f is the clean image, and more
    steps are taken by renoising it (eta = 1). Several are phased consistency (Wang et al. 2024,
    arXiv 2405.18407, eqs. 8-10), sampled from edge to edge (eta = 0).

    Args:
        student: the field that learns.
        teacher: the field whose paths are followed (guided, frozen).
        average: the student's moving average, if that is the target.
        grid_steps: steps of the teacher's grid.
        shift: timestep shift of the grid.
        edges: times inside (0, 1) where phases meet; none for one phase. Each takes the place of
            the nearest time of the grid.
        solver: ``euler`` or ``heun``.
        distance: ``l2`` or ``huber``, see `turbo_lab.methods.kinds`.
        target: θ⁻ is the ``current`` student or its ``average``.
    """

    student: TrainableField
    teacher: Field
    average: Field | None = None
    grid_steps: int = 40
    shift: float = 1.0
    edges: tuple[float, ...] = ()
    solver: str = "euler"
    distance: str = "l2"
    target: str = "current"

    def __post_init__(self) -> None:
        chosen("solver", self.solver, SOLVERS)
        chosen("distance", self.distance, DISTANCES)
        chosen("target", self.target, dict.fromkeys(TARGETS))
        if self.target == "average" and self.average is None:
            raise BadInput("target", "average", "give the average, or choose current")
        if any(not 0 < s < 1 for s in self.edges):
            raise BadInput("edges", self.edges, "use times between 0 and 1")
        if self.grid_steps <= len(self.edges):
            raise BadInput("grid_steps", self.grid_steps, f"use more than {len(self.edges)}")

    @property
    def players(self) -> Mapping[str, Player]:
        """One player: the student."""
        return {"student": self.student}

    def turns(self) -> Sequence[Turn]:
        """One turn per round."""
        return (Turn(name="consistency", loss=self.loss, moves=("student",)),)

    @property
    def grid(self) -> Tensor:
        """The teacher's times ``[grid_steps + 1]``, falling, with the edges among them."""
        grid = time_grid(self.grid_steps, shift=self.shift)
        for edge in self.edges:
            inner = grid[1:-1]
            inner[(inner - edge).abs().argmin()] = edge
        return grid

    def ends(self, t: Tensor) -> Tensor:
        """The edge s_m that a sample at time t ``[B]`` jumps to: the largest below t, or 0."""
        edges = torch.tensor(sorted({0.0, *self.edges}), device=t.device, dtype=t.dtype)
        return edges[(torch.searchsorted(edges, t) - 1).clamp_min(0)]

    def jump(self, field: Field, x_t: Tensor, t: Tensor, s: Tensor, c: Tensor) -> Tensor:
        """``f(x_t, t) = x_t + (s - t) v``; at t = s the identity."""
        return step(x_t, field(x_t, t, c), t, s)

    def loss(self, batch: Batch, draw: Draw) -> dict[str, Tensor]:
        """Distance of the two predictions per sample ``[B]``, for clean latents ``[B, ...]``."""
        x, c = batch.x, batch.c
        k = draw.integers("time", self.grid_steps)
        t, r = times_at(self.grid, k, x), times_at(self.grid, k + 1, x)
        s = self.ends(t)
        x_t = mix(x, draw.normal("z", x.shape[1:]).to(x), t)
        with torch.no_grad():
            x_r = SOLVERS[self.solver](self.teacher, x_t, t, r, c)
            source = self.average if self.target == "average" else self.student
            goal = self.jump(frozen(source), x_r, r, s, c)  # type: ignore[arg-type]
        ours = self.jump(self.student, x_t, t, s, c)
        return {"consistency": DISTANCES[self.distance](ours, goal)}
