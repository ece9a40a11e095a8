"""Phased consistency: edges, the kernel inside a phase, the adversary."""

from __future__ import annotations

import pytest
import torch
from dmd2_world import Recorded
from gaussian_world import MEAN, STD, GaussianField, GaussianMap, gaussian_batches
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from turbo_lab.errors import BadInput
from turbo_lab.field import frozen
from turbo_lab.fit import fit
from turbo_lab.methods import Consistency, phase_edges
from turbo_lab.methods.kinds import euler, squared
from turbo_lab.methods.phased import push, push_scales, pushed
from turbo_lab.optimisers import Optimiser
from turbo_lab.path import expand, mix, split, time_grid
from turbo_lab.sample import final, sample
from turbo_lab.streams import Draw

TEACHER = frozen(GaussianField().requires_grad_(False))
DRAW = Draw(seed=3, step=5, total=64)


# --- edges and sampling -------------------------------------------------------------------------


@pytest.mark.parametrize(("phases", "shift"), [(1, 2.5), (2, 2.5), (4, 1.0), (5, 3.0)])
def test_edges_are_where_a_sampler_of_as_many_steps_stops(phases: int, shift: float) -> None:
    stops = time_grid(phases, shift=shift)[1:-1].flip(0)
    assert phase_edges(phases, shift) == pytest.approx(stops.tolist())


def test_two_phases_at_shift_2_5_meet_beside_the_published_second_time() -> None:
    (edge,) = phase_edges(2, 2.5)
    assert edge == pytest.approx(2.5 / 3.5) and abs(edge - 0.7155) < 0.002
    for phases, shift, said in ((0, 1.0, "phases=0"), (2, 0.0, "shift=0")):
        with pytest.raises(BadInput, match=said):
            phase_edges(phases, shift)


@given(
    phases=st.integers(1, 6),
    shift=st.sampled_from([0.5, 1.0, 2.5, 5.0]),
    grid_steps=st.integers(12, 50),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_step_of_the_teacher_never_crosses_an_edge(
    phases: int, shift: float, grid_steps: int
) -> None:
    edges = phase_edges(phases, shift)
    try:
        method = Consistency(
            student=GaussianMap(), teacher=TEACHER, edges=edges, grid_steps=grid_steps
        )
    except BadInput as error:  # two edges so near that they fall on one step
        assert "edges" in str(error)
        return
    grid = method.grid
    assert bool((grid.diff() < 0).all()) and len(grid) == grid_steps + 1
    s = method.ends(grid[:-1])
    assert bool((s <= grid[1:]).all()) and bool((grid[:-1] <= method.tops(s)).all())
    assert len(set(s.tolist())) == phases


def test_edges_that_share_a_step_of_the_grid_are_refused() -> None:
    with pytest.raises(BadInput, match="edges"):
        Consistency(student=GaussianMap(), teacher=TEACHER, edges=(0.5, 0.51), grid_steps=8)


@pytest.mark.parametrize("phases", [1, 2, 4])
def test_jumping_from_edge_to_edge_is_sampling_without_noise(phases: int) -> None:
    student = GaussianMap(1.2, 0.5)
    method = Consistency(
        student=student, teacher=TEACHER, edges=phase_edges(phases, 2.5), grid_steps=16
    )
    z = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    x, t = z, torch.ones(8)
    for _ in range(phases):
        s = method.ends(t)
        x, t = method.jump(student, x, t, s, None), s
    assert bool((t == 0).all()) and len(method.sampler) == phases + 1
    assert torch.equal(x, final(sample(student, method.sampler, z, eta=0.0)))


def test_one_phase_is_consistency_bit_for_bit() -> None:
    """Against the algorithm of consistency distillation, where f is the clean image."""
    student, batch = GaussianMap(1.2, 0.5), gaussian_batches(DRAW)
    method = Consistency(student=student, teacher=TEACHER, edges=phase_edges(1), grid_steps=16)
    k = DRAW.integers("time", 16)
    t, r = time_grid(16)[k], time_grid(16)[k + 1]
    x_t = mix(batch.x, DRAW.normal("z", (3,)), t)
    x_r = euler(TEACHER, x_t, t, r, None)
    ours, _ = split(x_t, student(x_t, t, None), t)
    goal, _ = split(x_r, student(x_r, r, None), r)
    assert torch.equal(method.loss(batch, DRAW)["consistency"], squared(ours, goal))


def test_as_many_phases_as_teacher_steps_is_flow_matching_to_the_teacher() -> None:
    n = 6
    student, batch = GaussianField(1.1, 0.9), gaussian_batches(DRAW)
    settings = {"edges": phase_edges(n, 2.0), "grid_steps": n, "shift": 2.0}
    method = Consistency(student=student, teacher=TEACHER, **settings)  # type: ignore[arg-type]
    grid, k = time_grid(n, shift=2.0), DRAW.integers("time", n)
    t, s = grid[k], grid[k + 1]
    x_t = mix(batch.x, DRAW.normal("z", (3,)), t)
    gap = squared(student(x_t, t, None), TEACHER(x_t, t, None))
    expected = (t - s) ** 2 * gap
    got = method.loss(batch, DRAW)["consistency"]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-8)
    same = Consistency(student=GaussianField(), teacher=TEACHER, **settings)  # type: ignore[arg-type]
    assert float(same.loss(batch, DRAW)["consistency"].detach().max()) < 1e-12
    z = torch.randn(8, 3)
    with torch.no_grad():
        ours, theirs = final(sample(same.student, same.sampler, z)), final(sample(TEACHER, grid, z))
    torch.testing.assert_close(ours, theirs)


