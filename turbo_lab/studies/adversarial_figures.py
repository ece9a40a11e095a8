"""Figures of notebook 05's postcards, from a comparison of students with and without a GAN."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from turbo_lab import charts, figures, measure
from turbo_lab.charts import COLOURS, Band
from turbo_lab.figures import ACCENT, INK, SECOND, SOFT, bare, style
from turbo_lab.palette import colour_of, shades
from turbo_lab.postcards import render
from turbo_lab.postcards.captions import GROUNDS
from turbo_lab.studies import every_metric
from turbo_lab.studies.adversarial import (
    CONTROL,
    DIRECT,
    FLOOR,
    GAN,
    LOSSES,
    START,
    TEACHER,
    TERMS,
    TITLES,
    Comparison,
    groups,
    images_of,
)
from turbo_lab.studies.textures import METRICS, TEXTURES

CROP = 10
"""Pixels of a side of a magnified piece of ground."""
LOOKED_AT = {"real": "real", **TITLES}
_LINES = {family: colour_of(family) for family in TITLES}
_LINES |= {family: shades(family, 3)[0] for family in (DIRECT, START)}
"""Lighter with fewer steps than the other of its method, or less training."""


def magnified(comparison: Comparison, *, each: int = 2, seed: int = 0) -> Figure:
    """Whole pictures, and below each a piece of its ground: the same captions and noises.

    The captions are the first on each ground; the piece is where most pictures have free ground,
    and in the real picture, which has another layout, where that has some.

    Args:
        comparison: of all students.
        each: captions per ground.
        seed: which training is shown.
    """
    fields = comparison.scenes.fields
    rows = [
        int(k)
        for ground in TEXTURES
        for k in (fields[:, 2] == GROUNDS.index(ground)).nonzero()[:each, 0]
    ]
    shown = _pictures(comparison, seed)
    with style():
        figure = Figure(figsize=(1.25 * len(shown), 2.4 * len(rows)), layout="constrained")
        grid = figure.subplots(2 * len(rows), len(shown), squeeze=False)
        for r, k in enumerate(rows):
            images = torch.stack([pictures[k] for pictures in shown.values()])
            own, shared = charts.freest(images[:1], CROP), charts.freest(images[1:], CROP)
            for column, image in enumerate(images):
                top, left = shared if column else own
                crop = image[:, top : top + CROP, left : left + CROP]
                grid[2 * r, column].imshow(_picture(image), interpolation="nearest")
                grid[2 * r, column].add_patch(_frame(left, top))
                grid[2 * r + 1, column].imshow(_picture(crop), interpolation="nearest")
        for axis in grid.ravel():
            bare(axis)
        for axis, title in zip(grid[0], shown, strict=True):
            axis.set_title(LOOKED_AT[title], fontsize=8)
    return figure


def _pictures(comparison: Comparison, seed: int) -> dict[str, Tensor]:
    """Real pictures of the captions' own scenes, and those of every sampler."""
    found = {"real": render(comparison.scenes)}
    for family in TITLES:
        own = images_of(comparison, family)
        found[family] = own[min(seed, len(own) - 1)]
    return found


def _picture(image: Tensor) -> np.ndarray:
    return figures.contact_sheet(image[None], columns=1, enlarge=1, gap=0)


def _frame(left: int, top: int) -> Rectangle:
    return Rectangle((left - 0.5, top - 0.5), CROP, CROP, fill=False, ec=INK, lw=0.8)


def dots(rows: pd.DataFrame, metrics: Sequence[str]) -> Figure:
    """One row per sampler, one panel per metric; the bands are real (dark) and teacher (light).

    Args:
        rows: of `turbo_lab.studies.adversarial.table`.
        metrics: the panels.
    """
    return charts.dot_panels(
        rows,
        by="family",
        titles={f: title for f, title in TITLES.items() if f != TEACHER},
        metrics={metric: METRICS[metric] for metric in metrics},
        units={metric: every_metric.METRICS[metric].axis for metric in metrics},
        bands={
            TEACHER: Band(f"{TITLES[TEACHER]}, 95% interval", 0.2),
            FLOOR: Band("real, other pictures, 95% interval", 0.45),
        },
        accent=GAN,
        ylabel="student",
    )


def spectra(rows: pd.DataFrame) -> Figure:
    """Power of the ground over that of real ground, by frequency; one panel per ground.

    Args:
        rows: of `turbo_lab.studies.adversarial.spectra`.
    """
    with style():
        figure = Figure(figsize=(7.6, 2.9), layout="constrained")
        for axis, ground in zip(figure.subplots(1, len(TEXTURES)), TEXTURES, strict=True):
            axis.axhline(1.0, color=SOFT, lw=1)
            for family, title in TITLES.items():
                of = rows[(rows["ground"] == ground) & (rows["family"] == family)]
                axis.plot(
                    of["frequency"], of["value"], "o-", ms=3, lw=1.2, color=_LINES[family],
                    label=title,
                )  # fmt: skip
            axis.set(title=ground, xlabel="cycles per pixel", ylim=(0, None))
            axis.set_xticks([k / 8 for k in range(1, 5)])
        figure.axes[0].set_ylabel("power / real")
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", fontsize=8)
    return figure


