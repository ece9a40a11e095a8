"""Figures of cost: they show the numbers of the plan and of the records, and no others."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from IPython.display import Markdown

from turbo_lab.qwen_counts import Work
from turbo_lab.qwen_plan import DEVICES, WAYS, device_named, ways
from turbo_lab.studies.factory_speed import (
    _digits,
    measured,
    memory_figure,
    recorded,
    roofline_figure,
)

WORK = Work(height=2048, width=2048, batch=4, steps=2)


@pytest.mark.parametrize(("name", "rings"), [("H100", 2), ("A100", 0)])
def test_no_component_is_above_its_roof(name: str, rings: int) -> None:
    on = device_named(name)
    (axis,) = roofline_figure(WORK, on).axes
    dots = [line for line in axis.lines if line.get_marker() == "o"]
    assert len(dots) == 6 + rings
    for dot in dots:
        x, y = (float(np.ravel(v)[0]) for v in (dot.get_xdata(), dot.get_ydata()))
        assert 1e12 * y <= min(x * on.bandwidth, on.fp8 or on.bf16) * (1 + 1e-9)


@pytest.mark.parametrize("name", ["H100", "RTX 3090"])
def test_names_of_components_stay_inside_of_the_axes(name: str) -> None:
    figure = roofline_figure(WORK, device_named(name))
    figure.canvas.draw()
    (axis,) = figure.axes
    frame = axis.get_window_extent()
    assert len(axis.texts) == 6
    for text in axis.texts:
        box = text.get_window_extent()
        assert frame.contains(box.x0, box.y0) and frame.contains(box.x1, box.y1), text.get_text()


def _ends(axis: Any) -> dict[str, tuple[float, float]]:
    """Of each bar, where its filled part ends and where its open part does, by its name."""
    names = [label.get_text() for label in axis.get_yticklabels()]
    found = {name: (0.0, 0.0) for name in names}
    for bar in axis.patches:
        name = names[round(bar.get_y() + bar.get_height() / 2)]
        end, (filled, whole) = bar.get_x() + bar.get_width(), found[name]
        found[name] = (filled if bar.get_hatch() else max(filled, end), max(whole, end))
    return found


def test_bars_and_the_table_of_devices_say_the_same() -> None:
    """A way that decodes in tiles needs what is filled, one that decodes whole needs all."""
    (axis,) = memory_figure(WORK).axes
    ends = _ends(axis)
    assert list(ends) == list(WAYS)
    tiled = set()
    for one in DEVICES:
        for way in ways(WORK, one):
            filled, whole = ends[way.name]
            assert way.bytes / 1e9 == pytest.approx(filled if way.tiles else whole)
            tiled |= {(one.name, way.name)} if way.tiles else set()
    assert tiled == {("L40S", "freed"), ("RTX 5090", "known times")}
    shown = {line.get_xdata()[0] for line in axis.lines if line.get_linestyle() == ":"}  # type: ignore[index]
    assert shown == {d.memory / 1e9 for d in DEVICES if d.memory < 1.4e9 * ends["resident"][1]}


def test_names_of_devices_do_not_lie_on_each_other() -> None:
    figure = memory_figure(WORK)
    figure.canvas.draw()
    boxes = sorted((t.get_window_extent() for t in figure.axes[0].texts), key=lambda box: box.x0)
    assert len(boxes) == 4
    assert all(a.x1 < b.x0 for a, b in itertools.pairwise(boxes))


@pytest.mark.parametrize(
    ("value", "text"),
    [(1781.2, "1780"), (95.16, "95.2"), (5.131, "5.13"), (0.1092, "0.109"), (99.96, "100.0")],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert _digits(value) == text


def test_only_full_size_records_are_figures(tmp_path: Path) -> None:
    assert recorded(tmp_path).empty
    said = measured(tmp_path)
    assert isinstance(said, Markdown) and "None yet" in said.data
    row: dict[str, Any] = {"part": "total", "name": "ours", "seconds": 5.0, "peak": 2e9}
    for name, networks in (("qwen-a.json", "full"), ("qwen-b.json", "tiny")):
        record = {"device": name, "networks": networks, "rows": [row]}
        (tmp_path / name).write_text(json.dumps(record), "utf-8")
    table = recorded(tmp_path)
    assert table[["device", "seconds", "GB"]].values.tolist() == [["qwen-a.json", 5.0, 2.0]]
    shown = measured(tmp_path)
    assert isinstance(shown, pd.DataFrame) and shown.equals(table)
