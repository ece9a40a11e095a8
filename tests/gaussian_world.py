"""A world where everything is closed form: data N(m, s^2 I), and a field that knows (m, s)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from turbo_lab.fit import Batch
from turbo_lab.path import expand
from turbo_lab.streams import Draw

MEAN, STD, DIM = 1.5, 0.7, 3


class GaussianField(nn.Module):
    """The exact velocity of N(m, s^2 I): trainable m and log s."""

    def __init__(self, mean: float = MEAN, std: float = STD) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean))
        self.log_std = nn.Parameter(torch.tensor(std).log())

    def forward(self, x_t: Tensor, t: Tensor, c: object) -> Tensor:
        t = expand(t, x_t)
        variance = self.log_std.exp() ** 2
        off = x_t - (1 - t) * self.mean
        total = (1 - t) ** 2 * variance + t**2
        z_hat, x_hat = t * off / total, self.mean + variance * (1 - t) * off / total
        return z_hat - x_hat


def gaussian_batches(draw: Draw) -> Batch:
    """Data of the world for the rows of a draw; the condition is a column of zeros."""
    x = MEAN + STD * draw.normal("x", (DIM,))
    return Batch(x, torch.zeros(len(x), 1, dtype=torch.long))
