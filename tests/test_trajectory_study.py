"""Notebook 02's study: areas against geometry, intervals over seeds, claims that can fail."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from small_lab import quick_study

from turbo_lab import charts, explore
from turbo_lab.claims import crossed_bootstrap
from turbo_lab.errors import BadInput
from turbo_lab.lab import Lab
from turbo_lab.measure.areas import AREAS, area_errors, area_masks
from turbo_lab.postcards import draw_scenes, render
from turbo_lab.studies import trajectory, trajectory_figures
from turbo_lab.studies.trajectory import Budget, Comparison

# --- areas --------------------------------------------------------------------------------------


def test_areas_are_where_the_renderer_put_them() -> None:
    scenes = draw_scenes("eval", range(40))
    images = render(scenes)
    masks = area_masks(images)
    assert torch.equal(sum(masks[a].int() for a in AREAS), torch.ones(40, 32, 32, dtype=torch.int))
    for k, (x, y) in enumerate(scenes.sign.tolist()):
        plate = torch.zeros(32, 32, dtype=torch.bool)
        plate[y : y + 7, x : x + 9] = True
        assert torch.equal(masks["sign"][k], plate)
    heads = scenes.head.long()
    inside = masks["figure"][torch.arange(40), heads[:, 1], heads[:, 0]]
    assert bool(inside.all())
    share = {a: float(masks[a].float().mean()) for a in AREAS}
    assert share["sign"] < share["figure"] < share["ground"]


def test_normalised_errors_are_zero_for_the_teacher_and_one_for_its_mean_colours() -> None:
    images = render(draw_scenes("eval", range(30)))
    masks = area_masks(images)
    flat = torch.zeros_like(images)
    for mask in masks.values():
        weight = mask[:, None].float()
        flat += weight * (images * weight).sum((0, 2, 3), keepdim=True) / weight.sum()
    for area, found in area_errors(flat, images, masks).items():
        assert float(found.error.sum() / found.spread.sum()) == pytest.approx(1.0, rel=1e-4), area
        assert bool((found.detail <= found.spread * (1 + 1e-5)).all())
    own = torch.zeros_like(images)
    for mask in masks.values():
        weight = mask[:, None].float()
        count = weight.sum((2, 3), keepdim=True)
        own += weight * (images * weight).sum((2, 3), keepdim=True) / count
    for found in area_errors(own, images, masks).values():
        torch.testing.assert_close(found.error, found.detail, rtol=1e-4, atol=1e-4)
    assert all(float(f.error.sum()) == 0 for f in area_errors(images, images, masks).values())


def test_an_error_in_one_area_is_seen_in_that_area_only() -> None:
    images = render(draw_scenes("eval", range(20)))
    masks = area_masks(images)
    smeared = torch.where(masks["sign"][:, None], images.mean((2, 3), keepdim=True), images)
    found = area_errors(smeared, images, masks)
    assert float(found["sign"].error.min()) > 0
    assert float(found["figure"].error.max()) == float(found["ground"].error.max()) == 0


# --- intervals ----------------------------------------------------------------------------------


def test_crossed_bootstrap_knows_what_varies() -> None:
    source = np.random.default_rng(0)
    noise = source.standard_normal((1, 400))
    only_images = crossed_bootstrap(np.repeat(noise, 5, axis=0))
    assert only_images.high - only_images.low == pytest.approx(4 / 20 * noise.std(), rel=0.2)
    seeds = np.repeat(source.standard_normal((6, 1)), 300, axis=1)
    only_seeds = crossed_bootstrap(seeds)
    wide = 2 * 1.96 * seeds[:, 0].std() / 6**0.5
    assert only_seeds.high - only_seeds.low == pytest.approx(wide, rel=0.3)
    spread = source.standard_normal((3, 40))
    plain, moved = (
        crossed_bootstrap(spread, statistic=lambda x: abs(x.mean()), centred=c)
        for c in (False, True)
    )
    assert moved.low < moved.value == plain.value and moved.high < plain.high  # |mean| grows
    same = crossed_bootstrap(np.full((3, 10), 2.0))
    assert (same.low, same.value, same.high) == (2.0, 2.0, 2.0)


@pytest.mark.parametrize("shape", [(5,), (0, 4), (2, 3, 4)])
def test_crossed_bootstrap_wants_a_table(shape: tuple[int, ...]) -> None:
    with pytest.raises(BadInput, match="seeds, images"):
        crossed_bootstrap(np.zeros(shape))


# --- the study ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bench(study_lab: Lab) -> Iterator[Lab]:
    with quick_study(study_lab):
        yield study_lab


@pytest.fixture(scope="module")
def comparison(bench: Lab) -> Comparison:
    budget = Budget(captions=6, seeds=2, steps=(2, 8))
    return trajectory.compare(bench, budget, seed=0)


def test_students_share_captions_noise_and_pay_one_call_per_step(comparison: Comparison) -> None:
    assert len(comparison.samples) == 4 * 2 * 2
    for (family, steps, _), drawn in comparison.samples.items():
        assert drawn.nfe == steps, family
        assert drawn.scenes.captions == comparison.teacher.scenes.captions
    assert comparison.naive[2].nfe == 4 and comparison.teacher.nfe == 80
    one = {f: comparison.students[f, 2, 0].artefact.key for f in trajectory.TRAJECTORY}
    assert comparison.students["consistency", 8, 0].artefact.key == one["consistency"]
    assert comparison.students["progressive", 8, 0].artefact.key != one["progressive"]
    assert len(comparison.keys) == len(set(comparison.keys))


def test_tables_figures_and_claims_come_out_whole(comparison: Comparison) -> None:
    rows = trajectory.table(comparison)
    assert set(rows["metric"]) == set(trajectory.METRICS)
    assert bool((rows["low"] <= rows["high"]).all()) and bool(rows["value"].notna().all())
    own = rows[(rows["family"] == "teacher")].set_index("metric")["value"]
    assert own["high_frequency_share"] == 1.0
    assert all(own[f"error_{a}"] == 0.0 for a in AREAS)
    wide = trajectory.wide(rows, ["sign_read", "whole_body"])
    assert wide.shape == (4 * 2 + 2 + 1, 2)
    made = trajectory.claims(comparison, profile="smoke")
    parts = ["blur", "small", "figure", "detail", "steps"]
    assert [c.id.split("-")[1] for c in made[:5]] == parts and len(made) == 20
    for draw in (
        lambda: trajectory_figures.magnified(comparison, caption=0),
        lambda: trajectory_figures.lines(rows),
        lambda: trajectory_figures.spectra(comparison),
        lambda: trajectory_figures.readable(comparison),
    ):
        assert isinstance(draw(), Figure)
    assert 0 <= trajectory_figures.readable_caption(comparison) < 6


def test_claims_follow_the_pictures(comparison: Comparison) -> None:
    """Blurred copies of the teacher are found to blur; its own pictures are not."""
    teacher = comparison.teacher.images
    soft = torch.nn.functional.avg_pool2d(teacher, 3, stride=1, padding=1)
    for images, verdict in ((soft, "holds"), (teacher, "inconclusive")):
        found = comparison._measure([images, images])
        same = {key: found for key in comparison.measured if key[0] in trajectory.TRAJECTORY}
        patched = Comparison(**{k: getattr(comparison, k) for k in Comparison.__dataclass_fields__})
        object.__setattr__(patched, "measured", {**comparison.measured, **same})
        blur = [c for c in trajectory.claims(patched, profile="smoke") if "blur" in c.id]
        assert {c.verdict for c in blur} == {verdict}


def test_losing_the_sign_alone_or_the_figure_alone_is_told_apart(comparison: Comparison) -> None:
    """Real postcards in the teacher's place; one area of them in its mean colour."""
    images = render(comparison.teacher.scenes)
    patched = Comparison(**{k: getattr(comparison, k) for k in Comparison.__dataclass_fields__})
    object.__setattr__(patched, "teacher", replace(comparison.teacher, images=images))
    for area, verdict in (("sign", "holds"), ("figure", "not reproduced")):
        inside = patched.masks[area][:, None].float()
        colour = (images * inside).sum((0, 2, 3), keepdim=True) / inside.sum()
        lost = patched._measure([torch.where(inside.bool(), colour, images)] * 2)
        same = {key: lost for key in comparison.measured if key[0] in trajectory.TRAJECTORY}
        object.__setattr__(patched, "measured", {**comparison.measured, **same})
        made = trajectory.claims(patched, profile="smoke")
        told = {c.verdict for c in made if c.id.startswith("C1-figure")}
        assert told == {verdict}


