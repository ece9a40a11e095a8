"""TDM against closed forms: the score within a range of times, and steps that each come home."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from dmd2_world import DRAW, TEACHER, WITH_A_LEARNED_FAKE, Recorded, draw_of_step
from gaussian_world import MEAN, STD, GaussianField, GaussianMap, gaussian_batches
from torch import Tensor

from turbo_lab.errors import BadInput
from turbo_lab.fit import fit
from turbo_lab.methods import DMD2, TDM
from turbo_lab.methods.phased import push
from turbo_lab.methods.tdm import velocity_from
from turbo_lab.optimisers import Optimiser
from turbo_lab.path import expand, grid_from_times
from turbo_lab.sample import final, sample

TIMES = (1.0, 0.6)


class PhaseMap(GaussianField):
    """The exact student of N(m, s^2 I) whose every Euler step stays on the teacher's path.

    The path keeps ``(x_t - (1 - t) m) / sigma_t``, see `GaussianMap`, which jumps to 0 from
    everywhere; this one jumps to where its step ends.
    """

    def forward(self, x_t: Tensor, t: Tensor, c: object) -> Tensor:
        ends = {round(a, 4): b for a, b in pairwise(grid_from_times(TIMES).tolist())}
        u = torch.tensor([ends[round(a, 4)] for a in t.tolist()])
        t, u, std = expand(t, x_t), expand(u, x_t), self.log_std.exp()
        at = [((1 - time) ** 2 * std**2 + time**2).sqrt() for time in (t, u)]
        end = (1 - u) * self.mean + at[1] * (x_t - (1 - t) * self.mean) / at[0]
        return (x_t - end) / (t - u)


def build(student: GaussianField, fake: GaussianField | None = None, **options: object) -> TDM:
    fake = fake or GaussianField(student.mean.item(), student.log_std.exp().item())
    settings = {"teacher": TEACHER, "times": TIMES, **options}
    return TDM(student=student, fake=fake, **settings)  # type: ignore[arg-type]


def samples_at(s: float, count: int, seed: int) -> Tensor:
    """Samples ``[count, 1]`` of the Gaussian world's p_s."""
    x, z = torch.randn(2, count, 1, generator=torch.Generator().manual_seed(seed)).double()
    return (1 - s) * (MEAN + STD * x) + s * z


@pytest.mark.parametrize(("s", "t"), [(0.0, 0.3), (0.6, 0.65), (0.6, 0.8), (0.3, 1.0)])
def test_the_mean_of_the_velocity_is_the_field_of_all(s: float, t: float) -> None:
    n = 400_000
    x = samples_at(s, n, 0)
    eps = torch.randn(n, 1, generator=torch.Generator().manual_seed(1)).double()
    x_t, (v, _) = push(x, s, t, eps), velocity_from(x, s, t, eps)
    line = torch.cat([x_t, torch.ones_like(x_t)], 1)
    slope, height = torch.linalg.lstsq(line, v).solution.flatten().tolist()
    at = torch.tensor([[0.0], [1.0]]).double()
    low, high = GaussianField().double()(at, torch.full((2,), t).double(), None).flatten().tolist()
    # The residual of v has a spread of up to t / b, about 2.4 where t is near s.
    assert slope == pytest.approx(high - low, abs=0.03)
    assert height == pytest.approx(low, abs=0.03)


def test_from_a_clean_image_it_is_flow_matching() -> None:
    x, eps = torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(0)).double()
    v, w = velocity_from(x, 0.0, 0.4, eps)
    torch.testing.assert_close(v, eps - x)
    torch.testing.assert_close(w, torch.ones_like(w))


def test_the_loss_of_the_fake_is_weighed_by_what_the_push_added() -> None:
    """At s = 0.6 and t = 0.8, a is 1/2: b² = 0.8² - 0.3², and w is that over t²."""
    _, w = velocity_from(torch.zeros(1, 1).double(), 0.6, 0.8, torch.zeros(1, 1).double())
    assert w.item() == pytest.approx(0.55 / 0.64)
    fake, draw = GaussianField(2.0, 0.9), draw_of_step(0, 2)
    method, batch = build(PhaseMap(), fake), gaussian_batches(draw)
    state = method.predict(batch, draw, 0)
    x_t, t, eps = method.noised(state, draw)
    goal, w = velocity_from(state.x, state.u, t, eps)
    expected = (w * (fake(x_t, t, batch.c) - goal) ** 2).mean(1)
    torch.testing.assert_close(method.fake_loss(batch, draw)["velocity"], expected)


