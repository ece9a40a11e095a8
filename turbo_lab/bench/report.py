"""The benchmark's rows: ratios within rounds, a table for a terminal, JSON with provenance."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from turbo_lab.atomic import atomic_write_text
from turbo_lab.bench.passes import MODES, Mode, Pass
from turbo_lab.claims import Interval, bootstrap
from turbo_lab.provenance import provenance

if TYPE_CHECKING:
    from rich.table import Table

Seconds = Mapping[str | Pass, float]
"""Of one round: of each method by name, and of each kind of pass."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method.

    Args:
        name: of its recipe, with what tells its stages apart.
        rounds: of `fit` in a step: the fewest after which every turn was played.
        passes: network passes per sample in a step, the mean over the rounds, since some methods
            draw how far they sample; a guided velocity is 2.
        seconds: of a step, the median.
        to_flow: ratio to a flow-matching step of the same round, the median.
        expected: seconds of the passes alone, the median.
        to_passes: ratio of the step to its passes in the same round, the median.
        peak_bytes: memory at the worst moment of a step, above what was there before the first.
    """

    name: str
    rounds: int
    passes: Mapping[Pass, float]
    seconds: float
    to_flow: Interval
    expected: float
    to_passes: Interval
    peak_bytes: int | None = None

    @property
    def overhead(self) -> float:
        """What the step adds to its passes, as a share of them."""
        return self.to_passes.value - 1

    def total(self, mode: Mode) -> float:
        """Passes of a mode per sample, in an adapter or bare."""
        return sum(n for kind, n in self.passes.items() if kind.mode == mode)

    def record(self) -> dict[str, Any]:
        """The row as plain JSON."""
        passes = {str(kind): n for kind, n in self.passes.items()}
        return {**asdict(self), "passes": passes, "overhead": self.overhead}


@dataclass(frozen=True, kw_only=True)
class Holding:
    """What a training must keep, counted exactly, and what its process held at the worst moment.

    Args:
        weights: bytes of parameters and buffers, of whoever teaches too.
        gradients: bytes of those of the turn that has most.
        optimiser: bytes of the state of all optimisers.
        peak: bytes of the process at the worst moment of a step, activations and all.
    """

    weights: int
    gradients: int
    optimiser: int
    peak: int | None

    @property
    def exact(self) -> int:
        """Bytes that are kept between and during steps whatever the batch."""
        return self.weights + self.gradients + self.optimiser


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """One training on one shared base, and as three whole networks.

    Args:
        name: of the recipe.
        parameters: of the network.
        batch_size: samples of a step.
        shared: two adapters (and the student's average, a third) on one base.
        copies: student, fake and teacher as networks of their own, without an average.
    """

    name: str
    parameters: int
    batch_size: int
    shared: Holding
    copies: Holding

    @property
    def exact(self) -> float:
        """Share of the copies' weights, gradients and optimiser states."""
        return self.shared.exact / self.copies.exact

    @property
    def peak(self) -> float | None:
        """Share of the copies' peak."""
        if self.shared.peak is None or self.copies.peak is None:
            return None
        return self.shared.peak / self.copies.peak

    def record(self) -> dict[str, Any]:
        """The comparison as plain JSON."""
        return {**asdict(self), "exact_share": self.exact, "peak_share": self.peak}

    def __str__(self) -> str:
        peaks = "unknown" if self.peak is None else f"{self.peak:.0%}"
        return (
            f"{self.name}, {self.parameters / 1e6:.1f}M parameters, batch {self.batch_size}: "
            f"one shared base keeps {self.shared.exact / 1e6:.0f} MB, three copies "
            f"{self.copies.exact / 1e6:.0f} MB ({self.exact:.0%}); of their peak {peaks}"
        )


@dataclass(frozen=True, kw_only=True)
class Report:
    """The rows, and what they were measured with."""

    batch_size: int
    repeats: int
    device: str
    prices: Mapping[Pass, float]
    rows: tuple[Row, ...]
    sharing: tuple[Sharing, ...] = ()

    def record(self) -> dict[str, Any]:
        """The report as plain JSON, with its provenance."""
        return {
            "benchmark": "train",
            "batch_size": self.batch_size,
            "repeats": self.repeats,
            "device": self.device,
            "pass_seconds": {str(kind): price for kind, price in self.prices.items()},
            "rows": [row.record() for row in self.rows],
            "sharing": [sharing.record() for sharing in self.sharing],
            "provenance": provenance(),
        }


def compared(
    name: str,
    rounds: Sequence[Seconds],
    passes: Sequence[Mapping[Pass, float]],
    *,
    unit: str,
    played: int = 1,
) -> Row:
    """Make the row of a method from seconds and passes of all rounds; ratios are within rounds."""
    spent = [r[name] for r in rounds]
    expected = [
        sum(n * r[kind] for kind, n in tally.items())
        for r, tally in zip(rounds, passes, strict=True)
    ]
    kinds = sorted({kind for tally in passes for kind in tally})
    mean = {kind: sum(tally.get(kind, 0.0) for tally in passes) / len(passes) for kind in kinds}
    return Row(
        name=name,
        rounds=played,
        passes=mean,
        seconds=statistics.median(spent),
        to_flow=_ratio(spent, [r[unit] for r in rounds]),
        expected=statistics.median(expected),
        to_passes=_ratio(spent, expected),
    )


def _ratio(a: Sequence[float], b: Sequence[float]) -> Interval:
    return bootstrap(np.asarray(a) / np.asarray(b), statistic=np.median)


def save(report: Report, path: Path) -> None:
    """Write a report as JSON, atomically."""
    text = json.dumps(report.record(), indent=1, ensure_ascii=False, allow_nan=False)
    atomic_write_text(path, text + "\n")


def table(report: Report) -> Table:
    """The report for a terminal of 80 columns: passes per sample, medians with 95% intervals."""
    from rich.table import Table

    prices = ", ".join(f"{kind} {1e3 * price:.0f}" for kind, price in report.prices.items())
    made = Table(
        title=f"Training steps of {report.batch_size} samples, {report.repeats} rounds, "
        f"{report.device}",
        caption=f"fwd, grad, jvp: passes per sample. ms of a pass of the batch: {prices}",
        box=None,
        pad_edge=False,
    )
    made.add_column("method", no_wrap=True)
    for head in ("fwd", "grad", "jvp", "ms", "x flow", "x passes", "MB"):
        made.add_column(head, justify="right", no_wrap=True)
    for row in report.rows:
        made.add_row(
            row.name,
            *(f"{row.total(mode):g}" for mode in MODES),
            f"{1e3 * row.seconds:.0f}",
            _short(row.to_flow),
            _short(row.to_passes),
            "" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.0f}",
        )
    return made


def _short(ratio: Interval) -> str:
    return f"{ratio.value:.2f} {ratio.low:.2f}-{ratio.high:.2f}"
