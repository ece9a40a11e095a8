"""Panels of dots: every band is in the legend, every axis has a title, and nothing overlaps."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from turbo_lab import charts
from turbo_lab.charts import Band
from turbo_lab.studies import (
    adversarial,
    adversarial_figures,
    every_metric,
    photo_figures,
    photo_textures,
    textures,
    turbo,
    turbo_figures,
)


def table(by: str, samplers: list[str], metrics: list[str]) -> pd.DataFrame:
    return pd.DataFrame(
        {by: sampler, "metric": metric, "value": k + 0.5, "low": k + 0.25, "high": k + 1.0}
        for k, sampler in enumerate(samplers)
        for metric in metrics
    )


def ladder() -> Figure:
    return turbo_figures.dots(table("rung", [*turbo.TITLES], [*turbo.SHOWN]), turbo.SHOWN)


def postcards() -> Figure:
    samplers = [adversarial.FLOOR, *adversarial.TITLES]
    shown = [*textures.METRICS][:6]
    return adversarial_figures.dots(table("family", samplers, shown), shown)


def photographs() -> Figure:
    rows = [
        table("squares", [photo_textures.TRUE, *photo_textures.ALTERED], ["patches"]).assign(
            material=name
        )
        for name in photo_textures.MATERIALS
    ]
    others = [
        table("squares", [other], ["patches"]).assign(material=name)
        for name in photo_textures.MATERIALS
        for other in photo_textures.MATERIALS
        if other != name
    ]
    return photo_figures.distances(pd.concat([*rows, *others]))


def named_bands(figure: Figure) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def test_a_band_reaches_from_low_to_high_and_has_its_shade_in_the_legend() -> None:
    figure = charts.dot_panels(
        table("who", ["a", "b", "real"], ["m", "n"]),
        by="who",
        titles={"a": "first", "b": "second"},
        metrics={"m": "one", "n": "two"},
        units={"m": "length (cm)", "n": "share"},
        bands={"real": Band("real pictures", 0.3), "nobody": Band("not in the table", 0.1)},
        accent="b",
        ylabel="sampler",
        columns=1,
    )
    assert named_bands(figure) == ["real pictures", "not in the table"]
    key = figure.legends[0].get_patches()[0]
    for axis in figure.axes:
        (span,) = axis.patches
        assert (span.get_x(), span.get_x() + span.get_width()) == (2.25, 3.0)  # type: ignore[attr-defined]
        assert span.get_facecolor() == key.get_facecolor() and key.get_facecolor()[3] == 0.3
    assert [axis.get_xlabel() for axis in figure.axes] == ["length (cm)", "share"]
    assert [axis.get_ylabel() for axis in figure.axes] == ["sampler", "sampler"]


@pytest.mark.parametrize(
    ("draw", "bands"),
    [
        (photographs, ["the photograph's own right part as it is"]),
        (postcards, ["teacher, 40 steps", "real, other pictures"]),
        (ladder, ["teacher, 40 steps", "real, other pictures"]),
    ],
)
def test_every_figure_of_dots_says_what_its_bands_and_axes_are(
    draw: Callable[[], Figure], bands: list[str]
) -> None:
    figure = draw()
    assert named_bands(figure) == [f"{band}, 95% interval" for band in bands]
    assert all(axis.get_xlabel() for axis in figure.axes)
    assert figure.axes[0].get_ylabel()


@pytest.mark.parametrize("draw", [photographs, postcards, ladder])
def test_no_words_lie_on_other_words(draw: Callable[[], Figure]) -> None:
    figure = draw()
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    words = [
        *(text for axis in figure.axes for text in (axis.title, axis.xaxis.label)),
        *(figure.axes[0].yaxis.label, *figure.axes[0].get_yticklabels(), *figure.legends),
    ]
    boxes = [word.get_window_extent(canvas.get_renderer()) for word in words]
    assert not [pair for pair in combinations(boxes, 2) if pair[0].overlaps(pair[1])]


def test_a_unit_is_in_brackets_and_in_one_piece() -> None:
    metric = every_metric.METRICS["moss_energy"]
    assert metric.axis == "power in the grain's band (of\u00a0real)"


def test_a_break_parts_the_lines_and_each_dot_stays_on_its_own() -> None:
    drawn = {"by": "who", "metrics": {"m": "one"}, "units": {"m": "share"}, "bands": {}}
    rows = table("who", ["a", "b", "c"], ["m"])
    titles = {"a": "first", "b": "second", "c": "third"}
    whole, parted = (
        charts.dot_panels(rows, titles=titles, accent="b", ylabel="", breaks=breaks, **drawn)  # type: ignore[arg-type]
        for breaks in ((), ("c",))
    )
    assert np.diff(whole.axes[0].get_yticks()).tolist() == [1, 1]
    ticks = parted.axes[0].get_yticks()
    assert np.diff(ticks) == pytest.approx([1, 1 + charts.GAP])
    dots = [line.get_ydata()[0] for line in parted.axes[0].lines if line.get_marker() == "o"]  # type: ignore[index]
    assert dots == ticks.tolist()
