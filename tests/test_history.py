"""The training history: means over steps, and what a resumed run makes again."""

from __future__ import annotations

import json
from pathlib import Path

from turbo_lab.fit import Record
from turbo_lab.history import TrainingHistory


def fed(path: Path, first: int, last: int, *, end: int = 50) -> TrainingHistory:
    lines = TrainingHistory(path, stage=2)
    for k in range(first, last + 1):
        record = Record(step=k, terms={"a": float(k)}, norms={"student": 2.0 * k}, seconds=0.5)
        lines.add(record, last=k == end)
    return lines


def test_a_line_is_the_mean_over_the_steps_since_the_line_before(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    lines = fed(path, 1, 45)
    assert [(line["step"], line["terms"]["a"]) for line in lines.kept] == [(20, 10.5), (40, 30.5)]
    assert [line["norms"]["student"] for line in lines.kept] == [21.0, 61.0]
    assert all((line["stage"], line["seconds"]) == (2, 0.5) for line in lines.kept)
    assert [json.loads(line) for line in path.read_text().splitlines()] == lines.kept


def test_a_resumed_run_writes_the_lines_beyond_its_checkpoint_again(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    fed(path, 1, 45)
    lines = fed(path, 31, 50)
    assert [line["step"] for line in lines.kept] == [20, 40, 50]
    assert [line["terms"]["a"] for line in lines.kept] == [10.5, 35.5, 45.5]
    assert path.read_text() == lines.text()
