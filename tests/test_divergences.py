"""Divergence weights against autograd, and the alpha-beta gradient against quadrature."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from turbo_lab.errors import BadInput
from turbo_lab.methods.divergences import (
    DIVERGENCES,
    Divergence,
    alpha_beta_gradient,
    density_ratio,
    divergence_named,
    needs_ratio,
    power,
)

LINE = {f"alpha {a:g}": power(a) for a in (-1.0, 0.0, 0.3, 0.5, 1.0, 1.5)}
MEMBERS = {**DIVERGENCES, **LINE}
RATIOS = torch.logspace(-2, 2, 41, dtype=torch.float64)
PUBLISHED = {
    "rkl": lambda r: 1.0,
    "softened-rkl": lambda r: 1 / (1 + r),
    "neyman": lambda r: 1 / r,
    "js": lambda r: r / (1 + r),
    "hellinger": lambda r: math.sqrt(r),
    "jeffreys": lambda r: 1 + r,
    "kl": lambda r: r,
}

GRID = torch.linspace(-14, 14, 20_001, dtype=torch.float64)
P_PARTS = (Normal(-1.0, 0.9), Normal(1.2, 0.7))


def log_p(x: Tensor) -> Tensor:
    """A teacher with two modes, in one dimension."""
    return torch.stack([math.log(0.5) + n.log_prob(x) for n in P_PARTS]).logsumexp(0)


def score_of(log_density: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    at = x.clone().requires_grad_()
    return torch.autograd.grad(log_density(at).sum(), at)[0]


def integral(values: Tensor) -> Tensor:
    return torch.trapezoid(values, GRID)


def slopes(of: Callable[[Callable[[Tensor], Tensor]], Tensor]) -> Tensor:
    """Gradient of a divergence in (mean, std) of the student N(mean, std²), by autograd."""
    mean = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    std = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    return torch.stack(torch.autograd.grad(of(Normal(mean, std).log_prob), (mean, std)))


def pathwise(gradient: Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]) -> Tensor:
    """The same from gradients of samples, E_q[g dx/d(mean, std)], for x = mean + std n."""
    student = Normal(torch.tensor(0.4, dtype=torch.float64), torch.tensor(0.8, dtype=torch.float64))
    g = gradient(GRID, student.log_prob)
    q, n = student.log_prob(GRID).exp(), (GRID - 0.4) / 0.8
    return torch.stack([integral(q * g), integral(q * g * n)])


@pytest.mark.parametrize("name", MEMBERS)
def test_h_is_the_curvature_of_f_times_r_squared(name: str) -> None:
    member = MEMBERS[name]
    r = RATIOS.clone().requires_grad_()
    (first,) = torch.autograd.grad(member.f(r).sum(), r, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), r)
    torch.testing.assert_close(second * RATIOS**2, member.h(RATIOS), rtol=1e-8, atol=1e-10)
    assert float(member.f(torch.ones(1, dtype=torch.float64))) == pytest.approx(0, abs=1e-12)


def test_every_named_member_has_its_published_weight() -> None:
    assert DIVERGENCES.keys() == PUBLISHED.keys()
    for name, published in PUBLISHED.items():
        got = divergence_named(name).h(RATIOS).tolist()
        assert got == pytest.approx([published(r) for r in RATIOS.tolist()])


@pytest.mark.parametrize(
    ("alpha", "name"), [(0, "rkl"), (0.5, "hellinger"), (1, "kl"), (-1, "neyman")]
)
def test_the_line_passes_through_named_members(alpha: float, name: str) -> None:
    torch.testing.assert_close(power(alpha).h(RATIOS), DIVERGENCES[name].h(RATIOS))


@pytest.mark.parametrize("name", MEMBERS)
def test_weighted_score_differences_are_the_gradient_of_the_divergence(name: str) -> None:
    member: Divergence = MEMBERS[name]

    def divergence(log_q: Callable[[Tensor], Tensor]) -> Tensor:
        inside = log_q(GRID)
        # Far out both densities underflow; their ratio stays finite as a difference of logs.
        r = (log_p(GRID) - inside).clamp(-60, 60).exp()
        return integral((inside.exp() * member.f(r)).nan_to_num(0, 0, 0))

    def g(x: Tensor, log_q: Callable[[Tensor], Tensor]) -> Tensor:
        r = (log_p(x) - log_q(x)).clamp(-60, 60).exp()
        return member.h(r) * (score_of(log_q, x) - score_of(log_p, x))

    torch.testing.assert_close(pathwise(g), slopes(divergence), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("alpha", "beta"), [(0.5, 0.5), (0.2, 0.8), (1.0, 0.5), (0.8, 0.3), (0.4, 1.2), (2.0, -0.5)]
)
def test_the_alpha_beta_gradient_is_that_of_the_divergence(alpha: float, beta: float) -> None:
    def divergence(log_q: Callable[[Tensor], Tensor]) -> Tensor:
        a, b, p, q = alpha, beta, log_p(GRID), log_q(GRID)
        inside = ((a + b) * p).exp() / (b * (a + b)) + ((a + b) * q).exp() / (a * (a + b))
        return integral(inside - (a * p + b * q).exp() / (a * b))

    def g(x: Tensor, log_q: Callable[[Tensor], Tensor]) -> Tensor:
        scores = score_of(log_p, x)[:, None], score_of(log_q, x)[:, None]
        return alpha_beta_gradient(log_p(x), log_q(x), *scores, alpha=alpha, beta=beta)[:, 0]

    torch.testing.assert_close(pathwise(g), slopes(divergence), rtol=1e-5, atol=1e-7)


def test_the_plane_holds_the_line_and_is_smooth_at_alpha_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 16, generator=generator).double()
    s_p, s_q = torch.randn(2, 16, 2, generator=generator).double()

    def g(alpha: float, beta: float) -> Tensor:
        return alpha_beta_gradient(p, q, s_p, s_q, alpha=alpha, beta=beta)

    for alpha in (-0.5, 0.0, 0.5, 1.0):
        weight = power(alpha).h((p - q).exp())[:, None]
        torch.testing.assert_close(g(alpha, 1 - alpha), weight * (s_q - s_p))
    torch.testing.assert_close(g(1e-7, 0.5), g(0.0, 0.5), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(g(0.0, 0.5), g(0.0, 1.0))


def test_ratios_are_clipped_and_broken_logits_are_seen() -> None:
    logits = torch.tensor([-1e9, -1.0, 0.0, 2.0, 1e9])
    got = density_ratio(logits, (0.1, 20.0)).tolist()
    assert got == pytest.approx([0.1, math.exp(-1), 1.0, math.exp(2), 20.0])
    assert math.isnan(float(density_ratio(torch.tensor(math.nan), (0.1, 20.0))))


def test_only_reverse_kl_does_without_a_ratio() -> None:
    assert not needs_ratio("rkl") and not needs_ratio("alpha", 0.0)
    assert needs_ratio("alpha", 0.1) and needs_ratio("js")


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: divergence_named("tv"), "divergence='tv'"),
        (lambda: divergence_named("js", 0.5), "alpha=0.5"),
        (lambda: power(math.nan), "alpha=nan"),
        (
            lambda: alpha_beta_gradient(*torch.zeros(4, 1), alpha=0.5, beta=math.inf),  # type: ignore[misc]
            "beta=inf",
        ),
    ],
)
def test_bad_options_are_named(call: Callable[[], object], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        call()
