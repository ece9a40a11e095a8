"""Figures of C7: ratios beside the limit of the call counts, and where a picture's time goes."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from turbo_lab.figures import ACCENT, INK, SECOND, SOFT, THIRD, style
from turbo_lab.studies.speed import FUSED, SHARES, WAYS, Speed, parts, table
from turbo_lab.studies.speed_clock import APART, PARTS, TEACHERS, TOGETHER

REST = "everything else"
COLOURS = {"network": SECOND, REST: ACCENT}
MARKS = {TOGETHER: ("o", INK), APART: ("s", ACCENT)}


def ratio_figure(speed: Speed) -> Figure:
    """Draw how many times as fast the student is, with intervals: one panel per teacher.

    The dashed line is the ratio of network forwards, the dotted one what the claim asks for;
    filled marks have the adapter in the weights, hollow ones beside them.
    """
    rows = table(speed)
    with style():
        figure = Figure(figsize=(7.4, 3.8), layout="constrained")
        axes = figure.subplots(1, len(SHARES), sharey=True)
        for axis, (steps, asked) in zip(axes, SHARES.items(), strict=True):
            axis.axhline(speed.limit(steps), color=SOFT, ls="--", lw=1, label="fewer forwards")
            axis.axhline(asked, color=THIRD, ls=":", lw=1, label="asked for")
            _marks(axis, rows[rows["steps"] == steps])
            axis.set_xticks(range(len(speed.batches)), [f"{b}" for b in speed.batches])
            axis.set_xlim(-0.5, len(speed.batches) - 0.5)
            axis.set_xlabel("pictures at a time")
            axis.set_title(f"against {steps} guided steps, {speed.nfe[str(steps)]:g} forwards")
        axes[0].set_ylim(0, 1.08 * max(max(map(speed.limit, SHARES)), rows["high"].max()))
        axes[0].set_ylabel("times as fast, median of pairs")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=7)
    return figure


def _marks(axis: Axes, rows: object) -> None:
    """One mark with its interval for every batch, way and teacher."""
    for k, ((guidance, way), own) in enumerate(rows.groupby(["guidance", "way"])):  # type: ignore[attr-defined]
        mark, colour = MARKS[guidance]
        x = np.arange(len(own)) + 0.12 * (k - 1.5)
        error = np.abs([own["value"] - own["low"], own["high"] - own["value"]])
        axis.errorbar(
            x, own["value"], yerr=error, fmt=mark, color=colour, ms=4, lw=1, capsize=2,
            mfc=colour if way == FUSED else "white", label=f"{WAYS[way]}; {TEACHERS[guidance]}",
        )  # fmt: skip


def parts_figure(speed: Speed, steps: int = 40) -> Figure:
    """Draw the time of a picture, the teacher's divided by the ratio of the forwards.

    Where a teacher's bar is as long as the student's, the student is as many times as fast.
    """
    rows = parts(speed, steps)
    rows[REST] = rows[[part for part in PARTS if part != "network"]].sum(axis=1)
    share = f"teacher's time / {speed.limit(steps):g}"
    titles = {**{g: f"{share}, {title}" for g, title in TEACHERS.items()}, **WAYS}
    with style():
        figure = Figure(figsize=(7.6, 2.0), layout="constrained")
        axes = figure.subplots(1, len(speed.batches), squeeze=False, sharey=True)[0]
        for axis, batch in zip(axes, speed.batches, strict=True):
            own = rows[rows["batch"] == batch].set_index("who").reindex(list(titles))
            left = np.zeros(len(own))
            for part, colour in COLOURS.items():
                axis.barh(range(len(own)), own[part], left=left, color=colour, label=part)
                left += np.maximum(own[part].to_numpy(), 0)
            for y, whole in enumerate(left):
                axis.annotate(
                    f"{whole:.1f}", (whole, y), (3, 0), textcoords="offset points", fontsize=7,
                    va="center",
                )  # fmt: skip
            axis.set_xlim(0, 1.15 * left.max())
            axis.set_yticks(range(len(own)), list(titles.values()), fontsize=7)
            axis.set_title(f"{batch} picture{'s' * (batch > 1)} at a time")
            axis.set_xlabel("ms per picture")
        axes[0].invert_yaxis()
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=7)
    return figure
