"""Intervals against published numbers and closed forms, verdicts against their definition."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from turbo_lab import claims
from turbo_lab.claims import Claim, Interval
from turbo_lab.errors import BadInput


def claim(low: float, high: float, *, side: str = "above", threshold: float = 0.0) -> Claim:
    return Claim(
        id="X1",
        notebook="nb",
        statement="s",
        source="somebody 2020",
        statistic="difference",
        interval=Interval(value=(low + high) / 2, low=low, high=high),
        side=side,
        threshold=threshold,
        seeds=3,
        samples=10,
        profile="quick",
        artefact_keys=("abc",),
    )


def test_wilson_is_the_formula_of_wilson() -> None:
    k, n, z = 17, 50, stats.norm.ppf(0.975)
    centre = (k / n + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(k / n * (1 - k / n) / n + z**2 / (4 * n**2))
    got = claims.wilson(k, n)
    assert (got.low, got.high) == (pytest.approx(centre - half), pytest.approx(centre + half))
    assert claims.wilson(10, 10).high == pytest.approx(1.0)
    assert claims.wilson(10, 10).low < 0.8
    with pytest.raises(BadInput, match="successes"):
        claims.wilson(3, 2)


def test_bootstrap_covers_the_mean_as_often_as_it_says() -> None:
    draw = np.random.default_rng(0)
    hits = 0
    for k in range(200):
        got = claims.bootstrap(draw.exponential(size=60), seed=k, resamples=400)
        hits += got.low <= 1.0 <= got.high
    # 95% nominal; percentile intervals of 60 skewed values run a few points short.
    assert 0.86 <= hits / 200 <= 0.985


def test_bootstrap_resamples_pairs_together() -> None:
    a = np.random.default_rng(0).normal(size=100)
    tied = claims.bootstrap(a, a + 1, statistic=lambda x, y: np.mean(y - x))
    assert tied.low == pytest.approx(1.0) == tied.high
    with pytest.raises(BadInput, match="one length"):
        claims.bootstrap(a, a[:5])


def test_six_pairs_are_the_least_that_reach_five_percent() -> None:
    assert claims.paired_permutation(range(1, 7), [0] * 6) == pytest.approx(2 / 2**6)
    assert claims.paired_permutation(range(1, 6), [0] * 5) == pytest.approx(2 / 2**5)


@pytest.mark.parametrize(
    ("low", "high", "side", "verdict"),
    [
        (0.1, 0.3, "above", "holds"),
        (-0.3, -0.1, "above", "not reproduced"),
        (-0.1, 0.3, "above", "inconclusive"),
        (-0.3, -0.1, "below", "holds"),
        (0.1, 0.3, "below", "not reproduced"),
        (0.0, 0.3, "above", "inconclusive"),
    ],
)
def test_the_whole_interval_decides(low: float, high: float, side: str, verdict: str) -> None:
    assert claim(low, high, side=side).verdict == verdict


def test_claims_are_saved_with_what_they_stand_on(tmp_path: Path) -> None:
    path = claims.save([claim(0.1, 0.3)], tmp_path / "nb")
    (record,) = json.loads(path.read_text())
    expected = {"id": "X1", "low": 0.1, "high": 0.3, "verdict": "holds", "artefact_keys": ["abc"]}
    assert record.items() >= expected.items()
    assert claims.table([claim(0.1, 0.3)]).loc["X1", "needed"] == "> 0"
    assert claims.verdicts([claim(0.1, 0.3)]) == "X1: holds (seeds 3, n 10)"
