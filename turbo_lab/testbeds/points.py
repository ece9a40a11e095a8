"""points: 2-D Gaussian mixtures, where the teacher is exact and every density is known.

The data have about unit variance per axis, so that the time grids of images mean the same here.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from turbo_lab.critic import FREQUENCIES, waves
from turbo_lab.errors import BadInput
from turbo_lab.field import NULL_LABEL, Condition, Mixture, mixture
from turbo_lab.fit import Batch
from turbo_lab.streams import Draw, seed_for

WITHIN_3_SIGMA = 1 - math.exp(-4.5)
"""Share of a 2-D Gaussian within 3 sigma of its mean: what ``within`` of a perfect sampler is."""


# --- the mixtures -------------------------------------------------------------------------------


def _ring(k: int, radius: float = math.sqrt(2)) -> Tensor:
    angle = 2 * math.pi * torch.arange(k, dtype=torch.float64) / k
    return radius * torch.stack([angle.cos(), angle.sin()], 1)


@cache
def ring8() -> Mixture:
    """Eight equal modes on a circle; 4 classes of two opposite modes each."""
    return mixture(_ring(8), 0.1, labels=torch.arange(8) % 4)


@cache
def grid25() -> Mixture:
    """5 x 5 equal modes; the class is the column."""
    axis = 0.7 * torch.arange(-2, 3, dtype=torch.float64)
    return mixture(torch.cartesian_prod(axis, axis), 0.07, labels=torch.arange(25) // 5)


@cache
def moons() -> Mixture:
    """Two interleaved half circles of 16 overlapping components each; the class is the moon."""
    a = math.pi * (torch.arange(16, dtype=torch.float64) + 0.5) / 16
    upper = torch.stack([a.cos(), a.sin()], 1)
    lower = torch.stack([1 - a.cos(), 0.5 - a.sin()], 1)
    centre = torch.tensor([0.5, 0.25], dtype=torch.float64)
    return mixture(1.4 * (torch.cat([upper, lower]) - centre), 0.1, labels=torch.arange(32) // 16)


@cache
def rare() -> Mixture:
    """Five modes on a circle with weights 50, 30, 15, 4 and 1%; no classes."""
    return mixture(_ring(5), 0.1, torch.tensor([0.5, 0.3, 0.15, 0.04, 0.01]))


TILT = 1.0
"""How far the weights of `ring8_tilted` are from equal, in nats around their mean."""
BLUR = 3.0
"""How much wider the modes of `ring8_blurred` are than those of the data."""


@cache
def ring8_tilted() -> Mixture:
    r"""`ring8` with wrong weights: that at angle φ has one proportional to exp(TILT cos φ)."""
    ring = ring8()
    return mixture(
        ring.means, ring.stds, (TILT * ring.means[:, 0] / math.sqrt(2)).exp(), ring.labels
    )


@cache
def ring8_blurred() -> Mixture:
    """`ring8` with modes `BLUR` times as wide."""
    ring = ring8()
    return mixture(ring.means, BLUR * ring.stds, ring.weights, ring.labels)


MIXTURES: Mapping[str, Callable[[], Mixture]] = MappingProxyType(
    {
        "ring8": ring8,
        "grid25": grid25,
        "moons": moons,
        "rare": rare,
        "ring8-tilted": ring8_tilted,
        "ring8-blurred": ring8_blurred,
    }
)
TRUTHS: Mapping[str, str] = MappingProxyType({"ring8-tilted": "ring8", "ring8-blurred": "ring8"})
"""Mixtures that are what a wrong teacher takes the data for, and what the data are."""


def truth_of(name: str) -> str:
    """Return the mixture that real data come from where the teacher is this one: mostly itself."""
    return TRUTHS.get(name, name)


# --- the trainable field ------------------------------------------------------------------------


class PointField(nn.Module):
    """A small network as a velocity field of points: a residual MLP on (x_t, t, c).

    Args:
        width: hidden width.
        depth: residual layers.
        classes: number of class conditions; -1 and None mean any class.
    """

    FREQUENCIES = 8

    def __init__(self, width: int = 128, depth: int = 3, classes: int = 0) -> None:
        super().__init__()
        self.embed = nn.Linear(2 + 2 * self.FREQUENCIES, width)
        self.label = nn.Embedding(classes + 1, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.out = nn.Linear(width, 2)

    def forward(self, x_t: Tensor, t: Tensor, c: Condition = None) -> Tensor:
        """Return the velocity ``[B, 2]`` at ``x_t [B, 2]``, ``t [B]``, ``c [B]`` int64 or None."""
        rows = torch.zeros(len(x_t), dtype=torch.long, device=x_t.device) if c is None else c + 1
        h = self.embed(torch.cat([x_t, self._waves(t).to(x_t)], 1)) + self.label(rows)
        for layer in self.layers:
            h = h + layer(nn.functional.silu(h))
        return self.out(nn.functional.silu(h))

    def _waves(self, t: Tensor) -> Tensor:
        """Fourier features of time: cos and sin of π k t, k = 1 .. FREQUENCIES."""
        k = torch.arange(1, self.FREQUENCIES + 1, dtype=t.dtype, device=t.device)
        phase = math.pi * k * t[:, None]
        return torch.cat([phase.cos(), phase.sin()], 1)


class PointCritic(nn.Module):
    """Logits of points by a small network on (x_t, t); the class is not looked at.

    Nothing is normalised, and the last layer starts at zero, so at first every ratio is 1, as in
    `turbo_lab.critic.LatentCritic`.

    Args:
        width: hidden width.
        depth: layers between the first and the last.
    """

    def __init__(self, width: int = 64, depth: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(2 + 2 * FREQUENCIES, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.out = nn.Linear(width, 1)
        for p in self.out.parameters():
            nn.init.zeros_(p)

    def forward(self, x_t: Tensor, t: Tensor, c: Condition = None) -> Tensor:
        """Return logits ``[B]`` for ``x_t [B, 2]`` and ``t [B]``."""
        h = self.embed(torch.cat([x_t, waves(t.expand(len(x_t))).to(x_t)], 1))
        for layer in self.layers:
            h = h + layer(nn.functional.silu(h))
        return self.out(nn.functional.silu(h))[:, 0]


def spawn_point_critic(*, seed: int, width: int = 64, depth: int = 2) -> PointCritic:
    """Build a `PointCritic` from a seed without touching the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(seed, "point critic"))
        return PointCritic(width, depth)


