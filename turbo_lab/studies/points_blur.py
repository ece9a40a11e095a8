"""Notebook 02, part A: why few-step students put samples between the modes, on exact points."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from turbo_lab import figures
from turbo_lab.claims import Claim, crossed_bootstrap
from turbo_lab.figures import ACCENT, INK, SOFT
from turbo_lab.palette import colour_of
from turbo_lab.point_students import TRAJECTORY, load, sampled, student_recipe, trained
from turbo_lab.progress import progress
from turbo_lab.recipes import FAMILIES
from turbo_lab.store import Store
from turbo_lab.studies.points_maps import (
    BUDGETS,
    EXACT_STEPS,
    PERFECT,
    Budget,
    OptimalMaps,
    check_world,
    optimal_maps,
    outside,
    sigmas,
)
from turbo_lab.testbeds.points import points

__all__ = [
    "BUDGETS",
    "Budget",
    "OptimalMaps",
    "claims",
    "figure_map",
    "figure_shares",
    "optimal_maps",
    "shares",
    "student_table",
]

NOTEBOOK = "02_blur_in_trajectory_distillation"
STEPS = (1, 2, 4, 8)
"""Steps at which students are compared."""


# --- students -----------------------------------------------------------------------------------


def student_table(
    budget: Budget, *, world: str = "ring8", seed: int = 0, store: Store | None = None
) -> pd.DataFrame:
    """Train (or find) every student and sample it: one row per student, steps and sample.

    Sample i starts from the same noise everywhere. Students of one method differ by the seed of
    their distillation; all start from one base.

    Columns: ``method``, ``steps``, ``seed``, ``sample``, ``x``, ``y``, ``sigmas`` (distance to the
    nearest mode), ``outside`` (more than 3 of them), ``key`` (of the student).

    Raises:
        BadInput: a world whose modes overlap.
    """
    check_world(world)
    wanted = [(m, n, s) for s in range(budget.seeds) for m in TRAJECTORY for n in reversed(STEPS)]
    parts = []
    with progress(len(wanted), "students on points") as tick:
        for done, (method, steps, student_seed) in enumerate(wanted):
            tick(done, f"{method}, {steps} steps, seed {student_seed}")
            recipe = student_recipe(
                method, steps=steps, profile=budget.profile, seed=student_seed, world=world
            )
            artefact = trained(recipe, store=store)
            eta = FAMILIES[method].eta
            field = load(recipe, artefact)
            x = sampled(field, steps=steps, eta=eta, n=budget.samples, seed=seed)
            parts.append(
                _rows(world, x).assign(
                    method=method, steps=steps, seed=student_seed, key=artefact.key
                )
            )
    table = pd.concat(parts, ignore_index=True)
    return table.astype({"method": "category", "key": "category"})


def shares(table: pd.DataFrame) -> pd.DataFrame:
    """Share of samples outside, per method and steps, with the interval over seeds and samples.

    Columns ``method``, ``steps``, ``value``, ``low``, ``high``, ``between`` (share further than
    5 sigma from every mode), ``seeds``, ``samples``.
    """
    rows = []
    for (method, steps), part in table.groupby(["method", "steps"], observed=True):
        found = vars(crossed_bootstrap(_outcomes(part)))
        rows.append(
            {
                "method": method,
                "steps": steps,
                **found,
                "between": (part["sigmas"] > 5).mean(),
                "seeds": part["seed"].nunique(),
                "samples": part["sample"].nunique(),
            }
        )
    return pd.DataFrame(rows)


def claims(table: pd.DataFrame, profile: str) -> list[Claim]:
    """The claims of part A, each for the method that is worst for it.

    The least of four is biased downwards in a bootstrap, so these intervals lie rather too low
    than too high.
    """
    cells = {
        key: _outcomes(part) for key, part in table.groupby(["method", "steps"], observed=True)
    }
    first, last = min(STEPS), max(STEPS)
    excess = [cells[m, first] - PERFECT for m in TRAJECTORY]
    repair = [cells[m, first] - cells[m, last] for m in TRAJECTORY]
    seeds, samples = excess[0].shape
    rows = [
        ("P1", "At one step every trajectory method leaves samples between the modes",
         "Zheng et al. 2025 (rCM), arXiv 2510.08431",
         "outside 3 sigma of all modes at 1 step, minus exact data; least of 4 methods",
         excess),
        ("P2", "More steps repair it, in every method",
         "Song et al. 2023, arXiv 2303.01469",
         "outside 3 sigma of all modes, 1 minus 8 steps; least of 4 methods",
         repair),
    ]  # fmt: skip
    return [
        Claim(
            id=id_,
            notebook=NOTEBOOK,
            statement=statement,
            source=source,
            statistic=statistic,
            interval=crossed_bootstrap(*of, statistic=_least),
            side="above",
            threshold=0.0,
            seeds=seeds,
            samples=samples,
            profile=profile,
            artefact_keys=tuple(sorted(table["key"].unique())),
        )
        for id_, statement, source, statistic, of in rows
    ]


def _least(*outcomes: np.ndarray) -> float:
    return min(float(one.mean()) for one in outcomes)


# --- figures ------------------------------------------------------------------------------------


def figure_map(
    maps: OptimalMaps, table: pd.DataFrame, *, shown: int = 1200, seed: int = 0
) -> Figure:
    """Where the same noise ends: optimal maps, Euler steps of the exact field, and students.

    Args:
        maps: the closed forms.
        table: of `student_table`; only the students of one seed are drawn.
        shown: points per panel.
        seed: of those students.
    """
    panels = list(_panels(maps, table[table["seed"] == seed]))
    reach = float(points(maps.world).teacher.means.abs().max()) + 0.6
    with figures.style():
        figure = Figure(figsize=(9, 9.2), layout="constrained")
        axes = figure.subplots(4, 4)
        for axis, (title, x) in zip(axes.ravel(), panels, strict=True):
            _cloud(axis, maps.world, x[:shown])
            axis.set_title(f"{title}: {float(outside(maps.world, x).double().mean()):.0%} outside")
            axis.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
            axis.set(xticks=[], yticks=[])
        rows = (
            "l2-optimal map at\nresolution h of the noise",
            "Euler steps of\nthe exact field",
            "students, 1 step",
            "students, 2 steps",
        )
        for axis, label in zip(axes[:, 0], rows, strict=True):
            axis.set_ylabel(label)
    return figure


def figure_shares(maps: OptimalMaps, table: pd.DataFrame) -> Figure:
    """Share outside against the resolution of a map, and against the steps of a student."""
    found = shares(table)
    with figures.style():
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        _against_resolution(left, maps, found[found["steps"] == 1])
        _against_steps(right, maps, found)
        for axis in (left, right):
            axis.axhline(PERFECT, color=SOFT, ls=":", lw=1)
            axis.set(yscale="log", ylim=(PERFECT / 2, 1.3))
            axis.set_yticks([0.01, 0.03, 0.1, 0.3, 1], ["1%", "3%", "10%", "30%", "100%"])
            axis.minorticks_off()
        left.set_ylabel("samples outside 3 sigma of every mode")
        left.annotate(
            "exact data", (1, PERFECT), (0, -3), textcoords="offset points", ha="right", va="top",
            fontsize=8, color=SOFT,
        )  # fmt: skip
    return figure


def _against_resolution(axis: Axes, maps: OptimalMaps, one_step: pd.DataFrame) -> None:
    rows = maps.table.query("map == 'resolution'")
    axis.plot(rows["at"], rows["value"], color=INK, lw=1.4, marker="o", ms=3)
    axis.set(xlabel="resolution h of the noise", title="no network: the l2-optimal one-step map")
    axis.text(0.3, 0.3, "students at 1 step leave as many outside as", fontsize=8, va="center")
    rows = one_step.sort_values("value", ascending=False)
    for k, row in enumerate(rows.itertuples()):
        h, colour = maps.resolution(row.value), colour_of(row.method)
        axis.plot([h], [row.value], marker="D", ms=6, color=colour, zorder=3)
        text = f"h = {h:.2f}   {FAMILIES[row.method].title}"
        axis.text(0.36, 0.3 / 1.5 ** (k + 1), text, color=colour, fontsize=8, va="center")


def _against_steps(axis: Axes, maps: OptimalMaps, found: pd.DataFrame) -> None:
    rows = maps.table.query("map == 'euler'")
    axis.plot(rows["at"], rows["value"], color=SOFT, lw=1.2, ls="--")
    axis.annotate(
        "Euler, exact field", (2, rows.set_index("at")["value"][2]), (6, 0),
        textcoords="offset points", color=SOFT, fontsize=8, va="center",
    )  # fmt: skip
    ends = {}
    for k, method in enumerate(TRAJECTORY):
        part = found[found["method"] == method].sort_values("steps")
        at = part["steps"] * 1.03 ** (k - 1.5)  # side by side, so that intervals can be told apart
        errors = [part["value"] - part["low"], part["high"] - part["value"]]
        axis.errorbar(
            at, part["value"], np.clip(errors, 0, None), color=colour_of(method), lw=1.4,
            marker="o", ms=3, elinewidth=1,
        )  # fmt: skip
        ends[method] = float(part["value"].iloc[-1])
    for method, height in _apart(ends).items():
        axis.text(
            9.4, height, FAMILIES[method].title, color=colour_of(method), fontsize=8, va="center"
        )
    ticks = sorted({*STEPS, *EXACT_STEPS})
    axis.set(xscale="log", xlabel="steps", title="students and intervals over seeds and samples")
    axis.set_xticks(ticks, [str(n) for n in ticks])


def _apart(heights: Mapping[str, float], ratio: float = 1.22) -> dict[str, float]:
    """Move labels apart on a logarithmic axis, keeping their order and their middle."""
    order = sorted(heights, key=lambda name: heights[name])
    log = np.log([max(heights[name], 1e-6) for name in order])
    moved = log.copy()
    for _ in range(200):
        gaps = np.diff(moved)
        for k in np.flatnonzero(gaps < np.log(ratio) - 1e-9):
            push = (np.log(ratio) - gaps[k]) / 2
            moved[k] -= push
            moved[k + 1] += push
            gaps = np.diff(moved)
    return {name: float(np.exp(v)) for name, v in zip(order, moved, strict=True)}


def _panels(maps: OptimalMaps, table: pd.DataFrame) -> Iterator[tuple[str, Tensor]]:
    """Titles and points, row by row."""
    for h in _spread(sorted(maps.blurred)):
        yield f"h = {h:g}", maps.blurred[h]
    for n in STEPS:
        yield f"N = {n}", maps.euler[n]
    for steps in (1, 2):
        for method in TRAJECTORY:
            part = table[(table["method"] == method) & (table["steps"] == steps)]
            yield FAMILIES[method].title.split()[0], torch.from_numpy(part[["x", "y"]].to_numpy())


def _spread(resolutions: Sequence[float]) -> list[float]:
    """The four resolutions nearest to what the figure wants to show."""
    return [min(resolutions, key=lambda h: abs(h - wish)) for wish in (0, 0.2, 0.5, 1)]


def _cloud(axis: Axes, world: str, x: Tensor) -> None:
    far = outside(world, x).numpy()
    at = x.numpy()
    axis.scatter(at[~far, 0], at[~far, 1], s=1.5, color=SOFT, lw=0, rasterized=True)
    one_place = float(np.ptp(at, axis=0).max()) < 1e-3
    axis.scatter(
        at[far, 0], at[far, 1], s=50 if one_place else 4, color=ACCENT, lw=0, rasterized=True
    )


# --- small parts --------------------------------------------------------------------------------


def _rows(world: str, x: Tensor) -> pd.DataFrame:
    far = sigmas(world, x).numpy()
    at = x.double().numpy()
    columns = {"sample": np.arange(len(x)), "x": at[:, 0], "y": at[:, 1], "sigmas": far}
    return pd.DataFrame({**columns, "outside": far > 3})


def _outcomes(part: pd.DataFrame) -> np.ndarray:
    """Outcomes ``[seeds, samples]`` of one method at one number of steps."""
    wide = part.pivot(index="seed", columns="sample", values="outside")
    return wide.to_numpy(dtype=float)
