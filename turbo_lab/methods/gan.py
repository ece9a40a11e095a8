"""The GAN term: one more loss term and one more player beside any method that makes a sample."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from turbo_lab.critic import ADVERSARIES, TrainableCritic, gradient_penalty, votes_of
from turbo_lab.errors import BadInput
from turbo_lab.field import Condition, each
from turbo_lab.fit import Batch, Objective, Player, Terms, Turn
from turbo_lab.methods.kinds import chosen
from turbo_lab.path import mix
from turbo_lab.streams import Draw

CRITIC = "critic"
"""Name of the player and of its turn."""
MOST = 1e4
"""Largest ratio of norms that balancing takes for its own, as in VQGAN."""

Batches = Callable[[Draw], Batch]


@runtime_checkable
class Generates(Protocol):
    """What a method needs to have for a GAN term: the clean sample of its student's turn.

    A method that is asked for `generated` must get the same loss terms, bit for bit, as from the
    loss of its own turn.
    """

    def generated(self, batch: Batch, draw: Draw) -> tuple[Tensor | None, Terms]:
        """Return x ``[B, ...]`` with its gradient, and the method's own terms at that x.

        x is None in a turn whose sample is not meant to be distributed as the data.
        """

    def samples(self, batch: Batch, draw: Draw) -> Tensor:
        """Return such x ``[B, ...]`` without a gradient, for a rival."""


class Generator(Generates, Objective, Protocol):
    """A method with a GAN term's needs."""


def as_it_is(x: Tensor, draw: Draw) -> Tensor:
    """Show a sample unchanged."""
    return x


def mixed(data: Batches, teacher: Batches, rho: float) -> Batches:
    r"""The real side of a critic: each row from the data with probability rho, else the teacher's.

    At its optimum a critic then knows :math:`\log\,(\rho\, p_{data} + (1-\rho)\, p_T) / q`. Which
    row is whose is drawn from the stream "rho"; either side gets a stream of its own, and is not
    asked where it can have no row.

    Args:
        data: real samples for the rows of a draw.
        teacher: samples of the teacher for them.
        rho: share of data, 0 to 1.

    Raises:
        BadInput: rho is out of range.
    """
    if not 0 <= rho <= 1:
        raise BadInput("rho", rho, "use a share of real data from 0 to 1")
    if rho in (0, 1):
        name, only = ("data", data) if rho else ("teacher", teacher)
        return lambda draw: only(draw.sub(name))

    def batch(draw: Draw) -> Batch:
        ours, theirs = data(draw.sub("data")), teacher(draw.sub("teacher"))
        real = draw.uniform("rho") < rho

        def pick(a: Tensor, b: Tensor) -> Tensor:
            rows = real.to(a.device).reshape(-1, *(1,) * (a.ndim - 1))
            return torch.where(rows, a, b.to(a))

        return Batch(pick(ours.x, theirs.x), each(pick, ours.c, theirs.c))

    return batch