# --- the kernel inside a phase ------------------------------------------------------------------


def copied_scale(s: float, u: float) -> float:
    """Scale of the noise in the code that is widely copied."""
    return (u - s) / (1 - s)


@pytest.mark.parametrize(("s", "u"), [(0.0, 0.4), (0.5, 0.75), (0.7143, 0.8), (0.7143, 1.0)])
def test_pushed_samples_have_the_variance_of_their_time_and_copied_ones_only_from_zero(
    s: float, u: float
) -> None:
    """Noise at u is what is left of s, and what is added: it has to have variance u²."""
    a, b = (float(k) for k in push_scales(s, u, torch.zeros(1, 3)))
    left = (a * s) ** 2
    assert a == pytest.approx((1 - u) / (1 - s))
    assert left + b**2 == pytest.approx(u**2, rel=1e-5)
    copied = left + copied_scale(s, u) ** 2
    if s == 0 or u == 1:
        assert copied == pytest.approx(u**2, rel=1e-5)
    else:
        assert copied < 0.6 * u**2  # 0.125 and not 0.5625 at s = 0.5, u = 0.75

    n = 40_000
    numbers = torch.Generator().manual_seed(0)
    x, z, eps = (torch.randn(n, generator=numbers) for _ in range(3))
    x_s = mix(MEAN + STD * x, z, s)
    x_u, wrong = push(x_s, s, u, eps), a * x_s + copied_scale(s, u) * eps
    due = ((1 - u) * STD) ** 2 + u**2
    error = due * (2 / n) ** 0.5
    assert float(x_u.mean()) == pytest.approx((1 - u) * MEAN, abs=4 * (due / n) ** 0.5)
    assert float(x_u.var()) == pytest.approx(due, abs=4 * error)
    if s > 0 and u < 1:
        assert abs(float(wrong.var()) - due) > 20 * error


def test_a_push_to_its_own_edge_changes_nothing_and_to_one_leaves_only_noise() -> None:
    x, eps = torch.randn(4, 3), torch.randn(4, 3)
    torch.testing.assert_close(push(x, 0.7143, 0.7143, eps), x, rtol=1e-3, atol=1e-3)
    assert torch.equal(push(x, 0.5, 1.0, eps), eps)


