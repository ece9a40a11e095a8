"""Figures of the photographs: what was done to them, and what a patch distance says of it."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor

from turbo_lab import charts
from turbo_lab.charts import Band
from turbo_lab.figures import bare, style
from turbo_lab.studies.photo_textures import ALTERED, MATERIALS, TITLES, TRUE, photograph

SIDE = 48
"""Pixels of a side of the pieces that are shown."""


def pictures() -> Figure:
    """The middle of every photograph's left and right part, and of the right one altered."""
    columns = ("left part", f"right part, {TRUE}", *ALTERED)
    with style():
        size = (1.5 * len(columns), 1.5 * len(MATERIALS))
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(len(MATERIALS), len(columns))
        for axes, name in zip(grid, MATERIALS, strict=True):
            one = photograph(name)
            shown = (one.reference, one.asked, *(change(one.asked) for change in ALTERED.values()))
            for axis, part in zip(axes, shown, strict=True):
                axis.imshow(_middle(part), interpolation="nearest")
                bare(axis)
            axes[0].set_ylabel(TITLES.get(name, name), rotation=0, ha="right", va="center")
        for axis, title in zip(grid[0], columns, strict=True):
            axis.set_title(title, fontsize=8)
    return figure


def _middle(part: Tensor) -> Tensor:
    top, left = ((n - SIDE) // 2 for n in part.shape[1:])
    return part[:, top : top + SIDE, left : left + SIDE].permute(1, 2, 0)


def distances(rows: pd.DataFrame) -> Figure:
    """Patch distance to each photograph's left part, one panel each; the band is its right part.

    Args:
        rows: of `turbo_lab.studies.photo_textures.table`.
    """
    of = rows[rows["metric"] == "patches"].assign(metric=rows["material"])
    own = of[of["squares"] == TRUE]
    of = pd.concat([of, own.assign(squares=own["material"])])  # a photograph beside itself
    return charts.dot_panels(
        of,
        by="squares",
        titles={name: TITLES.get(name, name) for name in (*ALTERED, *MATERIALS)},
        metrics={name: f"to {TITLES.get(name, name)}" for name in MATERIALS},
        units=dict.fromkeys(MATERIALS, "patch distance (luminance,\u00a0−1\u00a0to\u00a01)"),
        bands={TRUE: Band("the photograph's own right part as it is, 95% interval", 0.45)},
        accent="phases scrambled",
        ylabel="squares of the right part",
    )
