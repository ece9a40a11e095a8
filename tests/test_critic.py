"""Critics: what the network promises, and that DMD2 teaches it the log ratio of densities."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from dmd2_world import DRAW, TEACHER, build
from gaussian_world import DIM, MEAN, STD, GaussianField, GaussianMap, gaussian_batches
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from turbo_lab.adapters import AdapterSize, Host
from turbo_lab.critic import LatentCritic, TrainableCritic, logistic, spawn_critic
from turbo_lab.field import frozen
from turbo_lab.fit import Batch, fit
from turbo_lab.methods.dmd2 import DMD2
from turbo_lab.optimisers import Optimiser
from turbo_lab.path import expand, mix
from turbo_lab.postcards.captions import TOKENS, VOCABULARY
from turbo_lab.streams import Draw
from turbo_lab.testbeds.postcards import LATENT_CHANNELS, LATENT_SHAPE, NetSize, spawn_net

WRONG = (2.2, 0.5)
"""Mean and deviation of a one-step student that is not its teacher."""


def critic(seed: int = 0, width: int = 32) -> LatentCritic:
    """The critic of postcards."""
    return spawn_critic(
        channels=LATENT_CHANNELS, vocabulary=VOCABULARY, tokens=TOKENS, seed=seed, width=width
    )


def log_ratio(x_t: Tensor, t: Tensor, p: tuple[Tensor, Tensor], q: tuple[float, float]) -> Tensor:
    """Exact ``log p_t / q_t`` of two Gaussians ``(mean, std)``, per sample ``[B]``."""
    t, total = expand(t, x_t), torch.zeros(())
    for sign, (mean, std) in ((1, p), (-1, q)):
        variance = (1 - t) ** 2 * torch.as_tensor(std) ** 2 + t**2
        density = -((x_t - (1 - t) * mean) ** 2) / (2 * variance) - variance.log() / 2
        total = total + sign * density
    return total.flatten(1).sum(1)


class GaussianRatio(GaussianField):
    """A critic that knows the student and learns mean and deviation of the teacher."""

    def forward(self, x_t: Tensor, t: Tensor, c: object) -> Tensor:
        return log_ratio(x_t, t, (self.mean, self.log_std.exp()), WRONG)


# --- the network --------------------------------------------------------------------------------


def test_a_critic_is_its_seed_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one, same, other = critic(0), critic(0), critic(1)
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.first.weight, other.first.weight)


def test_a_new_critic_has_no_opinion_and_a_stirred_one_sees_image_time_and_caption() -> None:
    net, rows = critic(), 6
    x, t = torch.randn(rows, *LATENT_SHAPE), torch.linspace(0, 1, rows)
    c = torch.arange(rows * TOKENS).reshape(rows, TOKENS) % VOCABULARY
    assert torch.equal(net(x, t, c), torch.zeros(rows))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    seen = net(x, t, c)
    assert bool(seen.isfinite().all())
    for other in (net(x.flip(3), t, c), net(x, 1 - t, c), net(x, t, c.flip(1))):
        assert bool(((seen - other).abs() > 1e-6).all())
    alone = torch.cat([net(x[k : k + 1], t[k : k + 1], c[k : k + 1]) for k in range(rows)])
    torch.testing.assert_close(seen, alone, rtol=1e-4, atol=1e-5)  # nobody knows its batch


def test_a_critic_costs_little_beside_a_pass_of_the_network() -> None:
    host = Host(spawn_net(NetSize(), 0), part="transformer")
    student = host.add("student", AdapterSize(rank=8), seed=0)
    asked = torch.zeros(1, *LATENT_SHAPE), torch.ones(1), torch.zeros(1, TOKENS, dtype=torch.long)
    flops = []
    for who in (student, critic()):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            who(*asked)
        flops.append(counter.get_total_flops())
    assert flops[1] < 0.1 * flops[0]


# --- what DMD2 teaches it -----------------------------------------------------------------------


def slopes(mean: float, std: float, n: int = 20_000, groups: int = 50) -> Tensor:
    """Gradients ``[groups, 2]`` of the critic's loss in its (mean, log std) of the teacher."""
    learner = GaussianRatio(mean, std)
    method = build(GaussianMap(*WRONG), divergence="js", critic=learner)
    draw = Draw(seed=0, step=0, total=n)
    loss = torch.stack(list(method.critic_loss(gaussian_batches(draw), draw).values())).sum(0)
    parts = loss.reshape(groups, -1).mean(1)
    wanted = [learner.mean, learner.log_std]
    rows = [torch.stack(torch.autograd.grad(part, wanted, retain_graph=True)) for part in parts]
    return torch.stack(rows)


