"""A GAN term in the Gaussian world: a critic that votes, and DMD2 with it."""

from __future__ import annotations

import torch
from dmd2_world import build
from gaussian_world import DIM, GaussianMap, gaussian_batches
from torch import Tensor, nn

from turbo_lab.fit import Batch, Objective
from turbo_lab.methods.gan import WithGan
from turbo_lab.optimisers import Optimiser
from turbo_lab.streams import Draw

WRONG = (2.2, 0.5)
"""Mean and deviation of a one-step student that is not its teacher."""


class Voter(nn.Module):
    """A critic of vectors with a vote per number: a w x + b x²/2, and a little of the time."""

    def __init__(self, a: float = 0.7, b: float = -0.4) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(a)), nn.Parameter(torch.tensor(b))

    def votes(self, x_t: Tensor, t: Tensor, c: object) -> Tensor:
        return self.a * x_t + self.b * x_t.square() / 2 + t[:, None]

    def forward(self, x_t: Tensor, t: Tensor, c: object) -> Tensor:
        return self.votes(x_t, t, c).mean(1)


def gan(student: GaussianMap | None = None, **options: object) -> WithGan:
    """DMD2 of two steps with a GAN term in the Gaussian world."""
    method = build(student or GaussianMap(*WRONG), times=(1.0, 0.7), rival_updates=2)
    settings = {"critic": Voter(), "real": gaussian_batches, "weight": 0.5, **options}
    return WithGan(method=method, **settings)  # type: ignore[arg-type]


def plan(method: Objective) -> dict[str, Optimiser]:
    return {name: Optimiser(lr=0.02) for name in method.players}


def parameters(method: WithGan, *names: str) -> list[nn.Parameter]:
    return [p for name in names for _, p in method.players[name].named_parameters()]


def ones(draw: Draw) -> Batch:
    """A teacher's samples that are told from data at a look."""
    rows = len(draw.uniform("any"))
    return Batch(torch.full((rows, DIM), 100.0), torch.ones(rows, 1, dtype=torch.long))