def test_one_step_is_dmd2_at_equal_draws() -> None:
    student, fake = GaussianMap(2.0, 1.1), GaussianField(1.8, 0.9)
    ours = build(student, fake, times=(1.0,), margin=0.05, noise_shift=3.0)
    theirs = DMD2(
        student=student,
        teacher=TEACHER,
        fake=fake,
        times=(1.0,),
        noise_range=(0.05, 0.95),
        noise_shift=3.0,
    )
    batch = gaussian_batches(DRAW)
    one, other = ours.student_loss(batch, DRAW), theirs.student_loss(batch, DRAW)
    assert one.keys() == other.keys()
    for name, term in one.items():
        torch.testing.assert_close(term, other[name], rtol=1e-5, atol=1e-7)


def test_every_step_is_noised_within_its_own_times() -> None:
    teacher = Recorded(TEACHER)
    method = build(PhaseMap(), teacher=teacher, margin=0.1, noise_shift=2.0)
    for k, (low, high) in enumerate([(0.64, 0.96), (0.06, 0.54)]):
        draw = draw_of_step(k, 2, total=4000)
        method.student_loss(gaussian_batches(draw), draw)
        _, t = teacher.calls[-1]
        assert low <= float(t.min()) < low + 0.01 and high - 0.01 < float(t.max()) <= high + 1e-6
        assert float(t.median()) == pytest.approx(low + (high - low) * 2 / 3, abs=0.01)


def test_a_state_noised_further_is_where_the_path_is() -> None:
    """A whole picture predicted from noise, mixed with that noise, is too wide for its time."""
    draw = draw_of_step(0, 2, total=20_000)
    spread = {}
    for name, student in (("step", PhaseMap()), ("picture", GaussianMap())):
        state = build(student).predict(gaussian_batches(draw), draw, 0)
        spread[name] = float(state.x.detach().std())
    assert spread["step"] == pytest.approx((0.4**2 * STD**2 + 0.6**2) ** 0.5, rel=0.01)
    assert spread["picture"] == pytest.approx(0.4 * STD + 0.6, rel=0.01)


def test_the_fake_learns_the_field_of_the_states_in_all_ranges() -> None:
    student, fake = PhaseMap(2.3, 0.9).requires_grad_(False), GaussianField(1.0, 0.4)
    method = build(student, fake)
    plan = {"student": Optimiser(lr=0.0), "fake": Optimiser(lr=0.05, final=0.02)}
    list(fit(method, gaussian_batches, steps=300, batch_size=128, seed=0, optimisers=plan))
    assert fake.mean.item() == pytest.approx(2.3, abs=0.03)
    assert fake.log_std.exp().item() == pytest.approx(0.9, abs=0.03)


def test_two_steps_with_a_learned_fake_come_home() -> None:
    student = PhaseMap(2.3, 1.1)
    method = build(student, rival_updates=4)
    plan = WITH_A_LEARNED_FAKE
    list(fit(method, gaussian_batches, steps=320, batch_size=64, seed=0, optimisers=plan))
    assert student.mean.item() == pytest.approx(MEAN, abs=0.06)
    assert student.log_std.exp().item() == pytest.approx(STD, abs=0.06)


def test_only_the_last_step_makes_a_sample_for_a_critic() -> None:
    student = PhaseMap(2.0, 0.9)
    method = build(student)
    for k in range(2):
        draw = draw_of_step(k, 2)
        batch = gaussian_batches(draw)
        x, terms = method.generated(batch, draw)
        assert torch.equal(terms["surrogate"], method.student_loss(batch, draw)["surrogate"])
        assert (x is None) == (k == 0)
    whole = final(sample(student, method.grid, draw.normal("z", batch.x.shape[1:]), batch.c))
    torch.testing.assert_close(method.samples(batch, draw), whole)


@pytest.mark.parametrize(
    "wrong",
    [
        {"times": (0.9, 0.5)},
        {"rival_updates": 0},
        {"margin": 0.0},
        {"margin": 0.5},
        {"noise_shift": 0.0},
        {"floor": float("nan")},
    ],
)
def test_a_wrong_option_is_named(wrong: dict[str, object]) -> None:
    (name,) = wrong
    with pytest.raises(BadInput, match=name):
        build(PhaseMap(), **wrong)
