"""Notebook 03's study: collapse, over-saturation and blur are found where they were put."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from small_lab import quick_study
from torch import Tensor

from turbo_lab import explore, measure
from turbo_lab.errors import BadInput
from turbo_lab.lab import Lab
from turbo_lab.measure.palette import CHROMA_BINS
from turbo_lab.postcards import HUE_MODES, draw_scenes, render
from turbo_lab.recipes import student_recipe
from turbo_lab.recipes.distribution import LONGER, VARIANTS, calls_per_round, sampler_times
from turbo_lab.recipes.trajectory import FAMILIES as TRAJECTORY
from turbo_lab.sampling import Sampling, checked_sampling
from turbo_lab.studies import distribution, distribution_figures, matching
from turbo_lab.studies.distribution import TEACHER, Budget, Comparison, Measured

BUDGET = Budget(
    captions=6, seeds=2, steps=(4, 2), prompts=2, noises=3, variants=("second-0.5", "guidance-2")
)

CLAIMED = ("dmd2", "dmd2-long", *TRAJECTORY)
"""Families that claims are made about, or held against."""


@pytest.fixture(scope="module")
def bench(study_lab: Lab) -> Iterator[Lab]:
    with quick_study(study_lab):
        yield study_lab


@pytest.fixture(scope="module")
def comparison(bench: Lab) -> Comparison:
    return distribution.compare(bench, BUDGET, seed=0)


# --- recipes ------------------------------------------------------------------------------------


def test_students_are_sampled_at_the_times_they_were_trained_for(comparison: Comparison) -> None:
    assert sampler_times(2) == (1.0, 0.7155)  # the published 2-step schedule
    assert sampler_times(4) == pytest.approx((1.0, 0.8824, 0.7143, 0.4545))  # shift 2.5
    for (family, steps, _), student in comparison.drawn.students.items():
        if family.startswith("dmd2"):
            assert student.times == student_recipe(family, steps=steps).times
            assert student.sampling(n=1).grid[1] == pytest.approx(student.times[1])
            assert comparison.drawn.samples[family, steps, 0].nfe == steps
    assert comparison.drawn.students["dmd2-second-0.5", 2, 0].times == (1.0, 0.5)


def test_every_variant_changes_one_thing_and_spends_the_same_calls() -> None:
    plain = student_recipe("dmd2", steps=2).stages[0]
    for name, variant in VARIANTS.items():
        (stage,) = student_recipe(f"dmd2-{name}", steps=2).stages
        changed = {k for k in stage.options if stage.options[k] != plain.options.get(k)}
        changed -= {"divergence"}  # it names the line that alpha lies on
        assert len(changed) + (stage.guidance_scale != plain.guidance_scale) == 1, name
        spent = []
        for s, extra in ((plain, 0.0), (stage, variant.extra)):
            updates = int(str(s.options["rival_updates"]))
            spent.append(s.steps * s.batch_size * (calls_per_round(2, updates) + extra / updates))
        assert spent[1] == pytest.approx(spent[0], rel=0.01), name


@pytest.mark.parametrize("name", LONGER)
def test_a_longer_student_spends_as_many_more_calls_as_it_says(name: str) -> None:
    longer, spent = LONGER[name], []
    families = [student_recipe(f, steps=longer.steps) for f in ("dmd2", f"dmd2-{name}")]
    for recipe in families:
        (stage,) = recipe.stages
        per_round = calls_per_round(longer.steps, int(str(stage.options["rival_updates"])))
        spent.append(stage.steps * stage.batch_size * per_round)
    assert spent[1] / spent[0] == pytest.approx(longer.calls, rel=0.01)
    assert families[1].adapter == longer.adapter != families[0].adapter
    with pytest.raises(BadInput, match="steps=2"):
        student_recipe(f"dmd2-{name}", steps=2)


def test_a_round_costs_what_it_calls() -> None:
    """Two steps, two updates of the fake: by hand from the turns' own passes."""
    fake = 1.5 + 3  # to the drawn step and that step, then learning
    student = 0.5 + 3 + 2 + 1  # to the drawn step, that step with gradient, teacher, fake
    assert calls_per_round(2, 2) == fake + student / 2
    with pytest.raises(BadInput, match="steps=16"):
        student_recipe("dmd2", steps=16)
    with pytest.raises(BadInput, match="steps=4"):
        student_recipe("dmd2-second-0.5", steps=4)


