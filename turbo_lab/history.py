"""The training history: one line per so many steps, the mean over them.

The first line after a resume is the mean over its steps since then: what came before them is lost
with the run that was killed.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from turbo_lab.atomic import atomic_write_text
from turbo_lab.errors import StoreWarning
from turbo_lab.fit import Record

HISTORY_EVERY = 20
"""Steps per line of history.jsonl (a line is the mean over them)."""


class TrainingHistory:
    """history.jsonl in the work folder: appended while training, cut back on resume."""

    def __init__(self, path: Path, stage: int) -> None:
        self.path, self.stage = path, stage
        self.kept: list[dict[str, Any]] = read_lines(path)
        self.open: list[Record] = []

    def add(self, record: Record, *, last: bool) -> None:
        """Take the record of a step; write a line every `HISTORY_EVERY` steps and at the last."""
        # Lines from beyond the checkpoint that this run resumed from are being made again.
        self.kept = [line for line in self.kept if line["step"] < record.step]
        self.open.append(record)
        if record.step % HISTORY_EVERY == 0 or last:
            self.kept.append({"stage": self.stage, **_mean(self.open)})
            self.open = []
            atomic_write_text(self.path, self.text())

    def text(self) -> str:
        """The lines so far."""
        return "".join(json.dumps(line) + "\n" for line in self.kept)


def seconds_by_stage(lines: Iterable[Mapping[str, Any]]) -> dict[int, float]:
    """Seconds that training took, all sittings; a line is the mean since the line before.

    Args:
        lines: of all stages, each stage's in order.
    """
    seconds: dict[int, float] = {}
    done: dict[int, int] = {}
    for line in lines:
        stage, step = line["stage"], line["step"]
        new = line["seconds"] * (step - done.get(stage, 0))
        seconds[stage] = seconds.get(stage, 0.0) + new
        done[stage] = step
    return seconds


def read_lines(path: Path) -> list[dict[str, Any]]:
    """What was written before, none if there is no file.

    A damaged file is a history that is lost, and no training: it warns (`StoreWarning`).
    """
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        return []
    except ValueError:
        warnings.warn(f"{path} is damaged; the history begins here.", StoreWarning, stacklevel=3)
        return []


def _mean(records: list[Record]) -> dict[str, Any]:
    def mean(of: Callable[[Record], Any]) -> dict[str, float]:
        names = {name for record in records for name in of(record)}
        got = {name: [of(r)[name] for r in records if name in of(r)] for name in sorted(names)}
        return {name: round(sum(values) / len(values), 6) for name, values in got.items()}

    seconds = round(sum(r.seconds for r in records) / len(records), 4)
    return {
        "step": records[-1].step,
        "terms": mean(lambda r: r.terms),
        "norms": mean(lambda r: r.norms),
        "seconds": seconds,
    }
