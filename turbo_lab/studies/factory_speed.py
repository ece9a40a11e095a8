"""Notebook 07's figures of cost: the roofline, the memory plan, and what was measured where."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from IPython.display import Markdown
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from turbo_lab import places
from turbo_lab.figures import ACCENT, INK, SECOND, SOFT, THIRD, style
from turbo_lab.qwen_counts import LINEARS, Work, counted
from turbo_lab.qwen_plan import DEVICES, Device, need_table, said
from turbo_lab.qwen_sizes import Model

PARTS = {
    "text": ("text encoder", SOFT),
    "transformer": ("transformer", SECOND),
    "decoder": ("VAE", INK),
    "activations": ("activations of one picture, or decoding it in tiles", ACCENT),
    "whole": ("on top, decoding it whole", THIRD),
}
"""Labels and colours of the parts of a bar."""


def roofline_figure(work: Work, on: Device) -> Figure:
    """Draw what a device can attain against FLOP per byte, with the components of some work.

    Dots are under the roof of bf16; rings are where linear layers go with fp8, if it has that.
    """
    counts = counted(Model(), work)
    densities = [count.flops / count.bytes for count in counts]
    x = np.geomspace(1, 1e5, 200)
    with style():
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axis = figure.subplots()
        axis.plot(x, _roof(x, on.bandwidth, on.bf16), color=INK, lw=1.2, label="bf16")
        if on.fp8 is not None:
            axis.plot(x, _roof(x, on.bandwidth, on.fp8), color=ACCENT, lw=1, label="fp8")
        for count, dense in zip(counts, densities, strict=True):
            attained = float(_roof(dense, on.bandwidth, on.bf16))
            axis.plot(dense, attained, "o", color=INK, ms=4)
            alone = sum(0.1 < other / dense < 10 for other in densities) == 1
            _name(axis, count.component, count.flops, (dense, attained), alone=alone)
            if on.fp8 is not None and count.component in LINEARS:
                dense = count.flops / (count.bytes - count.weights // 2)
                axis.plot(dense, _roof(dense, on.bandwidth, on.fp8), "o", mfc="none", color=ACCENT)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlabel("FLOP per byte")
        axis.set_ylabel("TFLOP/s at most")
        axis.set_title(f"{said(work)}, on one {on.name} ({on.source})")
        axis.legend(loc="upper left", fontsize=8)
    return figure


def _roof(dense: Any, bandwidth: float, rate: float) -> Any:
    return np.minimum(dense * bandwidth, rate) / 1e12


def _name(axis: Axes, component: str, flops: int, at: tuple[float, float], *, alone: bool) -> None:
    """Name a dot: slanted between neighbours, level where it has none and may be near the axis."""
    axis.annotate(
        f"{component}, {_digits(flops / 1e12)} TFLOP", at, (3, -5), textcoords="offset points",
        fontsize=7, rotation=0 if alone else -38, ha="left", va="top", rotation_mode="anchor",
    )  # fmt: skip


def _digits(value: float) -> str:
    """A number above 0 to three digits, without an exponent and without commas."""
    places = 2 - math.floor(math.log10(value))
    return f"{round(value, places):.{max(places, 0)}f}"


def memory_figure(work: Work, devices: Sequence[Device] = DEVICES) -> Figure:
    """Draw the bytes of each of `turbo_lab.qwen_plan.WAYS` as stacked bars, and devices as lines.

    The open end of a bar is what decoding whole takes on top: a device may lie inside it.
    """
    table = need_table(work)
    with style():
        figure = Figure(figsize=(6.8, 3.6), layout="constrained")
        axis = figure.subplots()
        for y, (name, row) in enumerate(table.iterrows()):
            _stack(axis, y, _parts(row, resident=name == "resident"))
        right = 1.4 * table["at once"].max()
        for size in sorted({one.memory / 1e9 for one in devices}):
            if size < right:
                names = "\n".join(d.name for d in devices if d.memory == int(size * 1e9))
                axis.axvline(size, color=SOFT, lw=0.8, ls=":")
                axis.text(size, -0.65, names, fontsize=6.5, ha="center", va="bottom")
        axis.set_yticks(range(len(table)), list(table.index))
        axis.set_ylim(len(table) - 0.5, -0.6)
        axis.set_xlim(0, right)
        axis.set_xlabel("GB at the worst moment, one picture at a time")
        handles, labels = axis.get_legend_handles_labels()
        first = dict(zip(labels, handles, strict=True))
        figure.legend(first.values(), first.keys(), loc="outside lower center", ncols=3, fontsize=7)
    return figure


def _parts(row: pd.Series, *, resident: bool) -> dict[str, float]:
    """GB that are on the device together at the worst moment of a way."""
    if row["at once"] == row["text"]:
        return {"text": row["text"]}
    beside = {part: row[part] for part in ("transformer", "decoder", "activations")}
    whole = max(0.0, row["decoding"] - row["activations"])
    return ({"text": row["text"]} if resident else {}) | beside | {"whole": whole}


def _stack(axis: Axes, y: int, parts: dict[str, float]) -> None:
    """One bar, its last part open."""
    left = 0.0
    for part, size in parts.items():
        label, colour = PARTS[part]
        filled = part != "whole"
        axis.barh(
            y, size, left=left, height=0.6, label=label, edgecolor=colour, lw=0 if filled else 0.8,
            color=colour if filled else "none", hatch=None if filled else "////",
        )  # fmt: skip
        left += size


# --- what was measured --------------------------------------------------------------------------


def recorded(folder: Path | None = None) -> pd.DataFrame:
    """Read the figures of ``python -m turbo_lab.bench.qwen``: one row per measurement.

    Args:
        folder: of the JSON files; None for ``benchmarks/`` of the checkout.

    Returns:
        Columns ``device``, ``part``, ``name``, ``seconds``, ``TFLOP/s``, ``over floor``, ``GB``,
        ``error`` and ``note``; no rows where nothing was measured yet.
    """
    folder = folder or places.root() / "benchmarks"
    rows = []
    for file in sorted(folder.glob("qwen-*.json")):
        record = json.loads(file.read_text("utf-8"))
        if record["networks"] == "full":
            rows += [_row(record["device"], row) for row in record["rows"]]
    return pd.DataFrame(rows, columns=list(_row("", {"part": "", "name": ""})))


def _row(device: str, row: dict[str, Any]) -> dict[str, Any]:
    peak = row.get("peak")
    return {
        "device": device,
        "part": row["part"],
        "name": row["name"],
        "seconds": row.get("seconds"),
        "TFLOP/s": row.get("rate"),
        "over floor": row.get("over_floor"),
        "GB": None if peak is None else peak / 1e9,
        "error": row.get("error"),
        "note": row.get("note", ""),
    }


def measured(folder: Path | None = None) -> pd.DataFrame | Markdown:
    """The table of `recorded`, or, where nothing was measured yet, the sentence that says so."""
    table = recorded(folder)
    if len(table):
        return table
    return Markdown("None yet: `python -m turbo_lab.bench.qwen` needs a CUDA GPU.")
