"""The points testbed: exact data, measures with known values, a network that learns the field."""

from __future__ import annotations

import math

import pytest
import torch

from turbo_lab.errors import BadInput
from turbo_lab.field import Mixture
from turbo_lab.path import mix, time_grid, velocity
from turbo_lab.sample import draw_samples
from turbo_lab.streams import Draw
from turbo_lab.testbeds.points import MIXTURES, WITHIN_3_SIGMA, PointField, points

N = 20_000


def wilson_like(p: float, n: int = N) -> float:
    return 5 * math.sqrt(p * (1 - p) / n)


@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_have_about_unit_variance(name: str) -> None:
    x, _, _ = points(name).real(N, seed=0)
    assert 0.5 < x.var(0).mean().item() < 1.5


@pytest.mark.parametrize("name", ["ring8", "grid25", "rare"])
def test_perfect_samples_measure_as_they_must(name: str) -> None:
    bed = points(name)
    x, _, _ = bed.real(N, seed=0)
    found = bed.measure(x)
    assert found["within"] == pytest.approx(WITHIN_3_SIGMA, abs=wilson_like(WITHIN_3_SIGMA))
    assert found["modes_covered"] == len(bed.teacher.weights)
    assert 0 <= found["mode_kl"] < 5 * len(bed.teacher.weights) / (2 * N)  # its expected order


def test_shares_are_unbiased_where_components_overlap() -> None:
    bed = points("moons")
    x, _, _ = bed.real(N, seed=1)
    torch.testing.assert_close(
        torch.tensor(bed.measure(x)["mode_shares"]), torch.full((32,), 1 / 32), rtol=0, atol=0.006
    )


def test_nll_of_perfect_samples_is_the_entropy() -> None:
    """For modes far apart the entropy is log K + log(2πe σ²)."""
    x, _, _ = points("ring8").real(N, seed=2)
    entropy = math.log(8) + math.log(2 * math.pi * math.e * 0.1**2)
    assert points("ring8").measure(x)["nll"] == pytest.approx(entropy, abs=5 / math.sqrt(N))


def test_collapse_is_measured_in_closed_form() -> None:
    """Only half of the ring, equally: KL = log 2, four modes, everything still within."""
    bed = points("ring8")
    found = bed.measure(bed.teacher.means[:4].repeat(10, 1).float())
    assert found["mode_kl"] == pytest.approx(math.log(2), abs=1e-6)
    assert found["modes_covered"] == 4
    assert found["within"] == 1


def test_the_mean_of_all_modes_covers_none() -> None:
    """One step gives the mean: its posterior is spread over all modes, but it is in none."""
    bed = points("ring8")
    found = bed.measure(torch.zeros(100, 2))
    assert found["mode_kl"] == pytest.approx(0, abs=1e-6)
    assert found["modes_covered"] == 0


def test_distant_and_wrong_class_samples_are_not_within() -> None:
    bed = points("ring8")
    means, labels = bed.teacher.means.float(), bed.teacher.labels
    assert bed.measure(means + 5)["within"] == 0
    assert bed.measure(means, labels)["within"] == 1
    assert bed.measure(means, (labels + 1) % 4)["within"] == 0


def test_conditional_shares_are_measured_against_the_prompts() -> None:
    bed = points("ring8")
    ones = bed.teacher.only(1)
    assert isinstance(ones, Mixture)
    x = ones.sample(N, torch.Generator().manual_seed(0))
    found = bed.measure(x, torch.ones(N, dtype=torch.long))
    assert found["mode_kl"] < 1e-3
    assert found["modes_covered"] == 2
    assert bed.measure(x)["mode_kl"] == pytest.approx(math.log(4), abs=1e-2)


