"""Figures of notebook 05, part A; the numbers are from `points_gan`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from torch import Tensor

from turbo_lab.figures import ACCENT, INK, SECOND, SOFT, THIRD, style
from turbo_lab.studies.points_distribution_figures import cloud
from turbo_lab.studies.points_gan import ALONE, BLURRED, TILTED, WORLDS, Runs, shares
from turbo_lab.studies.points_gan_measures import width_of
from turbo_lab.studies.points_maps import outside
from turbo_lab.testbeds.points import points, truth_of

SHOWN = ("data", "teacher", ALONE, "rho 0", "rho 0.5", "rho 1")
"""Columns of the clouds."""
DRAWN = 1024
"""Samples in a panel."""
REACH = 2.5
COLOURS: Mapping[str, str] = {ALONE: SOFT, "rho 0": SECOND, "rho 0.5": THIRD, "rho 1": ACCENT}
"""Students in the panels on gradients."""
DEFECTS: Mapping[str, tuple[str, str]] = {
    TILTED: ("mode_rkl", "KL of mode shares\nfrom the data's"),
    BLURRED: ("width", "width of modes,\n1 for the data"),
}
"""What is wrong with each teacher, as a column of the table."""
DISTANCES: Mapping[str, str] = {
    TILTED: "energy distance",
    BLURRED: "energy distance\nwithin a mode",
}
WITHOUT = -0.3
"""Where on the axis of rho the student without a GAN stands."""


def figure_clouds(runs: Runs, *, seed: int = 0) -> Figure:
    """Data, teacher and students, a row per wrong teacher; all from the same noise.

    Circles are 3 standard deviations of the data, red is outside of them. Where weights are wrong,
    the numbers are the shares of the modes in percent.

    Args:
        runs: all trainings.
        seed: which training is shown.
    """
    with style():
        size = (1.75 * len(SHOWN), 2.05 * len(WORLDS))
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(len(WORLDS), len(SHOWN), squeeze=False)
        for line, world in zip(axes, WORLDS, strict=True):
            for axis, who in zip(line, SHOWN, strict=True):
                clouds = runs.of(world, who)
                _panel(axis, world, clouds[min(seed, len(clouds) - 1)])
                if world == TILTED:
                    axis.set_title(who)
            line[0].set_ylabel(WORLDS[world])
    return figure


def _panel(axis: Axes, world: str, x: Tensor) -> None:
    truth = points(truth_of(world)).teacher
    rings = [Circle(m, 3 * float(s)) for m, s in zip(truth.means, truth.stds, strict=True)]
    axis.add_collection(PatchCollection(rings, facecolor="none", edgecolor=SOFT, lw=0.5))
    far = outside(truth_of(world), x)
    cloud(axis, x[:DRAWN], far[:DRAWN])
    if world == TILTED:
        _numbers(axis, truth.means, shares(world, x))
    within = 1 - float(far.double().mean())
    label = f"{within:.0%} within, width {width_of(x, truth):.2f}"
    axis.set_xlabel(label, fontsize=7, labelpad=1)
    axis.set(xlim=(-REACH, REACH), ylim=(-REACH, REACH), aspect="equal", xticks=[], yticks=[])


def _numbers(axis: Axes, means: Tensor, found: Sequence[float]) -> None:
    for mean, share in zip((1.5 * means).tolist(), found, strict=True):
        axis.text(
            mean[0], mean[1], f"{100 * share:.0f}", fontsize=6, color=INK, ha="center", va="center"
        )


def figure_rho(rows: pd.DataFrame, found: pd.DataFrame) -> Figure:
    """Share of real data against both distances, against the teacher's defect and quality.

    A column per wrong teacher. Dots are trainings, bars 95% intervals over trainings and samples
    together; dashed is the teacher itself. The leftmost student has no GAN.

    Args:
        rows: of `points_gan.table`.
        found: of `points_gan.intervals`.
    """
    with style():
        figure = Figure(figsize=(4.0 * len(WORLDS), 6.4), layout="constrained")
        axes = figure.subplots(3, len(WORLDS), sharex=True)
        for column, (world, title) in zip(axes.T, WORLDS.items(), strict=True):
            here, ours = rows[rows["world"] == title], found[found["world"] == title]
            for target, colour in (("truth", ACCENT), ("teacher", SECOND)):
                _distances(column[0], here, ours[ours["target"] == target], target, colour)
            column[0].set(title=title, ylabel=DISTANCES[world])
            column[0].set_ylim(bottom=min(0.0, column[0].get_ylim()[0]))
            for axis, (name, label) in zip(
                column[1:], (DEFECTS[world], ("within", "within 3 sigma\nof a mode")), strict=True
            ):
                _dots(axis, here, name, INK)
                _level(axis, here, name, INK)
                axis.set_ylabel(label)
            column[2].set_xlabel("rho, share of real data on the critic's side")
            _rho_axis(column[2], here)
        axes[0, 1].legend(fontsize=7, loc="upper right")
    return figure


def _distances(
    axis: Axes, rows: pd.DataFrame, found: pd.DataFrame, target: str, colour: str
) -> None:
    _dots(axis, rows, f"to_{target}", colour)
    at = found["rho"].fillna(WITHOUT)
    error = np.abs([found["value"] - found["low"], found["high"] - found["value"]])
    label = f"to the {'data' if target == 'truth' else target}"
    axis.errorbar(at, found["value"], yerr=error, color=colour, lw=0, elinewidth=1, capsize=2)
    line = found.dropna(subset="rho")
    axis.plot(line["rho"], line["value"], color=colour, lw=1.4, label=label)
    if target == "truth":
        _level(axis, rows, "to_truth", colour, label="the teacher's, to the data")


def _dots(axis: Axes, rows: pd.DataFrame, name: str, colour: str) -> None:
    """One per training; a line through the means of those with a GAN."""
    ours = rows[~rows["student"].isin(["teacher", "data"])]
    at = ours["rho"].fillna(WITHOUT)
    axis.scatter(at, ours[name], s=10, color=colour, lw=0, alpha=0.5)
    means = ours.dropna(subset="rho").groupby("rho")[name].mean()
    axis.plot(means.index, means, color=colour, lw=1.4)


def _level(axis: Axes, rows: pd.DataFrame, name: str, colour: str, label: str = "") -> None:
    level = float(rows.loc[rows["student"] == "teacher", name].mean())
    axis.axhline(level, color=colour, lw=1, ls="--", label=label or None)


def _rho_axis(axis: Axes, rows: pd.DataFrame) -> None:
    rhos = sorted({rho for rho in rows["rho"] if not math.isnan(rho)})
    axis.set_xticks([WITHOUT, *rhos], ["no GAN", *(f"{rho:g}" for rho in rhos)])


def figure_angles(rows: pd.DataFrame) -> Figure:
    """Cosine between the gradients of GAN and DMD2 at the student's samples, and their sizes.

    Bands go from the least to the largest of the seeds. Of DMD2 alone, it is the gradient of a
    critic of the data that the student does not follow.

    Args:
        rows: of `points_gan.angles`.
    """
    with style():
        figure = Figure(figsize=(4.0 * len(WORLDS), 4.4), layout="constrained")
        axes = figure.subplots(2, len(WORLDS), sharex=True, sharey="row")
        for column, title in zip(axes.T, WORLDS.values(), strict=True):
            here = rows[rows["world"] == title]
            for student, colour in COLOURS.items():
                ours = here[here["student"] == student]
                for axis, name in zip(column, ("cosine", "ratio"), strict=True):
                    _band(axis, ours, name, colour, student)
            column[0].axhline(0, color=SOFT, lw=0.8)
            column[0].set_title(title)
            column[1].set(xlabel="share of the training", yscale="log")
        axes[0, 0].set_ylabel("cosine")
        axes[1, 0].set_ylabel("size at weight 1,\nGAN over DMD2")
        axes[0, 1].legend(fontsize=7, ncols=2)
    return figure


def _band(axis: Axes, rows: pd.DataFrame, name: str, colour: str, label: str) -> None:
    """Mean over seeds, and the range of them."""
    by = rows.groupby("part")[name]
    at, low, high = by.mean().index.to_numpy(), by.min().to_numpy(), by.max().to_numpy()
    axis.fill_between(at, low, high, color=colour, alpha=0.2, lw=0)
    axis.plot(at, by.mean().to_numpy(), color=colour, lw=1.4, label=label)
