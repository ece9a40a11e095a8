"""Notebook 04's study: broken bodies, ghosts and lost hues are found where they were put."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from small_lab import small_lab, small_student
from torch import Tensor

from turbo_lab import charts, explore
from turbo_lab.claims import Claim
from turbo_lab.lab import Lab
from turbo_lab.measure.truth import free_places, paste_sign
from turbo_lab.postcards import Scenes, draw_scenes, render
from turbo_lab.postcards.scenes import PARTS
from turbo_lab.recipes import FAMILIES, Recipe, student_recipe
from turbo_lab.recipes.distribution import CALLS
from turbo_lab.recipes.warm import STARTS, STEPS, TIMES
from turbo_lab.store import Artefact, Store
from turbo_lab.studies import matching, warm_start, warm_start_figures, warm_start_sweeps
from turbo_lab.studies.matching import Measured
from turbo_lab.studies.warm_start import (
    ALONE,
    DIRECT,
    NAIVE,
    START,
    STUDENTS,
    TEACHER,
    WARM,
    Budget,
    Comparison,
)
from turbo_lab.training import history, trained

SWEEP = ("warm-share-50", "warm-second-0.5", "warm-fake")
BUDGET = Budget(captions=12, seeds=2, prompts=2, noises=3, sweep=SWEEP)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return small_lab(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def comparison(bench: Lab) -> Comparison:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("turbo_lab.lab.student_recipe", partial(small_student, bench))
        return warm_start.compare(bench, BUDGET, seed=0)


# --- equal compute, the same noise --------------------------------------------------------------


def test_every_start_leaves_the_same_number_of_calls_together() -> None:
    """Counted over all stages; a stage rounds to whole steps."""
    for family in (DIRECT, ALONE, *STARTS):
        stages = student_recipe(family, steps=STEPS).stages
        spent = [s.steps * s.batch_size * warm_start_sweeps.calls_per_sample(s) for s in stages]
        assert sum(spent) == pytest.approx(CALLS["quick"], rel=0.005), family
        share = {**{n: s.share for n, s in STARTS.items()}, DIRECT: 0.0, ALONE: 1.0}[family]
        before = sum(c for c, s in zip(spent, stages, strict=True) if s.method != "dmd2")
        assert before == pytest.approx(share * CALLS["quick"], abs=0.005 * CALLS["quick"]), family


def test_students_and_naive_steps_share_times_and_the_start_is_the_one_that_was_used(
    comparison: Comparison,
) -> None:
    drawn = comparison.drawn
    assert {k for k in drawn.samples if k[0] in STUDENTS} == {
        (family, STEPS, k) for family in STUDENTS for k in range(BUDGET.seeds)
    }
    for student in drawn.students.values():
        sampling = student.sampling(n=1)
        assert sampling.grid.tolist() == pytest.approx([*sampling.times, 0.0])
        assert sampling.times[0] == 1 and sampling.eta == 0
    assert drawn.students[DIRECT, STEPS, 0].times == drawn.students[WARM, STEPS, 0].times == TIMES
    assert comparison.plain[NAIVE][0].nfe == 2 * STEPS
    start, warm = (drawn.students[f, STEPS, 1].artefact for f in (START, WARM))
    assert [line for line in history(warm) if line["stage"] == 1] == history(start)


def test_costs_and_curves_count_all_stages(comparison: Comparison) -> None:
    warm = comparison.drawn.students[WARM, STEPS, 0].artefact
    first, last = warm_start_sweeps.stages_of(warm)
    curves = warm_start_sweeps.curves(comparison)
    begin = curves.groupby("student")["calls"].min()
    labels = warm_start_sweeps.sweeps(comparison)["warm start"]
    assert set(begin.index) == {labels[f] for f in (DIRECT, WARM, "warm-share-50")}  # PCM has none
    before = first.steps * warm_start_sweeps.calls_per_sample(first)
    assert begin[labels[WARM]] == pytest.approx(begin[labels[DIRECT]] + before)
    assert set(warm_start_figures.looks(comparison)) == set(begin.index)
    cost = warm_start_sweeps.training_cost(comparison)
    assert len(cost) == len(STUDENTS) + len(SWEEP) + 2  # direct of the moved time, and LATER
    assert warm_start_sweeps.seconds(warm) == pytest.approx(
        sum(
            line["seconds"] * stage.steps
            for line, stage in zip(history(warm), (first, last), strict=True)
        )
    )


def test_fresh_trains_every_student_once_and_the_start_with_the_student_it_belongs_to(
    bench: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, int]] = []

    def watched(recipe: Recipe, *, store: Store, fresh: bool, device: str) -> Artefact:
        if fresh:
            asked.append((recipe.name, len(recipe.stages)))
        return trained(recipe, store=store, device=device)

    small_one = partial(small_student, bench)
    monkeypatch.setattr("turbo_lab.lab.student_recipe", small_one)
    monkeypatch.setattr("turbo_lab.studies.warm_start.student_recipe", small_one)
    monkeypatch.setattr("turbo_lab.lab._trained", watched)
    few = replace(BUDGET, captions=2, seeds=1, prompts=1, noises=2, sweep=())
    warm_start.compare(bench, few, seed=0, profile="smoke", fresh=True)
    assert sorted(asked) == [("dmd2-2", 1), ("pcm", 1), ("warm", 2)]


def test_each_start_is_swept_once_beside_the_main_one(comparison: Comparison) -> None:
    shares = warm_start_sweeps.shares()
    assert next(iter(shares)) == DIRECT and list(shares)[-1] == ALONE
    assert sorted(shares.values()) == list(shares.values())
    moved = {warm_start.direct_of(name) for name in STARTS} - {DIRECT}
    assert moved <= set(FAMILIES)
    everything = replace_families(comparison, (DIRECT, ALONE, *STARTS, *moved))
    groups = warm_start_sweeps.sweeps(everything)
    swept = [f for group in groups.values() for f in group if f not in (WARM, DIRECT)]
    assert sorted(swept) == sorted({ALONE, *STARTS, *moved} - {WARM})
    assert all(WARM in group for group in groups.values())
    for family in (f for f in groups["second time"] if f in STARTS):
        pair = family, warm_start.direct_of(family)
        first, other = (student_recipe(f, steps=STEPS) for f in pair)
        assert first.times == other.times  # each warm student beside a direct one of its times
    there = {f for group in warm_start_sweeps.sweeps(comparison).values() for f in group}
    assert there == {DIRECT, WARM, ALONE, *SWEEP, "dmd2-second-0.5"}


def replace_families(comparison: Comparison, families: tuple[str, ...]) -> Comparison:
    some = next(iter(comparison.drawn.samples.values()))
    drawn = replace(comparison.drawn, samples={(family, STEPS, 0): some for family in families})
    return replace(comparison, drawn=drawn)


# --- what the oracles see -----------------------------------------------------------------------


def without(scenes: Scenes, *parts: str) -> Tensor:
    kept = scenes.parts.clone()
    kept[:, [PARTS.index(part) for part in parts]] = 0
    return render(replace(scenes, parts=kept))


def with_ghosts(scenes: Scenes) -> Tensor:
    x, y = free_places(scenes, 0)
    return paste_sign(render(scenes), x, y, torch.arange(len(scenes)), 1.0)


def test_judged_says_what_is_wrong() -> None:
    scenes = draw_scenes("critic", range(6))
    whole = charts.judged(render(scenes))
    assert whole.body == whole.sign == ("",) * 6
    assert charts.judged(without(scenes, "left arm")).body == ("1 arm",) * 6
    assert charts.judged(without(scenes, "head", "left arm")).body == ("no head, 1 arm",) * 6
    assert charts.judged(with_ghosts(scenes)).sign == ("2 signs",) * 6


def found(images: Tensor, comparison: Comparison, *, seeds: int, alike: bool = False) -> Measured:
    """Measure pictures as if every training had drawn them, and many noises of each caption."""
    many = draw_scenes("critic", [0] * 6 if alike else range(6))
    scenes = comparison.plain[TEACHER][0].scenes
    return matching.measured([images] * seeds, [render(many)] * seeds, scenes.fields, BUDGET.noises)


def with_measured(comparison: Comparison, replaced: dict[str, Measured]) -> Comparison:
    copy = Comparison(**{f.name: getattr(comparison, f.name) for f in fields(Comparison)})
    object.__setattr__(copy, "measured", {**comparison.measured, **replaced})
    return copy


def verdicts(comparison: Comparison) -> dict[str, str]:
    made: list[Claim] = warm_start.claims(comparison, profile="smoke")
    return {c.id.removeprefix("C4-"): c.verdict for c in made}


def test_what_a_warm_start_repairs_and_breaks_is_found(comparison: Comparison) -> None:
    scenes = comparison.plain[TEACHER][0].scenes
    good = found(render(scenes), comparison, seeds=2)
    armless = found(without(scenes, "left arm"), comparison, seeds=2, alike=True)
    comparison = with_measured(comparison, {TEACHER: good.training(0)})
    better = verdicts(with_measured(comparison, {WARM: good, DIRECT: armless}))
    assert {better[part] for part in ("bodies", "arms", "diversity")} == {"holds"}
    assert {better[part] for part in ("heads", "legs", "ghosts", "read")} == {"inconclusive"}
    worse = verdicts(with_measured(comparison, {WARM: armless, DIRECT: good}))
    assert worse["bodies"] == worse["arms"] == worse["diversity"] == "not reproduced"
    ghosts = found(with_ghosts(scenes), comparison, seeds=2)
    fewer = verdicts(with_measured(comparison, {WARM: good, DIRECT: ghosts}))
    assert fewer["ghosts"] == "holds" and fewer["arms"] == "inconclusive"
    same = verdicts(with_measured(comparison, {WARM: good, DIRECT: good}))
    of_both = ("bodies", "heads", "arms", "legs", "ghosts", "read", "hue", "diversity")
    assert {same[part] for part in of_both} == {"inconclusive"}


def test_samples_further_apart_than_the_teachers_are_no_gain(comparison: Comparison) -> None:
    good = found(render(comparison.plain[TEACHER][0].scenes), comparison, seeds=2)
    comparison = with_measured(comparison, {TEACHER: good.training(0)})
    far, near = (replace(good, diversity=good.diversity * factor) for factor in (1.2, 0.9))
    told = verdicts(with_measured(comparison, {WARM: far, DIRECT: near}))
    assert told["diversity"] == "not reproduced"
    told = verdicts(with_measured(comparison, {WARM: near, DIRECT: far}))
    assert told["diversity"] == "holds"


def test_a_collapse_of_hues_is_found(comparison: Comparison) -> None:
    plain = draw_scenes("eval", range(BUDGET.captions))
    good = found(render(plain), comparison, seeds=2)
    values = {**good.values, "hue_mode": np.full_like(good.hue_mode, 5)}
    one_hue = replace(good, values=values)
    assert verdicts(with_measured(comparison, {WARM: good, DIRECT: one_hue}))["hue"] == "holds"
    reverse = verdicts(with_measured(comparison, {WARM: one_hue, DIRECT: good}))
    assert reverse["hue"] == "not reproduced"


def test_pcm_alone_is_held_against_two_euler_steps(comparison: Comparison) -> None:
    scenes = comparison.plain[TEACHER][0].scenes
    good = found(render(scenes), comparison, seeds=2)
    images = without(scenes, "torso")
    images[0] = render(scenes)[0]
    few = found(images, comparison, seeds=1)
    told = verdicts(with_measured(comparison, {ALONE: good, NAIVE: few}))
    assert told["pcm-alone-bodies"] == "holds"
    made = warm_start.claims(with_measured(comparison, {NAIVE: few}), profile="smoke")
    (claim,) = [c for c in made if c.id == "C4-pcm-alone-bodies"]
    assert f"{1 / BUDGET.captions:.1%}" in claim.statement  # the baseline
    told = verdicts(with_measured(comparison, {ALONE: good, NAIVE: good.training(0)}))
    assert told["pcm-alone-bodies"] == "not reproduced"  # as many, not twice as many


def test_limbs_are_counted_against_what_was_asked_for(comparison: Comparison) -> None:
    scenes = comparison.plain[TEACHER][0].scenes
    armless = found(without(scenes, "left arm", "right arm"), comparison, seeds=2)
    counts = warm_start.limb_counts(with_measured(comparison, {WARM: armless}))
    assert counts.groupby(["family", "part"])["share"].sum().to_numpy() == pytest.approx(1)
    warm = counts[counts["family"] == WARM].set_index(["part", "found"])["share"]
    assert warm["arms", 0] == warm["legs", 2] == warm["heads", 1] == 1


@pytest.fixture(scope="module")
def swept(comparison: Comparison) -> tuple[Comparison, pd.DataFrame]:
    """A comparison in which coins decide whether a body is whole, and its sweep."""
    coins = np.random.default_rng(0).random((2, BUDGET.seeds, BUDGET.captions)) < 0.5
    direct, warm = (
        with_bodies(comparison.measured[f], r) for f, r in zip((DIRECT, WARM), coins, strict=True)
    )
    changed = with_measured(comparison, {DIRECT: direct, WARM: warm})
    return changed, warm_start_sweeps.sweep(changed)


def test_the_gain_of_a_training_is_over_direct_of_its_own_seed(
    swept: tuple[Comparison, pd.DataFrame],
) -> None:
    changed, rows = swept
    gain = rows[rows["metric"] == "gain"].set_index(["family", "training"])["value"]
    direct, warm = (changed.measured[f].values["whole_body"].mean(1) for f in (DIRECT, WARM))
    assert [gain[WARM, k] for k in range(BUDGET.seeds)] == pytest.approx(warm - direct)
    assert gain[DIRECT].tolist() == [0, 0]
    by_training = warm_start.by_training(changed)
    assert by_training[warm_start.TITLES[WARM]].tolist() == pytest.approx(warm, abs=1e-3)
    shown = warm_start_sweeps.sweep_table(changed, rows, "whole_body", "gain")
    assert shown.shape == (4 + 4 + 2, 2)  # shares, second times, other starts; the main in each


def with_bodies(of: Measured, whole: np.ndarray) -> Measured:
    return replace(of, values={**of.values, "whole_body": whole.astype(float)})


# --- the notebook -------------------------------------------------------------------------------


def test_tables_and_figures_come_out_whole(swept: tuple[Comparison, pd.DataFrame]) -> None:
    comparison, by_share = swept
    rows = warm_start.table(comparison)
    assert bool((rows["low"] <= rows["high"]).all())
    assert set(rows["metric"]) == set(warm_start.ALL_METRICS)
    assert list(warm_start.wide(rows, "whole_body").index) == list(warm_start.TITLES.values())
    assert len(comparison.keys) == len(set(comparison.keys))
    for figure in (
        warm_start_figures.side_by_side(comparison, rows=1, columns=2),
        warm_start_figures.pictures(comparison, count=2),
        warm_start_figures.one_caption(comparison),
        warm_start_figures.hues(comparison),
        warm_start_figures.limbs(warm_start.limb_counts(comparison)),
        warm_start_figures.share_lines(comparison, by_share),
        warm_start_figures.choices(comparison, by_share, ["whole_body", "hue_kl"]),
    ):
        assert isinstance(figure, Figure)


def test_outlines_are_drawn_around_broken_bodies_only() -> None:
    scenes = draw_scenes("critic", range(4))
    images = render(scenes)
    images[2] = without(scenes, "left leg")[2]
    figure = charts.judged_blocks({"some": charts.judged(images)}, columns=2)
    (axis,) = figure.axes
    (frame,) = axis.patches
    assert isinstance(frame, Rectangle)
    side, across = 32, axis.images[0].get_size()[1]
    below = side + (across - 2 * side)  # a picture and a gap
    assert frame.get_xy() == (-0.5, below - 0.5)  # second row, first column
    assert "3 of 4" in axis.get_title() and [t.get_text() for t in axis.texts] == ["1 leg"]


def test_the_explorer_draws_the_share_beside_direct(
    bench: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("turbo_lab.lab.student_recipe", partial(small_student, bench))
    box = explore.warm_explorer(bench, {DIRECT: 0.0, WARM: 0.25, ALONE: 1.0}, noises=2)
    knobs, shown = box.children
    picture, note = shown.children
    assert bytes(picture.value).startswith(b"\x89PNG") and "25% of the calls" in note.value
    before = bytes(picture.value)
    knobs.children[0].value = DIRECT
    assert bytes(picture.value) != before and "0% of the calls" in note.value
