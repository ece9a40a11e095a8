"""Figures of notebook 04's postcards, from a comparison of direct and warm students."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from turbo_lab.charts import judged, judged_blocks, judged_sheet
from turbo_lab.figures import INK, SOFT, style
from turbo_lab.palette import colour_of, shades
from turbo_lab.studies.distribution_figures import SHOWN, Look, hue_bars
from turbo_lab.studies.matching import PARTS
from turbo_lab.studies.warm_start import (
    ALL_METRICS,
    ALONE,
    DIRECT,
    MOST,
    TEACHER,
    TITLES,
    WARM,
    Comparison,
    images_of,
)
from turbo_lab.studies.warm_start_sweeps import SWEPT, shares, sweeps

SHORT = {TEACHER: "teacher, 40 steps", DIRECT: "DMD2, direct", WARM: "PCM, then DMD2"}


def side_by_side(
    comparison: Comparison, *, rows: int = 4, columns: int = 4, seed: int = 0
) -> Figure:
    """Direct DMD2 and, right, DMD2 after the warm start: the first captions, the same noises.

    The oracle outlines broken bodies and says what is wrong.

    Args:
        comparison: of all students.
        rows: of pictures.
        columns: of pictures, on each side.
        seed: which training is shown.
    """
    blocks = {
        TITLES[family]: judged(_of_training(comparison, family, seed)[: rows * columns])
        for family in (DIRECT, WARM)
    }
    return judged_blocks(blocks, columns=columns)


def pictures(comparison: Comparison, *, count: int = 9, seed: int = 0) -> Figure:
    """The same captions and noises down each column; broken bodies outlined.

    Args:
        comparison: of all students.
        count: captions shown.
        seed: which training is shown.
    """
    with style():
        figure = Figure(figsize=(0.95 * count + 1.8, 1.0 * len(TITLES)), layout="constrained")
        for axis, (family, title) in zip(
            figure.subplots(len(TITLES), 1), TITLES.items(), strict=True
        ):
            shown = _of_training(comparison, family, seed)[:count]
            judged_sheet(axis, judged(shown), columns=count)
            axis.set_ylabel(title, rotation=0, ha="right", va="center", labelpad=6)
    return figure


def one_caption(comparison: Comparison, *, prompt: int = 0, seed: int = 0) -> Figure:
    """Some noises of one caption: teacher, direct DMD2 and DMD2 after the warm start.

    Args:
        comparison: of all students.
        prompt: which of the captions.
        seed: which training is shown.
    """
    noises = comparison.budget.noises
    count = min(SHOWN, noises)
    columns = max(1, round(count**0.5))
    with style():
        figure = Figure(figsize=(3.2 * len(SHORT), 3.4), layout="constrained")
        for axis, (family, title) in zip(
            figure.subplots(1, len(SHORT)), SHORT.items(), strict=True
        ):
            images = _of_training(comparison, family, seed, prompts=True)
            shown = judged(images[prompt * noises : prompt * noises + count])
            judged_sheet(axis, shown, columns=columns)
            axis.set_title(title)
    return figure


def hues(comparison: Comparison) -> Figure:
    """Shares of the garment hues: the truth, the teacher, and every direct and warm training."""
    return hue_bars({title: comparison.measured[f].hue_mode for f, title in SHORT.items()})


def limbs(counts: pd.DataFrame) -> Figure:
    """Found counts of heads, arms and legs as shares; the right count is outlined.

    Args:
        counts: of `turbo_lab.studies.warm_start.limb_counts`.
    """
    found = [str(n) for n in range(MOST)] + [f"{MOST}+"]
    with style():
        figure = Figure(figsize=(8.2, 0.34 * len(TITLES) + 0.9), layout="constrained")
        for axis, (part, right) in zip(
            figure.subplots(1, len(PARTS), sharey=True), PARTS.items(), strict=True
        ):
            of = counts[counts["part"] == part].pivot(
                index="family", columns="found", values="share"
            )
            _shaded(axis, of.loc[list(TITLES)].to_numpy())
            frame = Rectangle((right - 0.5, -0.5), 1, len(TITLES), fill=False, ec=INK, lw=1.2)
            axis.add_patch(frame)
            axis.set(title=f"{part} found", xticks=range(MOST + 1), xticklabels=found)
            axis.set_yticks(range(len(TITLES)), list(TITLES.values()), fontsize=8)
    return figure


def _shaded(axis: Axes, values: np.ndarray) -> None:
    axis.imshow(values, cmap="Greys", vmin=0, vmax=1.15, aspect="auto")
    for (y, x), value in np.ndenumerate(values):
        shade = "white" if value > 0.6 else INK
        axis.text(x, y, f"{value:.0%}", ha="center", va="center", fontsize=7, color=shade)
    axis.tick_params(length=0)


def share_lines(comparison: Comparison, rows: pd.DataFrame) -> Figure:
    """Metrics against the warm start's share of the network calls.

    The line joins the first training of each share, with intervals over captions; hollow points
    are the other trainings. The band is the teacher.

    Args:
        comparison: of all students.
        rows: of `turbo_lab.studies.warm_start_sweeps.sweep`.
    """
    at = {f: 100 * share for f, share in shares().items() if f in comparison.families}
    colour = colour_of(WARM)
    with style():
        figure = Figure(figsize=(8.6, 4.2), layout="constrained")
        for axis, metric in zip(figure.subplots(2, 3).ravel(), SWEPT, strict=True):
            of = rows[(rows["metric"] == metric) & rows["family"].isin(at)]
            of = of.assign(at=of["family"].map(at)).sort_values("at")
            _teacher_band(axis.axhspan, rows, metric)
            first, others = of[of["training"] == 0], of[of["training"] > 0]
            error = _whiskers(first)
            axis.errorbar(
                first["at"], first["value"], yerr=error, color=colour, marker="o", ms=4, lw=1.2,
                capsize=2,
            )  # fmt: skip
            axis.plot(others["at"], others["value"], "o", mfc="none", mec=colour, ms=4, mew=0.8)
            axis.set(title=ALL_METRICS[metric], xticks=list(at.values()))
            axis.set_xlabel("% of the calls before DMD2")
    return figure


def looks(comparison: Comparison) -> dict[str, Look]:
    """How the trainings of `warm_start_sweeps.curves` are drawn: darker with a longer start."""
    direct, *warm = sweeps(comparison)["warm start"].items()
    started = [label for family, label in warm if family != ALONE]
    colours = shades(WARM, len(started))
    own = {label: (colour, "-") for label, colour in zip(started, colours, strict=True)}
    return {direct[1]: (colour_of(direct[0]), "-"), **own}


def choices(comparison: Comparison, rows: pd.DataFrame, metrics: Sequence[str]) -> Figure:
    """Second times, direct beside warm, and other starts: one row each, one panel per metric.

    Filled points are first trainings, with intervals over captions; hollow ones the others; direct
    students are in another colour. The band is the teacher, the line the direct student of the
    first seed at the usual second time.

    Args:
        comparison: of all students.
        rows: of `turbo_lab.studies.warm_start_sweeps.sweep`.
        metrics: the panels.
    """
    groups = sweeps(comparison)
    others = {f: label for f, label in groups["other starts"].items() if f != WARM}
    labels = {**groups["second time"], **others}
    with style():
        height = 0.3 * len(labels) + 0.9
        figure = Figure(figsize=(1.7 * len(metrics) + 2.2, height), layout="constrained")
        axes = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
        for axis, metric in zip(axes, metrics, strict=True):
            of = rows[rows["metric"] == metric]
            _teacher_band(axis.axvspan, rows, metric)
            direct = of[(of["family"] == DIRECT) & (of["training"] == 0)]
            axis.axvline(float(direct["value"].iloc[0]), color=colour_of(DIRECT), lw=1)
            _dots(axis, of, labels)
            axis.set_title(ALL_METRICS[metric], fontsize=8)
        axes[0].set_yticks(range(len(labels)), list(labels.values()), fontsize=8)
        axes[0].invert_yaxis()
    return figure


def _dots(axis: Axes, of: pd.DataFrame, labels: Mapping[str, str]) -> None:
    for y, family in enumerate(labels):
        own = of[of["family"] == family]
        first, others = own[own["training"] == 0], own[own["training"] > 0]
        colour = colour_of(family)
        axis.errorbar(
            first["value"], [y], xerr=_whiskers(first), color=colour, fmt="o", ms=4, lw=1, capsize=2
        )
        axis.plot(others["value"], [y] * len(others), "o", mfc="none", mec=colour, ms=4, mew=0.8)
    axis.grid(axis="y", color=SOFT, alpha=0.2)


def _whiskers(rows: pd.DataFrame) -> np.ndarray:
    low, high = rows["value"] - rows["low"], rows["high"] - rows["value"]
    return np.abs(np.stack([low, high]))


def _teacher_band(span: Callable[..., object], rows: pd.DataFrame, metric: str) -> None:
    """Draw by ``axhspan`` or ``axvspan`` of an axis."""
    for _, band in rows[(rows["family"] == TEACHER) & (rows["metric"] == metric)].iterrows():
        span(band["low"], band["high"], fc=to_rgba(SOFT, 0.25), ec=SOFT, lw=0.6)


def _of_training(
    comparison: Comparison, family: str, seed: int, *, prompts: bool = False
) -> Tensor:
    found = images_of(comparison, family, prompts=prompts)
    return found[min(seed, len(found) - 1)]
