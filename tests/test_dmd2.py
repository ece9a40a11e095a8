"""DMD2 against closed forms: the pull, the rollout, who learns when, and the published cures."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import islice

import pytest
import torch
from gaussian_world import DIM, MEAN, STD, GaussianField, GaussianMap, gaussian_batches
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from turbo_lab.adapters import AdapterSize, Host
from turbo_lab.errors import BadInput, NonFinite
from turbo_lab.field import Field, frozen, guided
from turbo_lab.fit import Optimiser, fit
from turbo_lab.methods.divergences import DIVERGENCES
from turbo_lab.methods.dmd2 import DMD2, pull, surrogate
from turbo_lab.methods.kinds import TrainableField
from turbo_lab.path import grid_from_times, mix, score, split, time_grid
from turbo_lab.postcards.captions import null_tokens
from turbo_lab.sample import final, sample
from turbo_lab.streams import Draw
from turbo_lab.testbeds.postcards import LATENT_SHAPE, NetSize, spawn_net, train_batch

TEACHER = frozen(GaussianField().requires_grad_(False))
DRAW = Draw(seed=3, step=5, total=64)
TINY = NetSize(layers=1, heads=2, head_width=16, text_width=16)


def build(
    student: TrainableField, *, fake: TrainableField | None = None, **options: object
) -> DMD2:
    """DMD2 in the Gaussian world; the fake is exact for a one-step GaussianMap."""
    if fake is None:
        assert isinstance(student, GaussianField)
        fake = GaussianField(student.mean.item(), student.log_std.exp().item())
    settings = {"teacher": TEACHER, "times": (1.0,), **options}
    return DMD2(student=student, fake=fake, **settings)  # type: ignore[arg-type]


def draw_of_step(k: int, steps: int, total: int = 64) -> Draw:
    """The first draw whose step is k."""
    draws = (Draw(seed=0, step=i, total=total) for i in range(200))
    return next(draw for draw in draws if draw.shared("step", steps) == k)


class Recorded:
    """A field that keeps its calls."""

    def __init__(self, field: Field) -> None:
        self.field = field
        self.calls: list[tuple[Tensor, Tensor]] = []

    def __call__(self, x_t: Tensor, t: Tensor, c: object) -> Tensor:
        self.calls.append((x_t, t))
        return self.field(x_t, t, c)


# --- the pull -----------------------------------------------------------------------------------


def test_clean_image_velocity_and_score_forms_agree() -> None:
    generator = torch.Generator().manual_seed(0)
    x, eps, v_fake, v_real = torch.randn(4, 16, 3, 4, 4, generator=generator).double()
    t = torch.linspace(0.05, 0.95, 16).double()
    x_t, wide = mix(x, eps, t), t.view(-1, 1, 1, 1)
    g, gap = pull(x, x_t, t, v_fake, v_real, 1e-3)
    x_fake, x_real = split(x_t, v_fake, t)[0], split(x_t, v_real, t)[0]
    scores = score(x_t, v_fake, t) - score(x_t, v_real, t)
    torch.testing.assert_close(gap, x_fake - x_real, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gap, wide**2 / (1 - wide) * scores, rtol=1e-6, atol=1e-6)
    size = (x - x_real).abs().mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(g, (x_fake - x_real) / size, rtol=1e-6, atol=1e-6)


def test_the_loss_is_the_published_one_transcribed() -> None:
    """DMD's pseudo-code, with clean predictions in place of its diffusion parametrisation."""
    student, fake = spawn_net(TINY, 0).eval(), spawn_net(TINY, 1).eval()
    teacher = guided(frozen(spawn_net(TINY, 2).eval()), null_tokens(1), 3.0)
    draw = Draw(seed=0, step=0, total=4)
    batch = train_batch(draw, seed=0)
    method = DMD2(student=student, teacher=teacher, fake=fake, times=(1.0,), floor=1e-12)
    x = method.predict(batch, draw, 0).x_hat

    t = 0.02 + 0.96 * draw.uniform("t")
    wide = t.view(-1, 1, 1, 1)
    noisy = (1 - wide) * x + wide * draw.normal("eps", LATENT_SHAPE)
    with torch.no_grad():
        pred_fake = noisy - wide * fake(noisy, t, batch.c)
        pred_real = noisy - wide * teacher(noisy, t, batch.c)
        weighting_factor = torch.abs(x - pred_real).mean(dim=[1, 2, 3], keepdim=True)
        grad = (pred_fake - pred_real) / weighting_factor
    published = 0.5 * mse_loss(x, (x - grad).detach())

    ours = method.student_loss(batch, draw)["surrogate"].mean()
    torch.testing.assert_close(ours, published, rtol=1e-5, atol=1e-7)
    last = student.transformer.proj_out.weight
    one, other = (torch.autograd.grad(loss, last)[0] for loss in (ours, published))
    assert float(one.abs().max()) > 1e-3
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_the_surrogate_has_g_over_d_as_its_gradient() -> None:
    x, g = torch.randn(4, 5, dtype=torch.float64, requires_grad=True), torch.randn(4, 5).double()
    (slope,) = torch.autograd.grad(surrogate(x, g).sum(), x)
    torch.testing.assert_close(slope, g / 5)