def test_the_exact_log_ratio_is_stationary() -> None:
    groups = slopes(MEAN, STD)
    assert bool((groups.mean(0).abs() < 4 * groups.std(0) / len(groups) ** 0.5).all())


@pytest.mark.parametrize(("mean", "std"), [(1.9, 0.7), (1.1, 0.7), (1.5, 1.0), (1.5, 0.5)])
def test_a_wrong_log_ratio_is_pointed_home(mean: float, std: float) -> None:
    away = torch.tensor([mean - MEAN, std - STD])
    moved = away.abs().argmax()
    assert slopes(mean, std).mean(0)[moved] * away[moved] > 0


def test_the_logistic_loss_is_least_at_the_log_ratio_and_log_two_without_opinion() -> None:
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.1, 0.3, 0.6])
    logit = torch.zeros(3, requires_grad=True)
    assert all(bool((term == math.log(2)).all()) for term in logistic(logit, logit).values())
    exact = (p / q).log().requires_grad_()
    terms = logistic(exact, exact)
    (slope,) = torch.autograd.grad((p * terms["teacher"] + q * terms["student"]).sum(), exact)
    torch.testing.assert_close(slope, torch.zeros(3))


class Brightness(nn.Module):
    """A one-step student of images of one brightness, N(mean, std²)."""

    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.mean, self.std = nn.Parameter(torch.tensor(mean)), std

    def forward(self, x_t: Tensor, t: Tensor, c: object) -> Tensor:
        return (x_t - (self.mean + self.std * x_t[:, :1, :1, :1])) / expand(t, x_t)


def even(draw: Draw) -> Batch:
    """Images of one brightness, N(0.3, 0.3²), under captions that say nothing."""
    x = 0.3 + 0.3 * draw.normal("x", (1, 1, 1))
    return Batch(x.expand(-1, *LATENT_SHAPE), torch.zeros(len(x), TOKENS, dtype=torch.long))


def test_the_logit_of_the_network_comes_to_the_log_ratio() -> None:
    """In the mean of 3,072 noisy numbers brightness is all there is: one dimension, exact."""
    net, p, q = critic(width=8), (0.3, 0.3), (-0.1, 0.4)
    method = build(
        Brightness(*q), fake=Brightness(*q), divergence="js", critic=net, rival_updates=1000
    )
    plan = {
        "student": Optimiser(lr=1e-9),
        "fake": Optimiser(lr=1e-9),
        "critic": Optimiser(lr=5e-3, final=0.05),
    }
    for _ in fit(method, even, steps=150, batch_size=64, seed=0, optimisers=plan):
        pass
    draw, n = Draw(seed=1, step=0, total=512), 512
    side = torch.arange(n) % 2
    mean, std = (torch.tensor(pair)[side] for pair in zip(p, q, strict=True))
    x = expand(mean + std * draw.normal("x", ()), torch.empty(n, 1, 1, 1))
    t = 0.05 + 0.9 * draw.uniform("t")
    x_t = mix(x.expand(-1, *LATENT_SHAPE), draw.normal("eps", LATENT_SHAPE), t)
    with torch.no_grad():
        got = net(x_t, t, torch.zeros(n, TOKENS, dtype=torch.long))
    # Averaged over an image and scaled back, the noise has deviation t / (1 - t) / √3072.
    brightness, noise = x_t.mean((1, 2, 3)) / (1 - t), t / (1 - t) / math.sqrt(3072)
    exact = _one_dimension(brightness, noise, p) - _one_dimension(brightness, noise, q)
    near = exact.abs() < 3  # what `ratio_clip` keeps
    assert float(near.float().mean()) > 0.9
    assert float(torch.stack([got, exact])[:, near].corrcoef()[0, 1]) > 0.95
    assert float((got - exact)[near].square().mean().sqrt()) < 0.4 * float(exact[near].std())


