"""Figures of notebook 04, part A; the numbers are from `points_warm`."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product

import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from torch import Tensor

from turbo_lab.figures import INK, SOFT, style
from turbo_lab.palette import colour_of, shades
from turbo_lab.studies.points_distribution_figures import cloud
from turbo_lab.studies.points_maps import outside
from turbo_lab.studies.points_warm import ASKED, TIMES, TITLES, WORLDS, Runs, knowing
from turbo_lab.testbeds.points import points

COLOURS: Mapping[str, str] = {
    TITLES["cold"]: colour_of("dmd2"),
    TITLES["consistency"]: colour_of("consistency"),
    TITLES["pcm"]: colour_of("warm"),
    TITLES["pcm-fake"]: shades("warm", 3)[0],
    TITLES["transition"]: "#c9709f",
}
MEASURES: Mapping[str, str] = {
    "within": "within 3 sigma\nof a mode",
    "covered": "modes covered",
    "mode_rkl": "KL of mode shares\nfrom their weights",
    "fkl": "KL(data || student)",
}
SHOWN = 1024
"""Samples in a panel."""
LINES = 160
"""Of these, so many are joined to where the teacher's path ends."""
REACH = 2.2


def figure_starts(runs: Runs, *, seed: int = 0) -> Figure:
    """Samples before and after distribution matching, a column per start.

    Red outside 3 sigma of every mode. A line leads from a sample to where the teacher's exact path
    from the same noise ends.

    Args:
        runs: all trainings.
        seed: which training is shown.
    """
    rows = list(product(WORLDS, ("before", "after")))
    with style():
        figure = Figure(figsize=(1.9 * len(TITLES), 2.0 * len(rows)), layout="constrained")
        axes = figure.subplots(len(rows), len(TITLES), squeeze=False)
        for line, (world, when) in zip(axes, rows, strict=True):
            for axis, (start, title) in zip(line, TITLES.items(), strict=True):
                x = runs.samples[world, start][("before", "after").index(when), seed]
                _panel(axis, world, x, runs.ends[world])
                if (world, when) == rows[0]:
                    axis.set_title(title)
            line[0].set_ylabel(f"{world}, {when}")
    return figure


def _panel(axis: Axes, world: str, x: Tensor, ends: Tensor) -> None:
    far = (x - ends).norm(dim=1).median()
    pairs = torch.stack([x[:LINES], ends[:LINES]], dim=1).numpy()
    axis.add_collection(LineCollection(list(pairs), colors=INK, linewidths=0.4, alpha=0.35))
    beyond = outside(world, x)
    cloud(axis, x[:SHOWN], beyond[:SHOWN])
    within = 1 - float(beyond.double().mean())
    axis.set_xlabel(f"{within:.0%} within, {far:.2f} from the end", fontsize=7, labelpad=1)
    axis.set(xlim=(-REACH, REACH), ylim=(-REACH, REACH), aspect="equal", xticks=[], yticks=[])


def figure_pulls(rows: pd.DataFrame, runs: Runs) -> Figure:
    """How much the teacher means the place where its own path ends, against the noise it sees.

    Args:
        rows: of `points_warm.pulls`, before distribution matching.
        runs: for the dotted line, the ends of the paths themselves.
    """
    with style():
        figure = Figure(figsize=(3.6 * len(WORLDS), 3.1), layout="constrained")
        for axis, world in zip(figure.subplots(1, len(WORLDS), sharey=True), WORLDS, strict=True):
            ends = runs.ends[world]
            best = [float(knowing(world, ends, ends, t).mean()) for t in TIMES]
            modes = points(world).teacher.responsibilities(ends).argmax(1)
            shares = modes.bincount().double() / len(modes)
            axis.plot(TIMES, best, color=INK, lw=1, ls=":", label="the end itself")
            axis.axhline(float((shares**2).sum()), color=SOFT, lw=0.8, label="knowing nothing")
            axis.axvline(ASKED, color=SOFT, lw=0.5)
            here = rows[rows["world"] == world]
            for start, group in here.groupby("start", sort=False):
                _band(axis, group, "t", "knows", COLOURS[str(start)], str(start))
            axis.set(title=world, xlabel="noise t at which the teacher is asked")
        figure.axes[0].set_ylabel("weight of the end's own mode")
        figure.axes[0].legend(fontsize=7)
    return figure


def figure_course(rows: pd.DataFrame) -> Figure:
    """Along training, against all network calls: a column per world, a row per measure.

    Args:
        rows: of `points_warm.course`; bands go from the least to the largest of the seeds.
    """
    with style():
        size = (3.7 * len(WORLDS), 1.9 * len(MEASURES))
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(len(MEASURES), len(WORLDS), sharex=True, sharey="row")
        for column, world in enumerate(WORLDS):
            here = rows[rows["world"] == world]
            for axis, measure in zip(axes[:, column], MEASURES, strict=True):
                for start, group in here.groupby("start", sort=False):
                    _band(axis, group, "part", measure, COLOURS[str(start)], str(start))
                axis.set_yscale("log" if measure.endswith("kl") else "linear")
            axes[0, column].set_title(world)
            axes[-1, column].set_xlabel("share of all network calls")
        for axis, label in zip(axes[:, 0], MEASURES.values(), strict=True):
            axis.set_ylabel(label)
        axes[0, 0].legend(fontsize=7)
    return figure


def _band(axis: Axes, rows: pd.DataFrame, x: str, y: str, colour: str, label: str) -> None:
    """Mean over seeds, and the range of them."""
    by = rows.groupby(x)[y]
    at = by.mean().index.to_numpy()
    low, high = by.min().to_numpy(), by.max().to_numpy()
    axis.fill_between(at, low, high, color=colour, alpha=0.2, lw=0)
    axis.plot(at, by.mean().to_numpy(), color=colour, lw=1.4, marker="o", ms=3, label=label)
