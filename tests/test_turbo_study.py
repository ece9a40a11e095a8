"""Notebook 06's study: equal calls on every rung, tests that hold, figures that are drawn."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from small_lab import quick_study, small_student

from turbo_lab import claims as cl
from turbo_lab import explore_turbo, readme
from turbo_lab.errors import BadInput
from turbo_lab.lab import Lab
from turbo_lab.measure import paste_sign
from turbo_lab.postcards import draw_scenes, render
from turbo_lab.recipes import Recipe, Stage, resolve, student_recipe
from turbo_lab.recipes.adversarial import AGAINST, gan
from turbo_lab.recipes.distribution import calls_per_round
from turbo_lab.recipes.turbo import CALLS, LADDER, LONG, MAIN, RUNGS, TURBO
from turbo_lab.recipes.warm import STEPS
from turbo_lab.store import Store
from turbo_lab.studies import gathered, turbo, turbo_choice, turbo_claims, turbo_figures
from turbo_lab.studies.every_metric import find, reference
from turbo_lab.studies.paired import holm, swapped
from turbo_lab.studies.turbo import Budget, Ladder

BUDGET = Budget(captions=32, seeds=1, most=2, prompts=2, noises=2, real=64, swaps=9)


@pytest.fixture(scope="module")
def bench(study_lab: Lab) -> Iterator[Lab]:
    """With the shipped artefacts behind it: the critic of turbo looks through the mini-DINO."""
    store = Store(cache=study_lab.store.cache, shipped=Store.default().shipped)
    with quick_study(study_lab):
        yield replace(study_lab, store=store)


@pytest.fixture(scope="module")
def ladder(bench: Lab) -> Ladder:
    return turbo.climb(bench, BUDGET, seed=0)


# --- recipes ------------------------------------------------------------------------------------


def spent(recipe: Recipe) -> float:
    """Network calls of a recipe, counted from its stages and those of its start."""
    earlier = spent(recipe.start) if recipe.start else 0.0
    return earlier + sum(s.steps * s.batch_size * per_sample(s) for s in recipe.stages)


def per_sample(stage: Stage) -> float:
    if stage.method == "dmd2":
        updates = int(str(stage.options["rival_updates"]))
        return calls_per_round(STEPS, updates) + (1.5 if stage.gan else 0)
    if stage.method == "consistency":
        return 6
    substeps = int(stage.options["teacher_steps"]) // int(stage.options["steps"])  # type: ignore[arg-type]
    return 3 + substeps * (2 if stage.teacher == "guided" else 1)


@pytest.mark.parametrize("name", LADDER)
def test_every_rung_has_spent_as_many_network_calls(name: str) -> None:
    recipe = student_recipe(name, steps=STEPS)
    assert spent(recipe) == pytest.approx(CALLS["quick"], rel=0.01)


def test_the_longer_student_is_turbo_by_more_calls_in_a_larger_adapter() -> None:
    plain, longer = (student_recipe(name, steps=STEPS) for name in (TURBO, LONG))
    assert spent(longer) == pytest.approx(3 * spent(plain), rel=0.01)
    assert longer.adapter is not None and longer.adapter.rank == 32 > plain.adapter.rank
    assert longer.start is not None and plain.start is not None
    assert longer.start.adapter == longer.adapter and longer.times == plain.times
    stages = [(*recipe.start.stages, *recipe.stages) for recipe in (plain, longer) if recipe.start]
    for ours, theirs in zip(*stages, strict=True):
        changed = {k for k, v in vars(theirs).items() if vars(ours)[k] != v}
        assert changed <= {"steps", "precision", "options"}
        kept = {k: v for k, v in theirs.options.items() if k != "rival_updates"}
        assert kept == {k: v for k, v in ours.options.items() if k != "rival_updates"}
    with pytest.raises(BadInput, match="steps"):
        student_recipe(LONG, steps=4)


def test_trainings_of_six_blocks_share_one_start_by_pcm_that_lowers_its_edge() -> None:
    one, other = (student_recipe(turbo.SIX, steps=STEPS, seed=k) for k in (0, 1))
    assert one.start == other.start == student_recipe("pcm-six", steps=STEPS)
    assert one.start is not None and one.teacher == resolve("teacher") == one.start.teacher
    assert one.net.layers < one.teacher.size.layers == 6
    edges = [stage.options["edges"] for stage in one.start.stages]
    assert edges == sorted(edges, reverse=True) and len(set(edges)) == 2
    assert one.start.times == one.times == (1.0, *edges[-1])
    assert [stage.gan is not None for stage in one.stages] == [False, False, True]
    assert spent(one) > spent(student_recipe(LONG, steps=STEPS))


def test_each_rung_below_turbo_lacks_one_thing() -> None:
    lacking = {"turbo-cold", "turbo-teacher-data", "turbo-random", "turbo-small"}
    assert set(turbo.ABLATIONS) == lacking
    for name in lacking:
        rung = RUNGS[name]
        assert rung.against is not None
        changed = {k for k, v in vars(MAIN).items() if vars(rung.against)[k] != v} - {"title"}
        assert len(changed) + (rung.start != RUNGS[TURBO].start) == 1
    for name in {TURBO, *lacking} & set(AGAINST):  # notebook 05 knows them by these names too
        assert student_recipe(name, steps=STEPS) == gan("quick", 0, name=name)
    stage = student_recipe(TURBO, steps=STEPS).stages[-1]
    assert stage.gan is not None and 0 < stage.gan.rho < 1 and stage.gan.features == "dino"


def test_everyone_is_drawn_for_the_same_captions(ladder: Ladder) -> None:
    assert set(ladder.rungs) == set(turbo.TITLES) - {turbo.REAL}
    trainings = {rung: len(found) for rung, found in ladder.found.items()}
    assert trainings[TURBO] == trainings[turbo.WARM] == 2
    assert trainings[turbo.COLD] == trainings[LONG] == 1
    assert all(len(f) == BUDGET.captions for found in ladder.found.values() for f in found)
    nfe = {rung: ladder.nfe(rung) for rung in ladder.rungs}
    assert (nfe[turbo.SLOW], nfe[turbo.TEACHER], nfe[turbo.NAIVE]) == (100, 80, 4)
    assert nfe[turbo.SIX_TEACHER] == 80 and {nfe[f] for f in (*LADDER, LONG, turbo.SIX)} == {2}


def test_the_longer_student_is_looked_at_after_each_stage(
    bench: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        turbo_choice, "student_recipe", partial(small_student, bench, profile="smoke")
    )
    found = turbo_choice.by_stage(bench, captions=8, trainings=1)
    assert list(found.index) == [(1, 0), (2, 0), (3, 0)]
    ended = turbo_choice.looks(bench, [LONG], captions=8)
    pd.testing.assert_series_equal(found.loc[3, 0], ended.loc[LONG], check_names=False)
    assert not found.loc[1, 0].equals(found.loc[3, 0])


# --- tests and claims ---------------------------------------------------------------------------


def test_holm_is_the_step_down_of_a_worked_example() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5]) == [0.5] and holm([0.6, 0.7]) == [1.0, 1.0]


def test_swapping_pictures_is_the_sign_flip_test_where_the_metric_is_a_mean() -> None:
    scenes = draw_scenes("eval", range(10))
    real, images = reference(64), render(scenes)
    other = images.clone()
    other[:6] = images[:6].mean((2, 3), keepdim=True)
    one, two = find(images, scenes, real), find(other, scenes, real)
    exact = cl.paired_permutation(one.values["contrast"], two.values["contrast"])
    assert swapped([one], [two], "contrast", swaps=4000) == pytest.approx(exact, abs=0.02)
    assert swapped([one], [one], "fur_patches", swaps=5) == 1.0
    assert swapped([one, one], [two], "contrast", swaps=200) < 0.1
    with pytest.raises(BadInput, match="metric"):
        swapped([one], [two], "diversity")
    with pytest.raises(BadInput, match="swaps"):
        swapped([one], [two], "contrast", swaps=0)
    with pytest.raises(BadInput, match="other"):
        swapped([one], [two, two], "contrast")


def test_tests_and_claims_name_everyone(ladder: Ladder) -> None:
    tests = turbo.tests(ladder)
    assert len(tests) == len(turbo.RIVALS) * len(turbo.PRIMARY)
    assert (tests["holm"] >= tests["p"]).all() and tests["holm"].le(1).all()
    made = {c.id: c for c in turbo_claims.claims(ladder, profile="smoke")}
    assert {f"C7-{k}" for k in ("signs", "bodies", "moss", "fur", "hues", "chroma")} <= set(made)
    assert made["L-long-signs"].seeds == made["C7-long-signs"].seeds == 1
    longer = np.mean([f.values["sign_read"].mean() for f in ladder.found[LONG]])
    teacher = ladder.found[turbo.TEACHER][0].values["sign_read"].mean()
    assert made["C7-long-signs"].interval.value == pytest.approx(longer - teacher)
    assert made["C7-signs"].seeds == 2 and made["L-warm"].seeds == 1
    assert made["L-gan-fur"].seeds == 2 and made["C7-hues"].threshold == pytest.approx(0.1)


def test_the_teacher_with_its_chroma_moved_is_half_as_far_again(ladder: Ladder) -> None:
    (teacher,) = ladder.found[turbo.TEACHER]
    (scaled,) = turbo_claims._scaled(ladder)
    at = np.arange(len(teacher))
    assert scaled.value("chroma_w1", at) == pytest.approx(1.5 * teacher.value("chroma_w1", at))


def test_bars_are_of_the_turbo_of_six_blocks_and_relative_to_the_teacher(
    bench: Lab, ladder: Ladder
) -> None:
    teacher = ladder.plain[turbo.TEACHER][0]
    found = {
        name: (value, limit) for name, value, _, limit in turbo_claims.bars(bench, teacher, seeds=1)
    }
    assert len(found) == 6 and found["turbo.hue_kl"][1] == pytest.approx(0.1)
    ours = np.mean([f.values["whole_body"].mean() for f in ladder.found[turbo.SIX]])
    gap = found["turbo.whole_body_minus_teacher"][0]
    assert gap.value == pytest.approx(
        ours - ladder.found[turbo.TEACHER][0].values["whole_body"].mean()
    )


def test_a_picture_fails_in_the_way_it_was_broken() -> None:
    scenes = draw_scenes("eval", range(8))
    images = render(scenes)
    whole = find(images, scenes, reference(64))
    assert not any(turbo.failed(whole, kind).any() for kind in turbo.FAILURES)
    swapped_captions = find(images.roll(1, 0), scenes, reference(64))
    assert turbo.failed(swapped_captions, "digits_right").mean() > 0.8
    x, y = scenes.sign.T
    side = torch.where(x < 16, 4, -4)
    number = torch.where(side > 0, 10 * scenes.fields[:, 4] + 7, 70 + scenes.fields[:, 3])
    longer = find(paste_sign(images, x + side, y, number, 1.0), scenes, reference(64))
    read = longer.values["sign_alone"] == 1
    assert read.any() and (turbo.failed(longer, "third_digit") == read).all()
    blank = find(torch.zeros_like(images), scenes, reference(64))
    assert turbo.failed(blank, "sign_lost").all() and turbo.failed(blank, "whole_body").all()
    assert not turbo.failed(blank, "digits_right").any()


# --- figures ------------------------------------------------------------------------------------


def test_tables_and_figures_are_drawn(ladder: Ladder, tmp_path: Path) -> None:
    rows = turbo.table(ladder)
    told = json.loads(turbo.save_headline(ladder, rows, tmp_path).read_text())
    assert [row["nfe"] for row in told["rows"]] == [None, 80, 4, 2, 2, 2, 2, 2, 2, 2, 80]
    shown = readme.rendered(readme.Headline.model_validate(told))
    assert shown.count("\n| ") == 1 + 11 and "pictures.png" in shown
    assert set(turbo.failures(ladder).index) == set(turbo.FAILURES.values())
    assert list(turbo.wide(ladder, rows, "sign_read").index) == list(turbo.TITLES.values())
    frames = turbo_figures.path_frames(ladder, [1, 0], seed=0, shown=(0, 9, 39))
    assert [len(v) for v in frames.values()] == [3, 2]
    last = ladder.plain[turbo.TEACHER][0].images[[1, 0]]
    assert torch.allclose(frames[turbo.TEACHER][-1], last, atol=1e-4)
    with Image.open(turbo_figures.save_path_gif(frames, tmp_path / "path.gif")) as gif:
        assert getattr(gif, "n_frames", 0) == 3
    for figure in (
        turbo_figures.pictures(ladder, count=2),
        turbo_figures.dots(rows, ["sign_read", "hue_kl"]),
        turbo_figures.differences(turbo.tests(ladder)),
        turbo_figures.gallery(ladder, count=2),
        turbo_figures.path_strip(frames, (0, 9, 39)),
    ):
        assert isinstance(figure, Figure)


def test_the_path_is_shown_of_pictures_that_the_teacher_gets_right() -> None:
    found = SimpleNamespace(values={"all_right": np.array([0.0, 1.0, 1.0, 0.0, 1.0])})
    told = cast(Ladder, SimpleNamespace(found={turbo.TEACHER: [found]}))
    assert turbo_figures.settled(told, 2) == [1, 2] and turbo_figures.settled(told, 9) == [1, 2, 4]


def test_the_explorer_shows_what_the_oracles_see(
    bench: Lab, ladder: Ladder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "turbo_lab.lab.student_recipe", lambda *a, **k: small_student(bench, *a, **k)
    )
    box = explore_turbo.turbo_explorer(bench, {TURBO: (2,), "dmd2": (2, 4)}, noises=2)
    knobs, shown = box.children
    picture, note = shown.children
    assert bytes(picture.value).startswith(b"\x89PNG") and note.value.count("garment") == 4
    before = bytes(picture.value)
    knobs.children[0].value = "dmd2"
    assert knobs.children[1].options == (2, 4)
    knobs.children[1].value = 4
    assert bytes(picture.value) != before
    knobs.children[3 + 3].value = "4x"  # the sign
    assert "two digits" in note.value or "sign" in note.value


def test_the_oracles_words_are_right_on_a_real_postcard() -> None:
    scenes = draw_scenes("eval", range(2))
    (line,) = explore_turbo.said(render(scenes)[:1], str(scenes.captions[0]))
    assert line.startswith("sign reads · whole body · ") and "no known" not in line


def test_claims_of_all_notebooks_are_counted_by_part(tmp_path: Path, ladder: Ladder) -> None:
    cl.save(turbo_claims.claims(ladder, profile="smoke"), tmp_path / "06_two_step_turbo")
    (tmp_path / "07_broken").mkdir()
    (tmp_path / "07_broken" / "claims.json").write_text("[{")
    found = gathered.claims_of(tmp_path)
    counted = gathered.table(found)
    verdicts = list(gathered.VERDICTS)
    assert counted.loc["C7", verdicts].sum() == sum(c["id"].startswith("C7") for c in found) == 18
    assert counted.loc["C1", verdicts].sum() == 0 and counted.loc["C7", "notebook"] == "06"
