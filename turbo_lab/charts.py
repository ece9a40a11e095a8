"""Charts that compare students: lines per method, magnified grids, scatters, ratios."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from textwrap import wrap
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from torch import Tensor

from turbo_lab.figures import (
    ACCENT,
    INK,
    SECOND,
    SOFT,
    THIRD,
    bare,
    contact_sheet,
    log_axis,
    style,
)
from turbo_lab.palette import colour_of

if TYPE_CHECKING:
    import pandas as pd

COLOURS = (ACCENT, SECOND, THIRD, "#8b5aa8", "#b8860b", INK)
"""One per line or row that is compared, where these are no methods (`turbo_lab.palette`)."""
GAP = 0.7
"""Between lines that are parted, in heights of a line."""


def compared_lines(
    table: pd.DataFrame,
    *,
    metrics: Mapping[str, str],
    titles: Mapping[str, str],
    xlabel: str = "steps",
    columns: int = 4,
) -> Figure:
    """Draw value and interval of each metric against steps, one line per family in its colour.

    Args:
        table: long form with columns ``family``, ``steps``, ``metric``, ``value``, ``low``,
            ``high``; rows whose steps are NaN are drawn as a band through the panel.
        metrics: metric name to panel title.
        titles: family name to its label.
        xlabel: label under the lowest panels.
        columns: panels per row.
    """
    rows = -(-len(metrics) // columns)
    with style():
        figure = Figure(figsize=(2.45 * columns, 2.2 * rows + 0.5), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for axis, (metric, title) in zip(axes, metrics.items(), strict=False):
            one = table[table["metric"] == metric]
            for k, family in enumerate(titles):
                rows_of = one[one["family"] == family]
                _family_line(axis, rows_of, colour_of(family), titles[family], k)
            axis.set_title(title)
            log_axis(axis, one["steps"].dropna().unique())
        for axis in axes[: len(metrics)][-columns:]:
            axis.set_xlabel(xlabel)
        for axis in axes[len(metrics) :]:
            axis.set_visible(False)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8)
    return figure


def _family_line(axis: Axes, rows: pd.DataFrame, colour: str, label: str, k: int) -> None:
    for _, band in rows[rows["steps"].isna()].iterrows():
        axis.axhspan(band["low"], band["high"], color=SOFT, alpha=0.25, lw=0)
        axis.axhline(band["value"], color=SOFT, lw=1, label=label)
    points = rows.dropna(subset=["steps"]).sort_values("steps")
    if len(points):
        error = [points["value"] - points["low"], points["high"] - points["value"]]
        axis.errorbar(
            points["steps"] * 1.03 ** (k - 2), points["value"], yerr=np.abs(error), color=colour,
            marker="o", ms=3, lw=1.2, capsize=2, label=label,
        )  # fmt: skip


def magnified_grid(
    cells: Mapping[str, Sequence[np.ndarray]],
    *,
    columns: Sequence[str],
    bars: Mapping[str, Mapping[str, Sequence[float]]],
    bar_title: str,
    colours: Mapping[str, str],
) -> Figure:
    """Draw a grid of prepared pictures, and beside each row a group of bars per area.

    Args:
        cells: row label to one uint8 picture ``[H, W, 3]`` per column.
        columns: title of each column; also what the bars of a group stand for, left to right.
        bars: row label to area to one height per column; a row may be missing.
        bar_title: above the bars.
        colours: row label to the colour of its bars.
    """
    with style():
        wide = len(columns)
        figure = Figure(figsize=(1.62 * wide + 2.6, 1.22 * len(cells) + 0.3), layout="constrained")
        grid = figure.subplots(
            len(cells), wide + 1, squeeze=False, width_ratios=[1.45] * wide + [2.0]
        )
        top = max((max(h) for row in bars.values() for h in row.values()), default=1.0)
        for r, (label, pictures) in enumerate(cells.items()):
            for axis, picture in zip(grid[r], pictures, strict=False):
                axis.imshow(picture, interpolation="nearest")
            for axis in grid[r, :wide]:
                bare(axis)
            for axis in grid[r, len(pictures) : wide]:
                axis.set_visible(False)
            grid[r, 0].set_ylabel(label, rotation=0, ha="right", va="center", labelpad=6)
            _area_bars(grid[r, wide], bars.get(label, {}), colours.get(label, INK), 1.08 * top)
        full = next(r for r, row in enumerate(cells.values()) if len(row) == wide)
        for axis, title in zip(grid[full], columns, strict=False):
            axis.set_title(title)
        grid[full, wide].set_title(bar_title, fontsize=8)
    return figure


def _area_bars(axis: Axes, areas: Mapping[str, Sequence[float]], colour: str, top: float) -> None:
    if not areas:
        axis.set_visible(False)
        return
    for k, heights in enumerate(areas.values()):
        width = 0.8 / len(heights)
        for j, height in enumerate(heights):
            shade = 0.35 + 0.65 * (j + 1) / len(heights)
            axis.bar(k - 0.4 + (j + 0.5) * width, height, width * 0.9, color=colour, alpha=shade)
    axis.set_xticks(range(len(areas)), list(areas), fontsize=7)
    axis.set_ylim(0, top)
    axis.tick_params(axis="y", labelsize=6)


def scatter(
    points: Mapping[str, Sequence[tuple[float, float, str]]],
    *,
    xlabel: str,
    ylabel: str,
    colours: Mapping[str, str],
) -> Figure:
    """Draw labelled points, one colour per group: group to ``(x, y, note)``."""
    with style():
        figure = Figure(figsize=(5.4, 3.4), layout="constrained")
        axis = figure.subplots()
        for group, rows in points.items():
            x, y, notes = zip(*rows, strict=True)
            axis.plot(x, y, color=colours[group], marker="o", ms=5, lw=0.7, label=group)
            for place, note in zip(zip(x, y, strict=True), notes, strict=True):
                axis.annotate(note, place, (4, 4), textcoords="offset points", fontsize=7)
        axis.set(xlabel=xlabel, ylabel=ylabel)
        axis.legend(fontsize=8)
    return figure


class Band(NamedTuple):
    """A grey band through panels: its words in the legend, and its opacity from 0 to 1."""

    label: str
    opacity: float


def dot_panels(
    rows: pd.DataFrame,
    *,
    by: str,
    titles: Mapping[str, str],
    metrics: Mapping[str, str],
    units: Mapping[str, str],
    bands: Mapping[str, Band],
    accent: str,
    ylabel: str,
    breaks: Collection[str] = (),
    columns: int = 6,
) -> Figure:
    """Draw one line per sampler and one panel per metric: dots with their intervals.

    A legend below the panels names the bands.

    Args:
        rows: long form with the columns ``by``, ``metric``, ``value``, ``low``, ``high``.
        by: name of the column of samplers.
        titles: samplers from top to bottom, and their labels.
        metrics: the panels and their titles.
        units: what the axis of a panel shows, with its unit, by metric.
        bands: samplers whose intervals are bands through every panel, from the back to the front.
        accent: the sampler that is picked out.
        ylabel: what the samplers are.
        breaks: samplers above which a gap parts the lines.
        columns: panels in a row of the figure.
    """
    heights = list(accumulate(1.0 + GAP * (sampler in breaks) for sampler in titles))
    deep = -(-len(metrics) // columns)
    with style():
        wide = 1.9 * min(columns, len(metrics)) + 1.8
        high = (0.24 * heights[-1] + 1.1) * deep + 0.3
        figure = Figure(figsize=(wide, high))
        figure.set_layout_engine("constrained", h_pad=0.08)
        axes = figure.subplots(deep, min(columns, len(metrics)), sharey=True, squeeze=False)
        for axis, (metric, title) in zip(axes.ravel(), metrics.items(), strict=False):
            of = rows[rows["metric"] == metric].set_index(by)
            for sampler, band in bands.items():
                _draw_band(axis, of, sampler, band)
            for y, sampler in zip(heights, titles, strict=True):
                dot(axis, of.loc[sampler], y, ACCENT if sampler == accent else SECOND)
            axis.locator_params(axis="x", nbins=4)
            axis.set_title(title, fontsize=8)
            axis.set_xlabel("\n".join(wrap(units[metric], 28)), fontsize=7)
            axis.grid(axis="y", color=SOFT, alpha=0.2)
        for axis in axes.ravel()[len(metrics) :]:
            axis.set_visible(False)
        for axis in axes[:, 0]:
            axis.set_yticks(heights, list(titles.values()), fontsize=8)
            axis.set_ylabel(ylabel, fontsize=8)
        axes[0, 0].invert_yaxis()
        keys = [Patch(label=band.label, **_look(band)) for band in bands.values()]
        figure.legend(handles=keys, loc="outside lower center", ncols=len(keys), fontsize=8)
    return figure


def _draw_band(axis: Axes, of: pd.DataFrame, sampler: str, band: Band) -> None:
    if sampler in of.index:
        low, high = of.loc[sampler, "low"], of.loc[sampler, "high"]
        axis.axvspan(low, high, **_look(band))


def _look(band: Band) -> dict[str, Any]:
    return {"fc": to_rgba(SOFT, band.opacity), "ec": SOFT, "lw": 0.6}


def dot(axis: Axes, row: pd.Series, y: float, colour: str) -> None:
    """Draw a value with its interval at height y."""
    error = np.abs([[row["value"] - row["low"]], [row["high"] - row["value"]]])
    axis.errorbar([row["value"]], [y], xerr=error, color=colour, fmt="o", ms=4, lw=1, capsize=2)


def ratio_lines(
    rows: Mapping[str, Mapping[str, Sequence[float]]],
    *,
    x: Sequence[float],
    xlabel: str,
    ylabel: str,
    colours: Mapping[str, Sequence[str]],
) -> Figure:
    """Draw one panel per group with lines of ratios against ``x``, and a legend in each.

    Args:
        rows: group to label to values.
        x: of the values.
        xlabel: below the panels.
        ylabel: left of them.
        colours: group to one colour per line.
    """
    with style():
        figure = Figure(figsize=(2.5 * len(rows), 2.9), layout="constrained")
        axes = figure.subplots(1, len(rows), squeeze=False, sharey=True)[0]
        for axis, (group, lines) in zip(axes, rows.items(), strict=True):
            axis.axhline(1, color=SOFT, lw=1)
            for colour, (label, values) in zip(colours[group], lines.items(), strict=True):
                axis.plot(x, values, color=colour, lw=1.4, label=label)
            axis.set_title(group)
            axis.set_xlabel(xlabel)
            axis.legend(fontsize=7, ncols=2, loc="upper right")
        axes[0].set_ylabel(ylabel)
    return figure


@dataclass(frozen=True, kw_only=True)
class Judged:
    """Pictures, and in words what is wrong with each body and with each sign; else empty."""

    images: Tensor  # [B, 3, 32, 32] in [-1, 1]
    body: tuple[str, ...]
    sign: tuple[str, ...]


def judged(images: Tensor) -> Judged:
    """Ask the oracles what is wrong with pictures ``[B, 3, 32, 32]``, without their captions."""
    from turbo_lab import measure

    seen = measure.read(images)
    body, parts = seen.body, {"head": 1, "arm": 2, "leg": 2}
    counts = zip(body.heads.tolist(), body.arms.tolist(), body.legs.tolist(), strict=True)
    bodies = []
    for found, torso, whole in zip(counts, body.torso.tolist(), body.whole.tolist(), strict=True):
        wrong = [_count(n, part) for n, part in zip(found, parts, strict=True) if n != parts[part]]
        wrong += [] if torso else ["no torso"]
        bodies.append("" if whole else ", ".join(wrong) or "parts askew")
    signs = ["" if n == 1 else _count(n, "sign") for n in seen.sign.count.tolist()]
    return Judged(images=images, body=tuple(bodies), sign=tuple(signs))


def _count(n: int, part: str) -> str:
    return f"no {part}" if n == 0 else f"{n} {part}{'s' * (n > 1)}"


def judged_blocks(blocks: Mapping[str, Judged], *, columns: int) -> Figure:
    """Draw blocks of pictures side by side: broken bodies outlined, what is wrong below each."""
    with style():
        rows = max(-(-len(block.body) // columns) for block in blocks.values())
        wide = 0.95 * columns + 0.25
        figure = Figure(figsize=(wide * len(blocks), 1.2 * rows + 0.3))
        figure.set_layout_engine("constrained", wspace=0.06)
        for axis, (title, block) in zip(
            figure.subplots(1, len(blocks), squeeze=False)[0], blocks.items(), strict=True
        ):
            judged_sheet(axis, block, columns=columns, gap=_GAP)
            _words(axis, block, columns)
            whole = sum(not words for words in block.body)
            axis.set_title(f"{title}: {whole} of {len(block.body)} bodies whole")
    return figure


_GAP = 10  # pixels below a picture, for three lines of words


def judged_sheet(axis: Axes, block: Judged, *, columns: int, gap: int = 2) -> None:
    """Draw a contact sheet with a line around the picture of each broken body."""
    sheet = contact_sheet(block.images, columns=columns, enlarge=1, gap=gap)
    axis.imshow(sheet, interpolation="nearest")
    side = block.images.shape[-1]
    for k, words in enumerate(block.body):
        if words:
            corner = (k % columns * (side + gap) - 0.5, k // columns * (side + gap) - 0.5)
            axis.add_patch(Rectangle(corner, side, side, fill=False, ec=ACCENT, lw=1.6))
    height, width, _ = sheet.shape
    axis.set(xlim=(-1.5, width + 0.5), ylim=(height + 0.5, -1.5))
    bare(axis)


def _words(axis: Axes, block: Judged, columns: int) -> None:
    side = block.images.shape[-1]
    for k, pair in enumerate(zip(block.body, block.sign, strict=True)):
        lines = [
            (part, colour)
            for words, colour in zip(pair, (ACCENT, SECOND), strict=True)
            for part in wrap(words, 21)
        ]
        for line, (words, colour) in enumerate(lines):
            x, y = k % columns * (side + _GAP), k // columns * (side + _GAP) + side
            axis.text(x, y + 0.3 + 3.3 * line, words, color=colour, fontsize=5.5, va="top")
    axis.set_ylim(axis.get_ylim()[0] + _GAP, -1.5)


def ground_piece(images: Tensor, size: int = 8) -> Tensor:
    """The square of pictures ``[B, 3, 32, 32]`` that is free ground in most: ``[B, 3, s, s]``."""
    top, left = freest(images, size)
    return images[:, :, top : top + size, left : left + size]


def freest(images: Tensor, size: int) -> tuple[int, int]:
    """Corner of the square that is free ground in most of the pictures."""
    from turbo_lab import measure

    free = measure.read(images).free.float().mean(0)
    sums = free.unfold(0, size, 1).unfold(1, size, 1).sum((2, 3))
    at = int(sums.argmax())
    return at // sums.shape[1], at % sums.shape[1]