def test_times_of_a_push_fill_the_phase() -> None:
    s = torch.tensor([0.0, 0.7]).repeat_interleave(4000)
    top = torch.tensor([0.7, 1.0]).repeat_interleave(4000)
    _, u = pushed(torch.zeros(8000, 3), s, top, Draw(seed=0, step=0, total=8000))
    assert bool((u > s).all()) and bool((u <= top).all())
    for low, high, part in ((0.0, 0.7, u[:4000]), (0.7, 1.0, u[4000:])):
        assert float(part.mean()) == pytest.approx((low + high) / 2, abs=4 * (high - low) / 200)


# --- the adversary ------------------------------------------------------------------------------


class Tilt(nn.Module):
    """A critic that thinks the teacher's samples are the larger ones."""

    def __init__(self, slope: float = 0.1) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(slope))

    def forward(self, x_t: Tensor, t: Tensor, c: object) -> Tensor:
        return self.slope * x_t.sum(1)


def build(student: GaussianField, critic: object = None, **options: object) -> Consistency:
    settings = {"edges": (0.5,), "grid_steps": 16, "solver": "heun", **options}
    return Consistency(student=student, teacher=TEACHER, critic=critic, **settings)  # type: ignore[arg-type]


def test_without_a_weight_a_critic_changes_nothing() -> None:
    student, batch = GaussianMap(1.2, 0.5), gaussian_batches(DRAW)
    plain, idle = build(student), build(student, Tilt())
    assert list(idle.players) == ["student"]
    assert [turn.name for turn in idle.turns()] == ["consistency"]
    ours, theirs = plain.loss(batch, DRAW), idle.loss(batch, DRAW)
    assert ours.keys() == theirs.keys() == {"consistency"}
    assert torch.equal(ours["consistency"], theirs["consistency"])


@pytest.mark.parametrize("adversary", ["hinge", "logistic"])
def test_the_adversarial_term_comes_beside_an_unchanged_distance(adversary: str) -> None:
    student, batch = GaussianMap(1.2, 0.5), gaussian_batches(DRAW)
    half, whole = (
        build(student, Tilt(), adversarial_weight=w, adversary=adversary).loss(batch, DRAW)
        for w in (0.5, 1.0)
    )
    assert whole.keys() == {"consistency", "adversarial"}
    assert torch.equal(whole["consistency"], build(student).loss(batch, DRAW)["consistency"])
    torch.testing.assert_close(half["adversarial"], whole["adversarial"] / 2)
    # The critic wants larger samples, so the student's mean is pulled up.
    (slope,) = torch.autograd.grad(whole["adversarial"].mean(), student.mean)
    assert float(slope) < 0


def test_a_critic_may_judge_the_phases_above_a_time_alone() -> None:
    student, batch = GaussianMap(1.2, 0.5), gaussian_batches(DRAW)
    edges = {"edges": (0.4, 0.7), "adversarial_weight": 1.0}
    whole, above = (
        build(student, Tilt(), adversarial_above=t, **edges)  # type: ignore[arg-type]
        for t in (0.0, 0.7)
    )
    _, _, s = whole.predictions(batch, DRAW)
    first = (s == 0.7).float()
    assert 0 < float(first.mean()) < 1
    for ours, all_ in (
        (above.loss(batch, DRAW), whole.loss(batch, DRAW)),
        (above.critic_loss(batch, DRAW), whole.critic_loss(batch, DRAW)),
    ):
        for name, term in all_.items():
            kept = 1 if name == "consistency" else first
            assert torch.equal(ours[name], kept * term)


