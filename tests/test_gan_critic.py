"""The critic of a GAN term: both of its sides, what it is shown, where it rests, its penalty."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from dmd2_world import DRAW, build
from gan_world import WRONG, Voter, gan, ones
from gaussian_world import DIM, MEAN, STD, GaussianMap, gaussian_batches
from torch import Tensor, nn

from turbo_lab.critic import gradient_penalty
from turbo_lab.errors import BadInput
from turbo_lab.fit import Batch
from turbo_lab.methods.gan import WithGan, mixed
from turbo_lab.path import expand
from turbo_lab.streams import Draw


class Scaled(nn.Module):
    """The exact log ratio of (rho N(m, s²) + (1-rho) N(0, 1)) to N(WRONG), times a number."""

    def __init__(self, scale: float, rho: float) -> None:
        super().__init__()
        self.scale, self.rho = nn.Parameter(torch.tensor(scale)), rho

    def forward(self, x_t: Tensor, t: Tensor, c: object) -> Tensor:
        logs = [
            _log_normal(x_t, mean, std).sum(1) for mean, std in ((MEAN, STD), (0.0, 1.0), WRONG)
        ]
        real = torch.logaddexp(
            logs[0] + torch.tensor(self.rho).log(), logs[1] + torch.tensor(1 - self.rho).log()
        )
        return self.scale * (real - logs[2])


def _log_normal(x: Tensor, mean: float, std: float) -> Tensor:
    return torch.distributions.Normal(mean, std).log_prob(x)


def standard(draw: Draw) -> Batch:
    """Samples of a teacher N(0, 1) that is far from the data."""
    return Batch(draw.normal("x", (DIM,)), torch.zeros(draw.total, 1, dtype=torch.long))


@pytest.mark.parametrize("rho", [0.3, 0.8])
def test_the_logistic_critic_is_at_rest_at_the_log_ratio_of_its_mixture(rho: float) -> None:
    """Its slope in the scale of the exact ratio is zero at 1, and points to 1 from elsewhere."""
    slopes = {}
    for scale in (0.5, 1.0, 1.6):
        critic = Scaled(scale, rho)
        dmd2 = build(GaussianMap(*WRONG))
        real = mixed(gaussian_batches, standard, rho)
        method = WithGan(method=dmd2, critic=critic, real=real)
        draw = Draw(seed=0, step=0, total=20_000)
        terms = method.critic_loss(gaussian_batches(draw), draw)
        parts = (terms["teacher"] + terms["student"]).reshape(50, -1).mean(1)
        slopes[scale] = torch.stack(
            [torch.autograd.grad(part, critic.scale, retain_graph=True)[0] for part in parts]
        )
    rest = slopes[1.0]
    assert abs(float(rest.mean())) < 4 * float(rest.std()) / len(rest) ** 0.5
    assert float(slopes[0.5].mean()) < 0 < float(slopes[1.6].mean())


def refused(draw: Draw) -> Batch:
    raise AssertionError("nobody should ask")


def test_the_real_side_is_a_mixture_of_rows_and_of_streams() -> None:
    draw = Draw(seed=0, step=0, total=4000)
    batch = mixed(gaussian_batches, ones, 0.3)(draw)
    data = batch.c[:, 0] == 0
    assert torch.equal(data, batch.x[:, 0] < 50)  # captions go with their pictures
    assert float(data.float().mean()) == pytest.approx(0.3, abs=4 * (0.21 / 4000) ** 0.5)
    assert torch.equal(batch.x[data], gaussian_batches(draw.sub("data")).x[data])
    again = mixed(gaussian_batches, ones, 0.6)(draw)
    assert bool((again.c[:, 0] == 0)[data].all())  # more data, and all that was
    assert torch.equal(again.x[data], batch.x[data])
    parts = [mixed(gaussian_batches, ones, 0.3)(draw.rows(a, b)).x for a, b in SPLIT]
    assert torch.equal(torch.cat(parts), batch.x)
    only_data, only_teacher = mixed(gaussian_batches, refused, 1), mixed(refused, ones, 0)
    assert not only_data(draw).c.any() and bool(only_teacher(draw).c.all())
    both = (mixed(gaussian_batches, gaussian_batches, rho)(draw).x for rho in (0.0, 1.0))
    assert not torch.equal(*both)  # the same source on either side is drawn anew
    with pytest.raises(BadInput, match=r"rho=1\.5"):
        mixed(gaussian_batches, ones, 1.5)


SPLIT = ((0, 1500), (1500, 4000))


def test_the_penalty_of_a_linear_critic_is_its_squared_gradient() -> None:
    """A step of any size: nothing is approximated there but the mean over noise."""
    w = torch.tensor([0.3, -1.2, 0.5])
    n = torch.randn(100_000, 3, generator=torch.Generator().manual_seed(0))
    x, t = torch.zeros_like(n), torch.zeros(len(n))

    def linear(x_t: Tensor, t: Tensor, c: object) -> Tensor:
        return x_t @ w + 3

    for step in (0.01, 1.0):
        votes = linear(x, t, None)[:, None]
        penalty = gradient_penalty(linear, x, t, None, votes=votes, n=n, step=step)
        exact = float(w.square().sum())
        error = float(penalty.std()) / len(n) ** 0.5
        assert float(penalty.mean()) == pytest.approx(exact, abs=4 * error)
        assert error < 0.01 * exact


def test_the_penalty_comes_to_r1_for_small_steps_and_is_on_the_real_side_alone() -> None:
    batch, draw = gaussian_batches(DRAW), DRAW
    method = gan(r1=2.0, r1_step=1e-3)
    terms = method.critic_loss(batch, draw)
    real = method.real(draw.sub("real")).x.requires_grad_()
    assert isinstance(method.critic, Voter)
    slope = method.critic.a + method.critic.b * real  # of each vote, in its own number alone
    n = draw.normal("r1", (DIM,))
    torch.testing.assert_close(terms["r1"], 2 * (slope * n).square().mean(1), rtol=2e-2, atol=1e-3)
    assert "r1" not in gan().critic_loss(batch, draw)


def test_both_sides_are_shown_alike_and_noised_apart() -> None:
    calls: list[tuple[Tensor, Tensor]] = []

    class Listening(Voter):
        def votes(self, x_t: Tensor, t: Tensor, c: object) -> Tensor:
            calls.append((x_t, t))
            return super().votes(x_t, t, c)

    def show(x: Tensor, draw: Draw) -> Tensor:
        return x * 0 + draw.normal("shown", x.shape[1:])

    method = gan(critic=Listening(), show=show, noise_range=(0.2, 0.6))
    method.critic_loss(gaussian_batches(DRAW), DRAW)
    (real, t), (made, s) = calls
    assert torch.equal(t, s) and 0.2 <= float(t.min()) < float(t.max()) <= 0.6
    shown = DRAW.sub("show").normal("shown", (DIM,))
    noises = [(x - (1 - t[:, None]) * shown) / t[:, None] for x in (real, made)]
    assert abs(float(torch.stack([n.flatten() for n in noises]).corrcoef()[0, 1])) < 0.3
    assert float(torch.stack(noises).std()) == pytest.approx(1, abs=0.15)
    calls.clear()
    clean = gan(critic=Listening(), r1=1.0)
    clean.critic_loss(gaussian_batches(DRAW), DRAW)
    (real, t), *_ = calls
    assert not t.any() and torch.equal(real, gaussian_batches(DRAW.sub("real")).x)
    assert expand(t, real).shape == (64, 1)


def test_a_gradient_goes_through_what_is_shown() -> None:
    slopes = []
    for gain in (1.0, 2.0):
        method = gan(critic=Voter(1.0, 0.0), show=partial(_scaled, gain), loss="hinge")
        terms = method.student_loss(gaussian_batches(DRAW), DRAW)
        slopes.append(terms["gan_pull"])
    torch.testing.assert_close(slopes[1], 2 * slopes[0])  # far below the margin, hinge is linear
    assert bool((slopes[0] > 0).all())


def _scaled(gain: float, x: Tensor, draw: Draw) -> Tensor:
    return gain * x - 10
