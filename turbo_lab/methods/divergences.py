r"""Divergences as weights on the gradient of distribution matching.

With r = p / q, teacher over student at the same point, an f-divergence
:math:`D_f = E_q[f(r)]` moves a sample x of the student along

.. math:: \nabla_x = h(r)\, (\nabla \log q - \nabla \log p), \qquad h(r) = f''(r)\, r^2

(Xu et al. 2025, f-distill, arXiv 2502.15681). Reverse KL has h = 1 and needs no ratio.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from turbo_lab.errors import BadInput
from turbo_lab.path import expand

Scalar = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """An f-divergence ``E_q[f(r)]``, r = p / q above 0, and its weight ``h(r) = f''(r) r²``."""

    title: str
    f: Scalar
    h: Scalar


def power(alpha: float) -> Divergence:
    """The line ``h(r) = r^α``: 0 is reverse KL, 1/2 squared Hellinger, 1 forward KL.

    ``f = (r^α - 1 - α (r - 1)) / (α (α - 1))`` and its limits at 0 and 1. The larger α, the more a
    mode that the student misses (r large) pulls, and the less a sample where p is small.

    Raises:
        BadInput: α is not finite.
    """
    if not math.isfinite(alpha):
        raise BadInput("alpha", alpha, "use a finite number; 0 is reverse KL")

    def f(r: Tensor) -> Tensor:
        if alpha == 0:
            return r - 1 - r.log()
        if alpha == 1:
            return r * r.log() - r + 1
        return (r**alpha - 1 - alpha * (r - 1)) / (alpha * (alpha - 1))

    return Divergence(title=f"alpha {alpha:g}", f=f, h=lambda r: r**alpha)


DIVERGENCES: Mapping[str, Divergence] = MappingProxyType(
    {
        "rkl": Divergence(title="reverse KL", f=lambda r: -r.log(), h=torch.ones_like),
        "softened-rkl": Divergence(
            title="softened reverse KL",
            f=lambda r: (r + 1) * ((r + 1) / (2 * r)).log(),
            h=lambda r: 1 / (1 + r),
        ),
        "neyman": Divergence(
            title="half of Neyman's chi²", f=lambda r: (r - 1) ** 2 / (2 * r), h=lambda r: 1 / r
        ),
        "js": Divergence(
            title="twice Jensen-Shannon",
            f=lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(),
            h=lambda r: r / (1 + r),
        ),
        "hellinger": Divergence(
            title="twice squared Hellinger", f=lambda r: 2 * (r.sqrt() - 1) ** 2, h=torch.sqrt
        ),
        "jeffreys": Divergence(title="Jeffreys", f=lambda r: (r - 1) * r.log(), h=lambda r: 1 + r),
        "kl": Divergence(title="forward KL", f=lambda r: r * r.log(), h=lambda r: r),
    }
)
"""The named members; f is scaled so that h is the published weight."""

LINE = "alpha"
"""The name that stands for `power`."""


def divergence_named(name: str, alpha: float = 0.0) -> Divergence:
    """Return a member of `DIVERGENCES`, or of the line ``r^α`` for the name "alpha".

    Raises:
        BadInput: unknown name, or an α that the named member has no use for.
    """
    if name == LINE:
        return power(alpha)
    if name not in DIVERGENCES:
        raise BadInput("divergence", name, f"choose one of {', '.join((*DIVERGENCES, LINE))}")
    if alpha != 0:
        raise BadInput("alpha", alpha, f"only divergence={LINE!r} has one, and this is {name!r}")
    return DIVERGENCES[name]


def needs_ratio(name: str, alpha: float = 0.0) -> bool:
    """Whether h depends on r: everywhere but at reverse KL, which is also α = 0."""
    return not (name == "rkl" or (name == LINE and alpha == 0))


def density_ratio(logit: Tensor, clip: tuple[float, float]) -> Tensor:
    """Return ``r = exp(logit)`` kept inside ``clip``; a logit that is not a number stays so.

    Args:
        logit: ``[B]`` of a calibrated discriminator: its sigmoid is the probability that a point,
            teacher or student with equal odds, is the teacher's. A logistic loss calibrates, a
            hinge loss does not.
        clip: lowest and highest ratio, both above 0.
    """
    low, high = clip
    return logit.clamp(math.log(low), math.log(high)).exp()


def alpha_beta_gradient(
    log_p: Tensor, log_q: Tensor, score_p: Tensor, score_q: Tensor, *, alpha: float, beta: float
) -> Tensor:
    r"""Gradient of the alpha-beta divergence for samples of q, where both densities are known.

    .. math:: D = \frac{\int p^{\alpha+\beta}}{\beta(\alpha+\beta)}
              + \frac{\int q^{\alpha+\beta}}{\alpha(\alpha+\beta)}
              - \frac{\int p^\alpha q^\beta}{\alpha\beta}, \qquad
              g = q^\kappa \Big( r^\alpha (s_q - s_p) - \kappa \frac{r^\alpha - 1}{\alpha} s_q \Big)

    with κ = α + β - 1 and dD/dθ = E_q[g · dx/dθ]; (r^α - 1) / α is log r at α = 0. On the line κ
    = 0 it is the f-divergence with h = r^α. Off the line it needs the density q itself, which no
    discriminator gives: so this is for points, not for images.

    Args:
        log_p: ``[B]`` log density of the teacher, in nats.
        log_q: ``[B]`` log density of the student.
        score_p: ``[B, ...]`` score of the teacher at the same points.
        score_q: ``[B, ...]`` score of the student.
        alpha: finite; 0 is a limit of D, and no special case of g.
        beta: finite.

    Returns:
        ``[B, ...]``, the gradient with respect to the sample.

    Source: the divergence is that of Wang et al. 2025 (ABKD, arXiv 2505.04560); the gradient is
    its functional derivative in q, differentiated in x.
    """
    for name, value in (("alpha", alpha), ("beta", beta)):
        if not math.isfinite(value):
            raise BadInput(name, value, "use a finite number")
    kappa, log_r = alpha + beta - 1, log_p - log_q
    slope = torch.expm1(alpha * log_r) / alpha if alpha else log_r
    size, ratio, slope = (
        expand(a, score_q) for a in ((kappa * log_q).exp(), (alpha * log_r).exp(), slope)
    )
    return size * (ratio * (score_q - score_p) - kappa * slope * score_q)
