"""TDM: distribution matching of every step of the student, each in its own range of times."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from turbo_lab.errors import BadInput
from turbo_lab.field import Field
from turbo_lab.fit import Batch, Player, Turn
from turbo_lab.methods.dmd2 import pull, rms, rounds, surrogate
from turbo_lab.methods.kinds import TrainableField, squared
from turbo_lab.methods.phased import push, push_scales
from turbo_lab.path import Time, expand, grid_from_times, shift_time
from turbo_lab.sample import State, sample
from turbo_lab.streams import Draw


def velocity_from(x: Tensor, s: Time, t: Time, eps: Tensor) -> tuple[Tensor, Tensor]:
    r"""Velocity at ``push(x, s, t, eps)`` whose mean, given that point, is the field's of all x.

    With a and b of `turbo_lab.methods.phased`, the score of x_t given x is -ε / b, and the velocity
    with that score is

    .. math:: v = \frac{\varepsilon}{b}\Big[t + (1-t)\Big(\frac{s}{1-s}\Big)^2\Big]
                  - \frac{x}{1-s}, \qquad w = (b / t)^2

    which is ε - x for s = 0. Near s it is all noise, as b falls to 0 there: w makes up for it, and
    is the weight under which the loss is that of the predicted noise, up to (1 - t)². (Score
    matching within a subinterval: Fan et al. 2025, Phased DMD, arXiv 2510.27684.)

    Args:
        x: ``[B, ...]`` samples at time s.
        s: a number or ``[B]``, in [0, 1).
        t: a number or ``[B]``, in (s, 1].
        eps: ``[B, ...]`` the noise of the push.

    Returns:
        v ``[B, ...]`` and w, shaped for arithmetic with it.
    """
    _, b = push_scales(s, t, x)
    s, t = expand(s, x), expand(t, x)
    ratio = s / (1 - s)
    return eps / b * (t + (1 - t) * ratio**2) - x / (1 - s), (b / t) ** 2


@dataclass(frozen=True, kw_only=True)
class TDM:
    r"""Move the states of the student's own path to where the teacher's are at the same times.

    The student walks its times by Euler steps. Where step k leads to, at time s, its state x_s is
    to be distributed as the teacher's p_s: noised further to a random t between s and the time at
    which the step began, see `turbo_lab.methods.phased.push`,

    .. math:: \nabla_\theta L = E\Big[ g \cdot \frac{\partial \hat x}{\partial \theta} \Big] / D,
              \qquad g = \frac{\hat x_{fake}(x_t) - \hat x_{teacher}(x_t)}
                              {\max(\mathrm{mean}|\hat x - \hat x_{teacher}|,\; floor)}

    (after Luo et al. 2025, TDM, arXiv 2503.06674, from its description and without its condition
    on the number of steps). DMD2 matches the clean image that every step predicts, and so asks the
    first step for a whole picture; this asks it only for what is decided by the time s. The ranges
    do not overlap, so one fake learns all steps: see `velocity_from`. With one step this is DMD2's
    gradient, with t below 1.

    Rounds and turns are those of `turbo_lab.methods.DMD2`, and so are ``g_norm`` and ``gap``. The
    step k is drawn once for the whole batch. Of the batch, ``c`` is used, and of ``x`` the shape.

    Args:
        student: the field that learns.
        teacher: the field whose distribution is the goal (guided, frozen).
        fake: learns the velocity of the student's states; never guided.
        times: of the student's sampler, falling from 1; the closing 0 may be left out.
        rival_updates: updates of the fake for each update of the student, at least 1.
        margin: of either end of a step's range, as a share of it, that is left out; 0 to 0.5.
        noise_shift: t = low + (high - low) shift_time(u, shift), u uniform, in that range.
        floor: lowest divisor, above 0.
    """

    student: TrainableField
    teacher: Field
    fake: TrainableField
    times: tuple[float, ...]
    rival_updates: int = 1
    margin: float = 0.02
    noise_shift: float = 1.0
    floor: float = 1e-3

    def __post_init__(self) -> None:
        if float(self.grid[0]) != 1:
            raise BadInput("times", self.times, "the first must be 1, where there is only noise")
        if self.rival_updates < 1:
            raise BadInput("rival_updates", self.rival_updates, "use an integer of at least 1")
        if not 0 < self.margin < 0.5:
            raise BadInput("margin", self.margin, "use a share between 0 and 0.5")
        for name, value in (("noise_shift", self.noise_shift), ("floor", self.floor)):
            if not 0 < value < math.inf:
                raise BadInput(name, value, "use a finite number above 0")

    @property
    def players(self) -> Mapping[str, Player]:
        """The student and its rival."""
        return {"student": self.student, "fake": self.fake}

    def turns(self) -> Sequence[Turn]:
        """Every round the fake, and then, every ``rival_updates`` rounds, the student."""
        return rounds(self.fake_loss, self.student_loss, every=self.rival_updates)

    @property
    def grid(self) -> Tensor:
        """The student's times ``[steps + 1]``, falling from 1 to 0."""
        return grid_from_times(self.times)

    @property
    def steps(self) -> int:
        """Steps of the student's sampler."""
        return len(self.grid) - 1

    def predict(self, batch: Batch, draw: Draw, k: int) -> State:
        """Step k of the student's path; only that step has the caller's gradient."""
        z = draw.normal("z", batch.x.shape[1:]).to(batch.x)
        states = sample(self.student, self.grid, z, batch.c)
        with torch.no_grad():
            for _ in range(k):
                next(states)
        return next(states)

    def noised(self, state: State, draw: Draw) -> tuple[Tensor, Tensor, Tensor]:
        """A state's x, which is at time u, noised on.

        Returns:
            x_t ``[B, ...]``, the times t ``[B]`` of the step's range, and the noise ``[B, ...]``.
        """
        x, width = state.x.detach(), state.t - state.u
        share = shift_time(draw.uniform("t").to(x), self.noise_shift)
        t = state.u + width * (self.margin + (1 - 2 * self.margin) * share)
        eps = draw.normal("eps", x.shape[1:]).to(x)
        return push(x, state.u, t, eps), t, eps

    def student_loss(self, batch: Batch, draw: Draw) -> dict[str, Tensor]:
        """Surrogate per sample ``[B]`` and the terms to watch."""
        return self.generated(batch, draw)[1]

    def generated(self, batch: Batch, draw: Draw) -> tuple[Tensor | None, dict[str, Tensor]]:
        """The clean sample of the last step, see `turbo_lab.methods.gan.Generates`, and its loss.

        There is none in the turn of an earlier step.
        """
        state = self.predict(batch, draw, draw.shared("step", self.steps))
        with torch.no_grad():
            x_t, t, _ = self.noised(state, draw)
            v, goal = self.fake(x_t, t, batch.c), self.teacher(x_t, t, batch.c)
            g, gap = pull(state.x_hat, x_t, t, v, goal, self.floor)
        terms = {"surrogate": surrogate(state.x_hat, g), "g_norm": rms(g), "gap": rms(gap)}
        return (state.x_hat if state.index == self.steps - 1 else None), terms

    @torch.no_grad()
    def samples(self, batch: Batch, draw: Draw) -> Tensor:
        """Clean images of the student ``[B, ...]``: where its last step leads to."""
        return self.predict(batch, draw, self.steps - 1).x

    def fake_loss(self, batch: Batch, draw: Draw) -> dict[str, Tensor]:
        """Score matching of the fake on the student's states, per sample ``[B]``."""
        with torch.no_grad():
            state = self.predict(batch, draw, draw.shared("step", self.steps))
            x_t, t, eps = self.noised(state, draw)
            goal, w = velocity_from(state.x, state.u, t, eps)
        v = self.fake(x_t, t, batch.c)
        return {"velocity": squared(w.sqrt() * v, w.sqrt() * goal)}