def _one_dimension(a: Tensor, noise: Tensor, of: tuple[float, float]) -> Tensor:
    mean, std = of
    variance = std**2 + noise**2
    return -((a - mean) ** 2) / (2 * variance) - variance.log() / 2


# --- how DMD2 plays it --------------------------------------------------------------------------


def test_a_critic_that_learns_has_a_turn_in_every_round() -> None:
    learner = GaussianRatio()
    method = build(GaussianMap(*WRONG), divergence="alpha", alpha=0.5, critic=learner)
    assert method.players["critic"] is learner
    assert [(turn.name, turn.moves, turn.every) for turn in method.turns()] == [
        ("fake", ("fake",), 1),
        ("critic", ("critic",), 1),
        ("student", ("student",), 5),
    ]


@pytest.mark.parametrize(
    ("divergence", "asked"),
    [
        ("js", lambda x_t, t, c: x_t.sum(1)),
        ("js", frozen(GaussianRatio())),
        ("rkl", GaussianRatio()),
        ("alpha", GaussianRatio()),
    ],
    ids=["function", "frozen", "rkl", "alpha=0"],
)
def test_no_other_critic_is_a_player(
    divergence: str, asked: Callable[[Tensor, Tensor, object], Tensor]
) -> None:
    method = build(GaussianMap(*WRONG), divergence=divergence, critic=asked)
    assert list(method.players) == ["student", "fake"]
    assert [turn.name for turn in method.turns()] == ["fake", "student"]


def test_the_networks_are_critics_that_learn_and_functions_are_not() -> None:
    assert isinstance(critic(), TrainableCritic)
    assert not isinstance(frozen(GaussianRatio()), TrainableCritic)


def test_a_training_without_weight_is_plain_dmd2_bit_for_bit_with_a_critic_around() -> None:
    ends = []
    for options in ({}, {"critic": GaussianRatio()}, {"divergence": "alpha"}):
        student, fake = GaussianMap(*WRONG), GaussianField(*WRONG)
        method = build(student, fake=fake, times=(1.0, 0.7), rival_updates=2, **options)
        plan = {name: Optimiser(lr=0.02) for name in method.players}
        list(fit(method, gaussian_batches, steps=6, batch_size=16, seed=0, optimisers=plan))
        ends.append(torch.stack([*student.parameters(), *fake.parameters()]).detach())
    assert all(torch.equal(ends[0], end) for end in ends[1:])


def test_a_critic_leaves_what_the_rivals_draw_alone() -> None:
    """With h = 1 at every ratio but by another name, student and fake go the same way."""
    ends = []
    for options in ({}, {"divergence": "alpha", "alpha": 1e-30, "critic": GaussianRatio()}):
        student, fake = GaussianMap(*WRONG), GaussianField(*WRONG)
        method = build(student, fake=fake, times=(1.0, 0.7), rival_updates=2, **options)
        plan = {name: Optimiser(lr=0.02) for name in method.players}
        list(fit(method, gaussian_batches, steps=6, batch_size=16, seed=0, optimisers=plan))
        ends.append(torch.stack([*student.parameters(), *fake.parameters()]).detach())
    assert torch.equal(*ends)


