"""The GAN term: who learns, from which side, how strongly, and that the method stays its own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from dmd2_world import DRAW, TEACHER, build
from gaussian_world import (
    DIM,
    MEAN,
    STD,
    GaussianField,
    GaussianMap,
    gaussian_batches,
    gaussian_pairs,
)
from torch import Tensor, nn
from torch.nn.functional import relu, softplus

from turbo_lab.critic import gradient_penalty
from turbo_lab.errors import BadInput
from turbo_lab.fit import Batch, Objective, Optimiser, fit
from turbo_lab.methods.consistency import Consistency
from turbo_lab.methods.direct import Direct
from turbo_lab.methods.flow import FlowMatching
from turbo_lab.methods.gan import Generates, WithGan, mixed
from turbo_lab.path import expand
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


# --- one more player, one more turn -------------------------------------------------------------


def test_the_critic_is_one_more_player_with_a_turn_before_the_students() -> None:
    method = gan()
    assert list(method.players) == ["student", "fake", "critic"]
    assert [(turn.name, turn.moves, turn.every) for turn in method.turns()] == [
        ("fake", ("fake",), 1),
        ("critic", ("critic",), 1),
        ("student", ("student",), 2),
    ]
    fit_ = fit(method, gaussian_batches, steps=3, batch_size=8, seed=0, optimisers=plan(method))
    assert [sorted(record.norms) for record in fit_] == [
        ["critic", "fake", "student"],
        ["critic", "fake"],
        ["critic", "fake", "student"],
    ]


@pytest.mark.parametrize("turn", ["fake", "critic", "student"])
def test_in_each_turn_only_its_own_player_gets_a_gradient(turn: str) -> None:
    method = gan(r1=0.1, noise_range=(0.1, 0.5))
    for p in parameters(method, "student", "fake", "critic"):
        p.requires_grad_()
    (loss,) = (t.loss for t in method.turns() if t.name == turn)
    torch.stack(list(loss(gaussian_batches(DRAW), DRAW).values())).sum().backward()
    for name in method.players:
        got = [p.grad is not None and bool(p.grad.any()) for p in parameters(method, name)]
        assert all(got) if name == turn else not any(got)


@pytest.mark.parametrize(
    "options", [{"weight": 0.0}, {"weight": 0.5}, {"weight": 0.0, "balance": 0.3}]
)
def test_the_methods_own_terms_are_the_same_bits(options: dict[str, float]) -> None:
    method = gan(None, **options)
    for name in ("fake", "student"):
        (plain,), (ours,) = (
            [t.loss(gaussian_batches(DRAW), DRAW) for t in it.turns() if t.name == name]
            for it in (method.method, method)
        )
        assert all(torch.equal(ours[term], plain[term]) for term in plain)
    assert ours.keys() - plain.keys() == {"gan", "gan_pull", "method_pull", "cosine", "gan_weight"}
    torch.testing.assert_close(ours["method_pull"], ours["g_norm"])  # for DMD2 they are one thing


def test_a_training_of_weight_zero_is_the_methods_own_bit_for_bit() -> None:
    ends = []
    for wrapped in (False, True):
        student = GaussianMap(*WRONG)
        whole = gan(student, weight=0.0)
        method: Objective = whole if wrapped else whole.method
        list(fit(method, gaussian_batches, steps=6, batch_size=16, seed=0, optimisers=plan(method)))
        ends.append(torch.stack([p.detach() for p in parameters(whole, "student", "fake")]))
    assert torch.equal(*ends)


METHODS: dict[str, tuple[Callable[[], Generates], Callable[[Draw], Batch]]] = {
    "dmd2": (
        lambda: build(GaussianMap(*WRONG), times=(1.0, 0.7), rival_updates=1),
        gaussian_batches,
    ),
    "direct": (lambda: Direct(student=GaussianMap(*WRONG), steps=2), gaussian_pairs),
    "consistency": (
        lambda: Consistency(student=GaussianMap(*WRONG), teacher=TEACHER, grid_steps=4),
        gaussian_batches,
    ),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_with_samples_takes_the_term(name: str) -> None:
    make, batches = METHODS[name]
    method = make()
    (turn,) = (t for t in method.turns() if t.moves == ("student",))  # type: ignore[attr-defined]
    x, terms = method.generated(batches(DRAW), DRAW)
    own = turn.loss(batches(DRAW), DRAW)
    assert x is not None and x.requires_grad and all(torch.equal(terms[k], own[k]) for k in own)
    samples = method.samples(batches(DRAW), DRAW)
    assert samples.shape == x.shape and not samples.requires_grad
    whole = WithGan(method=method, critic=Voter(), real=gaussian_batches, balance=0.5)  # type: ignore[arg-type]
    records = fit(whole, batches, steps=3, batch_size=8, seed=0, optimisers=plan(whole))
    assert all(f"{turn.name}/gan" in record.terms for record in records)


def test_what_does_not_go_together_is_refused() -> None:
    student = GaussianMap(*WRONG)
    adversarial = Consistency(
        student=student, teacher=TEACHER, critic=Voter(), adversarial_weight=0.1
    )
    for method in (FlowMatching(student=student), adversarial):
        with pytest.raises(BadInput, match=f"method='{type(method).__name__}'"):
            WithGan(method=method, critic=Voter(), real=gaussian_batches)  # type: ignore[arg-type]
    for options, said in (
        ({"loss": "magic"}, "loss='magic'.*hinge, logistic"),
        ({"weight": -1.0}, "weight=-1"),
        ({"weight": 1.0, "balance": 1.0}, "balance=1.0.*not both"),
        ({"weight": 0.0, "balance": 0.0}, "balance=0"),
        ({"r1": float("nan")}, "r1=nan"),
        ({"noise_range": (0.5, 0.2)}, "noise_range="),
    ):
        with pytest.raises(BadInput, match=said):
            gan(**options)
    phases = Consistency(student=student, teacher=TEACHER, edges=(0.5,))
    with pytest.raises(BadInput, match=r"edges=.*one phase"):
        phases.generated(gaussian_batches(DRAW), DRAW)


def test_an_anchored_first_step_is_left_to_its_anchor() -> None:
    dmd2 = build(GaussianMap(*WRONG), times=(1.0, 0.7), anchor_weight=1.0)
    method = WithGan(method=dmd2, critic=Voter(), real=gaussian_batches, weight=1.0)
    seen = set()
    for k in range(12):
        draw = Draw(seed=0, step=k, total=4)
        seen.add(tuple(method.student_loss(gaussian_batches(draw), draw)))
    assert ("anchor",) in seen and len(seen) == 2


# --- the student's part -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "value"),
    [("logistic", lambda d: softplus(-d)), ("hinge", lambda d: relu(1 - d))],
)
def test_the_term_is_the_loss_of_each_vote_with_its_gradient(
    loss: str, value: Callable[[Tensor], Tensor]
) -> None:
    method, batch = gan(loss=loss), gaussian_batches(DRAW)
    student = parameters(method, "student")
    terms = method.student_loss(batch, DRAW)
    x, _ = method.method.generated(batch, DRAW)
    assert x is not None and isinstance(method.critic, Voter)
    plain = 0.5 * value(method.critic.votes(x, torch.zeros(len(x)), batch.c)).mean(1)
    # The unweighted value is logged through its weight, and the gradient is the chain rule's.
    torch.testing.assert_close(terms["gan"], plain)
    ours = torch.autograd.grad(terms["gan"].sum(), student, retain_graph=True)
    theirs = torch.autograd.grad(plain.sum(), [*student, *parameters(method, "critic")])
    torch.testing.assert_close(ours, theirs[:2])
    assert bool(theirs[2].any()) and method.critic.a.grad is None


@pytest.mark.parametrize("ratio", [0.1, 1.0, 4.0])
def test_balance_gives_the_ratio_of_gradients_at_x(ratio: float) -> None:
    method, batch = gan(weight=0.0, balance=ratio), gaussian_batches(DRAW)
    terms = method.student_loss(batch, DRAW)
    assert set(terms) >= {"surrogate", "gan"}
    x, own = method.method.generated(batch, DRAW)
    assert x is not None and isinstance(method.critic, Voter)
    weight = terms["gan_weight"][0]
    term = weight * softplus(-method.critic.votes(x, torch.zeros(len(x)), None)).mean(1)
    slopes = [
        torch.autograd.grad(loss.sum(), x, retain_graph=True)[0]
        for loss in (own["surrogate"], term)
    ]
    assert float(slopes[1].norm() / slopes[0].norm()) == pytest.approx(ratio, rel=1e-4)
    for name, slope in zip(("method_pull", "gan_pull"), slopes, strict=True):
        rms = (DIM * slope).square().mean(1).sqrt() / (weight if name == "gan_pull" else 1)
        torch.testing.assert_close(terms[name], rms)
    cosine = nn.functional.cosine_similarity(slopes[0], slopes[1])
    torch.testing.assert_close(terms["cosine"], cosine, rtol=1e-3, atol=1e-5)
    assert all(not terms[k].requires_grad for k in ("cosine", "gan_pull", "gan_weight"))


def test_balance_of_a_critic_without_opinion_is_finite() -> None:
    method = gan(critic=Voter(0.0, 0.0), weight=0.0, balance=1.0)
    terms = method.student_loss(gaussian_batches(DRAW), DRAW)
    assert float(terms["gan_weight"][0]) == 1e4
    assert all(bool(term.isfinite().all()) for term in terms.values())


def test_micro_batches_do_not_change_the_losses() -> None:
    method = gan(noise_range=(0.1, 0.6), r1=0.3, real=mixed(gaussian_batches, ones, 0.5))
    draw = Draw(seed=0, step=2, total=12)
    for turn in method.turns():
        whole = turn.loss(gaussian_batches(draw), draw)
        parts = [turn.loss(gaussian_batches(d), d) for d in (draw.rows(0, 5), draw.rows(5, 12))]
        for term, loss in whole.items():
            torch.testing.assert_close(loss, torch.cat([part[term] for part in parts]))


def test_the_term_leads_to_the_data_what_the_teacher_keeps_away_from_it() -> None:
    """The teacher is wrong by 0.7: DMD2 stays there, and leaves it the more the GAN weighs.

    The real side is N(1.5, 0.7²) itself, and the critic knows that log ratios are quadratic.
    """
    lost = GaussianField(2.2, STD).requires_grad_(False)
    ends = []
    for weight in (0.0, 2.0, 20.0):
        student = GaussianMap(2.2, STD)
        dmd2 = build(student, teacher=lost, fake=GaussianField(2.2, STD), rival_updates=1)
        method = WithGan(
            method=dmd2, critic=Voter(0.0, 0.0), real=gaussian_batches, weight=weight, r1=0.05
        )
        rates = {
            "student": Optimiser(lr=0.02, final=0.1),
            "fake": Optimiser(lr=0.02),
            "critic": Optimiser(lr=0.05, betas=(0.0, 0.99)),
        }
        list(fit(method, gaussian_batches, steps=120, batch_size=64, seed=0, optimisers=rates))
        ends.append(student.mean.item())
    assert ends[0] == pytest.approx(2.2, abs=0.1)
    assert ends[1] < ends[0] - 0.15
    assert MEAN - 0.1 < ends[2] < ends[1] - 0.1


# --- the critic's part --------------------------------------------------------------------------


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


def ones(draw: Draw) -> Batch:
    """A teacher's samples that are told from data at a look."""
    rows = len(draw.uniform("any"))
    return Batch(torch.full((rows, DIM), 100.0), torch.ones(rows, 1, dtype=torch.long))


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