def test_at_the_answer_the_mean_gradient_is_zero_within_its_error() -> None:
    """A fake that knows each sample's own noise is the exact one on average, and only so."""
    n = 40_000
    draw = Draw(seed=1, step=0, total=n)
    batch = gaussian_batches(draw)
    method = build(GaussianMap())
    x = method.predict(batch, draw, 0).x_hat.detach()
    eps, t = draw.normal("eps", (DIM,)), 0.02 + 0.96 * draw.uniform("t")
    x_t = mix(x, eps, t)
    _, gap = pull(x, x_t, t, eps - x, TEACHER(x_t, t, None), 1e-3)
    assert float(gap.abs().mean()) > 0.1
    assert bool((gap.mean(0).abs() < 4 * gap.std(0) / n**0.5).all())
    exact, watched = method.gradient(x, batch.c, draw)
    assert float(exact.abs().max()) < 1e-3 and float(watched["gap"].max()) < 1e-5


def test_the_exact_fake_is_stationary_and_a_wrong_one_is_pointed_home() -> None:
    n, groups = 20_000, 20
    draw = Draw(seed=2, step=0, total=n)
    batch = gaussian_batches(draw)

    def slope(mean: float, std: float) -> tuple[Tensor, Tensor]:
        fake = GaussianField(mean, std)
        loss = build(GaussianMap(2.0, 0.5), fake=fake).fake_loss(batch, draw)["velocity"]
        rows = [
            torch.stack(torch.autograd.grad(part, [fake.mean, fake.log_std], retain_graph=True))
            for part in loss.reshape(groups, -1).mean(1)
        ]
        got = torch.stack(rows)
        return got.mean(0), got.std(0) / groups**0.5

    mean, error = slope(2.0, 0.5)
    assert bool((mean.abs() < 4 * error).all())
    assert float(slope(1.5, 0.5)[0][0]) < 0 < float(slope(2.0, 0.7)[0][1])


def test_the_floor_keeps_a_student_that_equals_its_teacher_finite() -> None:
    x, t = torch.randn(8, DIM), torch.full((8,), 0.3)
    x_t = mix(x, torch.randn(8, DIM), t)
    v_to = (x_t - x) / 0.3  # this teacher takes x for the clean image: the divisor is zero
    g, gap = pull(x, x_t, t, v_to + 1e-4, v_to, 0.01)
    torch.testing.assert_close(g, gap / 0.01)
    zero, _ = pull(x, x, torch.zeros(8), v_to + 1e-4, v_to, 0.01)
    assert bool((zero == 0).all())
    terms = build(GaussianMap(), noise_range=(0.0, 1e-7)).student_loss(gaussian_batches(DRAW), DRAW)
    assert all(bool(term.isfinite().all()) for term in terms.values())


def test_what_is_not_finite_stops_the_training() -> None:
    class Broken(GaussianField):
        def forward(self, x_t: Tensor, t: Tensor, c: object) -> Tensor:
            v = super().forward(x_t, t, c)
            return v if torch.is_grad_enabled() else v * math.nan  # only the student meets it

    method = build(GaussianMap(), fake=Broken())
    plan = {name: Optimiser(lr=1e-3) for name in method.players}
    with pytest.raises(NonFinite, match="student/surrogate"):
        list(fit(method, gaussian_batches, steps=1, batch_size=8, seed=0, optimisers=plan))


