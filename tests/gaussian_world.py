"""A world where everything is closed form: data N(m, s^2 I), and fields that know (m, s)."""

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


class GaussianMap(GaussianField):
    """The exact few-step student of N(m, s^2 I): one Euler step from t lands where the path ends.

    The path keeps ``(x_t - (1 - t) m) / sigma_t`` with ``sigma_t^2 = (1 - t)^2 s^2 + t^2``, so it
    ends at ``f = m + s (x_t - (1 - t) m) / sigma_t``, and ``v = (x_t - f) / t``.
    """

    def forward(self, x_t: Tensor, t: Tensor, c: object) -> Tensor:
        t = expand(t, x_t)
        std = self.log_std.exp()
        sigma = ((1 - t) ** 2 * std**2 + t**2).sqrt()
        end = self.mean + std * (x_t - (1 - t) * self.mean) / sigma
        return (x_t - end) / t.clamp_min(1e-3)


def gaussian_batches(draw: Draw) -> Batch:
    """Data of the world for the rows of a draw; the condition is a column of zeros."""
    x = MEAN + STD * draw.normal("x", (DIM,))
    return Batch(x, torch.zeros(len(x), 1, dtype=torch.long))


def gaussian_pairs(draw: Draw) -> Batch:
    """Noise and where the exact path from it ends: x = m + s z."""
    z = draw.normal("pair", (DIM,))
    return Batch(MEAN + STD * z, torch.zeros(len(z), 1, dtype=torch.long), z)
