"""Why the mean of modes appears: closed forms against other routes, intervals, and a smoke run."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import norm
from test_point_students import TWO, forbid_training, transport

from turbo_lab.errors import BadInput
from turbo_lab.point_students import TRAJECTORY, path_end
from turbo_lab.store import Store
from turbo_lab.studies.points_blur import (
    BUDGETS,
    STEPS,
    claims,
    figure_map,
    figure_shares,
    optimal_maps,
    shares,
    student_table,
)
from turbo_lab.studies.points_maps import PERFECT, blurred, lattice, outside, sigmas
from turbo_lab.testbeds.points import points

SMOKE = BUDGETS["smoke"]


def test_the_blurred_map_agrees_with_one_dimensional_quadrature() -> None:
    axis = lattice(0.05)
    ends = path_end(TWO, torch.cartesian_prod(axis, axis), steps=32).view(len(axis), len(axis), 2)
    z = torch.tensor([[0.0, 0.0], [-0.6, 1.0], [-0.5, -2.0], [1.5, 0.3], [-2.0, 0.0]])
    zeta = np.linspace(-8, 8, 40_001)
    for h in (0.1, 0.3, 0.7):
        got = blurred(axis, ends, z, h).numpy()
        for at, found in zip(z.double().numpy(), got, strict=True):
            noise = np.sqrt(1 - h**2) * at[0] + h * zeta
            inner = transport(np.stack([noise, noise], 1))[:, 0]
            first = np.trapezoid(norm.pdf(zeta) * inner, zeta)
            second = 0.2 * np.sqrt(1 - h**2) * at[1]  # linear across the modes
            assert found == pytest.approx([first, second], abs=0.02 / (h / 0.1))


def test_no_resolution_at_all_leaves_the_mean(tmp_path: Path) -> None:
    maps = optimal_maps(SMOKE, world="rare", store=Store(cache=tmp_path))
    teacher = points("rare").teacher
    mean = teacher.weights / teacher.weights.sum() @ teacher.means
    assert torch.allclose(maps.blurred[1], mean.expand(64, 2), atol=0.02)  # lattice of 0.25
    assert torch.allclose(maps.euler[1].double(), mean.expand(64, 2), atol=1e-6)


def test_full_resolution_is_the_exact_map(tmp_path: Path) -> None:
    maps = optimal_maps(SMOKE, store=Store(cache=tmp_path))
    assert torch.equal(maps.blurred[0], path_end(points("ring8").teacher, maps.z.double()))
    rows = maps.table.set_index(["map", "at"])["value"]
    assert rows["resolution", 1] == rows["euler", 1] == 1
    assert rows["resolution", 0] < 0.1
    assert maps.resolution(1.0) > maps.resolution(0.2) > 0


def test_blur_can_not_be_finer_than_the_lattice() -> None:
    axis = lattice(0.5)
    with pytest.raises(BadInput, match=r"h=0\.2"):
        blurred(axis, torch.zeros(21, 21, 2), torch.zeros(1, 2), 0.2)
    with pytest.raises(BadInput, match="world"):
        optimal_maps(SMOKE, world="moons")


def test_distances_are_in_sigmas_of_the_nearest_mode() -> None:
    mode = points("ring8").teacher.means[2]
    x = torch.stack([mode, mode + torch.tensor([0.0, 0.25]), mode + torch.tensor([0.35, 0.0])])
    assert sigmas("ring8", x).tolist() == pytest.approx([0, 2.5, 3.5])
    assert outside("ring8", x).tolist() == [False, False, True]
    real = outside("ring8", points("ring8").real(40_000, seed=0).x).double().mean()
    assert float(real) == pytest.approx(PERFECT, abs=0.003)


def table_of(rates: dict[int, float], seeds: int = 3, samples: int = 200) -> pd.DataFrame:
    """Outcomes of every method with these shares outside at each number of steps."""
    rows = [
        {
            "method": m, "steps": n, "seed": s, "sample": i, "key": "k",
            "sigmas": 4.0 if i < rates[n] * samples else 0.0, "outside": i < rates[n] * samples,
        }
        for m, n, s, i in product(TRAJECTORY, STEPS, range(seeds), range(samples))
    ]  # fmt: skip
    return pd.DataFrame(rows)


def test_claims_follow_the_outcomes() -> None:
    usual = claims(table_of({1: 0.5, 2: 0.3, 4: 0.1, 8: 0.05}), "quick")
    assert [c.verdict for c in usual] == ["holds", "holds"]
    assert usual[0].interval.value == pytest.approx(0.5 - PERFECT)
    assert usual[1].interval.value == pytest.approx(0.45)
    worse = claims(table_of({1: 0.2, 2: 0.3, 4: 0.4, 8: 0.5}), "quick")
    assert [c.verdict for c in worse] == ["holds", "not reproduced"]
    clean = claims(table_of({1: 0, 2: 0, 4: 0, 8: 0}), "quick")
    assert [c.verdict for c in clean] == ["not reproduced", "inconclusive"]


def test_one_method_that_fails_is_enough_to_fail_a_claim_about_all() -> None:
    table = table_of({1: 0.5, 2: 0.3, 4: 0.1, 8: 0.05})
    table.loc[(table["method"] == "direct") & (table["steps"] == 8), "outside"] = True
    assert [c.verdict for c in claims(table, "quick")] == ["holds", "not reproduced"]


def test_the_smoke_study_runs_and_runs_again_from_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(cache=tmp_path)
    table, maps = student_table(SMOKE, store=store), optimal_maps(SMOKE, store=store)
    assert len(table) == len(TRAJECTORY) * len(STEPS) * SMOKE.seeds * SMOKE.samples
    found = shares(table)
    assert (found["low"] <= found["value"]).all() and (found["value"] <= found["high"]).all()
    assert [c.id for c in claims(table, "smoke")] == ["P1", "P2"]
    assert len(figure_map(maps, table).axes) == 16
    assert len(figure_shares(maps, table).axes) == 2
    forbid_training(monkeypatch)
    pd.testing.assert_frame_equal(student_table(SMOKE, store=store), table)
