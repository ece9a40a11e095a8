"""DMD2: distribution matching with a fake score that is learned along with the student."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from turbo_lab.critic import Critic, TrainableCritic, logistic
from turbo_lab.errors import BadInput
from turbo_lab.field import Condition, Field
from turbo_lab.fit import Batch, Player, Terms, Turn
from turbo_lab.methods.divergences import density_ratio, divergence_named, needs_ratio
from turbo_lab.methods.kinds import TrainableField, chosen, squared
from turbo_lab.path import (
    check_eta,
    expand,
    grid_from_times,
    mix,
    secant,
    shift_time,
    split,
    velocity,
)
from turbo_lab.sample import State, final, sample
from turbo_lab.streams import Draw

Range = tuple[float, float]
Loss = Callable[[Batch, Draw], Terms]
Start = Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor, int]]


def backward(x: Tensor, z: Tensor, grid: Tensor, k: int) -> tuple[Tensor, Tensor, int]:
    """Backward simulation: step k starts where the student's own k steps from noise lead."""
    return z, grid, k


def forward(x: Tensor, z: Tensor, grid: Tensor, k: int) -> tuple[Tensor, Tensor, int]:
    """Forward noising: step k starts at real data noised to its time."""
    return mix(x, z, float(grid[k])), grid[k:], 0


ROLLOUTS: Mapping[str, Start] = MappingProxyType({"backward": backward, "forward": forward})
"""Where the drawn step starts: state, the rest of the grid, and steps to take without gradient."""


def rms(a: Tensor) -> Tensor:
    """Root mean square per sample: ``[B, ...]`` -> ``[B]``."""
    return a.square().flatten(1).mean(1).sqrt()


def pull(
    x: Tensor, x_t: Tensor, t: Tensor, v_from: Tensor, v_to: Tensor, floor: float
) -> tuple[Tensor, Tensor]:
    r"""Gradient that pulls x from what one field takes for its clean image to what another does.

    .. math:: \Delta = \hat x_{from} - \hat x_{to} = t (v_{to} - v_{from})
              = \tfrac{t^2}{1-t} (s_{from} - s_{to}), \qquad
              g = \frac{\Delta}{\max(\mathrm{mean}|x - \hat x_{to}|,\; floor)}

    (Yin et al. 2023, DMD, arXiv 2311.18828). The mean is over one sample.

    Args:
        x: ``[B, ...]`` samples of the student.
        x_t: ``[B, ...]`` the same, noised to the times t ``[B]``.
        t: ``[B]``.
        v_from: ``[B, ...]`` velocity there of the field that x is pulled away from.
        v_to: ``[B, ...]`` velocity there of the field that x is pulled to.
        floor: lowest divisor, above 0.

    Returns:
        g and Δ, both ``[B, ...]``.
    """
    gap = expand(t, x_t) * (v_to - v_from)
    x_hat, _ = split(x_t, v_to, t)
    size = (x - x_hat).abs().flatten(1).mean(1).clamp_min(floor)
    return gap / expand(size, x), gap


def surrogate(x: Tensor, g: Tensor) -> Tensor:
    """A loss per sample ``[B]`` whose gradient in x is g / D, with D numbers per sample.

    Its value, mean g² / 2, says nothing about convergence. As for every other loss here the mean
    over D keeps the size of a step and of the weights between terms the same at any resolution;
    codebases that sum (rCM) have gradients D times as large, which clipping sees and AdamW mostly
    does not.
    """
    return squared(x, (x - g).detach()) / 2


def rounds(
    fake: Loss, student: Loss, *, every: int, between: Sequence[Turn] = ()
) -> Sequence[Turn]:
    """Turns of a round: the fake's, others of rivals, and in each ``every``-th the student's."""
    return (
        Turn(name="fake", loss=fake, moves=("fake",)),
        *between,
        Turn(name="student", loss=student, moves=("student",), every=every),
    )


