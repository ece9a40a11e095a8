r"""Transition matching as a warm start: a small flow head learns what one coarse step may find.

At a time t of the student's sampler a whole distribution of differences y = z - x is compatible
with x_t, and the teacher's velocity is only their mean: a coarse step along it blurs. Transition
matching (Shaul et al. 2025, arXiv 2506.23589; distilled by Nie et al. 2026, TMD, arXiv 2601.09881)
takes the step along a *sample* of y, which an inner flow makes of noise y_1,

.. math:: y_s = (1 - s)\, y + s\, y_1, \qquad
          \frac{dy_s}{ds} = \frac{y_s - \hat y}{s}, \qquad \hat y = E[y \mid x_t, y_s]

from s = 1 to 0. Of a frozen teacher no data are needed to learn that mean: x_t and y_s are two
views of one x in independent noise, and together they are worth one view x_τ at a lower noise,

.. math:: \frac{x_t}{t} = a x + z, \qquad
          \frac{1}{s}\Big(\frac{1-s}{t} x_t - y_s\Big) = b x - y_1, \qquad
          a = \frac{1-t}{t}, \quad b = \frac{1-s}{t s}, \quad q = \sqrt{a^2 + b^2}

.. math:: \tau = \frac{1}{1+q}, \qquad
          x_\tau = \frac{\tau}{q}\Big(a \frac{x_t}{t} + b\, (b x - y_1)\Big), \qquad
          \hat y = \frac{x_t - \hat x_{teacher}(x_\tau, \tau)}{t}

(our derivation), guidance included.

**What becomes of the head.** In TMD the head stays: it is the last layers of the student, and the
later distribution matching runs through its rollout. Then a student needs inner noise beside x_t,
and is no longer a field that a sampler, a fake score, a LoRA file or a stock pipeline can take. So
here the head is *folded in and dropped*: the student learns, at the times it is sampled at, the end
of the head's rollout from inner noise :math:`y_1 = -\hat z_{teacher}(x_t)`, which can be read off
its own input. What is left is an adapter like any other, sampled by Euler steps at ``times``, and
DMD2 continues from it. Two things follow.

* The trunk stays the teacher, m = its velocity at x_t, and only the head learns on top of it.
  Trained jointly, as in TMD, part of the answer would sit in the head and leave with it.
* No MeanFlow: TMD makes the head a flow map to save inner steps when sampling. Here inner steps
  cost time only in training, and little, as the head is small.

**What the fold keeps.** At t = 1 the inner path is, step for step, the teacher's own path from the
noise z, so the first transition lands on the teacher's layout for each noise. Below 1, inner noise
should be white and independent of x_t, and what is read off x_t is neither. On Gaussian data of
standard deviation d, samples of x then spread :math:`\alpha + 1 - \alpha^2` times as far,
:math:`\alpha = d (1-t) / \sqrt{d^2 (1-t)^2 + t^2}`: right where noise or signal rules, in fine
detail as in coarse layout, and at most 1.25 times too far between. A warm start may err there, as
distribution matching is what follows. (Plain -x_t, scaled to unit variance, is exact at t = 1 too,
but would spread coarse layout almost twice as far.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, silu

from turbo_lab.critic import FREQUENCIES, Block, waves
from turbo_lab.errors import BadInput
from turbo_lab.field import Condition, Field
from turbo_lab.fit import Batch, Player, Turn
from turbo_lab.methods.kinds import (
    DISTANCES,
    TrainableField,
    check_steps,
    chosen,
    squared,
    times_at,
)
from turbo_lab.path import expand, grid_from_times, mix, split, time_grid
from turbo_lab.sample import final, sample
from turbo_lab.streams import Draw, seed_for

Known = tuple[Tensor, Tensor, Tensor, Condition]
"""What the head is told of a transition: x_t, t, the teacher's velocity m there, and c."""


TINY = 1e-6
"""Least a of `one_view`: at t = s = 1 neither view says anything, and the first one is used."""


