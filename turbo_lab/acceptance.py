"""A bar: a measured value beside the limit it must keep, and how bars are printed.

What is measured, and against which limits, is in `turbo_lab.bars`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from turbo_lab.claims import Interval
from turbo_lab.errors import BadInput


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A measured value and the limit it must keep."""

    name: str
    value: float
    side: Literal["at least", "at most"]
    limit: float
    unit: str = ""
    interval: Interval | None = None

    @property
    def ok(self) -> bool:
        """Whether the value keeps the limit."""
        return self.value >= self.limit if self.side == "at least" else self.value <= self.limit

    def __str__(self) -> str:
        around = f" [{self.interval.low:.4g}, {self.interval.high:.4g}]" if self.interval else ""
        unit = f" {self.unit}" if self.unit else ""
        verdict = "ok" if self.ok else "short"
        return f"{self.name} {self.value:.4g}{around}{unit}, {self.side} {self.limit:g} {verdict}"


def at_least(name: str, interval: Interval, limit: float, *, unit: str = "") -> Bar:
    """A bar for the value of an interval in some unit, which must reach the limit."""
    return Bar(
        name=name,
        value=interval.value,
        side="at least",
        limit=limit,
        unit=unit,
        interval=interval,
    )


def printed(bars: Mapping[str, Callable[[], Iterator[Bar]]], only: str | None = None) -> int:
    """Measure and print bars, one line each, as soon as it is known; return 1 if one is short.

    Args:
        bars: functions that measure, by name.
        only: the beginning of the names that are wanted; all of them without.

    Raises:
        BadInput: ``only`` begins no name.
    """
    chosen = [name for name in bars if name.startswith(only or "")]
    if not chosen:
        raise BadInput("only", only, f"choose one of {', '.join(bars)}")
    short = 0
    for name in chosen:
        for bar in bars[name]():
            print(bar, flush=True)
            short += not bar.ok
    return int(short > 0)
