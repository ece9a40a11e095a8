"""The GAN term: who learns, from which side, how strongly, and that the method stays its own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from dmd2_world import DRAW, TEACHER, build
from gan_world import WRONG, Voter, gan, ones, parameters, plan
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

from turbo_lab.errors import BadInput
from turbo_lab.fit import Batch, Objective, fit
from turbo_lab.methods.consistency import Consistency
from turbo_lab.methods.direct import Direct
from turbo_lab.methods.flow import FlowMatching
from turbo_lab.methods.gan import Generates, WithGan, mixed
from turbo_lab.optimisers import Optimiser
from turbo_lab.streams import Draw

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


def test_the_critic_hears_the_conditions_of_the_side_it_looks_at() -> None:
    heard: list[Tensor] = []

    class Listener(Voter):
        def votes(self, x_t: Tensor, t: Tensor, c: Tensor) -> Tensor:  # type: ignore[override]
            heard.append(c)
            return super().votes(x_t, t, c)

    gan(critic=Listener(), real=ones).critic_loss(gaussian_batches(DRAW), DRAW)
    real, made = heard
    assert bool((real == 1).all()) and bool((made == 0).all())


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
