"""DMD2 against closed forms: the pull, the rollout, and who learns when."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from dmd2_world import DRAW, TEACHER, WITH_A_LEARNED_FAKE, Recorded, build, draw_of_step
from gaussian_world import DIM, MEAN, STD, GaussianField, GaussianMap, gaussian_batches
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from turbo_lab.adapters import AdapterSize, Host
from turbo_lab.errors import NonFinite
from turbo_lab.field import Field, frozen, guided
from turbo_lab.fit import fit
from turbo_lab.methods.dmd2 import DMD2, pull, surrogate
from turbo_lab.methods.kinds import TrainableField
from turbo_lab.optimisers import Optimiser
from turbo_lab.path import grid_from_times, mix, score, split
from turbo_lab.postcards.captions import null_tokens
from turbo_lab.sample import final, sample
from turbo_lab.streams import Draw
from turbo_lab.testbeds.postcards import LATENT_SHAPE, NetSize, spawn_net, train_batch

TINY = NetSize(layers=1, heads=2, head_width=16, text_width=16)


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
    teacher, fake = Recorded(TEACHER), Recorded(GaussianField())
    ranges = {"noise_range": (0.3, 0.5), "fake_range": (0.2, 0.9)}
    shifts = {"noise_shift": 2.0, "fake_shift": 5.0}
    method = build(GaussianMap(), fake=fake, teacher=teacher, **ranges, **shifts)  # type: ignore[arg-type]
    draw = Draw(seed=0, step=0, total=4000)
    method.student_loss(gaussian_batches(draw), draw)
    method.fake_loss(gaussian_batches(draw), draw)
    (_, students), (_, fakes) = fake.calls
    assert torch.equal(students, teacher.calls[0][1])
    for t, low, high, middle in ((students, 0.3, 0.5, 2 / 3), (fakes, 0.2, 0.9, 5 / 6)):
        assert low <= float(t.min()) < low + 0.01 and high - 0.01 < float(t.max()) <= high
        assert float(t.median()) == pytest.approx(low + (high - low) * middle, abs=0.005)


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
    plan = WITH_A_LEARNED_FAKE
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
