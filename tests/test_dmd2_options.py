"""The options of DMD2: weights for coverage, decoupled guidance, an anchored first step."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from dmd2_world import DRAW, TEACHER, Recorded, build, draw_of_step
from gaussian_world import DIM, MEAN, STD, GaussianField, GaussianMap, gaussian_batches
from torch import Tensor

from turbo_lab.errors import BadInput
from turbo_lab.field import Field
from turbo_lab.fit import fit
from turbo_lab.methods.divergences import DIVERGENCES
from turbo_lab.methods.dmd2 import pull
from turbo_lab.optimisers import Optimiser
from turbo_lab.path import mix, time_grid
from turbo_lab.sample import final, sample
from turbo_lab.streams import Draw

# --- weights ------------------------------------------------------------------------------------


def _refuses(x_t: Tensor, t: Tensor, c: object) -> Tensor:
    raise AssertionError("plain DMD2 has no use for the critic")


def test_reverse_kl_by_any_name_is_plain_dmd2_bit_for_bit() -> None:
    batch = gaussian_batches(DRAW)
    ends = []
    options: list[dict[str, object]] = [
        {},
        {"divergence": "rkl", "critic": _refuses},
        {"divergence": "alpha", "alpha": 0.0, "critic": _refuses},
        {"divergence": "alpha"},
    ]
    for option in options:
        student = GaussianMap(2.0, 0.9)
        terms = build(student, **option).student_loss(batch, DRAW)
        (slope,) = torch.autograd.grad(terms["surrogate"].sum(), student.mean)
        ends.append(torch.cat([*(term.detach() for term in terms.values()), slope[None]]))
    assert all(torch.equal(ends[0], end) for end in ends[1:])


@pytest.mark.parametrize("name", ["kl", "js", "neyman", "alpha"])
def test_a_critic_weighs_each_sample_by_its_ratio(name: str) -> None:
    seen = []

    def critic(x_t: Tensor, t: Tensor, c: object) -> Tensor:
        seen.append((x_t, t))
        return torch.linspace(-4, 4, len(x_t))

    alpha = 0.3 if name == "alpha" else 0.0
    student, batch = GaussianMap(2.0, 0.9), gaussian_batches(DRAW)
    x = build(student).predict(batch, DRAW, 0).x_hat.detach()
    plain, _ = build(student).gradient(x, batch.c, DRAW)
    method = build(student, divergence=name, alpha=alpha, critic=critic, ratio_clip=(0.2, 10.0))
    weighed, watched = method.gradient(x, batch.c, DRAW)
    r = torch.linspace(-4, 4, 64).exp().clamp(0.2, 10.0)
    h = r**alpha if name == "alpha" else DIVERGENCES[name].h(r)
    torch.testing.assert_close(weighed, h[:, None] * plain)
    torch.testing.assert_close(watched["weight"], h)
    ((x_t, t),) = seen
    torch.testing.assert_close(x_t, mix(x, DRAW.normal("eps", (DIM,)), t))


# --- decoupled guidance -------------------------------------------------------------------------


def test_without_guidance_the_guidance_part_is_nothing() -> None:
    batch = gaussian_batches(DRAW)
    student = GaussianMap(2.0, 0.9)
    plain = build(student).student_loss(batch, DRAW)
    apart = build(student, plain=TEACHER, guidance_range=(0.5, 1.0)).student_loss(batch, DRAW)
    assert float(apart["guidance"].max()) == 0
    for term, value in plain.items():
        assert torch.equal(value, apart[term])


def test_the_two_parts_have_their_own_times_noise_and_divisors() -> None:
    strong, plain = Recorded(GaussianField(2.2, 0.4)), Recorded(TEACHER)
    student, batch = GaussianMap(2.0, 0.9), gaussian_batches(DRAW)
    ranges = {"noise_range": (0.1, 0.4), "guidance_range": (0.6, 0.9)}
    fake = GaussianField(2.0, 0.9)
    method = build(student, fake=fake, teacher=strong, plain=plain, **ranges)
    x = method.predict(batch, DRAW, 0).x_hat.detach()
    g, watched = method.gradient(x, batch.c, DRAW)
    (low_x, low), (high_x, high) = plain.calls
    assert 0.1 <= float(low.min()) <= float(low.max()) <= 0.4
    assert 0.6 <= float(high.min()) <= float(high.max()) <= 0.9
    ((strong_x, strong_t),) = strong.calls
    assert torch.equal(strong_x, high_x) and torch.equal(strong_t, high)

    noises = [(x_t - (1 - t[:, None]) * x) / t[:, None] for x_t, t in plain.calls]
    assert float((noises[0] - noises[1]).abs().mean()) > 0.5
    ranks = [t.argsort() for _, t in plain.calls]
    assert not torch.equal(*ranks)

    def part(x_t: Tensor, t: Tensor, a: Field, b: Field) -> tuple[Tensor, Tensor]:
        return pull(x, x_t, t, a(x_t, t, None), b(x_t, t, None), 1e-3)

    matching, gap = part(low_x, low, fake, TEACHER)
    guidance, _ = part(high_x, high, TEACHER, strong.field)
    torch.testing.assert_close(g, (matching + guidance).detach())
    torch.testing.assert_close(watched["gap"], gap.square().mean(1).sqrt().detach())


def test_the_guidance_part_is_shifted_as_the_students_noise_is() -> None:
    plain, draw = Recorded(TEACHER), Draw(seed=0, step=0, total=4000)
    shifts = {"noise_shift": 5.0, "fake_shift": 1.0}
    method = build(GaussianMap(), plain=plain, guidance_range=(0.5, 0.9), **shifts)
    method.student_loss(gaussian_batches(draw), draw)
    (_, (_, t)) = plain.calls
    assert float(t.median()) == pytest.approx(0.5 + 0.4 * 5 / 6, abs=0.01)


def test_at_equal_times_the_two_parts_add_up_to_guidance_inside_the_teacher() -> None:
    w = 4.0
    conditional, unconditional = GaussianField(2.2, 0.4), GaussianField(0.5, 1.0)
    x_t, t = torch.randn(16, DIM), torch.linspace(0.1, 0.9, 16)
    v_c, v_u, v_fake = conditional(x_t, t, None), unconditional(x_t, t, None), TEACHER(x_t, t, None)
    v_guided = v_u + w * (v_c - v_u)
    gaps = [
        pull(x_t, x_t, t, a, b, 1e-3)[1]
        for a, b in ((v_fake, v_c), (v_c, v_guided), (v_fake, v_guided))
    ]
    torch.testing.assert_close(gaps[0] + gaps[1], gaps[2])
    torch.testing.assert_close(gaps[1], (w - 1) * t[:, None] * (v_c - v_u))


# --- the anchored first step --------------------------------------------------------------------


def test_an_anchored_first_step_learns_the_teachers_chord_and_nothing_else() -> None:
    times, steps = (1.0, 0.6), 7
    method = build(GaussianMap(2.0, 0.9), times=times, anchor_weight=0.05, anchor_steps=steps)
    batch, first = gaussian_batches(DRAW), draw_of_step(0, 2)
    z = first.normal("z", (DIM,))
    path = 0.6 + 0.4 * time_grid(steps)
    chord = (z - final(sample(TEACHER, path, z))) / 0.4
    terms = method.student_loss(batch, first)
    v = method.student(z, torch.ones(64), None)
    assert terms.keys() == {"anchor"}
    torch.testing.assert_close(terms["anchor"], 0.05 * (v - chord).square().mean(1))
    later = method.student_loss(batch, draw_of_step(1, 2))
    assert later.keys() == {"surrogate", "g_norm", "gap"}


def test_the_chord_itself_has_no_loss_and_lands_on_the_teachers_path() -> None:
    z = torch.randn(16, DIM)
    method = build(GaussianMap(), times=(1.0, 0.5), anchor_weight=1.0, anchor_steps=400)
    landed = z - 0.5 * method.anchor(z, None)
    sigma = (0.25 * STD**2 + 0.25) ** 0.5
    torch.testing.assert_close(landed, 0.5 * MEAN + sigma * z, rtol=0, atol=5e-3)
    elsewhere = build(GaussianMap(), times=(1.0, 0.5), anchor_weight=1.0, anchor_time=0.9)
    assert not torch.allclose(elsewhere.anchor(z, None), method.anchor(z, None))


def test_the_fake_of_an_anchored_student_sees_later_steps_only() -> None:
    student = Recorded(GaussianMap())
    options = {"times": (1.0, 0.7, 0.4), "anchor_weight": 0.1, "rollout": "forward"}
    method = build(student, fake=GaussianField(), **options)  # type: ignore[arg-type]
    for i in range(20):
        draw = Draw(seed=0, step=i, total=4)
        method.fake_loss(gaussian_batches(draw), draw)
    assert {round(float(t[0]), 3) for _, t in student.calls} == {0.7, 0.4}


# --- all ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"times": (1.0, 0.7), "eta": 1.0},
        {"times": (1.0, 0.7), "rollout": "forward"},
        {"plain": TEACHER, "guidance_range": (0.5, 1.0)},
        {"times": (1.0, 0.7), "anchor_weight": 0.1},
        {"divergence": "js", "critic": lambda x_t, t, c: x_t.sum(1)},
        {"noise_range": (0.0, 1.0)},
    ],
)
def test_every_option_gives_finite_rows_that_do_not_know_their_micro_batch(
    options: dict[str, object],
) -> None:
    method = build(GaussianMap(2.0, 0.9), **options)
    for turn in method.turns():
        for step in range(4):
            draw = Draw(seed=0, step=step, total=12)
            whole = turn.loss(gaussian_batches(draw), draw)
            parts = [turn.loss(gaussian_batches(d), d) for d in (draw.rows(0, 5), draw.rows(5, 12))]
            for term, loss in whole.items():
                assert loss.shape == (12,) and bool(loss.isfinite().all())
                rows = torch.cat([part[term] for part in parts])
                torch.testing.assert_close(loss, rows, rtol=1e-4, atol=1e-6)


def test_a_run_in_two_micro_batches_is_the_run_in_one() -> None:
    ends = []
    for parts in (1, 2):
        student = GaussianMap(2.3, 0.9)
        method = build(student, times=(1.0, 0.7), eta=1.0, rival_updates=2)
        plan = {name: Optimiser(lr=0.01) for name in method.players}
        run = fit(
            method, gaussian_batches, steps=6, batch_size=16, seed=0, optimisers=plan,
            micro_batches=parts,
        )  # fmt: skip
        list(islice(run, 6))
        ends.append(torch.stack([student.mean, student.log_std]).detach())
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"times": (0.9, 0.5)}, "times="),
        ({"times": (1.0, 1.0)}, "times="),
        ({"times": ()}, "times="),
        ({"eta": 1.5}, "eta=1.5"),
        ({"rollout": "sideways"}, "sideways"),
        ({"rival_updates": 0}, "rival_updates=0"),
        ({"floor": 0.0}, "floor=0"),
        ({"noise_range": (0.5, 0.5)}, "noise_range"),
        ({"noise_range": (0.1, 1.1)}, "noise_range"),
        ({"noise_shift": 0.0}, "noise_shift=0"),
        ({"fake_range": (0.1, 0.9)}, "fake_range.*cover"),
        ({"guidance_range": (0.2, 0.8)}, "plain teacher"),
        ({"plain": TEACHER, "guidance_range": (0.8, 0.2)}, "guidance_range"),
        ({"divergence": "tv"}, "divergence='tv'"),
        ({"divergence": "js"}, "needs a critic"),
        ({"divergence": "alpha", "alpha": 0.5}, "needs a critic"),
        ({"alpha": 0.5}, "alpha=0.5"),
        ({"ratio_clip": (2.0, 1.0)}, "ratio_clip"),
        ({"anchor_weight": -1.0, "times": (1.0, 0.5)}, "anchor_weight=-1"),
        ({"anchor_weight": 1.0}, "anchor_weight=1.0.*two times"),
        ({"anchor_time": 1.0}, "anchor_time=1"),
        ({"anchor_steps": 0}, "anchor_steps=0"),
    ],
)
def test_bad_options_are_named(options: dict[str, object], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        build(GaussianMap(), **options)
