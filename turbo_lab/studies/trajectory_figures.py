"""Figures of notebook 02, from a comparison of students."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor

from turbo_lab import charts, figures, measure
from turbo_lab.lab import Samples
from turbo_lab.measure.areas import AREAS
from turbo_lab.palette import colour_of, shades
from turbo_lab.studies.trajectory import (
    METRICS,
    TITLES,
    TRAJECTORY,
    Comparison,
    endpoint_errors,
    ratio,
)


def magnified(comparison: Comparison, *, caption: int, seed: int = 0) -> Figure:
    """The picture to remember: method by steps, sign and arm magnified, error per area beside.

    Args:
        comparison: of all students.
        caption: which caption and noise is shown.
        seed: which training of the students is shown.
    """
    steps = comparison.budget.steps
    cells = {TITLES["naive"]: [_cell(comparison, caption, comparison.naive[n]) for n in steps]}
    bars = {TITLES["naive"]: _heights(comparison, "naive")}
    for family in TRAJECTORY:
        drawn = [comparison.samples[family, n, seed] for n in steps]
        cells[TITLES[family]] = [_cell(comparison, caption, one) for one in drawn]
        bars[TITLES[family]] = _heights(comparison, family)
    cells = {TITLES["teacher"]: [_cell(comparison, caption, comparison.teacher)], **cells}
    columns = [f"{n} step{'s' * (n > 1)}" for n in steps]
    return charts.magnified_grid(
        cells,
        columns=columns,
        bars=bars,
        bar_title=f"error / variance at {', '.join(map(str, steps))} steps",
        colours=_COLOURS,
    )


def readable_caption(comparison: Comparison) -> int:
    """The first caption that the teacher draws with one readable sign, whole body; 0 if none."""
    found = {m: v[0].astype(bool) for m, v in comparison.measured["teacher", 0].values.items()}
    good = found["sign_read"] & found["whole_body"] & ~found["ghost_signs"]
    return int(good.argmax())


CROP = 12
"""Pixels of a magnified crop."""
GUTTER = 8
"""Drawn pixels of white between a picture and its crops, and between these."""
_COLOURS = {title: colour_of(family) for family, title in TITLES.items()}


def _cell(comparison: Comparison, caption: int, drawn: Samples) -> np.ndarray:
    """One picture with its sign and its left arm magnified at its right, uint8."""
    image = drawn.images[caption]
    own = measure.read(image[None])
    # A smear has no place: then look where the teacher put its sign.
    found = bool(own.sign.count[0])
    sign, row = (own.sign, 0) if found else (comparison.reading.sign, caption)
    at_sign = (int(sign.x[row]) - 1, int(sign.y[row]) - 2)
    at_arm = (int(own.body.x[0]) - 9, int(own.body.y[0]) - 2)
    crops = [_crop(image, *at_sign), _crop(image, *at_arm)]
    large = figures.contact_sheet(image[None], columns=1, enlarge=6)
    small = [figures.contact_sheet(c[None], columns=1, enlarge=8) for c in crops]
    return with_crops(large, small)


def with_crops(picture: np.ndarray, crops: Sequence[np.ndarray]) -> np.ndarray:
    """A picture ``[H, W, 3]`` and right of it, one above the other, crops; white between them.

    Args:
        picture: uint8.
        crops: of one width, together as high as the picture.
    """
    height = len(picture) + GUTTER * (len(crops) - 1)
    width = crops[0].shape[1]
    sheet = np.full((height, picture.shape[1] + GUTTER + width, 3), 255, dtype=np.uint8)
    top = (height - len(picture)) // 2
    sheet[top : top + len(picture), : picture.shape[1]] = picture
    for k, crop in enumerate(crops):
        at = k * (len(crop) + GUTTER)
        sheet[at : at + len(crop), -width:] = crop
    return sheet


def _crop(image: Tensor, x: int, y: int) -> Tensor:
    x, y = (min(max(v, 0), image.shape[-1] - CROP) for v in (x, y))
    return image[:, y : y + CROP, x : x + CROP]


def _heights(comparison: Comparison, family: str) -> dict[str, list[float]]:
    found = [comparison.measured[family, n] for n in comparison.budget.steps]
    return {a: [ratio(one.errors[a], one.spreads[a]) for one in found] for a in AREAS}


def lines(rows: pd.DataFrame) -> Figure:
    """Every metric against steps, one line per family, the teacher as a band."""
    return charts.compared_lines(rows, metrics=METRICS, titles=TITLES)


def spectra(comparison: Comparison) -> Figure:
    """Radial power of each family's pictures over the teacher's, by spatial frequency."""
    teacher = comparison.measured["teacher", 0].power
    groups = {}
    for family in ("naive", *TRAJECTORY):
        steps = comparison.steps_of(family)
        groups[TITLES[family]] = {
            f"{n} step{'s' * (n > 1)}": (comparison.measured[family, n].power / teacher).tolist()
            for n in steps
        }
    rings = [k / 32 for k in range(1, len(teacher) + 1)]
    colours = {TITLES[f]: shades(f, len(groups[TITLES[f]])) for f in ("naive", *TRAJECTORY)}
    return charts.ratio_lines(
        groups, x=rings, xlabel="cycles per pixel", ylabel="power / teacher's", colours=colours
    )


def readable(comparison: Comparison) -> Figure:
    """Distance to the teacher's own sample against signs read: low error is not legibility."""
    return charts.scatter(
        endpoint_errors(comparison),
        xlabel="mean squared distance to the teacher's sample from the same noise",
        ylabel="signs read",
        colours=_COLOURS,
    )