# --- the rollout --------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_backward_simulation_is_the_sampler(eta: float) -> None:
    times = (1.0, 0.7155, 0.3)
    student = GaussianField(1.0, 1.2)
    method = build(student, fake=GaussianField(), times=times, eta=eta)
    batch = gaussian_batches(DRAW)
    states = list(
        sample(
            student,
            grid_from_times(times),
            DRAW.normal("z", (DIM,)),
            batch.c,
            eta=eta,
            renoise=lambda i: DRAW.normal(f"renoise/{i}", (DIM,)),
        )
    )
    for k, state in enumerate(states):
        got = method.predict(batch, DRAW, k)
        assert torch.equal(got.x_t, state.x_t) and torch.equal(got.x_hat, state.x_hat)
        assert got.t == state.t and not got.x_t.requires_grad
        moved = torch.autograd.grad(got.x_hat.sum(), student.mean)[0]
        alone, _ = split(
            state.x_t.detach(), student(state.x_t.detach(), _all(state.t), None), state.t
        )
        torch.testing.assert_close(moved, torch.autograd.grad(alone.sum(), student.mean)[0])
    torch.testing.assert_close(method.predict(batch, DRAW, 2).x_hat, final(iter(states)))


def _all(t: float) -> Tensor:
    return torch.full((64,), t)


def test_forward_noising_starts_at_data() -> None:
    times = (1.0, 0.6)
    batch = gaussian_batches(DRAW)
    method = build(GaussianMap(), times=times, rollout="forward")
    z = DRAW.normal("z", (DIM,))
    for k, t in enumerate(times):
        state = method.predict(batch, DRAW, k)
        torch.testing.assert_close(state.x_t, mix(batch.x, z, t))
        assert state.t == pytest.approx(t)


def test_one_step_is_drawn_for_the_whole_batch_and_every_step_comes() -> None:
    student = Recorded(GaussianMap())
    method = build(student, fake=GaussianField(), times=(1.0, 0.7, 0.4), rollout="forward")  # type: ignore[arg-type]
    for i in range(30):
        draw = Draw(seed=0, step=i, total=8)
        method.student_loss(gaussian_batches(draw), draw)
    assert all(len(t.unique()) == 1 for _, t in student.calls)
    assert len({round(float(t[0]), 3) for _, t in student.calls}) == 3


def test_the_student_and_the_fake_are_asked_within_their_own_times() -> None:
    teacher, fake = Recorded(TEACHER), GaussianField()
    method = build(
        GaussianMap(), fake=fake, teacher=teacher, noise_range=(0.3, 0.5), noise_shift=5.0
    )
    draw = Draw(seed=0, step=0, total=4000)
    method.student_loss(gaussian_batches(draw), draw)
    (_, t), *_ = teacher.calls
    assert 0.3 <= float(t.min()) < 0.31 and 0.49 < float(t.max()) <= 0.5
    assert float(t.median()) == pytest.approx(0.3 + 0.2 * 5 / 6, abs=0.005)


# --- who learns, and when -----------------------------------------------------------------------


def test_each_update_of_the_student_has_its_updates_of_the_fake() -> None:
    student = GaussianMap(2.5, 0.7)
    method = build(student, rival_updates=5)
    plan = {name: Optimiser(lr=0.01) for name in method.players}
    fit_ = partial(fit, method, gaussian_batches, batch_size=8, seed=0, optimisers=plan)
    seen, moved = [(student.mean.item(), method.fake.mean.item())], []  # type: ignore[attr-defined]
    for record in fit_(steps=10):
        seen.append((student.mean.item(), method.fake.mean.item()))  # type: ignore[attr-defined]
        moved.append(sorted(record.norms))
    rounds = [
        [i for i in range(1, 11) if seen[i][player] != seen[i - 1][player]] for player in (0, 1)
    ]
    assert rounds == [[1, 6], list(range(1, 11))]
    assert moved[0] == moved[5] == ["fake", "student"] and moved[1] == ["fake"]
    assert [turn.name for turn in method.turns()] == ["fake", "student"]


def test_a_wrong_student_is_pulled_home_when_the_fake_is_kept_exact() -> None:
    student, fake = GaussianMap(2.5, 1.2), GaussianField(2.5, 1.2)
    method = build(student, fake=fake, rival_updates=1)
    plan = {"student": Optimiser(lr=0.04, final=0.02), "fake": Optimiser(lr=1e-9)}
    start = None
    for record in fit(method, gaussian_batches, steps=100, batch_size=64, seed=0, optimisers=plan):
        with torch.no_grad():
            fake.mean.copy_(student.mean)
            fake.log_std.copy_(student.log_std)
        start = start or record.terms
    assert student.mean.item() == pytest.approx(MEAN, abs=0.02)
    assert student.log_std.exp().item() == pytest.approx(STD, abs=0.03)
    assert record.terms["student/gap"] < 0.05 * start["student/gap"]  # type: ignore[index]