def test_a_picture_and_its_crops_are_parted_by_white() -> None:
    black = np.zeros((192, 192, 3), dtype=np.uint8)
    sheet = trajectory_figures.with_crops(black, [black[:96, :96]] * 2)
    gap = trajectory_figures.GUTTER
    assert sheet.shape == (192 + gap, 192 + gap + 96, 3)
    assert (sheet[:, 192 : 192 + gap] == 255).all() and (sheet[96 : 96 + gap, -96:] == 255).all()
    assert int((sheet == 0).sum()) == black.size + 2 * 96 * 96 * 3


def test_students_of_unknown_kind_or_steps_are_refused(bench: Lab) -> None:
    with pytest.raises(BadInput, match="student='dmd9'"):
        bench.student("dmd9", steps=2)
    with pytest.raises(BadInput, match="steps=3"):
        bench.student("progressive", steps=3)
    with pytest.raises(BadInput, match="steps=5"):
        bench.student("direct", steps=5)


def test_the_explorer_draws_student_and_teacher(
    bench: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(explore, "TEACHER_STEPS", 2)
    box = explore.student_explorer(bench, ("consistency", "continuous"))
    knobs, shown = box.children
    pictures, note = shown.children
    before = [bytes(picture.value) for picture in pictures.children]
    assert all(png.startswith(b"\x89PNG") for png in before) and "left 2 NFE" in note.value
    knobs.children[0].value = "continuous"
    after = [bytes(picture.value) for picture in pictures.children]
    assert after[0] != before[0] and after[1] == before[1]


def test_compared_lines_draw_the_teacher_as_a_band() -> None:
    rows = [("direct", 1, 0.2), ("direct", 2, 0.4), ("teacher", np.nan, 0.9)]
    table = pd.DataFrame(
        [
            {"family": f, "steps": s, "metric": "m", "value": v, "low": v - 0.1, "high": v + 0.1}
            for f, s, v in rows
        ]
    )
    titles = {"direct": "method a", "teacher": "teacher"}
    figure = charts.compared_lines(table, metrics={"m": "a metric"}, titles=titles)
    (axis,) = [a for a in figure.axes if a.get_visible()]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["teacher", "method a"]
    assert len(axis.patches) == 1
