"""Notebook 07's figure of times: where published adapters take their few steps."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from turbo_lab.figures import ACCENT, INK, SOFT, style
from turbo_lab.schedules import PUBLISHED, Published, spoiled, stock_sigmas

_MARKS = {"terminal 0.02": (ACCENT, "x", 0.2), "the model's own": (SOFT, "|", 0.38)}
"""Colour, mark and offset downwards of each mistake."""


def sigma_figure() -> Figure:
    """Draw the times at which each published adapter takes a step, and two mistakes below each."""
    with style():
        figure = Figure(figsize=(6.6, 0.55 * len(PUBLISHED) + 0.9), layout="constrained")
        axis = figure.subplots()
        for k, row in enumerate(PUBLISHED):
            _row(axis, row, k, label=k == 0)
        axis.set_yticks(range(len(PUBLISHED)), [f"{row.name}" for row in PUBLISHED])
        axis.invert_yaxis()
        axis.set_xlim(1.03, -0.03)
        axis.set_xlabel("time of a step: 1 is noise, 0 is the picture")
        axis.spines["left"].set_visible(False)
        axis.tick_params(axis="y", length=0)
        figure.legend(loc="outside upper center", ncols=3, fontsize=8)
    return figure


def _row(axis: Axes, row: Published, k: int, *, label: bool) -> None:
    axis.axhline(k, color=SOFT, lw=0.4, zorder=0)
    right = stock_sigmas(row.schedule, row.steps)[:-1].tolist()
    axis.plot(right, [k] * row.steps, "o", color=INK, ms=5, label="as published" if label else None)
    for name, times in spoiled(row).items():
        colour, mark, down = _MARKS[name]
        axis.plot(
            times.tolist(), [k + down] * row.steps, mark, color=colour, ms=5,
            label=f"with {name}" + (" settings (1024 px)" if "own" in name else "")
            if label else None,
        )  # fmt: skip
