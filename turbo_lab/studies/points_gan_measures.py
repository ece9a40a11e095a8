r"""Distances of samples from mixtures: always finite, unbiased, without a density of the student.

All are energy distances (Székely & Rizzo 2013, doi 10.1016/j.jspi.2013.03.018), with X of one side
and Y of the other, primes for independent copies:

.. math:: E(X, Y) = 2\,\mathbb{E}|X - Y| - \mathbb{E}|X - X'| - \mathbb{E}|Y - Y'| \ge 0

and 0 for equal distributions alone. Against a mixture of isotropic Gaussians the terms with Y are
known, so only the student's own samples scatter.
"""

from __future__ import annotations

import math

import torch
from scipy.stats import ncx2
from torch import Tensor

from turbo_lab.errors import BadInput
from turbo_lab.field import Mixture, mixture

RAYLEIGH = math.sqrt(2 * math.log(2))
"""Median distance of a standard normal point in the plane from its centre, 1.177."""


def mean_norm(distance: Tensor, std: Tensor) -> Tensor:
    r"""``E|d + s N(0, I)|`` in the plane: the mean of the Rice distribution.

    .. math:: s \sqrt{\pi/2}\; e^{-u} \left[(1 + 2u) I_0(u) + 2u I_1(u)\right],
              \qquad u = |d|^2 / (4 s^2)

    Args:
        distance: ``|d|``.
        std: s, above 0; shapes broadcast.
    """
    u = (distance / std).square() / 4
    bessel = (1 + 2 * u) * torch.special.i0e(u) + 2 * u * torch.special.i1e(u)
    return std * math.sqrt(math.pi / 2) * bessel


def mean_distance(p: Mixture, q: Mixture) -> float:
    """``E|X - Y|`` between two mixtures in the plane, exact."""
    apart = torch.cdist(p.means, q.means)
    stds = (p.stds[:, None] ** 2 + q.stds**2).sqrt()
    a, b = p.log_weights()[0].exp(), q.log_weights()[0].exp()
    return float(a @ mean_norm(apart, stds) @ b)


def between(p: Mixture, q: Mixture) -> float:
    """Energy distance of two mixtures in the plane, exact."""
    return 2 * mean_distance(p, q) - mean_distance(p, p) - mean_distance(q, q)


def energy_rows(x: Tensor, q: Mixture) -> Tensor:
    """The energy distance of samples ``[N, 2]`` from a mixture as a mean of rows, ``[N]`` float64.

    The mean is the unbiased estimate, which may be below 0. A row is the value, plus the influence
    of that sample on it: so the mean of resampled rows is the value of resampled samples to first
    order, and a bootstrap over rows covers the pairs |x - x'| too.

    Raises:
        BadInput: fewer than two samples.
    """
    n = len(x)
    if n < 2:
        raise BadInput("x", tuple(x.shape), "use at least two samples [N, 2]")
    x = x.double()
    own = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").sum(1) / (n - 1)
    theirs = mean_norm(torch.cdist(x, q.means), q.stds) @ q.log_weights()[0].exp()
    value = 2 * theirs.mean() - own.mean() - mean_distance(q, q)
    influence = 2 * (theirs - own)
    return value + influence - influence.mean()


def folded(x: Tensor, truth: Mixture) -> Tensor:
    """Samples relative to their likeliest mode, in its standard deviations, ``[N, 2]`` float64.

    Weights leave no trace in it, so it tells how modes are shaped. Those of exact data are standard
    normal, but for the few that are nearer to another mode.
    """
    k = truth.responsibilities(x).argmax(1)
    return (x.double() - truth.means[k]) / truth.stds[k, None]


def round_mode(width: float) -> Mixture:
    """What `folded` makes of a mixture with modes this much wider than the data's: N(0, width²)."""
    return mixture(torch.zeros(1, 2), width)


def width_of(x: Tensor, truth: Mixture) -> float:
    """Median distance of samples from their likeliest mode, over that of exact data: 1 for these.

    Samples that lie between modes move it little.
    """
    return float(folded(x, truth).norm(dim=1).median()) / RAYLEIGH


def share_within(p: Mixture, truth: Mixture, sigmas: float = 3.0) -> float:
    """Exact share of a mixture within so many standard deviations of a mode of the data.

    Around every mode of p the squared distance from a mode of the data is a noncentral χ² of two
    degrees of freedom; the circles of the data must not overlap.
    """
    apart = torch.cdist(p.means, truth.means)
    reach, centre = sigmas * truth.stds / p.stds[:, None], apart / p.stds[:, None]
    inside = torch.from_numpy(ncx2.cdf((reach**2).numpy(), 2, (centre**2).numpy()))
    return float(p.log_weights()[0].exp() @ inside.sum(1))


def weights_off(p: Mixture, truth: Mixture) -> float:
    """KL of the weights of a mixture from those of the data, mode by mode, exact, in nats."""
    ours, due = p.log_weights()[0], truth.log_weights()[0]
    return float(ours.exp() @ (ours - due))