def test_two_renoised_steps_with_a_learned_fake_come_home_too() -> None:
    student = GaussianMap(2.3, 0.9)
    method = build(student, times=(1.0, 0.7), eta=1.0, rival_updates=4)
    plan = {
        "student": Optimiser(lr=0.04, final=0.05),
        "fake": Optimiser(lr=0.05, betas=(0.0, 0.99), final=0.05),
    }
    list(fit(method, gaussian_batches, steps=320, batch_size=64, seed=0, optimisers=plan))
    assert student.mean.item() == pytest.approx(MEAN, abs=0.06)
    assert student.log_std.exp().item() == pytest.approx(STD, abs=0.06)


def _on_one_base() -> tuple[TrainableField, TrainableField, Field, nn.Module]:
    host = Host(spawn_net(TINY, 0).eval(), part="transformer")
    student, fake = (host.add(n, AdapterSize(rank=2), seed=0) for n in ("student", "fake"))
    _stir(student)
    return student, fake, guided(frozen(host.bare), null_tokens(1), 3.0), host.net


def _stir(player: TrainableField) -> None:
    """Move an adapter off the base, so that confusing two of them would be seen."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in player.named_parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def _merged(student: TrainableField) -> nn.Module:
    """A whole network with the weights of a base and its adapter."""
    from peft.tuners.lora import LoraLayer

    host = student.host  # type: ignore[attr-defined]
    net = spawn_net(TINY, 0).eval()
    for path, layer in host.net.named_modules():
        if isinstance(layer, LoraLayer):
            with torch.no_grad():
                net.get_submodule(path).weight += layer.get_delta_weight("student")  # type: ignore[operator]
    return net


def _as_copies() -> tuple[TrainableField, TrainableField, Field, nn.Module]:
    student, fake, teacher = (spawn_net(TINY, 0).eval() for _ in range(3))
    return student, fake, guided(frozen(teacher), null_tokens(1), 3.0), teacher


@pytest.mark.parametrize("players", [_on_one_base, _as_copies])
def test_a_turn_gives_gradients_to_its_own_player_alone(
    players: Callable[[], tuple[TrainableField, TrainableField, Field, nn.Module]],
) -> None:
    student, fake, teacher, base = players()
    method = DMD2(student=student, teacher=teacher, fake=fake, times=(1.0, 0.7), eta=1.0)
    everyone = {"student": student, "fake": fake}
    learning = {id(p) for player in everyone.values() for _, p in player.named_parameters()}
    for player in everyone.values():
        for _, parameter in player.named_parameters():
            parameter.requires_grad_()
    draw = draw_of_step(1, 2, total=4)
    for turn in method.turns():
        batch = train_batch(draw, seed=0)
        torch.stack(list(turn.loss(batch, draw).values())).sum().backward()
        for name, player in everyone.items():
            grads = [p.grad for _, p in player.named_parameters()]
            assert (turn.moves == (name,)) == any(g is not None and bool(g.any()) for g in grads)
            assert turn.moves == (name,) or all(g is None for g in grads)
            for _, parameter in player.named_parameters():
                parameter.grad = None
        assert all(p.grad is None for p in base.parameters() if id(p) not in learning)


@pytest.mark.parametrize("k", [0, 1])
def test_adapters_and_copies_have_the_same_losses_at_equal_weights(k: int) -> None:
    student, fake, teacher, _ = _on_one_base()
    copies = _as_copies()
    draw = draw_of_step(k, 2, total=4)
    batch = train_batch(draw, seed=0)
    worn = DMD2(student=student, teacher=teacher, fake=fake, times=(1.0, 0.7))
    whole = DMD2(student=_merged(student), teacher=copies[2], fake=copies[1], times=(1.0, 0.7))  # type: ignore[arg-type]
    for one, other in zip(worn.turns(), whole.turns(), strict=True):
        ours, theirs = one.loss(batch, draw), other.loss(batch, draw)
        assert ours.keys() == theirs.keys()
        for term in ours:
            torch.testing.assert_close(ours[term], theirs[term], rtol=2e-4, atol=1e-5)
    assert float(worn.student_loss(batch, draw)["g_norm"].min()) > 1e-3


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
