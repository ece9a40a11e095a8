"""Figures of cost: they show the numbers of the plan and of the records, and no others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from turbo_lab.qwen_counts import Work
from turbo_lab.qwen_plan import DEVICES, need_table
from turbo_lab.studies.factory_speed import (
    device,
    memory_figure,
    missing,
    recorded,
    roofline_figure,
)

WORK = Work(height=2048, width=2048, batch=4, steps=2)


@pytest.mark.parametrize(("name", "rings"), [("H100", 2), ("A100", 0)])
def test_no_component_is_above_its_roof(name: str, rings: int) -> None:
    on = device(name)
    (axis,) = roofline_figure(WORK, on).axes
    dots = [line for line in axis.lines if line.get_marker() == "o"]
    assert len(dots) == 6 + rings
    for dot in dots:
        x, y = (float(np.ravel(v)[0]) for v in (dot.get_xdata(), dot.get_ydata()))
        assert 1e12 * y <= min(x * on.bandwidth, on.fp8 or on.bf16) * (1 + 1e-9)


@pytest.mark.parametrize("name", ["H100", "RTX 3090"])
def test_names_of_components_stay_inside_of_the_axes(name: str) -> None:
    figure = roofline_figure(WORK, device(name))
    figure.canvas.draw()
    (axis,) = figure.axes
    frame = axis.get_window_extent()
    assert len(axis.texts) == 6
    for text in axis.texts:
        box = text.get_window_extent()
        assert frame.contains(box.x0, box.y0) and frame.contains(box.x1, box.y1), text.get_text()


def test_bars_end_where_the_plan_says() -> None:
    (axis,) = memory_figure(WORK).axes
    table = need_table(WORK)
    ends: dict[float, float] = {}
    for bar in axis.patches:
        y = round(bar.get_y() + bar.get_height() / 2)  # type: ignore[attr-defined]
        ends[y] = max(ends.get(y, 0), bar.get_x() + bar.get_width())  # type: ignore[attr-defined]
    assert ends[0] == pytest.approx(table.loc["resident", "bf16, GB"])
    for k, column in enumerate(table.columns):
        assert ends[k + 1] == pytest.approx(
            table.loc["resident", column] - table.loc["text", column]
        )
    shown = {line.get_xdata()[0] for line in axis.lines if line.get_linestyle() == ":"}  # type: ignore[index]
    assert shown == {
        d.memory / 1e9 for d in DEVICES if d.memory < 1.4e9 * table.loc["resident"].max()
    }


def test_only_full_size_records_are_figures(tmp_path: Path) -> None:
    assert "needs a CUDA GPU" in missing(recorded(tmp_path))
    row: dict[str, Any] = {"part": "total", "name": "ours", "seconds": 5.0, "peak": 2e9}
    for name, networks in (("qwen-a.json", "full"), ("qwen-b.json", "tiny")):
        record = {"device": name, "networks": networks, "rows": [row]}
        (tmp_path / name).write_text(json.dumps(record), "utf-8")
    table = recorded(tmp_path)
    assert table[["device", "seconds", "GB"]].values.tolist() == [["qwen-a.json", 5.0, 2.0]]
    assert missing(table) == ""
