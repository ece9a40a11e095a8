"""Direct distillation: unroll the few-step student and match the teacher's final sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from turbo_lab.errors import BadInput
from turbo_lab.fit import Batch, Player, Turn
from turbo_lab.methods.kinds import DISTANCES, TrainableField, chosen
from turbo_lab.path import time_grid
from turbo_lab.sample import final, sample
from turbo_lab.streams import Draw


@dataclass(frozen=True, kw_only=True)
class Direct:
    r"""Regress the end of the student's own few steps on the end of the teacher's many.

    .. math:: L = E\, d\big(\mathrm{Euler}_{N}(v_\theta, z, c),\; x_T(z, c)\big)

    with the gradient through all N steps. The naive baseline: what a public trainer calls
    "direct distill", and what its users report as blurry. ``Batch.x`` holds the teacher's
    samples and ``Batch.z`` the noise they grew from; no teacher is called while training.

    Args:
        student: the field that learns.
        steps: N, 1 to 1000.
        shift: timestep shift of the grid.
        distance: ``l2`` or ``huber``, see `turbo_lab.methods.kinds`.
    """

    student: TrainableField
    steps: int
    shift: float = 1.0
    distance: str = "l2"

    def __post_init__(self) -> None:
        chosen("distance", self.distance, DISTANCES)
        _ = self.grid  # refuses steps and shifts that make none

    @property
    def grid(self) -> Tensor:
        """Times ``[steps + 1]`` of the sampler."""
        return time_grid(self.steps, shift=self.shift)

    @property
    def players(self) -> Mapping[str, Player]:
        """One player: the student."""
        return {"student": self.student}

    def turns(self) -> Sequence[Turn]:
        """One turn per round."""
        return (Turn(name="direct", loss=self.loss, moves=("student",)),)

    def loss(self, batch: Batch, draw: Draw) -> dict[str, Tensor]:
        """Distance to the teacher's sample per sample ``[B]``.

        Raises:
            BadInput: the batch does not say which noise its samples grew from.
        """
        return self.generated(batch, draw)[1]

    def generated(self, batch: Batch, draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        """The student's sample, see `turbo_lab.methods.gan.Generates`, and its loss terms."""
        if batch.z is None:
            raise BadInput("batch.z", None, "direct distillation needs pairs (noise, sample)")
        ours = final(sample(self.student, self.grid, batch.z, batch.c))
        return ours, {"endpoint": DISTANCES[self.distance](ours, batch.x)}

    @torch.no_grad()
    def samples(self, batch: Batch, draw: Draw) -> Tensor:
        """The student's samples ``[B, ...]`` for a critic."""
        return self.generated(batch, draw)[0]
