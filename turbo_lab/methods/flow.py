"""Flow matching: how the teacher learns its velocity field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from turbo_lab.errors import BadInput
from turbo_lab.fit import Batch, Player, Turn
from turbo_lab.methods.kinds import TrainableField, check_training_times, squared
from turbo_lab.path import logit_normal_times, mix, velocity
from turbo_lab.streams import Draw


@dataclass(frozen=True, kw_only=True)
class FlowMatching:
    r"""Regress the velocity on straight paths between noise and data.

    .. math:: E \| v_\theta(x_t, t, c) - (z - x) \|^2, \quad x_t = (1 - t) x + t z

    Times are logit-normal with an optional shift (Esser et al. 2024, arXiv 2403.03206, eq. 19);
    with probability ``drop`` the condition is replaced by the null condition, which is what makes
    classifier-free guidance possible (Ho & Salimans 2022, arXiv 2207.12598).

    Args:
        student: the field that learns (here: the future teacher).
        null: null condition, one row ``[1, ...]``.
        drop: probability of the null condition, 0 to 1.
        time_mean, time_std: of the normal under the logistic.
        shift: timestep shift s of the training times.
    """

    student: TrainableField
    null: Tensor | None = None
    drop: float = 0.1
    time_mean: float = 0.0
    time_std: float = 1.0
    shift: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.drop <= 1:
            raise BadInput("drop", self.drop, "use a number from 0 to 1")
        check_training_times(self.time_mean, self.time_std, self.shift)

    @property
    def players(self) -> Mapping[str, Player]:
        """One player: the student."""
        return {"student": self.student}

    def turns(self) -> Sequence[Turn]:
        """One turn per round."""
        return (Turn(name="flow", loss=self.loss, moves=("student",)),)

    def loss(self, batch: Batch, draw: Draw) -> dict[str, Tensor]:
        """Mean squared velocity error per sample ``[B]`` of latents ``[B, ...]``."""
        x, c = batch.x, batch.c
        z = draw.normal("z", x.shape[1:]).to(x)
        t = logit_normal_times(
            draw.normal("t", ()).to(x), mean=self.time_mean, std=self.time_std, shift=self.shift
        )
        if self.null is not None:
            dropped = draw.uniform("drop").to(x.device) < self.drop
            c = c.where(~dropped.view(-1, *[1] * (c.ndim - 1)), self.null.to(c.device))
        v = self.student(mix(x, z, t), t, c)
        return {"velocity": squared(v, velocity(x, z))}
