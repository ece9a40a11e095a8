"""Trajectory methods against closed forms: chords, boundaries, derivatives, unrolled steps."""

from __future__ import annotations

from collections.abc import Callable
from math import inf, nan

import pytest
import torch
from dmd2_world import Recorded
from gaussian_world import (
    MEAN,
    STD,
    GaussianField,
    GaussianMap,
    gaussian_batches,
    gaussian_pairs,
)
from torch import Tensor, nn

from turbo_lab.adapters import AdapterSize, Host
from turbo_lab.errors import BadInput
from turbo_lab.field import frozen, guided
from turbo_lab.fit import Batch, Objective, fit
from turbo_lab.methods.consistency import Consistency
from turbo_lab.methods.continuous import ContinuousConsistency, central_difference, forward_mode
from turbo_lab.methods.direct import Direct
from turbo_lab.methods.flow import FlowMatching
from turbo_lab.methods.kinds import HUBER, TrainableField, euler, heun, pseudo_huber, squared, walk
from turbo_lab.methods.progressive import Progressive
from turbo_lab.optimisers import Optimiser
from turbo_lab.path import mix, shift_time, time_grid
from turbo_lab.postcards.captions import null_tokens
from turbo_lab.sample import final, sample
from turbo_lab.streams import Draw
from turbo_lab.testbeds.postcards import LATENT_SHAPE, NetSize, spawn_net, train_batch

TEACHER = frozen(GaussianField().requires_grad_(False))
DRAW = Draw(seed=3, step=5, total=64)


# --- pieces -------------------------------------------------------------------------------------


def test_pseudo_huber_is_a_square_near_zero_and_a_distance_far_away() -> None:
    a, b = torch.zeros(2, 5), torch.stack([torch.full((5,), 1e-6), torch.full((5,), 3.0)])
    near, far = pseudo_huber(a, b).double()
    assert float(near) == pytest.approx(1e-12 / (2 * HUBER), rel=0.1)
    assert float(far) == pytest.approx(3.0 - HUBER, rel=1e-5)
    assert float(squared(a, b)[1]) == pytest.approx(9.0)


@pytest.mark.parametrize(("solver", "order"), [(euler, 1), (heun, 2)])
def test_solvers_converge_at_their_order(solver: Callable[..., Tensor], order: int) -> None:
    z = torch.randn(64, 3, generator=torch.Generator().manual_seed(0)).double()
    exact, errors = MEAN + STD * z, []
    for n in (16, 32):
        x = z
        for t, u in time_grid(n).double().unfold(0, 2, 1):
            x = solver(TEACHER, x, t.expand(64), u.expand(64), None)
        errors.append(float((x - exact).abs().mean()))
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.25)


def test_a_walk_is_the_sampler_from_each_samples_own_start_to_its_own_stop() -> None:
    grid, x = time_grid(6, shift=2.0), torch.randn(4, 3)
    start, stop = torch.tensor([0, 2, 3, 5]), torch.tensor([6, 4, 4, 6])
    got = walk(TEACHER, x, grid, start, stop, None)
    for k in range(4):
        own = grid[start[k] : stop[k] + 1]
        torch.testing.assert_close(got[k : k + 1], final(sample(TEACHER, own, x[k : k + 1])))


# --- progressive --------------------------------------------------------------------------------


def test_one_teacher_step_per_student_step_is_flow_matching_on_the_exact_field() -> None:
    student = GaussianField(1.1, 0.9)
    n, groups = 40_000, 40

    def slopes(method: Objective) -> Tensor:
        draw = Draw(seed=0, step=0, total=n)
        (turn,) = method.turns()
        (loss,) = turn.loss(gaussian_batches(draw), draw).values()
        rows = [
            torch.stack(
                torch.autograd.grad(part, [student.mean, student.log_std], retain_graph=True)
            )
            for part in loss.reshape(groups, -1).mean(1)
        ]
        return torch.stack(rows)

    chords = slopes(Progressive(student=student, teacher=TEACHER, steps=1, teacher_steps=1))

    class AtOne(FlowMatching):
        """Flow matching at t = 1, where a one-step student lives."""

        def loss(self, batch: Batch, draw: Draw) -> dict[str, Tensor]:
            x, z = batch.x, draw.normal("z", batch.x.shape[1:])
            v = self.student(mix(x, z, 1.0), torch.ones(len(x)), batch.c)
            return {"velocity": squared(v, z - x)}

    flows = slopes(AtOne(student=student))
    error = ((chords.std(0) ** 2 + flows.std(0) ** 2) / groups).sqrt()
    assert bool(((chords.mean(0) - flows.mean(0)).abs() <= 4 * error).all())


