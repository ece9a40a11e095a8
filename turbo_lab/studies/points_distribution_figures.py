"""Figures of notebook 03, part A; the numbers are from `points_distribution`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from turbo_lab.figures import ACCENT, INK, SECOND, SOFT, style
from turbo_lab.palette import colour_of, shades
from turbo_lab.point_students import CLOUD
from turbo_lab.studies.distribution_figures import CURVES
from turbo_lab.studies.points_density import Plane
from turbo_lab.studies.points_maps import outside
from turbo_lab.studies.points_plane import MEMBERS, PlaneRuns
from turbo_lab.studies.points_runs import LAGS, ROLLOUT_WORLDS, WORLDS, Key, Runs
from turbo_lab.studies.points_tilt import TiltRuns, target, tilt_plane
from turbo_lab.testbeds.points import WITHIN_3_SIGMA, points

MEASURES: Mapping[str, str] = {
    "within": "within 3 sigma\nof a mode",
    "covered": "modes covered",
    "mode_rkl": "KL of mode shares\nfrom their weights",
    "rkl": "KL(student || data)",
    "fkl": "KL(data || student)",
}
FRAME = 2.7
"""Half width of the panels on guidance."""
LINES: Mapping[tuple[str, int], tuple[str, str]] = {
    ("plain", 1): ("1 step", shades("dmd2", 2)[0]),
    ("plain", 2): ("2 steps", shades("dmd2", 2)[1]),
    ("little noise", 1): ("1 step, compared at t < 0.3 only", INK),
}


def figure_training(course: pd.DataFrame, floor: pd.DataFrame) -> Figure:
    """What reverse KL does along training: a column per world, a row per measure.

    The divergences are exact for the empirical measure of 1024 samples, noised like the data by a
    kernel half as wide as a mode; the grey line is what 1024 exact data measure. Bands go from
    the least to the largest of the seeds.

    Args:
        course: of `points_distribution.course`.
        floor: of `points_distribution.floor`.
    """
    with style():
        figure = Figure(figsize=(8.6, 9.4), layout="constrained")
        axes = figure.subplots(len(MEASURES), len(WORLDS), sharex=True, sharey="row")
        for column, world in enumerate(WORLDS):
            exact = floor[(floor["world"] == world) & (floor["n"] == CLOUD)]
            here = course[course["world"] == world]
            for axis, measure in zip(axes[:, column], MEASURES, strict=True):
                axis.axhline(exact[measure].mean(), color=SOFT, lw=1, ls=":", label="exact data")
                for (variant, steps), rows in here.groupby(["variant", "steps"], sort=False):
                    label, colour = LINES[variant, steps]
                    _band(axis, rows, measure, colour, label)
                axis.set_yscale("log" if measure.endswith("kl") else "linear")
            axes[0, column].set_title(world)
            axes[-1, column].set_xlabel("share of the training")
        for axis, label in zip(axes[:, 0], MEASURES.values(), strict=True):
            axis.set_ylabel(label)
        parts = sorted({share for share in course["part"].round(6)})
        _log_parts(axes[-1, 0], parts)
        figure.suptitle(
            f"KL(student || data) and back are exact for the empirical measure of {CLOUD} samples, "
            "noised by a kernel\nhalf as wide as a mode. Dotted: the same for as many exact data. "
            "Bands: all seeds.",
            fontsize=8,
        )
        handles, labels = axes[0, -1].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    return figure


def _band(axis: Axes, rows: pd.DataFrame, measure: str, colour: str, label: str) -> None:
    """Mean over seeds, and the range of them."""
    by = rows.groupby("part")[measure]
    at, low, high = by.mean().index.to_numpy(), by.min().to_numpy(), by.max().to_numpy()
    axis.fill_between(at, low, high, color=colour, alpha=0.2, lw=0)
    axis.plot(at, by.mean().to_numpy(), color=colour, lw=1.4, marker="o", ms=3, label=label)


def _log_parts(axis: Axes, parts: Sequence[float]) -> None:
    axis.set_xscale("log")
    axis.minorticks_off()
    axis.set_xticks(parts, [_part(part) for part in parts])


def _part(share: float) -> str:
    return str(Fraction(share).limit_denominator(32))


def figure_samples(runs: Runs, *, seed: int = 0) -> Figure:
    """Clouds of students along training, red outside 3 sigma of every mode; exact data last."""
    rows = {
        "ring8, 1 step": Key("plain", "ring8", 1),
        "grid25, 1 step": Key("plain", "grid25", 1),
        "rare, 1 step": Key("plain", "rare", 1),
        "rare, 1 step,\nt < 0.3 only": Key("little noise", "rare", 1),
        "rare, 2 steps": Key("plain", "rare", 2),
    }
    with style():
        wide = len(runs.runs[rows["rare, 1 step"]][seed].clouds) + 1
        figure = Figure(figsize=(1.5 * wide, 1.6 * len(rows)), layout="constrained")
        axes = figure.subplots(len(rows), wide)
        for line, (label, key) in zip(axes, rows.items(), strict=True):
            run = runs.runs[key][seed]
            clouds = {
                "end" if at == run.rounds else f"{_part(at / run.rounds)} of training": x
                for at, x in run.clouds.items()
            }
            clouds["exact data"] = points(key.world).real(CLOUD, seed=0).x
            for axis, (title, x) in zip(line, clouds.items(), strict=True):
                far = outside(key.world, x)
                cloud(axis, x, far)
                _frame(axis, 2.1)
                within = 1 - float(far.double().mean())
                axis.set_xlabel(f"{within:.0%} within", fontsize=7, labelpad=1)
                if key == rows["ring8, 1 step"]:
                    axis.set_title(title, fontsize=8)
            line[0].set_ylabel(label)
    return figure


def cloud(axis: Axes, x: Tensor, far: Tensor) -> None:
    """Draw samples ``[N, 2]``, in red those that are ``far [N]``."""
    for which, colour in ((~far, SECOND), (far, ACCENT)):
        at = x[which].numpy()
        axis.scatter(at[:, 0], at[:, 1], s=1.5, color=colour, lw=0, rasterized=True)


def _frame(axis: Axes, reach: float) -> None:
    axis.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", xticks=[], yticks=[])


# --- guidance -----------------------------------------------------------------------------------


def figure_tilted(tilt: TiltRuns, *, seed: int = 0) -> Figure:
    """What guidance aims at, where exact guided paths end, and where students end.

    Contours are p(x | c), the data. On the right, shares and spread against guidance: what the
    target itself does, and what is added to it.
    """
    found = tilt.table
    plane, _ = tilt_plane()
    truth = target(1.0).exp()
    with style():
        figure = Figure(figsize=(9.2, 6.6), layout="constrained")
        left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=[3, 1.35])[0]
        axes = left.subplots(3, len(tilt.clouds), squeeze=False)
        for column, w in enumerate(tilt.clouds):
            axes[0, column].set_title(f"guidance {w:g}")
            _heat(axes[0, column], plane, target(w).exp())
            for axis, x in (
                (axes[1, column], tilt.paths[w]),
                (axes[2, column], tilt.clouds[w][seed]),
            ):
                axis.scatter(*x.T.numpy(), s=1.5, color=SECOND, lw=0, rasterized=True)
            for axis in axes[:, column]:
                _contours(axis, plane, truth)
                _frame(axis, FRAME)
        labels = ("target p_w", "exact paths of\nthe guided field", "DMD2 students, 1 step")
        for axis, label in zip(axes[:, 0], labels, strict=True):
            axis.set_ylabel(label)
        panels = right.subplots(3, 1, sharex=True)
        names = {
            "first": "share of the first place",
            "third": "share of the third place",
            "spread": "spread within a place",
        }
        for axis, (name, title) in zip(panels, names.items(), strict=True):
            _against_guidance(axis, found, name)
            axis.set_title(title)
        panels[0].legend(fontsize=7, loc="lower right")
        panels[-1].set_xlabel("guidance")
        panels[-1].set_xticks(list(tilt.clouds), [f"{w:g}" for w in tilt.clouds])
    return figure


def _against_guidance(axis: Axes, found: pd.DataFrame, name: str) -> None:
    kinds = {"target": ("target p_w", INK, "-"), "paths": ("exact paths", SECOND, "--")}
    for what, (label, colour, line) in kinds.items():
        rows = found[found["what"] == what]
        axis.plot(
            rows["w"], rows[name], color=colour, ls=line, lw=1.3, marker="o", ms=3, label=label
        )
    rows = found[found["what"] == "student"]
    mean = rows.groupby("w")[name].mean()
    axis.plot(mean.index, mean, color=colour_of("dmd2"), lw=1.3, label="students")
    axis.scatter(rows["w"], rows[name], s=12, color=colour_of("dmd2"), lw=0, zorder=3)
    axis.set_ylim(bottom=0)


def _heat(axis: Axes, plane: Plane, density: Tensor) -> None:
    edge = float(plane.axis[-1])
    axis.imshow(
        density.T.sqrt().numpy(), origin="lower", extent=(-edge, edge, -edge, edge), cmap="Blues",
        interpolation="bilinear",
    )  # fmt: skip


def _contours(axis: Axes, plane: Plane, density: Tensor) -> None:
    levels = float(density.max()) * np.array([0.02, 0.3])
    at = plane.axis.numpy()
    axis.contour(at, at, density.T.numpy(), levels=levels, colors=INK, linewidths=0.5)


# --- the alpha-beta plane -----------------------------------------------------------------------


def figure_plane(plane: PlaneRuns) -> Figure:
    """Coverage and quality over the alpha-beta plane, mean over the seeds that did not blow up."""
    found = plane.table
    titles = {
        "overlap": "coverage: mode weights in common with the data",
        "within": "quality: share within 3 sigma of a mode",
    }
    with style():
        figure = Figure(figsize=(9.2, 4.4), layout="constrained")
        for axis, (measure, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
            _plane_map(axis, plane.grid, found, measure)
            axis.set_title(title)
    return figure


def _plane_map(axis: Axes, grid: Sequence[float], found: pd.DataFrame, measure: str) -> None:
    mean = found.pivot_table(index="beta", columns="alpha", values=measure, dropna=False)
    blown = found.assign(n=~found["finite"]).pivot_table(
        index="beta", columns="alpha", values="n", aggfunc="sum"
    )
    seeds = found["seed"].nunique()
    values = mean.reindex(index=list(grid), columns=list(grid)).to_numpy(dtype=float)
    colours = mpl.colormaps["viridis"](values)
    axis.imshow(colours, origin="lower", aspect="equal")
    at = np.array([-0.5, len(grid) - 0.5])
    axis.plot(at, len(grid) - 1 - at, color=INK, lw=1, ls="--", zorder=1)
    for i, beta in enumerate(grid):
        for j, alpha in enumerate(grid):
            lost = int(blown.loc[beta, alpha])
            notes = [MEMBERS.get((alpha, beta), ""), f"{lost} of {seeds} blew up" if lost else ""]
            _plane_cell(axis, j, i, values[i, j], colours[i, j], "\n".join(filter(None, notes)))
    ticks = [f"{value:g}" for value in grid]
    axis.set_xticks(range(len(grid)), ticks)
    axis.set_yticks(range(len(grid)), ticks)
    axis.set(xlabel="alpha", ylabel="beta")


def _plane_cell(axis: Axes, x: int, y: int, value: float, colour: np.ndarray, note: str) -> None:
    """Write the value over its own colour, so that the line does not cross it; hatch if none."""
    if not np.isfinite(value):
        box = Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor="white", edgecolor=SOFT, hatch="////")
        axis.add_patch(box).set_linewidth(0)
        back: dict[str, Any] = {"facecolor": "white", "pad": 1, "lw": 0}
        axis.text(x, y, "blows up", ha="center", va="center", fontsize=7, color=INK, bbox=back)
        return
    ink = "white" if value < 0.6 else INK
    back = {"facecolor": colour, "pad": 1, "lw": 0}
    text = f"{value:.0%}" + (f"\n{note}" if note else "")
    axis.text(x, y, text, ha="center", va="center", fontsize=7.5, color=ink, bbox=back)


# --- two time scales, rollouts ------------------------------------------------------------------


def figure_time_scales(runs: Runs, finished: pd.DataFrame) -> Figure:
    """Losses and gradients for 1 to 10 updates of the fake per student update, and the result.

    Args:
        runs: the trainings; each line is the mean over seeds.
        finished: of `points_distribution.table`.
    """
    titles = {term: CURVES[term] for term in ("fake/velocity", "student/g_norm", "student/gap")}
    colours = dict(zip(LAGS, (ACCENT, "#e0a030", SECOND, INK), strict=True))
    with style():
        figure = Figure(figsize=(9.4, 2.9), layout="constrained")
        axes = figure.subplots(1, 4)
        for axis, (term, title) in zip(axes, titles.items(), strict=False):
            for k in LAGS:
                part, value = _mean_history(runs, _lag(k), term)
                axis.plot(part, value, color=colours[k], lw=1.3, label=f"{k}")
            axis.set(title=title, yscale="log", xlabel="share of the network calls")
            _plain_ticks(axis)
        axes[0].legend(
            title="updates of the fake\nper student update", fontsize=7, title_fontsize=7
        )
        _quality(axes[3], finished, colours)
    return figure


def _plain_ticks(axis: Axes) -> None:
    """Label a short logarithmic axis with 1, 2, 5 and their tens."""
    low, high = axis.get_ylim()
    ticks = [f * 10.0**e for e in range(-3, 4) for f in (1, 2, 5) if low <= f * 10.0**e <= high]
    axis.minorticks_off()
    axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])


def _lag(k: int) -> Key:
    return Key("plain" if k == 5 else f"rivals-{k}", "rare", 1)


def _mean_history(runs: Runs, key: Key, term: str) -> tuple[np.ndarray, np.ndarray]:
    """Share of the training and mean over seeds of one term, where it was recorded."""
    rows = [run.history.set_index("round")[term] for run in runs.runs[key]]
    mean = pd.concat(rows, axis=1).mean(axis=1).dropna()
    return mean.index.to_numpy() / runs.runs[key][0].rounds, mean.to_numpy()


def _quality(axis: Axes, finished: pd.DataFrame, colours: Mapping[int, str]) -> None:
    for at, k in enumerate(LAGS):
        rows = finished[(finished[["variant", "world", "steps"]] == [*_lag(k)]).all(axis=1)]
        axis.scatter([at] * len(rows), rows["within"], s=14, color=colours[k], lw=0)
        axis.plot([at - 0.25, at + 0.25], [rows["within"].mean()] * 2, color=colours[k], lw=1.4)
    axis.set_xticks(range(len(LAGS)), [str(k) for k in LAGS])
    axis.set(title="within 3 sigma at the end", xlabel="updates of the fake", xlim=(-0.6, 3.6))


def figure_rollouts(finished: pd.DataFrame, floor: pd.DataFrame) -> Figure:
    """2-step students trained on their own states or on noised data: a pair of points per seed.

    Args:
        finished: of `points_distribution.table`; students of a seed are sampled from one noise.
        floor: of `points_distribution.floor`.
    """
    exact = floor[floor["n"] == floor["n"].max()].groupby("world")
    titles = {k: MEASURES[k].replace("\n", " ") for k in ("within", "mode_rkl", "rkl", "fkl")}
    with style():
        figure = Figure(figsize=(9.4, 2.7), layout="constrained")
        for axis, (measure, title) in zip(figure.subplots(1, 4), titles.items(), strict=True):
            for column, world in enumerate(ROLLOUT_WORLDS):
                rows = finished.query("world == @world and steps == 2")
                wide = rows.pivot(index="seed", columns="variant", values=measure)
                ends = wide[["plain", "forward"]].to_numpy()
                for pair in ends:
                    axis.plot([2.6 * column, 2.6 * column + 1], pair, color=SOFT, lw=0.8)
                for side, colour in ((0, SECOND), (1, ACCENT)):
                    at = [2.6 * column + side] * len(ends)
                    axis.scatter(at, ends[:, side], s=18, color=colour, lw=0, zorder=3)
                level = WITHIN_3_SIGMA if measure == "within" else exact[measure].mean()[world]
                axis.plot([2.6 * column - 0.4, 2.6 * column + 1.4], [level] * 2, color=SOFT, ls=":")
            axis.set_title(title, fontsize=8)
            axis.set(yscale="log") if measure != "within" else axis.set(ylim=(0, 1.03))
            axis.set_xticks([0, 1, 2.6, 3.6], ["own\nstates", "noised\ndata"] * 2, fontsize=7)
            for column, world in enumerate(ROLLOUT_WORLDS):
                axis.text(
                    2.6 * column + 0.5, -0.27, world, transform=axis.get_xaxis_transform(),
                    ha="center", va="top", fontsize=8,
                )  # fmt: skip
    return figure
