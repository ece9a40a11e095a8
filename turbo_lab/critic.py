"""Critics: networks that tell the teacher's side from the student's, at any time and caption.

A critic is asked like a field, ``critic(x_t, t, c)``, and answers with logits ``[B]``. Trained with
the logistic loss on as many samples of either side, its logit goes to ``log p / q``, teacher over
student (Goodfellow et al. 2014, proposition 1); a hinge loss does not calibrate it, which is no
matter where the student only has to fool it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.functional import relu, silu, softplus

from turbo_lab.field import Condition
from turbo_lab.fit import Player
from turbo_lab.streams import seed_for

Critic = Callable[[Tensor, Tensor, Condition], Tensor]
"""``(x_t, t, c)`` to logits ``[B]``."""


@runtime_checkable
class TrainableCritic(Player, Protocol):
    """A critic that is also a player. `turbo_lab.field.frozen` makes one a plain critic again."""

    def __call__(self, x_t: Tensor, t: Tensor, c: Any) -> Tensor:
        """Return logits ``[B]``, above 0 where the teacher is denser."""


@runtime_checkable
class Voting(Protocol):
    """A critic whose logit is a mean of votes, such as one for each token that it looks at."""

    def votes(self, x_t: Tensor, t: Tensor, c: Any) -> Tensor:
        """Return logits ``[B, V]``."""


def votes_of(critic: Critic, x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
    """Return the votes ``[B, V]`` of a critic; its logit is the only one where it has no others."""
    if isinstance(critic, Voting):
        return critic.votes(x_t, t, c)
    return critic(x_t, t, c)[:, None]


def logistic(teacher: Tensor, student: Tensor) -> dict[str, Tensor]:
    r"""Terms of the logistic loss per sample ``[B]``, :math:`\log(1+e^{-D(p)}) + \log(1+e^{D(q)})`.

    Each is log 2 = 0.693 for a critic that knows nothing, and for one that is right about a student
    that equals its teacher.

    Args:
        teacher: logits ``[B]`` of the teacher's samples.
        student: logits ``[B]`` of the student's.
    """
    return {"teacher": softplus(-teacher), "student": softplus(student)}


def hinge(teacher: Tensor, student: Tensor) -> dict[str, Tensor]:
    r"""Terms of the hinge loss per sample ``[B]``, :math:`(1 - D(p))_+ + (1 + D(q))_+`.

    Each is 1 for a critic that knows nothing. The arguments are those of `logistic`.
    """
    return {"teacher": relu(1 - teacher), "student": relu(1 + student)}


@dataclass(frozen=True, kw_only=True)
class Adversary:
    """What a critic minimises, given logits of either side, and what a student does, given its own.

    All are per logit: ``[B]``, or votes ``[B, V]``.
    """

    critic: Callable[[Tensor, Tensor], dict[str, Tensor]]
    student: Callable[[Tensor], Tensor]


ADVERSARIES: Mapping[str, Adversary] = MappingProxyType(
    {
        "hinge": Adversary(critic=hinge, student=lambda logits: relu(1 - logits)),
        "logistic": Adversary(critic=logistic, student=lambda logits: softplus(-logits)),
    }
)
"""By name: ``hinge`` stops pushing a sample that the critic takes for the teacher's with a margin,
as in the code of phased consistency; ``logistic`` is the non-saturating loss of DMD2."""


def gradient_penalty(
    critic: Critic, x_t: Tensor, t: Tensor, c: Condition, *, votes: Tensor, n: Tensor, step: float
) -> Tensor:
    r"""Approximate R1 per sample ``[B]``: how steep the critic is, by a finite difference.

    .. math:: R = \mathrm{mean}_v \left( \frac{D_v(x_t + h n) - D_v(x_t)}{h} \right)^2,
              \qquad n \sim N(0, I), \qquad E[R] \to \|\nabla D\|^2 \; (h \to 0)

    for one vote, and exactly so for a linear one. R1 itself (Mescheder et al. 2018, arXiv
    1801.04406) is differentiated twice, which fused attention does not offer. APT (Lin et al. 2025,
    arXiv 2501.08316) has λ (D(x) - D(x + σ n))²: a weight w here is λ = w / σ² there, so its λ =
    100 with σ = 0.01 is w = 0.01.

    Args:
        critic: asked once more.
        x_t: ``[B, ...]`` samples of the teacher's side, as the critic sees them.
        t: ``[B]``.
        c: their condition.
        votes: ``[B, V]`` of `votes_of` there.
        n: ``[B, ...]`` standard normal noise.
        step: h, above 0. Rounding is divided by it, so bfloat16 needs a larger one than float32.
    """
    return ((votes_of(critic, x_t + step * n, t, c) - votes) / step).square().mean(1)


class LatentCritic(nn.Module):
    """Logits of latents ``[B, channels, H, W]`` by two convolutional blocks, for less than a field.

    Time and caption scale and shift every block, and weigh the features of the last layer
    (projection, Miyato & Koyama 2018, arXiv 1802.05637). Nothing is normalised: neither over the
    batch, or micro-batches would change the loss, nor over an image, whose contrast is evidence.
    The last layer starts at zero, so at first every ratio is 1.

    Args:
        channels: of the latents.
        vocabulary: number of token ids.
        tokens: token ids of one caption.
        width: channels of the first block, at half the resolution; the second has twice as many.
    """

    def __init__(self, *, channels: int, vocabulary: int, tokens: int, width: int = 32) -> None:
        super().__init__()
        inner = 2 * width
        self.captions = nn.Embedding(vocabulary, width)
        self.condition = nn.Sequential(
            nn.Linear(2 * FREQUENCIES + tokens * width, inner), nn.SiLU(), nn.Linear(inner, inner)
        )
        self.first = nn.Conv2d(channels, width, 3, stride=2, padding=1)
        self.fine = Block(width, inner)
        self.second = nn.Conv2d(width, inner, 3, stride=2, padding=1)
        self.coarse = Block(inner, inner)
        self.score = nn.Linear(inner, 3 * width)
        self.bias = nn.Linear(inner, 1)
        for layer in (self.score, self.bias):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x_t: Tensor, t: Tensor, c: Tensor) -> Tensor:
        """Return logits ``[B]`` for ``x_t [B, channels, H, W]``, ``t [B]``, ``c [B, tokens]``."""
        time = waves(t.expand(len(x_t)))
        e = silu(self.condition(torch.cat([time, self.captions(c).flatten(1)], dim=1)))
        fine = self.fine(self.first(x_t), e)
        coarse = self.coarse(self.second(silu(fine)), e)
        seen = torch.cat([silu(a).mean((2, 3)) for a in (fine, coarse)], dim=1)
        return (self.score(e) * seen).sum(1) + self.bias(e)[:, 0]


FREQUENCIES = 6
"""Of the time: 1/2 to 16 waves from data to noise."""


def waves(t: Tensor) -> Tensor:
    """Sines and cosines of times: ``[B]`` -> ``[B, 2 FREQUENCIES]``."""
    phase = math.pi * t[:, None] * 2.0 ** torch.arange(FREQUENCIES, device=t.device)
    return torch.cat([phase.sin(), phase.cos()], dim=1)


class Block(nn.Module):
    """A residual block of two convolutions, the first scaled and shifted by a condition."""

    def __init__(self, width: int, condition: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.modulation = nn.Linear(condition, 2 * width)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        """Return ``x [B, width, H, W]`` changed as the condition ``e [B, condition]`` says."""
        scale, shift = self.modulation(e)[:, :, None, None].chunk(2, dim=1)
        return x + self.second(silu((1 + scale) * self.first(silu(x)) + shift))


def spawn_critic(
    *, channels: int, vocabulary: int, tokens: int, seed: int, width: int = 32
) -> LatentCritic:
    """Build a `LatentCritic` from a seed without touching the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(seed, "critic"))
        return LatentCritic(channels=channels, vocabulary=vocabulary, tokens=tokens, width=width)
