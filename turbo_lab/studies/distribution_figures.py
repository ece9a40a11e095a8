"""Figures of notebook 03, from a comparison of DMD2 students."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from turbo_lab import charts, measure
from turbo_lab.figures import INK, SOFT, bare, contact_sheet, style
from turbo_lab.measure.palette import CHROMA_BINS
from turbo_lab.palette import colour_of, shades
from turbo_lab.postcards import HUE_MODES
from turbo_lab.recipes import student_recipe
from turbo_lab.recipes.distribution import VARIANTS
from turbo_lab.recipes.trajectory import FAMILIES as TRAJECTORY
from turbo_lab.studies.distribution import (
    FEW,
    METRICS,
    TEACHER,
    TITLES,
    Comparison,
    Sampler,
    images_of,
    steps_title,
)

SWATCHES = {
    "crimson": "#d63a4e",
    "amber": "#d9a520",
    "cyan": "#22b8c4",
    "blue": "#3b62d0",
    "violet": "#8a46cf",
    "magenta": "#cf3ba8",
}
"""What the garment hues look like, in the order of `HUE_MODES`."""
CURVES = {
    "student/g_norm": "size of the gradient: rms of $g$",
    "student/gap": r"gap: rms of $\hat x_{fake} - \hat x_{teacher}$",
    "fake/velocity": "loss of the fake: its flow matching",
}
"""What is watched of a training, and what it is called."""
Look = tuple[str, str]
"""Colour and style of a line."""
SHOWN = 9
"""Noises of one caption that a figure has room for."""


def lines(rows: pd.DataFrame) -> Figure:
    """Every metric against steps, one line per family, the teacher as a band."""
    shown = rows[rows["family"].isin(TITLES)]
    return charts.compared_lines(shown, metrics=METRICS, titles=TITLES)


def _ours(comparison: Comparison) -> dict[Sampler, str]:
    """The teacher and the plain DMD2 students, from many steps to few."""
    steps = sorted(comparison.budget.steps, reverse=True)
    return {TEACHER: TITLES["teacher"], **{("dmd2", n): steps_title("dmd2", n) for n in steps}}


def pictures(comparison: Comparison, *, count: int = 6, seed: int = 0) -> Figure:
    """The same captions and noises: teacher, DMD2 students, and two of notebook 02's methods.

    Args:
        comparison: of all students.
        count: captions shown.
        seed: which training is shown.
    """
    rows = {TITLES["teacher"]: TEACHER}
    for steps in sorted(comparison.budget.steps, reverse=True):
        for family in ("progressive", "continuous", "dmd2"):
            rows[steps_title(family, steps)] = (family, steps)
    with style():
        figure = Figure(figsize=(1.05 * count + 2.3, 1.05 * len(rows)), layout="constrained")
        grid = figure.subplots(len(rows), count, squeeze=False)
        for axes, (label, sampler) in zip(grid, rows.items(), strict=True):
            found = images_of(comparison, sampler)
            images = found[min(seed, len(found) - 1)]
            for axis, image in zip(axes, images, strict=False):
                sheet = contact_sheet(image[None], columns=1, enlarge=1)
                axis.imshow(sheet, interpolation="nearest")
            for axis in axes:
                bare(axis)
            axes[0].set_ylabel(label, rotation=0, ha="right", va="center", labelpad=6)
    return figure


def one_caption(comparison: Comparison, *, prompt: int = 0, seed: int = 0) -> Figure:
    """Some noises of one caption, teacher and students side by side.

    Args:
        comparison: of all students.
        prompt: which of the captions.
        seed: which training is shown.
    """
    ours, noises = _ours(comparison), comparison.budget.noises
    shown = min(SHOWN, noises)
    rows = slice(prompt * noises, prompt * noises + shown)
    with style():
        figure = Figure(figsize=(2.7 * len(ours), 2.95), layout="constrained")
        for axis, (sampler, title) in zip(
            figure.subplots(1, len(ours), squeeze=False)[0], ours.items(), strict=True
        ):
            found = images_of(comparison, sampler, prompts=True)
            images = found[min(seed, len(found) - 1)][rows]
            sheet = contact_sheet(images, columns=max(1, round(shown**0.5)), enlarge=1)
            axis.imshow(sheet, interpolation="nearest")
            axis.set_title(title)
            bare(axis)
    return figure


def hues(comparison: Comparison) -> Figure:
    """Shares of the garment hues: the truth, the teacher, every training of DMD2's students.

    Of notebook 02's students at 2 steps one bar has all trainings of a method.
    """
    modes = {title: comparison.measured[s].hue_mode for s, title in _ours(comparison).items()}
    for family in TRAJECTORY:
        found = comparison.measured[family, FEW].hue_mode
        modes[f"{steps_title(family, FEW)}\nall trainings"] = found.reshape(1, -1)
    return hue_bars(modes)


def hue_bars(modes: Mapping[str, np.ndarray]) -> Figure:
    """Shares of the garment hues as stacked bars, the truth first.

    Args:
        modes: title to hue modes ``[trainings, images]``, -1 off every mode; one bar per training.
    """
    columns = [("truth", measure.hue_truth().numpy())]
    for title, found in modes.items():
        for k, row in enumerate(found):
            shares = measure.hue_shares(torch.from_numpy(row).long())[:-1].numpy()
            name = title if len(found) == 1 else f"{title}\ntraining {k}"
            columns.append((name, shares))
    with style():
        figure = Figure(figsize=(0.78 * len(columns) + 1.6, 3.2), layout="constrained")
        axis = figure.subplots()
        for x, (_, shares) in enumerate(columns):
            _stacked(axis, x, shares)
        for x, ((before, _), (name, _)) in enumerate(pairwise(columns)):
            if before.split("\n")[0] != name.split("\n")[0]:
                axis.axvline(x + 0.5, color=SOFT, lw=0.5)
        names = [_broken(name) for name, _ in columns]
        axis.set_xticks(range(len(columns)), names, fontsize=7)
        axis.set(ylim=(0, 1), ylabel="share of garments", xlim=(-0.6, len(columns) - 0.4))
        handles = [axis.bar(0, 0, color=c, label=n) for n, c in SWATCHES.items()]
        handles.append(axis.bar(0, 0, color="#dddddd", label="no hue of these"))
        figure.legend(handles=handles[::-1], loc="outside right center", fontsize=8)
    return figure


def _broken(name: str) -> str:
    """A title on several lines, no word of it wider than a bar."""
    title, _, training = name.partition("\n")
    lines = title.replace(", ", "\n", 1).replace(" (", "\n(").replace("distillation", "dist.")
    return "\n".join(filter(None, (lines.replace("continuous ", "continuous\n"), training)))


def _stacked(axis: Axes, x: float, shares: np.ndarray) -> None:
    bottom = 0.0
    assert list(SWATCHES) == list(HUE_MODES)
    for share, colour in zip(shares, SWATCHES.values(), strict=True):
        axis.bar(x, share, 0.8, bottom=bottom, color=colour)
        bottom += float(share)
    axis.bar(x, 1 - bottom, 0.8, bottom=bottom, color="#dddddd")


def chromas(comparison: Comparison) -> Figure:
    """Distribution of pixel chroma: real, teacher, students."""
    at = (np.arange(CHROMA_BINS) + 0.5) / CHROMA_BINS
    real = np.diff(comparison.real_cdf, prepend=0.0) * CHROMA_BINS
    with style():
        figure = Figure(figsize=(7.2, 3.0), layout="constrained")
        left, right = figure.subplots(1, 2)
        left.fill_between(at, real, color=SOFT, alpha=0.35, lw=0, label="real")
        ours = _ours(comparison)
        colours = (INK, *shades("dmd2", len(ours) - 1)[::-1])  # darker with more steps
        for colour, (sampler, title) in zip(colours, ours.items(), strict=True):
            cdf = comparison.measured[sampler].cdf.reshape(-1, CHROMA_BINS).mean(0)
            left.plot(
                at, np.diff(cdf, prepend=0.0) * CHROMA_BINS, color=colour, lw=1.2, label=title
            )
            right.plot(at, cdf - comparison.real_cdf, color=colour, lw=1.2)
        right.axhline(0, color=SOFT, lw=1)
        left.set(xlabel="chroma of a pixel", ylabel="density", xlim=(0, 1))
        right.set(
            xlabel="chroma of a pixel",
            ylabel="share below, minus real",
            title="below 0: more colour than real",
            xlim=(0, 1),
        )
        left.legend(fontsize=8)
    return figure


def second_time(rows: pd.DataFrame, variants: Mapping[str, str]) -> Figure:
    """Metrics of the 2-step student against its second time.

    Args:
        rows: of `distribution.table`.
        variants: families of 2-step students; those that differ in their times are drawn.
    """
    plain = student_recipe("dmd2", steps=FEW)
    times = {"dmd2": plain.times[1]}
    for family in variants:
        if family.startswith("dmd2-second"):
            times[family] = student_recipe(family, steps=FEW).times[1]
    shown = ("sign_read", "whole_body", "hue_kl", "saturation")
    with style():
        figure = Figure(figsize=(9, 2.4), layout="constrained")
        for axis, metric in zip(figure.subplots(1, len(shown)), shown, strict=True):
            of = rows[(rows["metric"] == metric)]
            band = of[of["family"] == "teacher"].iloc[0]
            axis.axhspan(band["low"], band["high"], color=SOFT, alpha=0.25, lw=0)
            part = of[of["family"].isin(times) & (of["steps"] == FEW)]
            part = part.assign(at=part["family"].map(times)).sort_values("at")
            error = [part["value"] - part["low"], part["high"] - part["value"]]
            axis.errorbar(
                part["at"], part["value"], yerr=np.abs(error), color=colour_of("dmd2"),
                marker="o", ms=4, lw=1.2, capsize=2,
            )  # fmt: skip
            axis.set(title=METRICS[metric], xlabel="second time")
    return figure


def training_curves(curves: pd.DataFrame, looks: Mapping[str, Look]) -> Figure:
    """Gradient, gap and fake loss of trainings, against network calls per sample.

    Thin the values as they were written down, thick their running mean.

    Args:
        curves: long form ``student, calls, term, value``.
        looks: colour and line of each student.
    """
    with style():
        figure = Figure(figsize=(9, 3.0), layout="constrained")
        for axis, (term, title) in zip(
            figure.subplots(1, len(CURVES)), CURVES.items(), strict=True
        ):
            of = curves[curves["term"] == term]
            for student, part in of.groupby("student", sort=False):
                colour, line = looks[str(student)]
                axis.plot(part["calls"], part["value"], color=colour, lw=0.5, alpha=0.3)
                axis.plot(
                    part["calls"], running_mean(part["value"].to_numpy()), color=colour, ls=line,
                    lw=1.6, label=str(student),
                )  # fmt: skip
            axis.set(title=title, xlabel="network calls per sample")
        handles, labels = axis.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8)
    return figure


def looks(comparison: Comparison) -> dict[str, Look]:
    """Lines for `distribution.curves`: darker with more steps, black for other updates."""
    steps = sorted(comparison.budget.steps)
    shade = dict(zip(steps, shades("dmd2", len(steps)), strict=True))
    plain = {f"{n} steps": (shade[n], "-") for n in steps}
    lines = {"updates-1": ":", "updates-4": "--"}
    changed = {f"{FEW} steps, {VARIANTS[v].title}": (INK, lines[v]) for v in lines}
    return {**plain, **changed}


def running_mean(values: np.ndarray, part: float = 0.2) -> np.ndarray:
    """Mean of each value and its neighbours, together a part of all; fewer at the ends.

    Args:
        values: ``[n]``, in order.
        part: in (0, 1].
    """
    half = int(part * len(values) / 2)
    near = [values[max(0, k - half) : k + half + 1] for k in range(len(values))]
    return np.array([one.mean() for one in near])


def dots(
    rows: pd.DataFrame, variants: Mapping[str, str], metrics: Sequence[str], *, steps: int = FEW
) -> Figure:
    """One row per student of so many steps, one panel per metric, the teacher as a band.

    Args:
        rows: of `distribution.table`.
        variants: family to label, from top to bottom.
        metrics: the panels.
        steps: of all the students.
    """
    families = [f for f in variants if f != "teacher"]
    with style():
        height = 0.27 * len(families) + 0.9
        figure = Figure(figsize=(2.0 * len(metrics) + 1.8, height), layout="constrained")
        axes = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
        for axis, metric in zip(axes, metrics, strict=True):
            of = rows[rows["metric"] == metric]
            for _, band in of[of["family"] == "teacher"].iterrows():
                axis.axvspan(band["low"], band["high"], color=SOFT, alpha=0.25, lw=0)
            part = of[of["steps"] == steps].set_index("family").reindex(families)
            for y, family in enumerate(families):
                charts.dot(axis, part.loc[family], y, colour_of(family))
            axis.set_title(METRICS[metric])
            axis.grid(axis="y", color=SOFT, alpha=0.2)
        axes[0].set_yticks(range(len(families)), [variants[f] for f in families], fontsize=8)
        axes[0].set_ylim(len(families) - 0.5, -0.5)  # the first on top
    return figure
