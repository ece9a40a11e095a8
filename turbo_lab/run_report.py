"""What a person sees while notebooks run: a line each on a terminal, few plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from turbo_lab import places

if TYPE_CHECKING:
    from turbo_lab.run_one import Outcome

#: Seconds between two plain lines about one notebook.
QUIET_SECONDS = 30.0


class Report:
    """Shows how far each notebook is; a context manager."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)
        self.live = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("cells"),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
            refresh_per_second=4,
            disable=not self.console.is_terminal,
        )
        self.tasks: dict[str, tuple[TaskID, int]] = {}
        self.told: dict[str, float] = {}

    def __enter__(self) -> Report:
        self.live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.live.stop()

    def started(self, name: str, cells: int) -> None:
        """A notebook of so many cells has begun."""
        self.tasks[name] = (self.live.add_task(name, total=cells), cells)
        self.told[name] = time.monotonic()
        if self.live.disable:
            self.console.print(f"{name}  started")

    def moved(self, name: str, cell: int, seconds: float) -> None:
        """A notebook is at this cell; tells it live, or every ``QUIET_SECONDS`` in plain lines."""
        task, cells = self.tasks[name]
        self.live.update(task, completed=min(cell, cells))
        if self.live.disable and time.monotonic() - self.told[name] >= QUIET_SECONDS:
            self.told[name] = time.monotonic()
            self.console.print(f"{name}  cell {cell} of {cells}, {duration(seconds)}")

    def ended(self, outcome: Outcome) -> None:
        """A notebook is done or has failed; prints its line."""
        if outcome.name in self.tasks:
            self.live.remove_task(self.tasks[outcome.name][0])
            self.live.refresh()
        copy = places.shown(outcome.copy)
        if outcome.problem:
            self.console.print(f"{outcome.name}  FAILED  {outcome.problem}.", markup=False)
            self.console.print(f"{'':{len(outcome.name)}}  see {copy}", markup=False)
        else:
            drawn = f"{outcome.figures} figure{'' if outcome.figures == 1 else 's'}"
            took = duration(outcome.seconds)
            self.console.print(f"{outcome.name}  ok  {took}, {drawn}, {copy}", markup=False)


def duration(seconds: float) -> str:
    """Return a time as a person says it: ``12 s``, ``3 min 05 s``."""
    whole = round(seconds)
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60:02d} s"