def test_samples_of_one_caption_come_in_a_row(bench: Lab) -> None:
    scenes = bench.scenes(Sampling(n=6, noises=3))
    assert scenes.captions[:3] == [scenes.captions[0]] * 3
    assert [scenes.captions[0], scenes.captions[3]] == bench.testbed.prompts(2).captions
    with pytest.raises(BadInput, match="n=7"):
        checked_sampling({"n": 7, "noises": 3})


# --- the study ----------------------------------------------------------------------------------


def test_tables_figures_and_claims_come_out_whole(comparison: Comparison) -> None:
    rows = distribution.table(comparison)
    assert bool((rows["low"] <= rows["high"]).all())
    ours = rows[rows["family"] == "dmd2"]
    assert set(ours["metric"]) == set(distribution.METRICS)
    teacher = rows[rows["family"] == "teacher"].set_index("metric")["value"]
    assert teacher["high_frequency_share"] == teacher["diversity"] == 1.0
    made = distribution.claims(comparison, profile="smoke")
    assert [c.id.split("-")[0] for c in made] == ["C2"] * 6 + ["C3"] * 9
    assert len(comparison.keys) == len(set(comparison.keys))
    variants = distribution.variant_titles(comparison)
    longer = distribution.longer_titles()
    for figure in (
        distribution_figures.lines(rows),
        distribution_figures.pictures(comparison, count=3),
        distribution_figures.one_caption(comparison),
        distribution_figures.hues(comparison),
        distribution_figures.chromas(comparison),
        distribution_figures.second_time(rows, variants),
        distribution_figures.dots(rows, variants, ["sign_read", "hue_kl"]),
        distribution_figures.dots(rows, longer, ["sign_read", "hue_kl"], steps=4),
    ):
        assert isinstance(figure, Figure)
    assert distribution.wide(rows, variants, ["sign_read"]).shape == (1 + 2 + 2, 1)
    assert len(distribution.training_cost(comparison)) == 2 + 2 + 1  # steps, variants, longer


def with_pictures(comparison: Comparison, images: Tensor, prompts: Tensor) -> Comparison:
    """The comparison with given pictures in the place of every student's."""
    of = comparison.teacher.scenes.fields
    found = matching.measured([images] * 2, [prompts] * 2, of, BUDGET.noises)
    return with_measured(comparison, {k: found for k in comparison.measured if k[0] in CLAIMED})


def with_measured(comparison: Comparison, found: dict[tuple[str, int], Measured]) -> Comparison:
    copy = Comparison(**{f.name: getattr(comparison, f.name) for f in fields(Comparison)})
    object.__setattr__(copy, "measured", {**comparison.measured, **found})
    return copy


def verdicts(comparison: Comparison) -> dict[str, str]:
    return {c.id: c.verdict for c in distribution.claims(comparison, profile="smoke")}


@pytest.fixture(scope="module")
def honest(comparison: Comparison) -> Comparison:
    """Real postcards in the place of the teacher's, so that the oracles have something to see."""
    images = render(comparison.teacher.scenes)
    prompts = render(draw_scenes("critic", range(BUDGET.prompts * BUDGET.noises)))
    of = comparison.teacher.scenes.fields
    return with_measured(
        comparison, {TEACHER: matching.measured([images], [prompts], of, BUDGET.noises)}
    )


def test_the_teachers_own_pictures_break_no_claim_either_way(honest: Comparison) -> None:
    images = render(honest.teacher.scenes)
    prompts = render(draw_scenes("critic", range(BUDGET.prompts * BUDGET.noises)))
    found = verdicts(with_pictures(honest, images, prompts))
    assert {v for k, v in found.items() if k.startswith("C3")} == {"inconclusive"}
    assert {v for k, v in found.items() if k.startswith("C2-teacher")} == {"holds"}


def test_what_is_done_to_pictures_is_found(honest: Comparison) -> None:
    images = render(honest.teacher.scenes)
    grey = images.mean(1, keepdim=True)
    vivid = (grey + 1.8 * (images - grey)).clamp(-1, 1)
    same = render(draw_scenes("critic", [0])).expand(BUDGET.prompts * BUDGET.noises, -1, -1, -1)
    found = verdicts(with_pictures(honest, vivid, same))
    assert found["C3-saturation"] == found["C3-clipped"] == found["C3-diversity"] == "holds"
    soft = torch.nn.functional.avg_pool2d(images, 3, stride=1, padding=1)
    found = verdicts(with_pictures(honest, soft, same))
    assert found["C2-teacher-sharp-4"] == "not reproduced"
    assert found["C3-sharp"] == "not reproduced"