@pytest.mark.parametrize("turn", ["critic", "student"])
def test_in_each_turn_only_its_own_player_gets_a_gradient(turn: str) -> None:
    student, fake, learner = GaussianMap(*WRONG), GaussianField(*WRONG), GaussianRatio(2.0, 0.9)
    method = build(student, fake=fake, times=(1.0, 0.7), divergence="kl", critic=learner)
    losses = {t.name: t.loss for t in method.turns()}
    everyone = {"student": student, "fake": fake, "critic": learner}
    torch.stack(list(losses[turn](gaussian_batches(DRAW), DRAW).values())).sum().backward()
    got = {
        name for name, who in everyone.items() if any(p.grad is not None for p in who.parameters())
    }
    assert got == {turn}
    assert all(p.grad is not None and bool(p.grad.any()) for p in everyone[turn].parameters())


def test_both_sides_are_noised_on_their_own_within_the_students_range() -> None:
    calls: list[tuple[Tensor, Tensor]] = []

    class Listening(GaussianRatio):
        def forward(self, x_t: Tensor, t: Tensor, c: object) -> Tensor:
            calls.append((x_t, t))
            return super().forward(x_t, t, c)

    method = build(GaussianMap(*WRONG), divergence="js", critic=Listening(), noise_range=(0.2, 0.6))
    batch, draw = gaussian_batches(DRAW), DRAW
    terms = method.critic_loss(batch, draw)
    (real_x, real_t), (made_x, made_t) = calls
    for t in (real_t, made_t):
        assert float(t.min()) >= 0.2 and float(t.max()) <= 0.6
    assert not torch.equal(real_t, made_t)
    made = method.samples(batch, draw)
    noises = [
        (x_t - (1 - t[:, None]) * x) / t[:, None]
        for x_t, t, x in ((real_x, real_t, batch.x), (made_x, made_t, made))
    ]
    assert abs(float(torch.stack([n.flatten() for n in noises]).corrcoef()[0, 1])) < 0.3
    assert float(torch.stack(noises).std()) == pytest.approx(1, abs=0.15)
    assert {name: term.shape for name, term in terms.items()} == {
        "teacher": (DRAW.total,),
        "student": (DRAW.total,),
    }


def test_micro_batches_do_not_change_the_loss_of_a_critic() -> None:
    method = build(GaussianMap(*WRONG), times=(1.0, 0.7), divergence="js", critic=GaussianRatio())
    draw = Draw(seed=0, step=2, total=12)
    whole = method.critic_loss(gaussian_batches(draw), draw)
    parts = [
        method.critic_loss(gaussian_batches(d), d) for d in (draw.rows(0, 5), draw.rows(5, 12))
    ]
    for term, loss in whole.items():
        torch.testing.assert_close(loss, torch.cat([part[term] for part in parts]))


def test_a_weighted_student_comes_home_with_a_critic_that_learns_along() -> None:
    student, fake, learner = GaussianMap(2.0, 0.9), GaussianField(2.0, 0.9), _Quadratic()
    method = build(student, fake=fake, divergence="kl", critic=learner, rival_updates=3)
    assert isinstance(method, DMD2) and method.teacher is TEACHER
    plan = {
        "student": Optimiser(lr=0.04, final=0.05),
        "fake": Optimiser(lr=0.05, betas=(0.0, 0.99), final=0.05),
        "critic": Optimiser(lr=0.02, final=0.1),
    }
    list(fit(method, gaussian_batches, steps=240, batch_size=64, seed=0, optimisers=plan))
    assert student.mean.item() == pytest.approx(MEAN, abs=0.08)
    assert student.log_std.exp().item() == pytest.approx(STD, abs=0.08)


class _Quadratic(nn.Module):
    """A critic that knows nothing but that log ratios of Gaussians are quadratic."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Linear(2, 3)
        nn.init.zeros_(self.weights.weight)
        nn.init.zeros_(self.weights.bias)

    def forward(self, x_t: Tensor, t: Tensor, c: object) -> Tensor:
        a, b, bias = self.weights(torch.stack([t, t.square()], dim=1)).T
        return a * x_t.sum(1) + b * x_t.square().sum(1) / DIM + bias
