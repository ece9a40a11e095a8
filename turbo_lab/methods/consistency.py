"""Consistency distillation, discrete: neighbours on one teacher path point at the same place."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from turbo_lab.critic import ADVERSARIES, Critic, TrainableCritic
from turbo_lab.errors import BadInput
from turbo_lab.field import Condition, Field, frozen
from turbo_lab.fit import Batch, Player, Turn
from turbo_lab.methods.kinds import (
    DISTANCES,
    SOLVERS,
    TrainableField,
    check_steps,
    chosen,
    times_at,
)
from turbo_lab.methods.phased import pushed
from turbo_lab.path import grid_from_times, mix, step, time_grid
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

    **Adversarial consistency**, if ``adversarial_weight`` is above 0: a critic tells the two
    predictions apart, each noised from its edge to a time of its own inside the phase (see
    `turbo_lab.methods.phased`), and the student is to fool it as well. At the exact phase map both
    sides have one distribution, so the optimum stays where it was; on the way there, the critic
    sees blur that a distance forgives. It is an option of consistency, not a method of its own:
    one term and one turn beside the same prediction, the same target and the same sampler.

    Args:
        student: the field that learns.
        teacher: the field whose paths are followed (guided, frozen).
        average: the student's moving average, if that is the target.
        grid_steps: steps of the teacher's grid.
        shift: timestep shift of the grid.
        edges: times inside (0, 1) where phases meet; none for one phase. Each takes the place of
            the nearest time of the grid; `turbo_lab.methods.phase_edges` places them by a shift.
        solver: ``euler`` or ``heun``.
        distance: ``l2`` or ``huber``, see `turbo_lab.methods.kinds`.
        target: θ⁻ is the ``current`` student or its ``average``.
        critic: logits of x_r's prediction against x_t's; it learns, in a turn of its own, if it is
            a `turbo_lab.critic.TrainableCritic`.
        adversarial_weight: weight of the student's adversarial term; 0 for none.
        adversary: ``hinge`` or ``logistic``, see `turbo_lab.critic.ADVERSARIES`.
        adversarial_above: the critic judges phases whose lower edge is at least this time, 0 to
            below 1; 0 for all of them.
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
    critic: Critic | None = None
    adversarial_weight: float = 0.0
    adversary: str = "hinge"
    adversarial_above: float = 0.0

    def __post_init__(self) -> None:
        chosen("solver", self.solver, SOLVERS)
        chosen("distance", self.distance, DISTANCES)
        chosen("target", self.target, dict.fromkeys(TARGETS))
        if self.target == "average" and self.average is None:
            raise BadInput("target", "average", "give the average, or choose current")
        check_steps("grid_steps", self.grid_steps)
        self._check_edges()
        self._check_adversary()

    def _check_edges(self) -> None:
        if any(not 0 < s < 1 for s in self.edges):
            raise BadInput("edges", self.edges, "use times between 0 and 1")
        if self.grid_steps <= len(self.edges):
            raise BadInput("grid_steps", self.grid_steps, f"use more than {len(self.edges)}")
        kept = torch.isin(torch.tensor(self.edges), self.grid)
        if not bool(kept.all()):
            allowed = f"two fall on one of {self.grid_steps} steps; move them, or use more steps"
            raise BadInput("edges", self.edges, allowed)

    def _check_adversary(self) -> None:
        chosen("adversary", self.adversary, ADVERSARIES)
        if not 0 <= self.adversarial_weight < math.inf:
            allowed = "use a finite number, at least 0"
            raise BadInput("adversarial_weight", self.adversarial_weight, allowed)
        if self.adversarial_weight and self.critic is None:
            raise BadInput("adversarial_weight", self.adversarial_weight, "it needs a critic")
        highest = max(self.edges, default=0.0)
        if not 0 <= self.adversarial_above <= highest:
            allowed = f"use a time from 0 to the highest edge, {highest:g}"
            raise BadInput("adversarial_above", self.adversarial_above, allowed)

    @property
    def players(self) -> Mapping[str, Player]:
        """The student, and a critic that has to learn."""
        return {"student": self.student, **self._critics}

    def turns(self) -> Sequence[Turn]:
        """Every round the critic, if there is one, and then the student."""
        return (
            *(Turn(name=name, loss=self.critic_loss, moves=(name,)) for name in self._critics),
            Turn(name="consistency", loss=self.loss, moves=("student",)),
        )

    @property
    def _critics(self) -> Mapping[str, TrainableCritic]:
        """The critic by name, if it is asked for and learns."""
        asked = {"critic": self.critic} if self.adversarial_weight else {}
        return {name: it for name, it in asked.items() if isinstance(it, TrainableCritic)}

    @property
    def grid(self) -> Tensor:
        """The teacher's times ``[grid_steps + 1]``, falling, with the edges among them."""
        grid = time_grid(self.grid_steps, shift=self.shift)
        for edge in self.edges:
            inner = grid[1:-1]
            inner[(inner - edge).abs().argmin()] = edge
        return grid

    @property
    def sampler(self) -> Tensor:
        """The student's times ``[phases + 1]``: from 1, edge to edge, to 0."""
        return grid_from_times((1.0, *sorted(self.edges, reverse=True)))

    def ends(self, t: Tensor) -> Tensor:
        """The edge s_m that a sample at time t ``[B]`` jumps to: the largest below t, or 0."""
        edges = torch.tensor(sorted({0.0, *self.edges}), device=t.device, dtype=t.dtype)
        return edges[(torch.searchsorted(edges, t) - 1).clamp_min(0)]

    def tops(self, s: Tensor) -> Tensor:
        """The edge s_{m+1} at the top of the phase whose lower edge is s ``[B]``."""
        edges = torch.tensor(sorted({*self.edges, 1.0}), device=s.device, dtype=s.dtype)
        return edges[torch.searchsorted(edges, s, right=True)]

    def jump(self, field: Field, x_t: Tensor, t: Tensor, s: Tensor, c: Condition) -> Tensor:
        """``f(x_t, t) = x_t + (s - t) v``; at t = s the identity."""
        return step(x_t, field(x_t, t, c), t, s)

    def predictions(self, batch: Batch, draw: Draw) -> tuple[Tensor, Tensor, Tensor]:
        """Return f_θ at x_t and f_θ⁻ at x_r, both ``[B, ...]``, and their edges s_m ``[B]``.

        Args:
            batch: clean latents ``[B, ...]`` and their conditions.
            draw: of this turn.
        """
        x, c = batch.x, batch.c
        k = draw.integers("time", self.grid_steps)
        t, r = times_at(self.grid, k, x), times_at(self.grid, k + 1, x)
        s = self.ends(t)
        x_t = mix(x, draw.normal("z", x.shape[1:]).to(x), t)
        with torch.no_grad():
            x_r = SOLVERS[self.solver](self.teacher, x_t, t, r, c)
            source = self.average if self.target == "average" else self.student
            goal = self.jump(frozen(source), x_r, r, s, c)  # type: ignore[arg-type]
        return self.jump(self.student, x_t, t, s, c), goal, s

    def loss(self, batch: Batch, draw: Draw) -> dict[str, Tensor]:
        """Distance of the two predictions per sample ``[B]``, and how well ours is told apart."""
        return self._judged(batch, draw)[1]

    def generated(self, batch: Batch, draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        """Our prediction, see `turbo_lab.methods.gan.Generates`, and its loss terms.

        Raises:
            BadInput: there are several phases, whose predictions are not clean images.
        """
        if self.edges:
            allowed = "a GAN term needs clean images; use one phase, or adversarial_weight"
            raise BadInput("edges", self.edges, allowed)
        return self._judged(batch, draw)

    @torch.no_grad()
    def samples(self, batch: Batch, draw: Draw) -> Tensor:
        """Our predictions ``[B, ...]`` for a critic, as in `generated`."""
        return self.generated(batch, draw)[0]

    def _judged(self, batch: Batch, draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        ours, goal, s = self.predictions(batch, draw)
        terms = {"consistency": DISTANCES[self.distance](ours, goal)}
        if self.adversarial_weight:
            fooled = ADVERSARIES[self.adversary].student(self._logits(ours, s, batch.c, draw))
            terms["adversarial"] = self.adversarial_weight * self._seen(s) * fooled
        return ours, terms

    def critic_loss(self, batch: Batch, draw: Draw) -> dict[str, Tensor]:
        """Terms of the critic per sample ``[B]``: x_r's prediction is the teacher's side."""
        with torch.no_grad():
            ours, goal, s = self.predictions(batch, draw)
        terms = ADVERSARIES[self.adversary].critic(
            self._logits(goal, s, batch.c, draw.sub("teacher")),
            self._logits(ours, s, batch.c, draw.sub("student")),
        )
        return {name: self._seen(s) * term for name, term in terms.items()}

    def _seen(self, s: Tensor) -> Tensor:
        """1 where the critic judges the phase with lower edge s ``[B]``, else 0."""
        return (s >= self.adversarial_above).to(s)

    def _logits(self, f: Tensor, s: Tensor, c: Condition, draw: Draw) -> Tensor:
        assert self.critic is not None
        x_u, u = pushed(f, s, self.tops(s), draw)
        return self.critic(x_u, u, c)