@pytest.mark.parametrize(("steps", "teacher_steps"), [(1, 2), (4, 8), (2, 5), (3, 4)])
def test_a_student_that_lands_where_the_teacher_lands_has_no_loss(
    steps: int, teacher_steps: int
) -> None:
    grid = time_grid(teacher_steps, shift=1.5)
    sizes = {"steps": steps, "teacher_steps": teacher_steps, "shift": 1.5}
    method = Progressive(student=GaussianField(), teacher=TEACHER, **sizes)  # type: ignore[arg-type]
    assert method.edges[0] == 0 and method.edges[-1] == teacher_steps
    assert method.edges.diff().max() <= -(-teacher_steps // steps)

    class Chord(nn.Module):
        def forward(self, x_t: Tensor, t: Tensor, c: object) -> Tensor:
            start = (grid[None] - t[:, None]).abs().argmin(1)
            place = torch.searchsorted(method.edges, start)
            stop = method.edges[place + 1]
            end = walk(TEACHER, x_t, grid, start, stop, None)
            return (x_t - end) / (t - grid[stop])[:, None]

    exact = Progressive(student=Chord(), teacher=TEACHER, **sizes)  # type: ignore[arg-type]
    assert float(exact.loss(gaussian_batches(DRAW), DRAW)["chord"].max()) < 1e-9
    assert float(method.loss(gaussian_batches(DRAW), DRAW)["chord"].mean()) > 1e-4
    times = {round(float(t), 5) for t in grid[method.edges]}
    z = torch.randn(8, 3)
    own = torch.tensor(sorted(times, reverse=True))
    torch.testing.assert_close(
        final(sample(Chord(), own, z)), final(sample(TEACHER, grid, z)), rtol=1e-4, atol=1e-4
    )


def test_a_teacher_with_times_of_its_own_is_asked_at_them() -> None:
    teacher = Recorded(TEACHER)
    method = Progressive(
        student=GaussianField(), teacher=teacher, steps=1, teacher_steps=2, teacher_times=(1.0, 0.4)
    )
    method.loss(gaussian_batches(DRAW), DRAW)
    assert torch.equal(
        torch.stack([t for _, t in teacher.calls]), torch.tensor([[1.0], [0.4]]).expand(2, 64)
    )


# --- consistency --------------------------------------------------------------------------------


@pytest.mark.parametrize("edges", [(), (0.5,), (0.25, 0.6)])
def test_a_jump_ends_at_the_edge_of_its_phase_and_is_the_identity_there(
    edges: tuple[float, ...],
) -> None:
    wild = nn.Linear(3, 3)
    method = Consistency(
        student=GaussianMap(), teacher=TEACHER, edges=edges, grid_steps=16, shift=2.0
    )
    for s in (0.0, *edges):
        at = torch.full((5,), s)
        x = torch.randn(5, 3)
        assert torch.equal(method.jump(lambda x_t, t, c: wild(x_t), x, at, at, torch.zeros(5)), x)
    t = torch.tensor([1e-4, 0.25, 0.2501, 0.5, 0.55, 0.6, 1.0])
    inner = sorted({0.0, *edges})
    assert method.ends(t).tolist() == pytest.approx(
        [max(s for s in inner if s < round(float(one), 6)) for one in t]
    )


@pytest.mark.parametrize("edges", [(), (0.5,), (0.3, 0.7155)])
def test_neighbours_never_straddle_an_edge(edges: tuple[float, ...]) -> None:
    method = Consistency(student=GaussianMap(), teacher=TEACHER, edges=edges, grid_steps=16)
    grid = method.grid
    assert bool((grid.diff() < 0).all()) and len(grid) == 17
    assert bool((method.ends(grid[:-1]) <= grid[1:]).all())
    assert set(edges) <= {round(float(t), 6) for t in grid}


def test_the_exact_phase_map_has_no_loss() -> None:
    class PhaseMap(nn.Module):
        """The path keeps (x - (1 - t) m) / sigma_t, to the edge 0.5 or to 0."""

        def forward(self, x_t: Tensor, t: Tensor, c: object) -> Tensor:
            t = t[:, None].double()
            s = torch.where(t > 0.5, 0.5, 0.0).double()

            def sigma(u: Tensor) -> Tensor:
                return (((1 - u) * STD) ** 2 + u**2).sqrt()

            end = (1 - s) * MEAN + sigma(s) / sigma(t) * (x_t - (1 - t) * MEAN)
            return ((x_t - end) / (t - s).clamp_min(1e-9)).float()

    method = Consistency(
        student=PhaseMap(), teacher=TEACHER, edges=(0.5,), grid_steps=100, solver="heun"
    )
    assert float(method.loss(gaussian_batches(DRAW), DRAW)["consistency"].max()) < 1e-10
    plain = Consistency(student=PhaseMap(), teacher=TEACHER, grid_steps=100, solver="heun")
    assert float(plain.loss(gaussian_batches(DRAW), DRAW)["consistency"].mean()) > 1e-6


def test_the_target_is_the_average_where_that_is_asked_for() -> None:
    student, average = GaussianMap(1.2, 0.5), GaussianMap(1.4, 0.6)
    batch = gaussian_batches(DRAW)

    def loss(**options: object) -> Tensor:
        method = Consistency(student=student, teacher=TEACHER, **options)  # type: ignore[arg-type]
        return method.loss(batch, DRAW)["consistency"]

    mixed = loss(average=average, target="average")
    assert not torch.allclose(mixed, loss())
    assert torch.equal(loss(average=student, target="average"), loss())
    mixed.sum().backward()
    assert student.mean.grad is not None and average.mean.grad is None


# --- continuous ---------------------------------------------------------------------------------


def test_forward_mode_and_central_differences_agree_with_the_closed_form() -> None:
    field = GaussianField(0.7, 0.6).double()
    x, t = torch.randn(32, 3).double(), torch.linspace(0.05, 0.95, 32).double()
    v = torch.randn(32, 3).double()
    _, exact = torch.func.jvp(lambda a, s: field(a, s, None), (x, t), (v, torch.ones_like(t)))
    value, jvp = forward_mode(field, x, t, torch.zeros(32), v)
    _, difference = central_difference(field, x, t, torch.zeros(32), v)
    torch.testing.assert_close(value, field(x, t, None))
    torch.testing.assert_close(jvp, exact)
    torch.testing.assert_close(difference, exact, rtol=1e-2, atol=3e-3)


def test_forward_mode_passes_through_the_transformer_and_an_adapter() -> None:
    net = spawn_net(NetSize(layers=2, heads=2, head_width=16, text_width=16), 0).eval()
    worn = Host(net, part="transformer").add("student", AdapterSize(rank=2), seed=0)
    batch = train_batch(Draw(seed=0, step=0, total=4), seed=0)
    t = torch.tensor([0.2, 0.4, 0.6, 0.8])
    v = torch.randn(4, *LATENT_SHAPE)
    value, jvp = forward_mode(worn, batch.x, t, batch.c, v)
    again, difference = central_difference(worn, batch.x, t, batch.c, v)
    torch.testing.assert_close(value, again, rtol=1e-4, atol=1e-4)
    gap = (jvp - difference).norm() / jvp.norm()
    assert float(gap) < 0.02


def test_the_derivative_of_the_exact_map_vanishes_and_the_warm_up_starts_at_the_teacher() -> None:
    batch = gaussian_batches(DRAW)
    exact = ContinuousConsistency(student=GaussianMap(), teacher=TEACHER)
    assert float(exact.loss(batch, DRAW)["tangent"].max()) < 1e-3
    other = GaussianField(0.3, 1.3)
    early = ContinuousConsistency(student=other, teacher=TEACHER, warmup=100)
    t, c = torch.full((64,), 0.6), batch.c
    torch.testing.assert_close(
        early.tangent(batch.x, t, c, 0.0), TEACHER(batch.x, t, c) - other(batch.x, t, c)
    )


def test_the_surrogate_has_the_gradient_of_the_consistency_it_stands_for() -> None:
    """As h -> 0, discrete consistency divided by h pulls the same way, sample by sample."""
    student = GaussianMap(1.2, 0.9)
    method = ContinuousConsistency(student=student, teacher=TEACHER)
    x, t = torch.randn(16, 3), torch.full((16,), 0.5)
    c = torch.zeros(16, 1)
    h = 1e-3
    change = method.tangent(x, t, c, 1.0)
    with torch.no_grad():
        x_r = euler(TEACHER, x, t, t - h, c)
        ours = x - 0.5 * student(x, t, c)
        theirs = x_r - (0.5 - h) * student(x_r, t - h, c)
    torch.testing.assert_close((ours - theirs) / h, change, rtol=2e-2, atol=2e-2)


def test_halfway_through_the_warm_up_half_of_the_derivative_counts() -> None:
    method = ContinuousConsistency(student=GaussianField(0.3, 1.3), teacher=TEACHER)
    x, c = gaussian_batches(DRAW)[:2]
    none, half, full = (method.tangent(x, torch.full((64,), 0.6), c, r) for r in (0.0, 0.5, 1.0))
    torch.testing.assert_close(half, (none + full) / 2)
    assert not torch.allclose(none, full)


def test_the_warm_up_is_over_when_it_is_and_kappa_softens_the_normalisation() -> None:
    batch, late = gaussian_batches(DRAW), Draw(seed=3, step=400, total=64)

    def terms(warmup: int) -> dict[str, Tensor]:
        student = GaussianField(0.3, 1.3)
        options = {"warmup": warmup, "kappa": 0.7}
        method = ContinuousConsistency(student=student, teacher=TEACHER, **options)  # type: ignore[arg-type]
        return method.loss(batch, late)

    over, size = terms(100), terms(0)["tangent"]
    assert torch.equal(over["tangent"], size)
    torch.testing.assert_close(over["surrogate"], (size / (size + 0.7)) ** 2)


def test_continuous_training_times_are_shifted() -> None:
    teacher, draw = Recorded(TEACHER), Draw(seed=0, step=0, total=4000)
    method = ContinuousConsistency(
        student=GaussianField(), teacher=teacher, time_mean=0.4, shift=3.0
    )
    method.loss(gaussian_batches(draw), draw)
    ((_, t),) = teacher.calls
    middle = shift_time(torch.tensor(0.4).sigmoid(), 3.0)
    assert float(t.median()) == pytest.approx(float(middle), abs=0.01)


# --- direct -------------------------------------------------------------------------------------


def test_direct_is_zero_for_the_exact_map_and_flows_through_every_step() -> None:
    batch = gaussian_pairs(DRAW)
    assert float(Direct(student=GaussianMap(), steps=1).loss(batch, DRAW)["endpoint"].max()) < 1e-9
    student = GaussianField(1.0, 1.0)
    loss = Direct(student=student, steps=2).loss(batch, DRAW)["endpoint"].mean()
    (got,) = torch.autograd.grad(loss, student.mean)
    half = batch.z - 0.5 * student(batch.z, torch.ones(64), None)  # type: ignore[operator]
    end = half - 0.5 * student(half, torch.full((64,), 0.5), None)
    (by_hand,) = torch.autograd.grad(squared(end, batch.x).mean(), student.mean)
    torch.testing.assert_close(got, by_hand)
    with pytest.raises(BadInput, match="pairs"):
        Direct(student=student, steps=2).loss(gaussian_batches(DRAW), DRAW)


def test_a_direct_students_steps_are_shifted() -> None:
    student = Recorded(GaussianMap())
    Direct(student=student, steps=2, shift=3.0).loss(gaussian_pairs(DRAW), DRAW)  # type: ignore[arg-type]
    times = time_grid(2, shift=3.0)[:-1]
    assert torch.equal(torch.stack([t for _, t in student.calls]), times[:, None].expand(2, 64))


# --- all of them --------------------------------------------------------------------------------

STUDENTS: dict[str, Callable[..., Objective]] = {
    "progressive": lambda student, teacher: Progressive(
        student=student, teacher=teacher, steps=2, teacher_steps=4
    ),
    "consistency": lambda student, teacher: Consistency(
        student=student, teacher=teacher, grid_steps=8
    ),
    "continuous": lambda student, teacher: ContinuousConsistency(student=student, teacher=teacher),
    "direct": lambda student, teacher: Direct(student=student, steps=2),
}


@pytest.mark.parametrize("name", STUDENTS)
def test_an_adapter_and_a_copy_of_the_network_see_the_same_losses(name: str) -> None:
    size = NetSize(layers=1, heads=2, head_width=16, text_width=16)
    host = Host(spawn_net(size, 0).eval(), part="transformer")
    worn, copied = host.add("student", AdapterSize(rank=2), seed=0), spawn_net(size, 0).eval()
    draw = Draw(seed=0, step=2, total=4)
    batch = train_batch(draw, seed=0)._replace(z=torch.randn(4, *LATENT_SHAPE))

    def losses(student: TrainableField, base: TrainableField) -> dict[str, Tensor]:
        method = STUDENTS[name](student, guided(frozen(base), null_tokens(1), 3.0))
        (turn,) = method.turns()
        return dict(turn.loss(batch, draw))

    ours, theirs = losses(worn, host.bare), losses(copied, spawn_net(size, 0).eval())
    for term in ours:
        torch.testing.assert_close(ours[term], theirs[term], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", STUDENTS)
def test_only_the_adapter_moves(name: str) -> None:
    size = NetSize(layers=1, heads=2, head_width=16, text_width=16)
    host = Host(spawn_net(size, 0).eval(), part="transformer")
    student, other = (host.add(n, AdapterSize(rank=2), seed=0) for n in ("student", "other"))
    base = {k: v.clone() for k, v in host.net.state_dict().items() if "lora" not in k}
    asleep, awake = ({k: v.clone() for k, v in w.state_dict().items()} for w in (other, student))
    method = STUDENTS[name](student, guided(frozen(host.bare), null_tokens(1), 3.0))

    def batches(draw: Draw) -> Batch:
        z = draw.normal("pair", LATENT_SHAPE)
        return train_batch(draw, seed=0)._replace(z=z)

    plan = {"student": Optimiser(lr=1e-3)}
    list(fit(method, batches, steps=2, batch_size=4, seed=0, optimisers=plan))
    after = host.net.state_dict()
    assert all(torch.equal(after[k], v) for k, v in base.items())
    assert all(torch.equal(other.state_dict()[k], v) for k, v in asleep.items())
    assert any(not torch.equal(student.state_dict()[k], v) for k, v in awake.items())


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda s: Progressive(student=s, teacher=s, steps=0, teacher_steps=2), "steps=0"),
        (lambda s: Progressive(student=s, teacher=s, steps=4, teacher_steps=2), "teacher_steps=2"),
        (lambda s: Direct(student=s, steps=1, distance="l1"), "l1"),
        (lambda s: Consistency(student=s, teacher=s, solver="rk4"), "rk4"),
        (lambda s: Consistency(student=s, teacher=s, target="average"), "average"),
        (lambda s: Consistency(student=s, teacher=s, target="old"), "old"),
        (lambda s: Consistency(student=s, teacher=s, edges=(1.0,)), "edges"),
        (lambda s: Consistency(student=s, teacher=s, edges=(0.5,), grid_steps=1), "grid_steps=1"),
        (lambda s: ContinuousConsistency(student=s, teacher=s, derivative="x"), "derivative"),
        (lambda s: ContinuousConsistency(student=s, teacher=s, warmup=-1), "warmup=-1"),
        (lambda s: ContinuousConsistency(student=s, teacher=s, kappa=0.0), "kappa=0"),
        (lambda s: Direct(student=s, steps=0), "steps=0"),
        (lambda s: Direct(student=s, steps=5000), "steps=5000"),
        (lambda s: Direct(student=s, steps=2, shift=-1.0), "shift=-1"),
        (lambda s: Progressive(student=s, teacher=s, steps=1, teacher_steps=5000), "r_steps=5000"),
        (lambda s: Progressive(student=s, teacher=s, steps=1, teacher_steps=2, shift=nan), "shift"),
        (
            lambda s: Progressive(
                student=s, teacher=s, steps=1, teacher_steps=2, teacher_times=(1.0, 0.5, 0.2)
            ),
            "one per teacher step, 2",
        ),
        (lambda s: Consistency(student=s, teacher=s, grid_steps=5000), "grid_steps=5000"),
        (lambda s: ContinuousConsistency(student=s, teacher=s, shift=0.0), "shift=0"),
        (lambda s: ContinuousConsistency(student=s, teacher=s, time_std=0.0), "time_std=0"),
        (lambda s: ContinuousConsistency(student=s, teacher=s, time_mean=nan), "time_mean=nan"),
        (lambda s: ContinuousConsistency(student=s, teacher=s, kappa=inf), "kappa=inf"),
        (lambda s: FlowMatching(student=s, drop=2.0), "drop=2"),
        (lambda s: FlowMatching(student=s, drop=nan), "drop=nan"),
        (lambda s: FlowMatching(student=s, time_std=-1.0), "time_std=-1"),
        (lambda s: FlowMatching(student=s, shift=0.0), "shift=0"),
    ],
)
def test_bad_options_are_named(build: Callable[[GaussianField], Objective], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        build(GaussianField())