# --- the testbed --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Points:
    """A mixture of points as a testbed; build it with ``points``.

    Attributes:
        name: one of ``MIXTURES``.
        width: width of the trainable fields.
        depth: depth of the trainable fields.
        seed: base seed of their first weights.
        base: a network fitted to the teacher; ``spawn`` copies it if there is one.
    """

    name: str = "ring8"
    width: int = 128
    depth: int = 3
    seed: int = 0
    base: PointField | None = None
    shape: tuple[int, ...] = (2,)

    @property
    def teacher(self) -> Mixture:
        """The exact field."""
        return MIXTURES[self.name]()

    @property
    def null(self) -> Tensor:
        """The condition that means any class, ``[1]``."""
        return torch.tensor([NULL_LABEL])

    @property
    def classes(self) -> int:
        """Number of class conditions."""
        labels = self.teacher.labels
        return 0 if labels is None else int(labels.max()) + 1

    def spawn(self, name: str) -> PointField:
        """Return a trainable field: a copy of ``base``, else fresh weights named by the stream."""
        if self.base is not None:
            return copy.deepcopy(self.base)
        with torch.random.fork_rng(devices=[]):  # leaves the global generator as it was
            torch.manual_seed(seed_for(self.seed, "spawn", name))
            return PointField(self.width, self.depth, self.classes)

    def batches(self, draw: Draw) -> Batch:
        """Return the exact data of one training step: x ``[rows, 2]`` and its classes ``[rows]``.

        The class is -1 throughout in a mixture without classes.
        """
        x, k = self.teacher.place(draw.uniform("component"), draw.normal("point", (2,)))
        labels = self.teacher.labels
        return Batch(x, torch.full_like(k, NULL_LABEL) if labels is None else labels[k])

    def real(self, n: int, *, seed: int) -> Batch:
        """Return n exact samples and their classes, from a stream that training never sees."""
        return self.batches(Draw(seed=seed, step=0, total=n, stream="real"))

    def prompts(self, n: int, *, seed: int) -> Tensor:
        """Return the classes of n samples, distributed as in the data, ``[n]``."""
        return self.batches(Draw(seed=seed, step=0, total=n, stream="prompts")).c

    def measure(self, x: Tensor, c: Tensor | None = None) -> dict[str, Any]:
        """Measure samples against the mixture, each against the components of its class.

        Every component is a mode. Mode shares are mean posteriors, so that a perfect sampler has
        exactly the weights of the mixture in expectation, overlapping components included. A
        sample far from all modes still has a posterior: read ``mode_kl`` beside ``within``.

        Args:
            x: ``[N, 2]`` samples.
            c: ``[N]`` the classes they were asked for, or None for any.

        Returns:
            ``within``: share of samples within 3 sigma of a mode, 0.98889 for a perfect sampler
            of modes that do not overlap; ``mode_shares``: list of K; ``mode_kl``: KL of these
            from the shares due, Σ q log(q / p), in nats; ``modes_covered``: number of modes that
            have at least a tenth of the share due within 3 sigma of them; ``nll``: mean
            -log p(x | c), in nats.

        Raises:
            BadInput: no samples, or samples that are not ``[N, 2]``.
        """
        if x.ndim != 2 or x.shape[1] != 2 or not len(x):
            raise BadInput("x", tuple(x.shape), "use samples [N, 2] with N of at least 1")
        due = self.teacher.log_weights(c).exp()
        near = self._near(x, due > 0)
        shares = self.teacher.responsibilities(x, 0.0, c).mean(0)
        p = due.mean(0)
        return {
            "within": float(near.any(1).double().mean()),
            "mode_shares": shares.tolist(),
            "mode_kl": _kl(shares, p),
            "modes_covered": int(((near.double().mean(0) >= p / 10) & (p > 0)).sum()),
            "nll": -float(self.teacher.log_density(x.double(), 0.0, c).mean()),
        }

    def _near(self, x: Tensor, allowed: Tensor) -> Tensor:
        """Tell which samples are within 3 sigma of which mode allowed to them, ``[N, K]``."""
        distance = torch.cdist(x.double(), self.teacher.means) / self.teacher.stds
        return (distance <= 3) & allowed


def _kl(q: Tensor, p: Tensor) -> float:
    """Return Σ q log(q / p) in nats, with 0 log 0 = 0."""
    return float((torch.xlogy(q, q) - torch.xlogy(q, p)).sum())


def points(
    name: str = "ring8",
    *,
    width: int = 128,
    depth: int = 3,
    seed: int = 0,
    base: PointField | None = None,
) -> Points:
    """Build the testbed of a named mixture; see ``Points`` for the arguments.

    Raises:
        BadInput: an unknown name.
    """
    if name not in MIXTURES:
        raise BadInput("name", name, f"use one of {', '.join(MIXTURES)}")
    return Points(name=name, width=width, depth=depth, seed=seed, base=base)
