"""Points: densities on a grid, divergences by quadrature, and what guidance tilts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from turbo_lab.errors import BadInput
from turbo_lab.field import Mixture, mixture
from turbo_lab.testbeds.points import Points, points

KERNEL = 0.5
"""Width h of the smoothing, in standard deviations of the narrowest mode."""
FINE = 0.8
"""Spacing of the quadrature, in h. At 1 it integrates a Gaussian of width h to 1e-8."""
NOTHING = -80.0
"""Log of a density that adds nothing to a divergence, whatever the other one is there."""
FAR = 6.0
"""How far the quadrature reaches beyond samples and modes, in their widths."""
LOWEST = -300.0
"""Logarithm of the smallest scaled kernel; their products are far from the end of float64."""
TINY = 1e-110
"""Below it, a sum of scaled kernels is taken in logarithms, which is slow."""

TITLES = {
    "within": "within 3 sigma of a mode",
    "covered": "modes covered",
    "mode_rkl": "KL of mode shares from their weights",
    "rkl": "KL(student || data)",
    "fkl": "KL(data || student)",
}
"""Of what `measured` finds, in tables."""


@dataclass(frozen=True, kw_only=True)
class Plane:
    """A square grid for quadrature: ``axis [G]``, the same along both coordinates, float64."""

    axis: Tensor

    @property
    def cell(self) -> float:
        """Area of a cell."""
        return float(self.axis[1] - self.axis[0]) ** 2

    @property
    def points(self) -> Tensor:
        """The grid as points ``[G², 2]``, the first coordinate varying slowest."""
        return torch.cartesian_prod(self.axis, self.axis)

    def shaped(self, values: Tensor) -> Tensor:
        """Values at `points` as ``[G, G]``."""
        return values.view(len(self.axis), len(self.axis))


def kernel_width(mix: Mixture) -> float:
    """The h at which a mixture and samples are compared: `KERNEL` of its narrowest mode."""
    return KERNEL * float(mix.stds.min())


def plane_around(mix: Mixture, x: Tensor | None = None, *, h: float) -> Plane:
    """A plane that holds a mixture and samples ``[N, 2]``, both smoothed by h, with their tails.

    Raises:
        BadInput: samples that are not finite.
    """
    reach = float((mix.means.abs().amax(1) + FAR * (mix.stds**2 + h**2).sqrt()).max())
    if x is not None:
        if not bool(x.isfinite().all()):
            raise BadInput("x", "NaN or infinite", "use finite samples [N, 2]")
        reach = max(reach, float(x.abs().max()) + FAR * h)
    n = math.ceil(reach / (FINE * h))
    return Plane(axis=FINE * h * torch.arange(-n, n + 1, dtype=torch.float64))


def log_smoothed(mix: Mixture, plane: Plane, h: float) -> Tensor:
    """Log density ``[G, G]`` of a mixture convolved with N(0, h²), exact, in nats."""
    wide = mixture(mix.means, (mix.stds**2 + h**2).sqrt(), mix.weights)
    return plane.shaped(wide.log_density(plane.points))


def log_kernels(x: Tensor, plane: Plane, h: float, needed: Tensor | None = None) -> Tensor:
    """Log density ``[G, G]`` of samples ``[N, 2]``, each made a Gaussian of width h.

    An isotropic kernel is a product over the coordinates, so the sum over N samples is one
    product of two matrices.

    Args:
        x: the samples.
        plane: where.
        h: width.
        needed: ``[G, G]`` bool, where it has to be exact although it is below about 1e-110 of
            what is near in each coordinate; None for everywhere.
    """
    first, second = (-((plane.axis[:, None] - one) ** 2) / (2 * h**2) for one in x.double().T)
    most = first.amax(1)[:, None] + second.amax(1)
    sums = _scaled(first) @ _scaled(second).T
    out = sums.clamp_min(TINY).log() + most
    small = sums < TINY
    rows, columns = (small if needed is None else small & needed).nonzero(as_tuple=True)
    for part in torch.arange(len(rows)).split(2048):  # no sample is near in both coordinates
        i, j = rows[part], columns[part]
        both = first[i] + second[j]
        out[i, j] = both.amax(1) + _scaled(both).sum(1).log()
    return out - math.log(len(x)) - math.log(2 * math.pi * h**2)


def _scaled(logits: Tensor) -> Tensor:
    """Exponentials relative to the largest of each row; exp is slow where it underflows."""
    return (logits - logits.amax(1, keepdim=True)).clamp_min(LOWEST).exp()


def divergence(log_q: Tensor, log_p: Tensor, cell: float) -> float:
    """``KL(q || p) = Σ q log(q / p) cell`` of two densities on one grid, in nats."""
    q = log_q.exp()
    return float((q * (log_q - log_p).where(q > 0, 0.0)).sum() * cell)


def divergences(mix: Mixture, x: Tensor) -> dict[str, float]:
    r"""Reverse and forward KL between samples and a mixture, both noised alike.

    With q the empirical measure of the samples and p the mixture, both convolved with N(0, h²),
    h of `kernel_width`: :math:`\mathrm{KL}(q_h \| p_h)` and the other way round. Noising
    to :math:`t_0 = h / (1 + h)` gives the same two numbers, since they do not change when the
    plane is scaled. Both densities are Gaussian mixtures, so nothing is estimated: the numbers
    are exact for the empirical measure of these N samples. N samples of p itself do not have 0
    either; their numbers are the floor.

    Args:
        mix: p.
        x: ``[N, 2]`` samples.

    Returns:
        ``rkl`` = KL(q || p) and ``fkl`` = KL(p || q), in nats.

    Raises:
        BadInput: samples that are not finite.
    """
    h = kernel_width(mix)
    plane = plane_around(mix, x, h=h)
    log_p = log_smoothed(mix, plane, h)
    log_q = log_kernels(x, plane, h, log_p > NOTHING)
    return {
        "rkl": divergence(log_q, log_p, plane.cell),
        "fkl": divergence(log_p, log_q, plane.cell),
    }


def mode_divergences(shares: Sequence[float], due: Tensor, n: int) -> dict[str, float]:
    """KL between mode shares and the weights due, in both directions, in nats.

    Half a sample is added to every mode, so that a mode without any gives a finite forward KL.

    Args:
        shares: of n samples, K of them.
        due: weights of the modes, ``[K]``, all above 0.
        n: samples.

    Returns:
        ``mode_rkl`` = KL(shares || due) and ``mode_fkl`` = KL(due || shares).
    """
    p = due.double() / due.sum()
    q = (n * torch.tensor(shares, dtype=torch.float64) + 0.5) / (n + len(p) / 2)
    log_r = q.log() - p.log()
    return {"mode_rkl": float((q * log_r).sum()), "mode_fkl": float(-(p * log_r).sum())}


def measured(world: str, x: Tensor) -> dict[str, float]:
    """Everything part A measures of samples ``[N, 2]``, as a row of a table.

    ``within`` (share within 3 sigma of a mode), ``covered`` (share of the modes that have at
    least a tenth of their due within 3 sigma), ``mode_rkl``, ``mode_fkl``, ``rkl``, ``fkl``.
    """
    bed: Points = points(world)
    found = bed.measure(x)
    weights = bed.teacher.weights
    return {
        "within": found["within"],
        "covered": found["modes_covered"] / len(weights),
        **mode_divergences(found["mode_shares"], weights, len(x)),
        **divergences(bed.teacher, x),
    }


# --- guidance -----------------------------------------------------------------------------------


def log_tilted(mix: Mixture, c: int, w: float, plane: Plane) -> Tensor:
    r"""Log of the density that guidance aims at, normalised on the plane, ``[G, G]``.

    .. math:: p_w(x \mid c) \propto p(x \mid c)^w \, p(x)^{1-w}

    At t = 0, the guided score :math:`s + w (s_c - s)` is its score. At t > 0 it is that of the
    tilted *noised* densities, which is not the noised tilted density: nothing that follows guided
    scores through all t has to end at p_w. For a single class, p(x) fixed, it is p^w sharpened:
    of a Gaussian of variance s² over a flat p(x), s² / w is left.

    Args:
        mix: with classes.
        c: the class.
        w: guidance scale; 1 is p(x | c).
        plane: where; it has to hold the density.
    """
    at = plane.points
    one = mix.log_density(at, 0.0, torch.full((len(at),), c))
    tilted = w * one + (1 - w) * mix.log_density(at)
    return plane.shaped(tilted - tilted.logsumexp(0) - math.log(plane.cell))


def smoothed(log_p: Tensor, plane: Plane, h: float) -> Tensor:
    """Convolve a density on the plane with N(0, h²), in logarithms, ``[G, G]``."""
    kernel = (-((plane.axis - plane.axis[:, None]) ** 2) / (2 * h**2)).exp()
    kernel = kernel / kernel.sum(1).max()
    return (kernel @ log_p.exp() @ kernel).clamp_min(1e-300).log()