def test_each_turn_has_gradients_in_its_own_player_alone() -> None:
    student, critic = GaussianMap(1.2, 0.5), Tilt()
    method = build(student, critic, adversarial_weight=0.3)
    turns = {turn.name: turn for turn in method.turns()}
    assert {name: turn.moves for name, turn in turns.items()} == {
        "critic": ("critic",),
        "consistency": ("student",),
    }
    batch = gaussian_batches(DRAW)
    sum(turns["critic"].loss(batch, DRAW).values()).sum().backward()  # type: ignore[union-attr]
    assert critic.slope.grad is not None and student.mean.grad is None
    critic.zero_grad()
    critic.requires_grad_(False)  # as fit does, while the student moves
    sum(turns["consistency"].loss(batch, DRAW).values()).sum().backward()  # type: ignore[union-attr]
    assert critic.slope.grad is None and student.mean.grad is not None


def test_the_critic_sees_both_sides_at_times_of_their_own_inside_the_phase() -> None:
    seen = Recorded(lambda x_t, t, c: x_t.sum(1))
    method = build(GaussianMap(1.2, 0.5), seen, adversarial_weight=1.0)
    assert list(method.players) == ["student"]  # a function does not learn
    method.critic_loss(gaussian_batches(DRAW), DRAW)
    _, _, s = method.predictions(gaussian_batches(DRAW), DRAW)
    (_, teacher), (_, student) = seen.calls
    for u in (teacher, student):
        assert bool((u > s).all()) and bool((u <= method.tops(s)).all())
    assert not torch.equal(teacher, student) and set(s.tolist()) == {0.0, 0.5}


def test_the_exact_phase_map_cannot_be_told_from_its_target() -> None:
    """Both sides are then distributed as p_u, so no critic has anything to learn."""

    class PhaseMap(nn.Module):
        def forward(self, x_t: Tensor, t: Tensor, c: object) -> Tensor:
            t = expand(t, x_t)
            s = torch.where(t > 0.5, 0.5, 0.0)

            def sigma(u: Tensor) -> Tensor:
                return (((1 - u) * STD) ** 2 + u**2).sqrt()

            end = (1 - s) * MEAN + sigma(s) / sigma(t) * (x_t - (1 - t) * MEAN)
            return (x_t - end) / (t - s).clamp_min(1e-3)

    seen = Recorded(lambda x_t, t, c: x_t.sum(1))
    method = build(PhaseMap(), seen, adversarial_weight=1.0)  # type: ignore[arg-type]
    draw = Draw(seed=0, step=0, total=20_000)
    method.critic_loss(gaussian_batches(draw), draw)
    for x_u, u in seen.calls:
        u = u[:, None]
        unit = (x_u - (1 - u) * MEAN) / (((1 - u) * STD) ** 2 + u**2).sqrt()
        n = unit.numel()
        assert float(unit.mean()) == pytest.approx(0, abs=4 / n**0.5)
        assert float(unit.var()) == pytest.approx(1, abs=4 * (2 / n) ** 0.5)


def test_a_critic_learns_where_a_student_is_wrong() -> None:
    """A student that is drawn to larger images than its target: the slope turns negative."""
    critic = Tilt(0.0)
    student = GaussianMap(2.5, 0.7)
    method = build(student, critic, adversarial_weight=0.1, adversary="logistic", grid_steps=4)
    plan = {"critic": Optimiser(lr=0.05), "student": Optimiser(lr=1e-8)}
    records = list(fit(method, gaussian_batches, steps=40, batch_size=256, seed=0, optimisers=plan))
    told = [record.terms["critic/teacher"] + record.terms["critic/student"] for record in records]
    assert float(critic.slope) < -0.01 and told[-1] < told[0]
    last = records[-1]
    assert {"consistency/consistency", "consistency/adversarial"} <= last.terms.keys()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"adversarial_weight": 0.1}, "critic"),
        ({"adversarial_weight": -1.0}, "adversarial_weight=-1"),
        ({"adversary": "wasserstein"}, "wasserstein"),
        ({"adversarial_above": 0.6}, "adversarial_above=0.6.*highest edge, 0.5"),
        ({"adversarial_above": float("nan")}, "adversarial_above=nan"),
    ],
)
def test_bad_adversaries_are_named(changed: dict[str, object], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        build(GaussianMap(), **changed)