def one_view(x_t: Tensor, t: Tensor, y_s: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Return x_τ ``[B, ...]`` and τ ``[B]``, which say of x what x_t and y_s say together.

    Args:
        x_t: ``[B, ...]``.
        t: ``[B]``, in (0, 1].
        y_s: ``[B, ...]``, the difference z - x in inner noise.
        s: ``[B]``, in (0, 1].
    """
    a = ((1 - t) / t).clamp_min(TINY)
    b = (1 - s) / (t * s)
    q = torch.hypot(a, b)
    tau = 1 / (1 + q)
    first = x_t / expand(t, x_t)
    second = ((1 - expand(s, x_t)) * first - y_s) / expand(s, x_t)
    return expand(tau * a / q, x_t) * first + expand(tau * b / q, x_t) * second, tau


def gaussian_estimate(y_s: Tensor, s: Tensor, t: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of y given y_s, if the data were Gaussian of unit variance.

    With ``V = 1 / ((1 - t)² + t²)``, the variance of y given x_t: the mean is ``m + g (y_s - (1 -
    s) m)``, ``g = (1 - s) V / ((1 - s)² V + s²)``. It is m at s = 1 and y_s at s = 0, for any data.

    Args:
        y_s: ``[B, ...]``.
        s: ``[B]``, in (0, 1].
        t: ``[B]``.
        m: ``[B, ...]``, mean of y given x_t.
    """
    s, t = expand(s, y_s), expand(t, y_s)
    variance = 1 / ((1 - t) ** 2 + t**2)
    total = (1 - s) ** 2 * variance + s**2
    mean = m + (1 - s) * variance / total * (y_s - (1 - s) * m)
    return mean, (variance / total).sqrt() * s


def inner_noise(x_t: Tensor, t: Tensor, m: Tensor) -> Tensor:
    """The inner noise that a student can read off its own input: ``-ẑ = -(x_t + (1 - t) m)``."""
    _, z_hat = split(x_t, m, t)
    return -z_hat


@dataclass(frozen=True, kw_only=True)
class Transition:
    r"""Learn the teacher's transitions with a flow head, and fold its rollout into the student.

    With x_t real data noised to a time of the sampler, and known = (x_t, t, m, c),

    .. math:: L_{head} = E\, \big| \hat y_\phi(y_s, s, known) - \hat y \big|^2 / spread^2, \qquad
              L_{fold} = E\, d\big(v_\theta(x_t, t, c),\; \mathrm{sg}\, y_0\big)

    where y_0 is where the head's inner flow leads from `inner_noise`. The head gives the rest of
    an estimate that is right for Gaussian data, in units of its spread: ŷ = mean + spread ·
    ``head(y_s, s, known)``, see `gaussian_estimate`. One that gives zeros is a good start, and in
    these units what is left to learn has one size at any s (as in EDM, Karras et al. 2022).

    The teacher is asked twice per sample, at x_t and at x_τ; the rollout asks the head alone.

    Args:
        student: the field that learns; afterwards it is sampled at ``times``, by Euler steps.
        teacher: the field whose transitions are learnt (guided, frozen).
        head: a field of y, told ``known`` as its condition; it is dropped after the stage.
        times: starts of the transitions, falling from 1; the closing 0 may be left out.
        inner_steps: Euler steps of the rollout, 1 to 1000.
        distance: of the fold: ``l2`` or ``huber``, see `turbo_lab.methods.kinds`.
    """

    student: TrainableField
    teacher: Field
    head: TrainableField
    times: tuple[float, ...]
    inner_steps: int = 8
    distance: str = "l2"

    def __post_init__(self) -> None:
        if float(self.grid[0]) != 1:
            raise BadInput("times", self.times, "the first must be 1, where there is only noise")
        check_steps("inner_steps", self.inner_steps)
        chosen("distance", self.distance, DISTANCES)

    @property
    def players(self) -> Mapping[str, Player]:
        """The student, and the head it learns from."""
        return {"student": self.student, "head": self.head}

    def turns(self) -> Sequence[Turn]:
        """One turn per round: neither term has a gradient in the other's player."""
        return (Turn(name="transition", loss=self.loss, moves=("student", "head")),)

    @property
    def grid(self) -> Tensor:
        """The student's times ``[steps + 1]``, falling from 1 to 0."""
        return grid_from_times(self.times)

    @torch.no_grad()
    def answer(self, y_s: Tensor, s: Tensor, known: Known) -> Tensor:
        """The teacher's ``E[y | x_t, y_s]``, ``[B, ...]``."""
        x_t, t, _, c = known
        x_tau, tau = one_view(x_t, t, y_s, s)
        x_hat, _ = split(x_tau, self.teacher(x_tau, tau, c), tau)
        return (x_t - x_hat) / expand(t, x_t)

    def estimate(self, y_s: Tensor, s: Tensor, known: Known) -> Tensor:
        """The head's ``E[y | x_t, y_s]``, ``[B, ...]``."""
        _, t, m, _ = known
        mean, spread = gaussian_estimate(y_s, s, t, m)
        return mean + spread * self.head(y_s, s, known)

    def inner(self, y_s: Tensor, s: Tensor, known: Known) -> Tensor:
        """The velocity of the inner flow, ``(y_s - ŷ) / s``: a field of y, for the sampler."""
        return (y_s - self.estimate(y_s, s, known)) / expand(s, y_s)

    @torch.no_grad()
    def rollout(self, y_1: Tensor, known: Known) -> Tensor:
        """Where the inner flow leads from inner noise y_1 ``[B, ...]``."""
        return final(sample(self.inner, time_grid(self.inner_steps), y_1, known))

    def loss(self, batch: Batch, draw: Draw) -> dict[str, Tensor]:
        """Both terms per sample ``[B]``, for clean latents ``[B, ...]``."""
        x, c = batch.x, batch.c
        t = times_at(self.grid, draw.integers("time", len(self.grid) - 1), x)
        z = draw.normal("z", x.shape[1:]).to(x)
        x_t = mix(x, z, t)
        with torch.no_grad():
            m = self.teacher(x_t, t, c)
        known = (x_t, t, m, c)
        s = 1 - draw.uniform("s").to(t)  # in (0, 1]
        y_s = mix(z - x, draw.normal("y", x.shape[1:]).to(x), s)
        mean, spread = gaussian_estimate(y_s, s, t, m)
        rest = (self.answer(y_s, s, known) - mean) / spread
        goal = self.rollout(inner_noise(x_t, t, m), known)
        return {
            "head": squared(self.head(y_s, s, known), rest),
            "fold": DISTANCES[self.distance](self.student(x_t, t, c), goal),
        }


# --- heads ---------------------------------------------------------------------------------------
#
# They look at x_τ and τ in the place of y_s and s: the same information, in the form of the images
# that a denoiser sees, with nothing left to find out about how the two views go together.


class PointHead(nn.Module):
    """A head for points ``[B, 2]``: a residual MLP. Of the condition it hears through m.

    Args:
        width: hidden width.
        depth: residual layers.
    """

    def __init__(self, width: int = 64, depth: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(3 * 2 + 4 * FREQUENCIES, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.out = _zeroed(nn.Linear(width, 2))

    def forward(self, y_s: Tensor, s: Tensor, known: Known) -> Tensor:
        """Return ``[B, 2]``, see `Transition`."""
        x_t, t, m, _ = known
        x_tau, tau = one_view(x_t, t, y_s, s)
        h = self.embed(torch.cat([x_tau, x_t, m, waves(tau), waves(t)], dim=1))
        for layer in self.layers:
            h = h + layer(silu(h))
        return self.out(silu(h))


class LatentHead(nn.Module):
    """A head for latents ``[B, channels, H, W]``: convolutions at two resolutions.

    Args:
        channels: of the latents.
        vocabulary: number of token ids.
        tokens: token ids of one caption.
        width: channels at full resolution; half the resolution has twice as many.
    """

    def __init__(self, *, channels: int, vocabulary: int, tokens: int, width: int = 32) -> None:
        super().__init__()
        inner = 2 * width
        self.captions = nn.Embedding(vocabulary, width)
        self.condition = nn.Sequential(
            nn.Linear(4 * FREQUENCIES + tokens * width, inner), nn.SiLU(), nn.Linear(inner, inner)
        )
        self.first = nn.Conv2d(3 * channels, width, 3, padding=1)
        self.fine = Block(width, inner)
        self.down = nn.Conv2d(width, inner, 3, stride=2, padding=1)
        self.coarse = Block(inner, inner)
        self.up = nn.Conv2d(inner, width, 3, padding=1)
        self.last = Block(width, inner)
        self.out = _zeroed(nn.Conv2d(width, channels, 3, padding=1))

    def forward(self, y_s: Tensor, s: Tensor, known: Known) -> Tensor:
        """Return ``[B, channels, H, W]``, see `Transition`; c is token ids ``[B, tokens]``."""
        x_t, t, m, c = known
        x_tau, tau = one_view(x_t, t, y_s, s)
        words = self.captions(c).flatten(1)
        e = silu(self.condition(torch.cat([waves(tau), waves(t), words], dim=1)))
        fine = self.fine(self.first(torch.cat([x_tau, x_t, m], dim=1)), e)
        coarse = self.coarse(self.down(silu(fine)), e)
        seen = fine + self.up(interpolate(silu(coarse), size=fine.shape[2:]))
        return self.out(silu(self.last(seen, e)))


def spawn_point_head(*, seed: int, width: int = 64, depth: int = 2) -> PointHead:
    """Build a `PointHead` from a seed without touching the global generator."""
    return _spawned(PointHead, seed, width=width, depth=depth)


def spawn_latent_head(
    *, channels: int, vocabulary: int, tokens: int, seed: int, width: int = 32
) -> LatentHead:
    """Build a `LatentHead` from a seed without touching the global generator."""
    sizes = {"channels": channels, "vocabulary": vocabulary, "tokens": tokens, "width": width}
    return _spawned(LatentHead, seed, **sizes)


def _spawned(kind: Any, seed: int, **sizes: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(seed, "head"))
        return kind(**sizes)


def _zeroed(layer: Any) -> Any:
    """A last layer that starts at zero, so that the first estimate is the Gaussian one."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