def test_batches_are_rows_of_one_draw_and_labels_fit_the_points() -> None:
    bed, draw = points("grid25"), Draw(seed=0, step=3, total=12)
    x, c, _ = bed.batches(draw)
    parts = [bed.batches(draw.rows(a, b)) for a, b in ((0, 5), (5, 12))]
    assert torch.equal(torch.cat([p[0] for p in parts]), x)
    assert torch.equal(torch.cat([p[1] for p in parts]), c)
    assert torch.equal(bed.teacher.responsibilities(x).argmax(1) // 5, c)
    assert not torch.equal(bed.batches(Draw(seed=0, step=4, total=12))[0], x)


def test_mixture_without_classes_has_only_the_null_condition() -> None:
    bed = points("rare")
    assert bed.classes == 0
    assert torch.equal(bed.prompts(5, seed=0), bed.null.expand(5))
    x, c, _ = bed.real(5, seed=0)
    assert torch.equal(bed.teacher(x, torch.rand(5).fill_(0.5), c), bed.teacher(x, 0.5))


def test_exact_teacher_at_64_steps_passes_its_own_measures() -> None:
    bed, n = points("ring8"), 4000
    x = draw_samples(bed.teacher, time_grid(64, shift=2.0), (2,), seed=0, indices=range(n), batch=n)
    found = bed.measure(x)
    assert found["within"] > 0.97
    assert found["modes_covered"] == 8
    for share in found["mode_shares"]:
        assert share == pytest.approx(1 / 8, abs=wilson_like(1 / 8, n))


# --- the trainable field ------------------------------------------------------------------------


def test_spawn_is_named_repeatable_and_leaves_global_randomness_alone() -> None:
    bed = points("ring8", width=16, depth=1)
    torch.manual_seed(0)
    student, again, fake = bed.spawn("student"), bed.spawn("student"), bed.spawn("fake")
    drawn = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(3), drawn)
    assert torch.equal(student.out.weight, again.out.weight)
    assert not torch.equal(student.out.weight, fake.out.weight)


def test_spawn_copies_a_fitted_base() -> None:
    base = PointField(16, 1, 4)
    bed = points("ring8", base=base)
    student = bed.spawn("student")
    assert torch.equal(student.out.weight, base.out.weight)
    with torch.no_grad():
        student.out.weight.zero_()
    assert base.out.weight.abs().sum() > 0


@pytest.mark.parametrize("t", [0.0, 1.0])
def test_network_is_finite_at_the_ends_and_in_bfloat16(t: float) -> None:
    net, x, times = PointField(16, 1, 4).bfloat16(), torch.randn(3, 2).bfloat16(), torch.ones(3) * t
    v = net(x, times, torch.tensor([-1, 0, 3]))
    assert v.isfinite().all()
    assert v.dtype == torch.bfloat16
    assert torch.equal(net(x, times, None), net(x, times, torch.full((3,), -1)))


def test_network_learns_the_exact_field() -> None:
    """Flow matching towards z - x must approach the exact field it never sees."""
    bed = points("ring8", width=64, depth=2)
    net = bed.spawn("student")
    optimiser = torch.optim.Adam(net.parameters(), lr=5e-3)
    for k in range(400):
        draw = Draw(seed=0, step=k, total=256)
        (x, c, _), z, t = bed.batches(draw), draw.normal("z", (2,)), draw.uniform("t")
        loss = (net(mix(x, z, t), t, c) - velocity(x, z)).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    (x, c, _), draw = bed.real(4000, seed=1), Draw(seed=1, step=0, total=4000)
    z, t = draw.normal("z", (2,)), draw.uniform("t")
    x_t = mix(x, z, t)
    with torch.no_grad():
        exact = bed.teacher(x_t, t, c)
        gap = (net(x_t, t, c) - exact).square().mean() / exact.square().mean()
    assert gap < 0.1


def test_unknown_mixture_and_empty_samples_are_refused() -> None:
    with pytest.raises(BadInput, match="name='rings' is not allowed: use one of ring8, grid25"):
        points("rings")
    with pytest.raises(BadInput, match=r"^x="):
        points("ring8").measure(torch.empty(0, 2))
