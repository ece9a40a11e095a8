"""Figures of the validation of the metrics: a ladder per corruption, and all of it as a matrix."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import SymLogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from turbo_lab.charts import COLOURS
from turbo_lab.figures import INK, SOFT, style
from turbo_lab.studies.every_metric import METRICS
from turbo_lab.studies.validation_cases import CASES

REACH = 400
"""Effects are drawn up to this many half widths, linear within the band and logarithmic beyond."""
TICKS = (-100, -10, -1, 0, 1, 10, 100)


def ladder_panels(rows: pd.DataFrame, *, columns: int = 6) -> Figure:
    """One panel per corruption: effect on every metric that is not on the written list.

    Coloured lines are the corruption's own metrics, grey ones those that must stay in the null
    band, which is shaded.

    Args:
        rows: of `turbo_lab.studies.validation.ladders`.
        columns: panels per row.
    """
    count = -(-len(CASES) // columns)
    with style():
        figure = Figure(figsize=(1.95 * columns, 2.3 * count), layout="constrained")
        axes = figure.subplots(count, columns, sharex=True, sharey=True, squeeze=False)
        for axis, name in zip(axes.ravel(), CASES, strict=False):
            _ladder(axis, rows[rows["corruption"] == name])
            axis.set_title(name)
        for axis in axes.ravel()[len(CASES) :]:
            axis.set_visible(False)
        figure.supxlabel("strength", fontsize=9)
        figure.supylabel("effect, half widths of the null band", fontsize=9)
    return figure


def _ladder(axis: Axes, rows: pd.DataFrame) -> None:
    axis.axhspan(-1, 1, color=SOFT, alpha=0.25, lw=0)
    for _, line in rows[rows["role"] == "quiet"].groupby("metric", sort=False):
        axis.plot(line["strength"], line["effect"], color=SOFT, lw=0.6)
    own = rows[rows["role"] == "own"].groupby("metric", sort=False)
    for colour, (metric, line) in zip(COLOURS, own, strict=False):
        axis.plot(
            line["strength"], line["effect"], color=colour, lw=1.2, marker="o", ms=2.5,
            label=METRICS[metric].title,
        )  # fmt: skip
    axis.set_yscale("symlog", linthresh=1)
    axis.set(ylim=(-REACH, REACH), xticks=(0, 0.5, 1), yticks=TICKS)
    axis.set_xticklabels(("0", "½", "1"), fontsize=7)
    axis.set_yticklabels([f"{t:g}" for t in TICKS], fontsize=7)
    axis.minorticks_off()
    if len(own):
        falls = rows.loc[rows["role"] == "own", "effect"].sum() < 0
        place = "upper left" if falls else "lower left"
        axis.legend(fontsize=5.5, loc=place, borderaxespad=0.1, labelspacing=0.2, handlelength=1)


def matrix_map(effects: pd.DataFrame) -> Figure:
    """Every corruption at full strength on every metric, in half widths of the null band.

    Numbers stand where an effect leaves the band. A thick frame is the corruption's own metric, a
    thin one a coupling of the written list; a number without a frame is a failure.

    Args:
        effects: of `turbo_lab.studies.validation.matrix`.
    """
    names, metrics = list(effects.index), list(effects.columns)
    with style():
        figure = Figure(
            figsize=(0.43 * len(metrics) + 1.9, 0.3 * len(names) + 1.5), layout="constrained"
        )
        axis = figure.subplots()
        norm = SymLogNorm(linthresh=1, vmin=-REACH, vmax=REACH)
        image = axis.imshow(effects.to_numpy(float), cmap="RdBu_r", norm=norm, aspect="auto")
        for (y, x), effect in np.ndenumerate(effects.to_numpy(float)):
            _cell(axis, x, y, effect, names[y], metrics[x])
        titles = [METRICS[m].title for m in metrics]
        axis.set_xticks(range(len(metrics)), titles, rotation=45, ha="left", fontsize=7)
        axis.xaxis.tick_top()
        axis.set_yticks(range(len(names)), names, fontsize=7.5)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        bar = figure.colorbar(image, ax=axis, ticks=TICKS, pad=0.01, aspect=40)
        bar.ax.set_yticklabels([f"{t:g}" for t in TICKS], fontsize=7)
        bar.set_label("effect, half widths of the null band", fontsize=8)
        bar.ax.minorticks_off()
        bar.outline.set_visible(False)
    return figure


def _cell(axis: Axes, x: int, y: int, effect: float, name: str, metric: str) -> None:
    case = CASES[name]
    if abs(effect) > 1:
        axis.text(
            x, y, f"{effect:.0f}", ha="center", va="center", fontsize=6.5,
            color="white" if abs(effect) > 15 else INK,
        )  # fmt: skip
    if metric in case.own or metric in case.listed:
        inset = 0.06
        axis.add_patch(
            Rectangle(
                (x - 0.5 + inset, y - 0.5 + inset),
                1 - 2 * inset,
                1 - 2 * inset,
                fill=False,
                ec=INK,
                lw=1.6 if metric in case.own else 0.5,
            )
        )
