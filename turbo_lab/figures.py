"""Figures: functions from tables to matplotlib figures, saved with where they come from."""

from __future__ import annotations

import io
import json
import math
import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from turbo_lab.atomic import atomic_write_bytes, atomic_write_text
from turbo_lab.provenance import provenance

if TYPE_CHECKING:
    import pandas as pd

INK, SOFT, ACCENT, SECOND, THIRD = "#222222", "#8a8a8a", "#c8452f", "#2f6fb0", "#4f8f3a"
STYLE = {
    "figure.dpi": 110,
    "savefig.dpi": 100,
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "svg.hashsalt": "turbo_lab",
    "svg.fonttype": "none",
}
FIXED_DATE = "1735689600"
"""2025-01-01: the date in an SVG, so that a rerun writes the same bytes."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Picture:
    """A saved figure; a notebook shows the very bytes that were saved."""

    name: str
    png: bytes

    def __repr__(self) -> str:
        return f"figure {self.name}"

    def _repr_png_(self) -> bytes:
        return self.png


def style() -> AbstractContextManager[None]:
    """Return the drawing style as a context."""
    return mpl.rc_context(STYLE)


def save(
    figure: Figure,
    name: str,
    folder: Path,
    *,
    data: Mapping[str, Any],
    parameters: Mapping[str, Any],
    artefact_keys: Sequence[str],
) -> Picture:
    """Write ``name.png``, ``name.svg`` and the sidecar ``name.json``; return the PNG to display.

    The same data give the same bytes: dates and identifiers are fixed.

    Args:
        figure: what to save.
        name: file name without suffix.
        folder: of this notebook's figures, made if missing.
        data: the numbers behind the figure (plain JSON).
        parameters: the notebook's.
        artefact_keys: of everything that went in.
    """
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("SOURCE_DATE_EPOCH", FIXED_DATE)
    drawn: dict[str, bytes] = {}
    with style():
        for kind, metadata in (("png", {"Software": "turbo_lab"}), ("svg", {"Date": None})):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, bbox_inches="tight", metadata=metadata)
            drawn[kind] = buffer.getvalue()
            atomic_write_bytes(folder / f"{name}.{kind}", drawn[kind])
    side = {
        "figure": name,
        "data": rounded(data),
        "parameters": dict(parameters),
        "artefact_keys": list(artefact_keys),
        "made_by": provenance(),
    }
    text = json.dumps(side, indent=1, ensure_ascii=False, default=str)
    atomic_write_text(folder / f"{name}.json", text + "\n")
    return Picture(name=name, png=drawn["png"])


def rounded(value: Any, digits: int = 6) -> Any:
    """Round every float in nested data to significant digits; NaN becomes None."""
    if isinstance(value, float | np.floating):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    if isinstance(value, np.integer):
        return int(value)
    if isinstance(value, Mapping):
        return {str(k): rounded(v, digits) for k, v in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [rounded(v, digits) for v in value]
    return value


def contact_sheet(images: Tensor, *, columns: int, enlarge: int = 3, gap: int = 1) -> np.ndarray:
    """Lay images ``[B, 3, H, W]`` in [-1, 1] out as one uint8 sheet, pixels kept square.

    A gap of ``gap`` image pixels in white separates them.
    """
    b, _, h, w = images.shape
    rows = -(-b // columns)
    sheet = np.ones((rows * (h + gap) - gap, columns * (w + gap) - gap, 3), dtype=np.float32)
    pixels = ((images.clamp(-1, 1) + 1) / 2).permute(0, 2, 3, 1).numpy()
    for k in range(b):
        y, x = k // columns * (h + gap), k % columns * (w + gap)
        sheet[y : y + h, x : x + w] = pixels[k]
    large = sheet.repeat(enlarge, axis=0).repeat(enlarge, axis=1)
    return (large * 255 + 0.5).astype(np.uint8)


def image_rows(
    rows: Mapping[str, Tensor],
    *,
    columns: Sequence[str] = (),
    notes: Mapping[str, str] | None = None,
) -> Figure:
    """Draw one strip of images per row: same caption and same noise down each column.

    Args:
        rows: label to images ``[B, 3, H, W]`` in [-1, 1], the same B in each.
        columns: a caption per column, or none.
        notes: text to the right of a row, for example its measured rates.
    """
    notes = notes or {}
    count = len(next(iter(rows.values())))
    with style():
        figure = Figure(figsize=(1.05 * count + 3.2, 1.08 * len(rows) + 0.5))
        axes = figure.subplots(len(rows), 1, squeeze=False)[:, 0]
        for axis, (label, images) in zip(axes, rows.items(), strict=True):
            axis.imshow(contact_sheet(images, columns=count), interpolation="nearest")
            bare(axis)
            axis.set_ylabel(label, rotation=0, ha="right", va="center", labelpad=8)
            axis.text(
                1.01, 0.5, notes.get(label, ""), transform=axis.transAxes, va="center", fontsize=8
            )
        if columns:
            width = axes[0].get_xlim()[1]
            at = (np.arange(count) + 0.5) * width / count
            axes[0].set_xticks(at, columns, fontsize=7)
            axes[0].xaxis.tick_top()
            axes[0].tick_params(length=0)
        figure.subplots_adjust(hspace=0.06)
    return figure


def postcard_sheet(images: Tensor, captions: Sequence[str], *, columns: int = 4) -> Figure:
    """Draw postcards ``[B, 3, H, W]`` in [-1, 1], each above its caption."""
    rows = -(-len(images) // columns)
    with style():
        figure = Figure(figsize=(2.0 * columns, 2.35 * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for axis, image, caption in zip(axes, images, captions, strict=False):
            axis.imshow(contact_sheet(image[None], columns=1), interpolation="nearest")
            axis.set_xlabel("\n".join(textwrap.wrap(caption, 36)), fontsize=6.5)
        for axis in axes:
            bare(axis)
    return figure


def time_lines(rows: Mapping[str, Sequence[float]]) -> Figure:
    """Draw each schedule as the times at which a sampler stops on its way from 1 to 0."""
    with style():
        figure = Figure(figsize=(7.2, 0.36 * len(rows) + 0.8), layout="constrained")
        axis = figure.subplots()
        for y, times in enumerate(reversed([*rows.values()])):
            axis.plot(times, [y] * len(times), color=SOFT, lw=0.8, zorder=1)
            axis.scatter(times, [y] * len(times), s=16, color=ACCENT, zorder=2)
            if len(times) <= 5:
                for t in times[:-1]:
                    axis.annotate(
                        f"{t:.3g}",
                        (t, y),
                        (0, 4),
                        textcoords="offset points",
                        ha="center",
                        fontsize=7,
                    )
        axis.set_yticks(range(len(rows)), [*rows][::-1])
        axis.set(
            xlim=(1.03, -0.03), ylim=(-0.6, len(rows) - 0.2), xlabel="t (1 is noise, 0 is data)"
        )
    return figure


def small_multiples(
    table: pd.DataFrame,
    *,
    x: str,
    metrics: Mapping[str, str],
    xlabel: str,
    log_x: bool = True,
    goals: Mapping[str, float] | None = None,
    columns: int = 4,
) -> Figure:
    """Draw value and 95% interval of each metric against ``x``, one small panel each.

    Args:
        table: long form with columns ``x``, ``metric``, ``value``, ``low``, ``high``; rows whose
            x is NaN are the real images measured against other real images (drawn as a band).
        x: name of the x column.
        metrics: metric name to panel title.
        xlabel: label under the lowest panels.
        log_x: logarithmic x.
        goals: metric to the height of a dotted line.
        columns: panels per row.
    """
    goals = goals or {}
    rows = -(-len(metrics) // columns)
    with style():
        figure = Figure(figsize=(2.35 * columns, 2.05 * rows + 0.3), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for axis, (metric, title) in zip(axes, metrics.items(), strict=False):
            _one_metric(axis, table[table["metric"] == metric], x)
            axis.set_title(title)
            if metric in goals:
                axis.axhline(goals[metric], color=THIRD, ls=":", lw=1)
            if log_x:
                log_axis(axis, table[x].dropna().unique())
        for axis in axes[: len(metrics)][-columns:]:
            axis.set_xlabel(xlabel)
        for axis in axes[len(metrics) :]:
            axis.set_visible(False)
    return figure


def field_portrait(
    velocity: Callable[[np.ndarray, float], np.ndarray],
    paths: Mapping[str, np.ndarray],
    data: np.ndarray,
    *,
    times: Sequence[float],
    reach: float,
) -> Figure:
    """Draw a 2-D velocity field at some times, and sampling paths through it.

    Args:
        velocity: ``(points [N, 2], t) -> [N, 2]``.
        paths: label to trajectories ``[steps + 1, N, 2]``.
        data: samples of the data ``[M, 2]``.
        times: at which the field is drawn.
        reach: half width of the picture.
    """
    side = np.linspace(-reach, reach, 17)
    grid = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)
    with style():
        panels = len(times) + len(paths)
        figure = Figure(figsize=(2.3 * panels, 2.5), layout="constrained")
        axes = figure.subplots(1, panels, squeeze=False)[0]
        for axis, t in zip(axes, times, strict=False):
            v = -velocity(grid, t)  # sampling walks against the velocity, from noise to data
            axis.quiver(*grid.T, *v.T, color=SECOND, angles="xy", width=0.006)
            axis.scatter(*data.T, s=1.5, color=SOFT, zorder=0)
            axis.set_title(f"where a sampler goes at t = {t:g}")
        for axis, (label, path) in zip(axes[len(times) :], paths.items(), strict=True):
            axis.scatter(*data.T, s=1.5, color=SOFT, zorder=0)
            axis.plot(path[..., 0], path[..., 1], color=SECOND, lw=0.5, alpha=0.5)
            axis.scatter(*path[-1].T, s=5, color=ACCENT, zorder=3)
            axis.set_title(label)
        for axis in axes:
            axis.set(
                xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", xticks=[], yticks=[]
            )
    return figure


def loss_curve(history: Sequence[Mapping[str, Any]], *, term: str) -> Figure:
    """Draw one loss term of a training history against the step, through all stages."""
    with style():
        figure = Figure(figsize=(5.2, 2.4), layout="constrained")
        axis = figure.subplots()
        begin = 0
        for stage in sorted({record["stage"] for record in history}):
            records = [record for record in history if record["stage"] == stage]
            steps = [begin + record["step"] for record in records]
            axis.plot(steps, [record["terms"][term] for record in records], color=SECOND, lw=0.8)
            axis.axvline(begin, color=SOFT, lw=0.6, ls=":")
            below = -8 - 9 * (stage % 2)  # neighbours at two heights, since stages can be short
            axis.annotate(
                f"{stage}" if begin else f"stage {stage}", (begin, 1), (2, below),
                xycoords=("data", "axes fraction"), textcoords="offset points",
                fontsize=7, color=SOFT,
            )  # fmt: skip
            begin = steps[-1]
        axis.set(xlabel="step", ylabel="mean squared velocity error", yscale="log")
    return figure


def _one_metric(axis: Axes, rows: pd.DataFrame, x: str) -> None:
    real = rows[rows[x].isna()]
    for _, floor in real.iterrows():
        axis.axhspan(floor["low"], floor["high"], color=SOFT, alpha=0.25, lw=0)
        axis.axhline(floor["value"], color=SOFT, lw=1)
    points = rows.dropna(subset=[x]).sort_values(x)
    error = [points["value"] - points["low"], points["high"] - points["value"]]
    axis.errorbar(
        points[x],
        points["value"],
        yerr=np.abs(error),
        color=ACCENT,
        marker="o",
        ms=3,
        lw=1.2,
        capsize=2,
    )
    if len(real):
        axis.annotate(
            "real", (0, real["value"].iloc[0]), xycoords=("axes fraction", "data"), fontsize=7,
            color=SOFT, ha="left", va="bottom",
        )  # fmt: skip


def log_axis(axis: Axes, ticks: Sequence[float]) -> None:
    """Logarithmic x with a label at the last point and all that do not crowd the one before."""
    axis.set_xscale("log")
    shown: list[float] = []
    for tick in sorted(ticks):
        if not shown or tick >= 1.4 * shown[-1]:
            shown.append(tick)
    last = max(ticks)
    if last > shown[-1] and math.log(last / shown[-1]) < 0.12 * math.log(last / shown[0]):
        shown.pop()
    shown = [*[tick for tick in shown if tick < last], last]
    axis.set_xticks(shown, [f"{t:g}" for t in shown], fontsize=7)
    axis.minorticks_off()


def bare(axis: Axes) -> None:
    """Take ticks and frame away."""
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_visible(False)