def test_hues_lost_by_dmd2_alone_are_its_own_and_those_lost_by_all_are_not(
    honest: Comparison,
) -> None:
    images = render(honest.teacher.scenes)
    prompts = render(draw_scenes("critic", range(BUDGET.prompts * BUDGET.noises)))
    of = honest.teacher.scenes.fields
    good = matching.measured([images] * 2, [prompts] * 2, of, BUDGET.noises)
    spread = np.tile(np.arange(6) % len(HUE_MODES), (2, 1))  # all hues, in every training
    many = replace(good, values={**good.values, "hue_mode": spread})
    one = replace(good, values={**good.values, "hue_mode": np.full_like(spread, 5)})
    for ours, theirs, verdict in (
        (one, many, "holds"),
        (one, one, "inconclusive"),
        (many, one, "not reproduced"),
    ):
        found = {("dmd2", 2): ours, **{(f, 2): theirs for f in TRAJECTORY}}
        assert verdicts(with_measured(honest, found))["C3-hue-own"] == verdict


def test_a_running_mean_keeps_what_stays_and_takes_what_swings() -> None:
    flat, swings = np.full(40, 3.0), np.tile([1.0, -1.0], 20)
    assert distribution_figures.running_mean(flat) == pytest.approx(flat)
    assert np.abs(distribution_figures.running_mean(swings)[4:-4]).max() <= 1 / 9 + 1e-12
    assert distribution_figures.running_mean(np.array([2.0, 4.0])) == pytest.approx([2.0, 4.0])


def test_curves_are_looked_up_by_the_names_they_were_written_under(comparison: Comparison) -> None:
    curves = distribution.curves(comparison)
    looks = distribution_figures.looks(comparison)
    assert set(curves["student"]) <= set(looks)
    figure = distribution_figures.training_curves(curves, looks)
    assert len(figure.axes[0].lines) == 2 * curves["student"].nunique()  # as written, and smooth


def test_only_dmd2s_two_steps_are_named_by_their_times() -> None:
    assert distribution.steps_title("dmd2", 2) == "DMD2, 2 steps (1, 0.7155)"
    assert distribution.steps_title("dmd2", 4) == "DMD2, 4 steps"
    assert distribution.steps_title("progressive", 2) == "progressive, 2 steps"


def test_trainings_that_collapse_apart_are_two_collapses() -> None:
    apart = np.stack([np.zeros(50), np.ones(50)])
    alone = [measure.hue_kl(torch.full((50,), k)) for k in (0, 1)]
    assert distribution.hue_kl(apart) == pytest.approx(np.mean(alone))
    assert distribution.hue_kl(apart.reshape(1, -1)) < distribution.hue_kl(apart)


def test_chroma_distance_is_the_wasserstein_distance(comparison: Comparison) -> None:
    images = render(draw_scenes("eval", range(8)))
    reference = comparison.lab.testbed.real(distribution.REAL)
    exact = measure.chroma_w1(images, reference)
    binned = np.abs(measure.chroma_cdf(images).numpy().mean(0) - comparison.real_cdf).mean()
    assert binned == pytest.approx(exact, abs=1 / CHROMA_BINS)


def test_the_explorer_shows_what_was_trained_and_says_what_was_not(bench: Lab) -> None:
    box = explore.dmd2_explorer(bench, noises=4)
    knobs, shown = box.children
    picture, note = shown.children
    assert bytes(picture.value).startswith(b"\x89PNG") and "2 NFE" in note.value
    before = bytes(picture.value)
    knobs.children[0].value = 4
    assert bytes(picture.value) != before and "4 NFE" in note.value
    knobs.children[1].value = 0.5
    assert note.value.startswith("No student was trained so")
    assert set(explore.KNOBS.values()) <= {"dmd2", *(f"dmd2-{name}" for name in VARIANTS)}


def test_a_budget_takes_other_captions() -> None:
    assert distribution.scaled(BUDGET, 0) == BUDGET
    assert distribution.scaled(BUDGET, 9) == replace(BUDGET, captions=9)
    assert {f for f in distribution.TITLES if f in TRAJECTORY} == set(TRAJECTORY)
