"""Progressive distillation: one student step learns to go where two teacher steps went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from turbo_lab.errors import BadInput
from turbo_lab.field import Field
from turbo_lab.fit import Batch, Player, Turn
from turbo_lab.methods.kinds import (
    DISTANCES,
    TrainableField,
    check_steps,
    chosen,
    times_at,
    walk,
)
from turbo_lab.path import grid_from_times, mix, secant, time_grid
from turbo_lab.streams import Draw


@dataclass(frozen=True, kw_only=True)
class Progressive:
    r"""Match the chord of several teacher steps with one student step.

    From x_t at a time of the student's grid, the teacher walks its own finer grid to the student's
    next time u and arrives at x_u; one Euler step of the student arrives there too if

    .. math:: v_\theta(x_t, t, c) = v^* = \frac{x_t - x_u}{t - u}, \qquad
              L = E\, d\big(v_\theta(x_t, t, c),\; v^*\big)

    (Salimans & Ho 2022, arXiv 2202.00512, algorithm 2, written for velocities; with the velocity
    as the target no weight is singular at t = 1). A stage halves the number of steps; the next
    stage has this student as its teacher. A guided teacher is only needed in the first stage
    (Meng et al. 2022, arXiv 2210.03142). Sampled with Euler steps, eta = 0.

    Args:
        student: the field that learns.
        teacher: the field to follow; guided in the first stage, the student before in others.
        steps: steps of the student, 1 to 1000.
        teacher_steps: steps of the teacher, at least ``steps``; where they are no multiple of
            it, some student steps span one teacher step more than others.
        shift: timestep shift of the grid.
        distance: ``l2`` or ``huber``, see `turbo_lab.methods.kinds`.
        teacher_times: the teacher's times without the closing 0, where it is a student whose
            steps were not of one length (5 steps halved to 2 go from 1 to 0.4 to 0).
    """

    student: TrainableField
    teacher: Field
    steps: int
    teacher_steps: int
    shift: float = 1.0
    distance: str = "l2"
    teacher_times: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        chosen("distance", self.distance, DISTANCES)
        check_steps("steps", self.steps)
        check_steps("teacher_steps", self.teacher_steps, least=self.steps)
        if len(self.grid) != self.teacher_steps + 1:
            allowed = f"give one per teacher step, {self.teacher_steps}, or none"
            raise BadInput("teacher_times", self.teacher_times, allowed)

    @property
    def grid(self) -> Tensor:
        """Times ``[teacher_steps + 1]`` of the teacher."""
        if self.teacher_times:
            return grid_from_times(self.teacher_times)
        return time_grid(self.teacher_steps, shift=self.shift)

    @property
    def players(self) -> Mapping[str, Player]:
        """One player: the student."""
        return {"student": self.student}

    def turns(self) -> Sequence[Turn]:
        """One turn per round."""
        return (Turn(name="progressive", loss=self.loss, moves=("student",)),)

    @property
    def edges(self) -> Tensor:
        """Indices ``[steps + 1]`` of the student's times in the teacher's grid."""
        k = torch.arange(self.steps + 1)
        return (k * self.teacher_steps + self.steps // 2) // self.steps

    def loss(self, batch: Batch, draw: Draw) -> dict[str, Tensor]:
        """Distance to the chord per sample ``[B]``, for clean latents ``[B, ...]``."""
        x, c = batch.x, batch.c
        grid = self.grid
        k = draw.integers("interval", self.steps)
        start, stop = self.edges[k], self.edges[k + 1]
        t, u = times_at(grid, start, x), times_at(grid, stop, x)
        x_t = mix(x, draw.normal("z", x.shape[1:]).to(x), t)
        target = secant(x_t, walk(self.teacher, x_t, grid, start, stop, c), t, u)
        return {"chord": DISTANCES[self.distance](self.student(x_t, t, c), target)}