def scrambles(comparison: Comparison, *, count: int = 6) -> Figure:
    """Real postcards above, below the same with scrambled phases: their spectra are equal."""
    images = render(comparison.scenes)[:count]
    rows = {"real": images, "phases scrambled": measure.scrambled(images)}
    with style():
        figure = Figure(figsize=(1.1 * count + 1.2, 2.4), layout="constrained")
        for axis, (title, pictures) in zip(figure.subplots(2, 1), rows.items(), strict=True):
            axis.imshow(figures.contact_sheet(pictures, columns=count), interpolation="nearest")
            axis.set_ylabel(title, rotation=0, ha="right", va="center", labelpad=6)
            bare(axis)
    return figure


def ablations(rows: pd.DataFrame, metrics: Sequence[str]) -> Figure:
    """One block per thing changed, one panel per metric; the line is more DMD2 without a GAN.

    Args:
        rows: of `turbo_lab.studies.adversarial.ablations`.
        metrics: the panels; ``texture`` is relative to that control.
    """
    lines = [(title, f, label) for title, own in groups().items() for f, label in own.items()]
    lines = [line for line in lines if line[1] in set(rows["family"])]
    with style():
        height = 0.24 * len(lines) + 1.0
        figure = Figure(figsize=(1.7 * len(metrics) + 2.6, height), layout="constrained")
        axes = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
        for axis, metric in zip(axes, metrics, strict=True):
            of = rows[rows["metric"] == metric].set_index("family")
            axis.axvline(of.loc[CONTROL, "value"] if CONTROL in of.index else 0.0, color=SOFT, lw=1)
            for y, (_, family, _) in enumerate(lines):
                charts.dot(axis, of.loc[family], y, ACCENT if family == GAN else SECOND)
            axis.locator_params(axis="x", nbins=3)
            axis.set_title({**METRICS, "texture": "texture, minus no GAN"}[metric], fontsize=8)
            axis.grid(axis="y", color=SOFT, alpha=0.2)
        starts = [k for k in range(1, len(lines)) if lines[k][0] != lines[k - 1][0]]
        for axis in axes:
            for k in starts:
                axis.axhline(k - 0.5, color=SOFT, lw=0.6)
        labels = [f"{title}: {label}" for title, _, label in lines]
        axes[0].set_yticks(range(len(lines)), labels, fontsize=7)
        axes[0].invert_yaxis()
    return figure


def training(curves: pd.DataFrame) -> Figure:
    """What the GAN term's own curves look like: one panel per term, one line per training.

    The dashed line is log 2, the loss of a critic that guesses.

    Args:
        curves: of `turbo_lab.studies.adversarial.curves`.
    """
    with style():
        figure = Figure(figsize=(8.6, 4.4), layout="constrained")
        mains = [s for s in curves["student"].unique() if str(s).startswith("main")]
        for axis, (term, title) in zip(figure.subplots(2, 3).ravel(), TERMS.items(), strict=True):
            of = curves[curves["term"] == term]
            for k, (student, part) in enumerate(of.groupby("student", sort=False)):
                main = str(student).startswith("main")
                colour = ACCENT if main else COLOURS[1 + k - len(mains)]
                label = {**dict.fromkeys(mains), mains[0]: "main"}.get(student, str(student))
                axis.plot(
                    part["step"], part["value"], color=colour, lw=1.6 if main else 0.9, label=label,
                    zorder=3 if main else 2,
                )  # fmt: skip
            if term in LOSSES:
                axis.axhline(np.log(2), color=SOFT, ls="--", lw=1)
            axis.set_title(title, fontsize=8)
        for axis in figure.axes[3:]:  # the lower row
            axis.set_xlabel("rounds of training", fontsize=8)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    return figure


def hurts(comparison: Comparison, *, count: int = 12, seed: int = 0) -> Figure:
    """Pictures that were right without the GAN and are not with it, and the other way round.

    The first of each kind, the same captions and noises; the oracle says what is wrong.

    Args:
        comparison: of all students.
        count: pictures of each kind, at most.
        seed: which training is shown.
    """
    blocks = {}
    for title, rows in _changed(comparison, seed).items():
        for family in (CONTROL, GAN):
            images = images_of(comparison, family)[seed][rows[:count]]
            if len(images):
                blocks[f"{title}: {'with' if family == GAN else 'without'} the GAN"] = images
    columns = max((len(images) for images in blocks.values()), default=1)
    with style():
        figure = Figure(figsize=(max(4, 0.8 * columns), 1.1 * len(blocks)), layout="constrained")
        axes = figure.subplots(max(1, len(blocks)), 1, squeeze=False)[:, 0]
        for axis, (title, images) in zip(axes, blocks.items(), strict=False):
            charts.judged_sheet(axis, charts.judged(images), columns=columns)
            axis.set_title(title, loc="left", fontsize=8)
            axis.set_anchor("W")
        for axis in axes[len(blocks) :]:
            axis.set_visible(False)
    return figure


def _changed(comparison: Comparison, seed: int) -> dict[str, Tensor]:
    """Rows of the pictures that the GAN broke, and of those that it mended.

    A picture is right with a whole body and one sign, which can be read.
    """
    found = [comparison.measured[f].values for f in (GAN, CONTROL)]
    with_, without = (
        torch.from_numpy(v["whole_body"][seed] * v["sign_alone"][seed]).bool() for v in found
    )
    return {
        "right without, wrong with it": (without & ~with_).nonzero()[:, 0],
        "wrong without, right with it": (with_ & ~without).nonzero()[:, 0],
    }
