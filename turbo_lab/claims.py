"""Claims: a statement, a statistic, an interval, and the verdict the interval allows."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from scipy import stats

from turbo_lab.atomic import atomic_write_text
from turbo_lab.errors import BadInput
from turbo_lab.streams import rng

if TYPE_CHECKING:
    import pandas as pd

Rows = Sequence[float] | np.ndarray
Side = Literal["above", "below"]
Verdict = Literal["holds", "not reproduced", "inconclusive"]


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A value with its 95% interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One sentence of the literature, and what was measured about it.

    ``side`` says where the whole interval must lie for the claim to hold: above or below
    ``threshold``.
    """

    id: str
    notebook: str
    statement: str
    source: str
    statistic: str
    interval: Interval
    side: Side
    threshold: float
    seeds: int
    samples: int
    profile: str
    artefact_keys: tuple[str, ...] = field(default=())

    @property
    def verdict(self) -> Verdict:
        """Holds, not reproduced (the interval lies on the other side), or inconclusive."""
        low, high = self.interval.low, self.interval.high
        above, below = low > self.threshold, high < self.threshold
        if (above, below)[self.side == "below"]:
            return "holds"
        return "not reproduced" if above or below else "inconclusive"

    def record(self) -> dict[str, object]:
        """The claim as plain JSON, the interval spread out and the verdict added."""
        flat = {**asdict(self), **asdict(self.interval), "verdict": self.verdict}
        del flat["interval"]
        return flat


def wilson(successes: int, n: int) -> Interval:
    """Rate with its 95% Wilson score interval (Wilson 1927).

    Raises:
        BadInput: n is 0, or successes are not among 0 .. n.
    """
    if n < 1 or not 0 <= successes <= n:
        raise BadInput("successes, n", (successes, n), "use 0 <= successes <= n and n >= 1")
    ci = stats.binomtest(successes, n).proportion_ci(0.95, method="wilson")
    return Interval(value=successes / n, low=float(ci.low), high=float(ci.high))


def bootstrap(
    *samples: Rows,
    statistic: Callable[..., float | np.ndarray] = np.mean,
    seed: int = 0,
    resamples: int = 2000,
    centred: bool = False,
) -> Interval:
    """Percentile bootstrap over rows; several samples are resampled together (paired).

    Args:
        samples: arrays with the same number of rows, one row per image.
        statistic: takes the (resampled) arrays, returns one number.
        seed: of the resampling.
        resamples: how often.
        centred: move the resampled values so that their mean is the value itself. For distances
            between distributions: they grow when rows repeat, so their plain percentiles lie
            too high, at times above the value.

    Raises:
        BadInput: no rows, or arrays of different length.
    """
    rows = [np.asarray(s) for s in samples]
    n = len(rows[0]) if rows else 0
    if n < 1 or any(len(r) != n for r in rows):
        raise BadInput("samples", [len(r) for r in rows], "give arrays of one length, at least 1")
    draws = rng(seed, "bootstrap").integers(0, n, size=(resamples, n))
    values = np.array([statistic(*(r[d] for r in rows)) for d in draws])
    value = float(statistic(*rows))
    low, high = np.percentile(values, [2.5, 97.5]) + (value - values.mean() if centred else 0.0)
    return Interval(value=value, low=float(low), high=float(high))


def crossed_bootstrap(
    *samples: Rows,
    statistic: Callable[..., float | np.ndarray] = np.mean,
    seed: int = 0,
    resamples: int = 1000,
    centred: bool = False,
) -> Interval:
    """Percentile bootstrap over training seeds and images at once.

    Each resample draws seeds with replacement and images with replacement, and keeps the table
    they cross in, so the interval covers both another training and other pictures. With few seeds
    it is rough: three seeds have ten different resamples.

    Args:
        samples: arrays ``[seeds, images]`` of one shape.
        statistic: takes the (resampled) arrays, returns one number.
        seed: of the resampling.
        resamples: how often.
        centred: see `bootstrap`.

    Raises:
        BadInput: arrays that are not two-dimensional, empty or of different shapes.
    """
    rows = [np.asarray(s, dtype=float) for s in samples]
    shapes = [r.shape for r in rows]
    if not rows or len(set(shapes)) > 1 or rows[0].ndim != 2 or rows[0].size == 0:
        raise BadInput("samples", shapes, "give arrays [seeds, images] of one shape")
    source = rng(seed, "crossed bootstrap")
    values = []
    for _ in range(resamples):
        s = source.integers(0, len(rows[0]), len(rows[0]))
        n = source.integers(0, rows[0].shape[1], rows[0].shape[1])
        values.append(float(statistic(*(r[s][:, n] for r in rows))))
    value = float(statistic(*rows))
    moved = value - float(np.mean(values)) if centred else 0.0
    low, high = np.percentile(values, [2.5, 97.5]) + moved
    return Interval(value=value, low=float(low), high=float(high))


def paired_difference(a: Rows, b: Rows, *, seed: int = 0) -> Interval:
    """Mean of a - b over paired rows with its bootstrap interval."""
    return bootstrap(np.asarray(a, float) - np.asarray(b, float), seed=seed)


def paired_permutation(a: Rows, b: Rows) -> float:
    """Two-sided p-value of the paired sign-flip permutation test on mean(a - b).

    Exact up to 2^13 flips; six pairs are the least that can reach p < 0.05 (2 / 2^6 = 0.031).
    """
    difference = np.asarray(a, float) - np.asarray(b, float)
    result = stats.permutation_test(
        (difference,),
        lambda d, axis: d.mean(axis=axis),
        permutation_type="samples",
        n_resamples=2**13,
        vectorized=True,
        rng=rng(0, "permutation"),
    )
    return float(result.pvalue)


def save(claims: Sequence[Claim], folder: Path) -> Path:
    """Write ``claims.json`` of one notebook, atomically."""
    path = folder / "claims.json"
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps([c.record() for c in claims], indent=1, ensure_ascii=False, allow_nan=False)
    atomic_write_text(path, text + "\n")
    return path


def table(claims: Sequence[Claim]) -> pd.DataFrame:
    """The claims as a table to read: statement, measured interval, what was needed, verdict."""
    import pandas as pd

    sign = {"above": ">", "below": "<"}
    rows = [
        {
            "claim": c.id,
            "statement": c.statement,
            "statistic": c.statistic,
            "measured [95%]": str(c.interval),
            "needed": f"{sign[c.side]} {c.threshold:g}",
            "n": c.samples,
            "verdict": c.verdict,
        }
        for c in claims
    ]
    return pd.DataFrame(rows).set_index("claim")


def verdicts(claims: Sequence[Claim]) -> str:
    """One line per claim, without raw floats: stable text for comparing notebooks."""
    return "\n".join(f"{c.id}: {c.verdict} (seeds {c.seeds}, n {c.samples})" for c in claims)