@dataclass(frozen=True, kw_only=True)
class WithGan:
    r"""A method whose student has to fool a critic as well.

    To the terms of the student's turn comes ``gan``, and before that turn, every round, the critic
    has one of its own. With a the student's part of the loss and b, b' the critic's
    (`turbo_lab.critic.ADVERSARIES`; for ``logistic`` the non-saturating loss of Goodfellow et al.
    2014), averaged over the votes v,

    .. math:: L_G = \lambda\, \mathrm{mean}_v\, a(D_v(x_t)), \qquad
              L_D = \mathrm{mean}_v \left[ b(D_v(x^{real}_t)) + b'(D_v(x_t)) \right] + w R

    with R of `turbo_lab.critic.gradient_penalty` on the real side. The student's forward pass is
    the method's: one x serves both. The method's own streams are not touched, so its terms are the
    same bits with or without a critic.

    **Weight.** Either λ itself, or a ratio of gradients at x, as the author of DMD2 advises (issue
    73 of its repository) and VQGAN does (Esser et al. 2020, arXiv 2012.09841, eq. 7):

    .. math:: \lambda = \mathrm{balance} \cdot
              \|\nabla_x L_{method}\| \,/\, \|\nabla_x L_{gan}\|

    with norms over the rows at hand (micro-batches, and processes, are balanced each on its own)
    and their ratio at most 1e4.
    Both norms and their angle are watched either way, by the terms ``method_pull`` and
    ``gan_pull`` (rms of the gradients, each times the D numbers of a sample, as ``g_norm`` is in
    DMD2; the second without λ), ``cosine`` and ``gan_weight``.

    Args:
        method: any `Generates` with one turn that moves ``student`` alone.
        critic: learns; called with shown samples, times and conditions.
        real: samples of the critic's other side, see `mixed`.
        weight: λ, at least 0, if there is no balance.
        balance: ratio above 0, or None for the fixed weight.
        loss: ``logistic`` or ``hinge``.
        r1: w, at least 0.
        r1_step: h of the finite difference.
        noise_range: times to which shown samples are noised, t uniform; (0, 0) shows them clean.
            A time is drawn for row i of either side at once, the noise for each.
        show: how a clean sample is shown: decoding, augmentation. It gets the same draw for both
            sides, and has to be differentiable.
    """

    method: Generator
    critic: TrainableCritic
    real: Batches
    weight: float = 0.0
    balance: float | None = None
    loss: str = "logistic"
    r1: float = 0.0
    r1_step: float = 0.01
    noise_range: tuple[float, float] = (0.0, 0.0)
    show: Callable[[Tensor, Draw], Tensor] = as_it_is

    def __post_init__(self) -> None:
        chosen("loss", self.loss, ADVERSARIES)
        for name, value in (("weight", self.weight), ("r1", self.r1)):
            if not 0 <= value < math.inf:
                raise BadInput(name, value, "use a finite number of at least 0")
        for name, above in (("balance", self.balance), ("r1_step", self.r1_step)):
            if above is not None and not 0 < above < math.inf:
                raise BadInput(name, above, "use a finite number above 0")
        if self.balance is not None and self.weight:
            raise BadInput("balance", self.balance, "give a weight or a balance, not both")
        low, high = self.noise_range
        if not 0 <= low <= high <= 1:
            raise BadInput("noise_range", self.noise_range, "use two times, 0 to 1, not falling")
        self._check_method()

    def _check_method(self) -> None:
        name = type(self.method).__name__
        if not isinstance(self.method, Generates):
            raise BadInput("method", name, "it makes no sample that a critic could look at")
        if CRITIC in self.method.players:
            raise BadInput("method", name, "it has a critic of its own; a GAN term adds one")
        if [turn.moves for turn in self.method.turns()].count(("student",)) != 1:
            raise BadInput("method", name, "it needs one turn that moves the student alone")

    @property
    def players(self) -> Mapping[str, Player]:
        """The method's players and the critic."""
        return {**self.method.players, CRITIC: self.critic}

    def turns(self) -> Sequence[Turn]:
        """The method's turns; the critic's comes before the student's."""
        turns: list[Turn] = []
        for turn in self.method.turns():
            if turn.moves == ("student",):
                turns.append(Turn(name=CRITIC, loss=self.critic_loss, moves=(CRITIC,)))
                turn = dataclasses.replace(turn, loss=self.student_loss)
            turns.append(turn)
        return turns

    def student_loss(self, batch: Batch, draw: Draw) -> Terms:
        """The method's terms, the GAN term, and those to watch, per sample ``[B]``."""
        x, terms = self.method.generated(batch, draw)
        if x is None:
            return terms
        own = _slope(_sum(terms), x)
        fooled, pull = self._fooling(x.detach(), batch.c, draw.sub("gan"))
        weight = self.weight if self.balance is None else self.balance * _ratio(own, pull)
        return {
            **terms,
            "gan": weight * _carrying(fooled, pull, x),
            **_watched(own, pull, weight),
        }

    def critic_loss(self, batch: Batch, draw: Draw) -> dict[str, Tensor]:
        """Terms of the critic per sample ``[B]``: either side, and how steep it is.

        Args:
            batch: its conditions are those of the student's samples.
            draw: of this turn.
        """
        made, real = self.method.samples(batch, draw), self.real(draw.sub("real"))
        x_t, t = self._shown(real.x, draw, "teacher")
        votes = votes_of(self.critic, x_t, t, real.c)
        theirs = votes_of(self.critic, *self._shown(made, draw, "student"), batch.c)
        terms = ADVERSARIES[self.loss].critic(votes, theirs)
        terms = {name: term.mean(1) for name, term in terms.items()}
        if self.r1:
            n = draw.normal("r1", x_t.shape[1:]).to(x_t)
            terms["r1"] = self.r1 * gradient_penalty(
                self.critic, x_t, t, real.c, votes=votes, n=n, step=self.r1_step
            )
        return terms

    def _fooling(self, x: Tensor, c: Condition, draw: Draw) -> tuple[Tensor, Tensor]:
        """The unweighted term ``[B]`` at x ``[B, ...]``, and its gradient there."""
        x = x.requires_grad_()
        votes = votes_of(self.critic, *self._shown(x, draw, "student"), c)
        term = ADVERSARIES[self.loss].student(votes).mean(1)
        return term.detach(), torch.autograd.grad(term.sum(), x)[0]

    def _shown(self, x: Tensor, draw: Draw, side: str) -> tuple[Tensor, Tensor]:
        """Samples as the critic sees them, and their times ``[B]``."""
        x, (low, high) = self.show(x, draw.sub("show")), self.noise_range
        t = low + (high - low) * draw.uniform("noise").to(x)
        if high == 0:
            return x, t
        return mix(x, draw.normal(f"eps/{side}", x.shape[1:]).to(x), t), t


def _sum(terms: Terms) -> Tensor:
    """All terms that carry a gradient, in one number."""
    return torch.stack([term.sum() for term in terms.values() if term.requires_grad]).sum()


def _slope(loss: Tensor, x: Tensor) -> Tensor:
    """Gradient of a loss in x ``[B, ...]``; the graph behind both is kept."""
    return torch.autograd.grad(loss, x, retain_graph=True)[0]


def _carrying(value: Tensor, slope: Tensor, x: Tensor) -> Tensor:
    """A term ``[B]`` of this value whose gradient in x is ``slope [B, ...]``.

    So the critic's graph is walked once, for the norm, and gone before the student's.
    """
    linear = (slope * x).flatten(1).sum(1)
    return value + (linear - linear.detach())


def _ratio(own: Tensor, pull: Tensor) -> Tensor:
    """``‖own‖ / ‖pull‖`` over all rows, at most `MOST`."""
    return (own.norm() / pull.norm().clamp_min(1e-12)).clamp_max(MOST)


def _watched(own: Tensor, pull: Tensor, weight: float | Tensor) -> dict[str, Tensor]:
    """What is logged of two gradients in x ``[B, ...]``, per sample ``[B]``."""
    a, b = own.flatten(1), pull.flatten(1)
    size = a.shape[1] ** 0.5  # the rms of D times a gradient is √D times its norm
    return {
        "method_pull": size * a.norm(dim=1),
        "gan_pull": size * b.norm(dim=1),
        "cosine": cosine_similarity(a, b, dim=1, eps=1e-12),
        "gan_weight": torch.as_tensor(weight).to(a).expand(len(a)),
    }