@dataclass(frozen=True, kw_only=True)
class DMD2:
    r"""Move the student's samples from where it is dense to where the teacher is.

    With x the clean image that the student predicts in the drawn step of its sampler, and x_t the
    same noised to a random t,

    .. math:: \nabla_\theta L = E\Big[ h(r)\, g \cdot \frac{\partial x}{\partial \theta} \Big] / D,
              \qquad g = \frac{\hat x_{fake}(x_t) - \hat x_{teacher}(x_t)}
                              {\max(\mathrm{mean}|x - \hat x_{teacher}|,\; floor)}

    while the fake learns, by flow matching, the velocity of the student's samples (Yin et al.
    2024, arXiv 2405.14867; the weight h is that of f-distill, arXiv 2502.15681). The terms
    ``g_norm`` (rms of g) and ``gap`` (rms of the numerator) are the ones to watch. Nothing that is
    not finite is repaired: `turbo_lab.fit` stops and names it.

    One round is one update of the fake. The student moves after the fake in rounds 1, 1 +
    ``rival_updates``, 1 + 2 ``rival_updates``...: so for each of its updates the fake has
    ``rival_updates``. (A "ratio of 5" means this in DMD2, and 4 in FastGen.)

    The step k is drawn once for the whole batch, as in DMD2. Of the batch, ``c`` is used, and of
    ``x`` only the shape unless the rollout is ``forward``.

    **Weights h(r)** need r = p / q at x_t. Where densities are known, ``critic`` is a function that
    returns log r. Elsewhere it is a player, and learns log r in a turn of its own every round, by
    the logistic loss between the teacher's samples and the student's, each noised to a time of its
    own in ``noise_range``. ``Batch.x`` must then be samples of the teacher: p is what they were
    drawn from. Pairs are drawn from the guided teacher, so r is that of guided samples, not of
    the plain teacher that decoupled guidance matches. With few of them a critic can learn them by
    heart, and then overrates r; its terms sink below those on fresh samples. A divergence without
    a weight asks no critic and trains none.

    **Decoupled guidance** (Liu et al. 2025, arXiv 2511.22677), if ``guidance_range`` is given: g
    becomes the sum of a distribution-matching part, from the fake to the ``plain`` teacher, and a
    guidance part, from the plain to the guided teacher, which has noise and times of its own. Each
    has its own divisor, and h weighs the first alone.

    **Anchored first step** (Wu et al. 2026, arXiv 2602.03139), if ``anchor_weight`` is above 0:
    the first step learns the chord of the teacher's Euler path from the same noise, (z - x_a) / (1
    - a), weighted, and is left out of distribution matching; the fake sees later steps only.
    Meant for Euler sampling: renoising (eta = 1) forgets much of what the first step found.

    Args:
        student: the field that learns.
        teacher: the field whose distribution is the goal (guided, frozen).
        fake: learns the velocity of the student's samples; never guided.
        plain: the teacher without guidance, for decoupled guidance.
        critic: logits of teacher against student, for every divergence but ``rkl``; it learns if
            it is a `turbo_lab.critic.TrainableCritic`.
        times: of the student's sampler, falling from 1; the closing 0 may be left out.
        eta: of the student's sampler: 0 is Euler, 1 predicts and renoises.
        rollout: ``backward`` (simulated with the sampler, gradient through the drawn step alone)
            or ``forward`` (noised real data).
        rival_updates: updates of the fake for each update of the student, at least 1.
        noise_range, noise_shift: t = low + (high - low) shift_time(u, shift), u uniform, for the
            student's loss.
        fake_range, fake_shift: the same for the fake's; its range covers the student's.
        guidance_range: the same for the guidance part, with ``noise_shift``; empty for guidance
            inside the teacher.
        floor: lowest divisor, above 0.
        divergence: a name of `turbo_lab.methods.divergences.DIVERGENCES`, or ``alpha``.
        alpha: of the line h = r^alpha; 0 is ``rkl``.
        ratio_clip: lowest and highest r.
        anchor_weight: weight of the anchored first step; 0 for none.
        anchor_time: a, where the teacher's path is left; None for the student's second time.
        anchor_steps: even Euler steps of the teacher from 1 to a.
    """

    student: TrainableField
    teacher: Field
    fake: TrainableField
    plain: Field | None = None
    critic: Critic | None = None
    times: tuple[float, ...]
    eta: float = 0.0
    rollout: str = "backward"
    rival_updates: int = 5
    noise_range: Range = (0.02, 0.98)
    noise_shift: float = 1.0
    fake_range: Range = (0.0, 1.0)
    fake_shift: float = 1.0
    guidance_range: Range | tuple[()] = ()
    floor: float = 1e-3
    divergence: str = "rkl"
    alpha: float = 0.0
    ratio_clip: Range = (0.1, 20.0)
    anchor_weight: float = 0.0
    anchor_time: float | None = None
    anchor_steps: int = 5

    def __post_init__(self) -> None:
        if float(self.grid[0]) != 1:
            raise BadInput("times", self.times, "the first must be 1, where there is only noise")
        check_eta(self.eta)
        chosen("rollout", self.rollout, ROLLOUTS)
        if self.rival_updates < 1:
            raise BadInput("rival_updates", self.rival_updates, "use an integer of at least 1")
        if not 0 < self.floor < math.inf:
            raise BadInput("floor", self.floor, "use a finite number above 0")
        self._check_noise()
        self._check_divergence()
        self._check_anchor()

    def _check_noise(self) -> None:
        _check_range("noise_range", self.noise_range)
        _check_range("fake_range", self.fake_range)
        for name, shift in (("noise_shift", self.noise_shift), ("fake_shift", self.fake_shift)):
            if not 0 < shift < math.inf:
                raise BadInput(name, shift, "use a finite number above 0")
        (low, high), (first, last) = self.noise_range, self.fake_range
        if not first <= low < high <= last:
            raise BadInput("fake_range", self.fake_range, f"it must cover {self.noise_range}")
        if self.guidance_range:
            _check_range("guidance_range", self.guidance_range)
            if self.plain is None:
                allowed = "it needs the plain teacher, which this stage was not given"
                raise BadInput("guidance_range", self.guidance_range, allowed)

    def _check_divergence(self) -> None:
        divergence_named(self.divergence, self.alpha)
        if not (len(self.ratio_clip) == 2 and 0 < self.ratio_clip[0] < self.ratio_clip[1] < 1e30):
            raise BadInput("ratio_clip", self.ratio_clip, "use two rising numbers above 0")
        if self._weighed and self.critic is None:
            allowed = "it needs a critic for the ratio; only rkl (alpha = 0) does without"
            raise BadInput("divergence", self.divergence, allowed)

    def _check_anchor(self) -> None:
        if not 0 <= self.anchor_weight < math.inf:
            raise BadInput("anchor_weight", self.anchor_weight, "use a finite number, at least 0")
        if self.anchor_steps < 1:
            raise BadInput("anchor_steps", self.anchor_steps, "use an integer of at least 1")
        if self.anchor_time is not None and not 0 <= self.anchor_time < 1:
            raise BadInput("anchor_time", self.anchor_time, "use None or a time from 0 to below 1")
        if self.anchor_weight and self.steps < 2:
            allowed = "an anchored first step needs a later one; use at least two times"
            raise BadInput("anchor_weight", self.anchor_weight, allowed)

    @property
    def players(self) -> Mapping[str, Player]:
        """The student, and its rivals: the fake, and a critic that has to learn."""
        return {"student": self.student, "fake": self.fake, **self._critics}

    def turns(self) -> Sequence[Turn]:
        """Every round the rivals, and then, every ``rival_updates`` rounds, the student."""
        critics = [Turn(name=name, loss=self.critic_loss, moves=(name,)) for name in self._critics]
        return rounds(self.fake_loss, self.student_loss, every=self.rival_updates, between=critics)

    @property
    def grid(self) -> Tensor:
        """The student's times ``[steps + 1]``, falling from 1 to 0."""
        return grid_from_times(self.times)

    @property
    def steps(self) -> int:
        """Steps of the student's sampler."""
        return len(self.grid) - 1

    @property
    def _weighed(self) -> bool:
        return needs_ratio(self.divergence, self.alpha)

    @property
    def _critics(self) -> Mapping[str, TrainableCritic]:
        """The critic by name, if it is asked for a ratio and learns."""
        asked = {"critic": self.critic} if self._weighed else {}
        return {name: it for name, it in asked.items() if isinstance(it, TrainableCritic)}

    def predict(self, batch: Batch, draw: Draw, k: int) -> State:
        """Step k of the student's own sampler, ``State.x_hat`` being the x of the losses.

        The steps before it have no gradient; this one has the caller's.
        """
        tail = batch.x.shape[1:]
        z = draw.normal("z", tail).to(batch.x)
        start, grid, skipped = ROLLOUTS[self.rollout](batch.x, z, self.grid, k)
        states = sample(
            self.student,
            grid,
            start,
            batch.c,
            eta=self.eta,
            renoise=lambda i: draw.normal(f"renoise/{i}", tail).to(batch.x),
        )
        with torch.no_grad():
            for _ in range(skipped):
                next(states)
        return next(states)

    @torch.no_grad()
    def gradient(self, x: Tensor, c: Condition, draw: Draw) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return ``h(r) g [B, ...]`` at clean images x ``[B, ...]``, and the terms to watch."""
        goal = self.plain if self.guidance_range else self.teacher
        assert goal is not None
        x_t, t = _noised(x, draw, self.noise_range, self.noise_shift)
        g, gap = pull(x, x_t, t, self.fake(x_t, t, c), goal(x_t, t, c), self.floor)
        watched = {"gap": rms(gap)}
        if self._weighed:
            assert self.critic is not None
            r = density_ratio(self.critic(x_t, t, c), self.ratio_clip)
            watched["weight"] = divergence_named(self.divergence, self.alpha).h(r)
            g = expand(watched["weight"], g) * g
        if self.guidance_range:
            guidance = self._guidance(x, c, draw.sub("guidance"), goal)
            watched["guidance"] = rms(guidance)
            g = g + guidance
        return g, {"g_norm": rms(g), **watched}

    def _guidance(self, x: Tensor, c: Condition, draw: Draw, plain: Field) -> Tensor:
        """The guidance part of g: from the plain to the guided teacher, at its own times."""
        assert self.guidance_range
        x_t, t = _noised(x, draw, self.guidance_range, self.noise_shift)
        return pull(x, x_t, t, plain(x_t, t, c), self.teacher(x_t, t, c), self.floor)[0]

    @torch.no_grad()
    def anchor(self, z: Tensor, c: Condition) -> Tensor:
        """Chord of the teacher's path from noise z ``[B, ...]`` to the anchor time."""
        end = float(self.grid[1]) if self.anchor_time is None else self.anchor_time
        grid = torch.linspace(1, end, self.anchor_steps + 1)
        return secant(z, final(sample(self.teacher, grid, z, c)), 1.0, end)

    def student_loss(self, batch: Batch, draw: Draw) -> dict[str, Tensor]:
        """Surrogate per sample ``[B]`` and the terms to watch, or the anchored first step."""
        return self.generated(batch, draw)[1]

    def generated(self, batch: Batch, draw: Draw) -> tuple[Tensor | None, dict[str, Tensor]]:
        """The x of the student's turn, see `turbo_lab.methods.gan.Generates`, and its loss terms.

        There is no x in the anchored first step, which is not matched.
        """
        k = draw.shared("step", self.steps)
        state = self.predict(batch, draw, k)
        if k == 0 and self.anchor_weight:
            chord = self.anchor(state.x_t, batch.c)
            return None, {"anchor": self.anchor_weight * squared(state.v, chord)}
        g, watched = self.gradient(state.x_hat.detach(), batch.c, draw)
        return state.x_hat, {"surrogate": surrogate(state.x_hat, g), **watched}

    @torch.no_grad()
    def samples(self, batch: Batch, draw: Draw) -> Tensor:
        """Clean images of the student ``[B, ...]`` for its rivals: those that are matched."""
        first = 1 if self.anchor_weight else 0
        k = first + draw.shared("step", self.steps - first)
        return self.predict(batch, draw, k).x_hat

    def fake_loss(self, batch: Batch, draw: Draw) -> dict[str, Tensor]:
        """Flow matching of the fake on the student's samples, per sample ``[B]``."""
        x = self.samples(batch, draw)
        t = _times(draw, self.fake_range, self.fake_shift, x)
        z = draw.normal("eps", x.shape[1:]).to(x)
        v = self.fake(mix(x, z, t), t, batch.c)
        return {"velocity": squared(v, velocity(x, z))}

    def critic_loss(self, batch: Batch, draw: Draw) -> dict[str, Tensor]:
        """Logistic loss of a critic that learns, per sample ``[B]``, see `logistic`.

        Args:
            batch: its ``x`` are samples of the teacher.
            draw: of this turn.
        """
        assert self.critic is not None
        sides = {"teacher": batch.x, "student": self.samples(batch, draw)}
        logits = {}
        for side, x in sides.items():
            x_t, t = _noised(x, draw.sub(side), self.noise_range, self.noise_shift)
            logits[side] = self.critic(x_t, t, batch.c)
        return logistic(**logits)


def _times(draw: Draw, between: Range, shift: float, like: Tensor) -> Tensor:
    low, high = between
    return low + (high - low) * shift_time(draw.uniform("t").to(like.device), shift)


def _noised(x: Tensor, draw: Draw, between: Range, shift: float) -> tuple[Tensor, Tensor]:
    t = _times(draw, between, shift, x)
    return mix(x, draw.normal("eps", x.shape[1:]).to(x), t), t


def _check_range(name: str, between: tuple[float, ...]) -> None:
    if len(between) != 2 or not 0 <= between[0] < between[1] <= 1:
        raise BadInput(name, between, "use two rising times from 0 to 1")
