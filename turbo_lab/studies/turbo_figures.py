"""Figures of notebook 06, from a ladder of samplers."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from turbo_lab import charts
from turbo_lab.atomic import atomic_write_bytes
from turbo_lab.charts import Band
from turbo_lab.field import guided
from turbo_lab.figures import ACCENT, SECOND, SOFT, bare, contact_sheet, style
from turbo_lab.path import grid_from_times, time_grid
from turbo_lab.recipes.turbo import LONG, TURBO
from turbo_lab.recipes.turbo import SECOND as SECOND_TIME
from turbo_lab.recipes.warm import STEPS
from turbo_lab.sample import sample
from turbo_lab.sampling import TEACHER_GUIDANCE, TEACHER_STEPS
from turbo_lab.streams import noise
from turbo_lab.studies.every_metric import METRICS
from turbo_lab.studies.turbo import (
    ABLATIONS,
    COLD,
    FAILURES,
    NAIVE,
    REAL,
    RIVALS,
    SIX,
    SIX_TEACHER,
    SLOW,
    TEACHER,
    TITLES,
    WARM,
    Ladder,
    failed,
    images_of,
)

PICTURED = (TEACHER, NAIVE, "progressive-more", "consistency-more", COLD, WARM, TURBO, LONG,
            SIX, SIX_TEACHER)  # fmt: skip


def pictures(ladder: Ladder, *, count: int = 10, seed: int = 0) -> Figure:
    """One row per rung: the first captions from the same noises, broken bodies outlined.

    Args:
        ladder: with all samples.
        count: captions.
        seed: which training is shown.
    """
    with style():
        figure = Figure(figsize=(0.92 * count + 1.6, 0.98 * len(PICTURED)), layout="constrained")
        for axis, rung in zip(figure.subplots(len(PICTURED), 1), PICTURED, strict=True):
            images = images_of(ladder, rung)
            own = images[min(seed, len(images) - 1)][:count]
            charts.judged_sheet(axis, charts.judged(own), columns=count)
            axis.set_anchor("W")
            label = f"{TITLES[rung]}\n{ladder.nfe(rung):g} NFE"
            axis.set_ylabel(label, rotation=0, ha="right", va="center", labelpad=6, fontsize=8)
    return figure


def dots(rows: pd.DataFrame, metrics: Sequence[str]) -> Figure:
    """One line per rung, one panel per metric; the dark band is real, the light one the teacher.

    Args:
        rows: of `turbo_lab.studies.turbo.table`.
        metrics: the panels.
    """
    return charts.dot_panels(
        rows,
        by="rung",
        titles={k: title for k, title in TITLES.items() if k not in (REAL, TEACHER, SLOW)},
        metrics={m: METRICS[m].title for m in metrics},
        units={m: METRICS[m].axis for m in metrics},
        bands={
            TEACHER: Band(f"{TITLES[TEACHER]}, 95% interval", 0.2),
            REAL: Band(f"{TITLES[REAL]}, 95% interval", 0.45),
        },
        accent=TURBO,
        ylabel="sampler",
        breaks=(next(iter(ABLATIONS)), LONG),
        columns=5,
    )


def differences(tests: pd.DataFrame) -> Figure:
    """Turbo minus each rival, in the direction that is better: right of the line turbo is better.

    Filled dots are differences whose corrected p is below 0.05 and whose interval excludes 0.

    Args:
        tests: of `turbo_lab.studies.turbo.tests`.
    """
    metrics = list(dict.fromkeys(tests["metric"]))
    with style():
        figure = Figure(
            figsize=(1.75 * len(metrics) + 1.9, 0.27 * len(RIVALS) + 0.9), layout="constrained"
        )
        axes = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
        for axis, metric in zip(axes, metrics, strict=True):
            sign = 1 if METRICS[metric].better == "more" else -1
            of = tests[tests["metric"] == metric].set_index("rival")
            axis.axvline(0, color=SOFT, lw=1)
            for y, rival in enumerate(RIVALS):
                row = of.loc[rival]
                ends = sorted(sign * row[k] for k in ("low", "high"))
                sure = row["holm"] < 0.05 and (ends[0] > 0 or ends[1] < 0)
                colour = ACCENT if rival in ABLATIONS else SECOND
                axis.plot(ends, [y, y], color=colour, lw=1)
                axis.plot(
                    sign * row["value"], y, "o", ms=4.5, color=colour,
                    mfc=colour if sure else "white",
                )  # fmt: skip
            axis.locator_params(axis="x", nbins=3)
            axis.set_title(METRICS[metric].title, fontsize=8)
            axis.set_xlabel(METRICS[metric].unit, fontsize=7)
            axis.grid(axis="y", color=SOFT, alpha=0.2)
        labels = [f"against {TITLES[rival]}" for rival in RIVALS]
        axes[0].set_yticks(range(len(RIVALS)), labels, fontsize=8)
        axes[0].invert_yaxis()
    return figure


def gallery(ladder: Ladder, *, count: int = 10) -> Figure:
    """What two steps still get wrong: the first failures of each kind, all trainings looked at.

    Args:
        ladder: with all samples.
        count: pictures of each kind, at most.
    """
    with style():
        figure = Figure(figsize=(0.92 * count + 1.6, 1.3 * len(FAILURES)), layout="constrained")
        for axis, (kind, title) in zip(
            figure.subplots(len(FAILURES), 1), FAILURES.items(), strict=True
        ):
            own, share = _failures(ladder, kind, count)
            axis.set_title(f"{title}: {share:.0%} of turbo's pictures", loc="left", fontsize=8)
            axis.set_anchor("W")
            if len(own):
                charts.judged_sheet(axis, charts.judged(own), columns=count)
            else:
                bare(axis)
    return figure


def _failures(ladder: Ladder, kind: str, count: int) -> tuple[Tensor, float]:
    """The first failures of a kind ``[<= count, 3, 32, 32]``, and their share."""
    wrong = [failed(found, kind) for found in ladder.found[TURBO]]
    images = images_of(ladder, TURBO)
    both = torch.cat([x[torch.from_numpy(w)] for x, w in zip(images, wrong, strict=True)])
    return both[:count], float(np.mean(wrong))


def settled(ladder: Ladder, count: int) -> list[int]:
    """The first captions, at most so many, of which the teacher gets all right in 40 steps."""
    (found,) = ladder.found[TEACHER]
    return np.flatnonzero(found.values["all_right"])[:count].tolist()


@torch.no_grad()
def path_frames(
    ladder: Ladder,
    captions: Sequence[int],
    *,
    seed: int,
    shown: Sequence[int] = (0, 1, 2, 4, 8, 16, 28, 39),
) -> dict[str, list[Tensor]]:
    """What each sampler takes for the clean picture, step by step.

    Args:
        ladder: with all samples.
        captions: which of its captions, n of them; each has its own noise.
        seed: of the noise.
        shown: steps of the teacher that are kept, from 0.

    Returns:
        By sampler, predictions ``[n, 3, 32, 32]``: of the teacher for the shown steps, of the
        turbo student for both of its steps.
    """
    lab = ladder.lab
    student = lab.student(TURBO, steps=STEPS)
    z = noise(lab.testbed.shape, seed=seed, stream="z", indices=captions).to(lab.device)
    teacher = guided(lab.testbed.net, lab.testbed.null, TEACHER_GUIDANCE)
    runs = {
        TEACHER: (teacher, time_grid(TEACHER_STEPS), tuple(shown)),
        TURBO: (student.field, grid_from_times((1.0, SECOND_TIME)), (0, 1)),
    }
    c = ladder.scenes.tokens[list(captions)].to(lab.device)
    return {
        name: [
            lab.testbed.decode(state.x_hat).cpu()
            for k, state in enumerate(sample(field, grid, z, c))
            if k in keep
        ]
        for name, (field, grid, keep) in runs.items()
    }


def path_strip(frames: Mapping[str, Sequence[Tensor]], shown: Sequence[int]) -> Figure:
    """Draw the predictions of one caption per row, teacher and turbo in turn, from the left.

    Args:
        frames: of `path_frames`.
        shown: the teacher's steps that were kept.
    """
    n = len(frames[TEACHER][0])
    with style():
        figure = Figure(figsize=(1.0 * len(shown) + 1.5, 2.05 * n), layout="constrained")
        grid = figure.subplots(2 * n, len(shown), squeeze=False)
        for axis in grid.ravel():
            axis.set_visible(False)
        for k in range(n):
            for row, (name, own) in enumerate(frames.items()):
                for column, images in enumerate(own):
                    axis = grid[2 * k + row, column]
                    axis.set_visible(True)
                    axis.imshow(contact_sheet(images[k : k + 1], columns=1, enlarge=1, gap=0))
                    step = shown[column] + 1 if name == TEACHER else column + 1
                    axis.set_title(f"step {step}", fontsize=7)
                    bare(axis)
                label = f"{TITLES[name].split(':')[-1].strip()}"
                grid[2 * k + row, 0].set_ylabel(
                    label, rotation=0, ha="right", va="center", labelpad=4, fontsize=7
                )
    return figure


def save_path_gif(frames: Mapping[str, Sequence[Tensor]], path: Path) -> Path:
    """Write the predictions as an animation, the teacher above and turbo below, atomically.

    Turbo is done after two frames and then waits for its teacher.

    Args:
        frames: of `path_frames`.
        path: of the GIF.
    """
    from PIL import Image

    teacher, ours = frames[TEACHER], frames[TURBO]
    drawn = []
    for k, images in enumerate(teacher):
        both = torch.cat([images, ours[min(k, len(ours) - 1)]])
        drawn.append(Image.fromarray(contact_sheet(both, columns=len(images), enlarge=4)))
    buffer = io.BytesIO()
    # The last frame stays, so that a reader can compare.
    times = [500] * (len(drawn) - 1) + [2500]
    drawn[0].save(
        buffer, format="GIF", save_all=True, append_images=drawn[1:], duration=times, loop=0
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_bytes(path, buffer.getvalue())
    return path
