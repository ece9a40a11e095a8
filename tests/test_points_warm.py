"""Warm starts on points: equal calls, what a stage starts from, and what the teacher knows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from turbo_lab import point_students
from turbo_lab.errors import BadInput
from turbo_lab.methods.transition import PointHead
from turbo_lab.path import mix
from turbo_lab.point_recipes import (
    RIVAL_CALLS,
    STARTS,
    PointRecipe,
    rival_calls,
    rival_recipe,
    warm_recipe,
)
from turbo_lab.store import Store
from turbo_lab.studies import points_warm, points_warm_figures
from turbo_lab.studies.points_warm import BUDGETS, TITLES, WORLDS, Runs
from turbo_lab.testbeds.points import points

PER_SAMPLE = {"consistency": 5, "transition": 5}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(cache=tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def runs(store: Store) -> Runs:
    return points_warm.warm_runs(BUDGETS["smoke"], store=store)


def spent(recipe: PointRecipe) -> float:
    """Network calls of all stages, by the documented counts."""
    per = {**PER_SAMPLE, "dmd2": rival_calls(2, 5, "")}
    return sum(s.steps * s.batch_size * per[s.method] for s in recipe.stages)


def test_every_start_leaves_the_same_number_of_calls_together() -> None:
    for start in STARTS:
        assert spent(warm_recipe(start)) == pytest.approx(RIVAL_CALLS["quick"], rel=0.005), start
    assert warm_recipe("cold", seed=2, world="rare") == rival_recipe(steps=2, seed=2, world="rare")
    with pytest.raises(BadInput, match="start='hot' is not allowed: choose one of cold"):
        warm_recipe("hot")


def test_pcm_meets_where_the_sampler_steps() -> None:
    start, matching = warm_recipe("pcm", steps=4).stages
    times = matching.options["times"]
    assert isinstance(times, tuple)
    assert start.options["edges"] == times[1:]
    assert warm_recipe("consistency").stages[0].options["edges"] == ()


def test_a_fake_starts_as_the_base_unless_the_stage_says_otherwise(
    store: Store, runs: Runs
) -> None:
    """And the student of either starts as the stage before left it."""
    for start, like_student in (("pcm", False), ("pcm-fake", True)):
        recipe = warm_recipe(start, profile="smoke", world="rare")
        bench = point_students.workbench(recipe, store)
        assert recipe.base is not None
        base = point_students.load(recipe.base, point_students.trained(recipe.base, store=store))
        fake = bench.rivals["fake"].state_dict()
        student, other = bench.student.state_dict(), base.state_dict()
        assert any(not torch.equal(student[k], other[k]) for k in student)
        expected = student if like_student else other
        assert all(torch.equal(fake[k], expected[k]) for k in fake)


def test_transition_matching_gets_a_head_and_leaves_no_clouds(store: Store, runs: Runs) -> None:
    recipe = warm_recipe("transition", profile="smoke", world="rare").before
    assert recipe is not None
    assert isinstance(point_students.workbench(recipe, store).rivals["head"], PointHead)
    artefact = point_students.trained(recipe, store=store)
    with pytest.raises(BadInput, match=r"file='clouds.safetensors'"):
        artefact.file("clouds.safetensors")


def test_what_points_do_not_have_is_refused_before_any_work(tmp_path: Path) -> None:
    first, last = warm_recipe("pcm", profile="smoke").stages
    options = {**first.options, "adversarial_weight": 0.1}
    for stages, named in (
        ((first.model_copy(update={"options": options}), last), "adversarial_weight=0.1"),
        ((first.model_copy(update={"rivals_from": "before"}), last), "rivals_from='before'"),
        ((last.model_copy(update={"rivals_from": "before"}),), "rivals_from='before'"),
    ):
        recipe = warm_recipe("pcm", profile="smoke").model_copy(update={"stages": stages})
        with pytest.raises(BadInput, match=named):
            point_students.trained(recipe, store=Store(cache=tmp_path))
    assert not list(tmp_path.rglob("*.safetensors"))


def test_curves_begin_where_the_start_has_ended(runs: Runs) -> None:
    course = points_warm.course(runs)
    first = course.groupby("start")["part"].min()
    assert first["cold"] == 0 and first["PCM"] == 0.25
    assert course["part"].max() == 1
    assert set(course["start"]) == set(TITLES.values())


def test_the_teacher_knows_an_end_by_bayes() -> None:
    """At low noise it is sure of the mode it sees; at high noise it goes by the weights."""
    bed = points("rare")
    ends = bed.teacher.means.float()
    assert points_warm.knowing("rare", ends, ends, 0.05).min() > 0.99
    weights = bed.teacher.log_weights()[0].exp()
    blind = points_warm.knowing("rare", ends, ends, 0.999)
    assert blind == pytest.approx(weights, abs=0.01)
    wrong = points_warm.knowing("rare", ends.roll(1, 0), ends, 0.05)
    assert wrong.max() < 0.01
    x_t = mix(ends, torch.zeros_like(ends), 0.3)  # what it is an average of, by hand
    means, stds = 0.7 * bed.teacher.means, (0.49 * bed.teacher.stds**2 + 0.09).sqrt()
    logits = bed.teacher.log_weights() - (torch.cdist(x_t.double(), means) / stds) ** 2 / 2
    by_hand = (logits - 2 * stds.log()).softmax(1)
    assert bed.teacher.responsibilities(x_t, torch.full((len(ends),), 0.3)) == pytest.approx(
        by_hand, abs=1e-6
    )


def test_claims_find_a_difference_that_was_put_there(runs: Runs) -> None:
    """PCM's samples at the ends of the paths, cold ones nine units beside them."""
    right = {w: runs.ends[w].expand(2, 1, -1, -1) for w in WORLDS}
    samples = dict(runs.samples)
    for world in WORLDS:
        samples[world, "pcm"] = right[world]
        samples[world, "cold"] = right[world] + torch.tensor([9.0, 0.0])
    changed = replace(runs)
    changed.__dict__["samples"] = samples
    made = {claim.id: claim for claim in points_warm.claims(changed, profile="smoke")}
    for name in ("P13", "P15"):
        assert made[name].interval.value == pytest.approx(9, abs=1e-5)
        assert made[name].verdict == "holds"
    assert made["P16"].verdict == "holds" and made["P16"].interval.value > 0.9
    gains = []
    for world in WORLDS:
        weights = [
            points_warm.knowing(world, samples[world, start][0, 0], runs.ends[world], 0.5).mean()
            for start in ("pcm", "cold")
        ]
        gains.append(float(weights[0] - weights[1]))
    assert made["P14"].interval.value == pytest.approx(min(gains))


def test_figures_show_every_start(runs: Runs, tmp_path: Path) -> None:
    figures = (
        points_warm_figures.figure_starts(runs),
        points_warm_figures.figure_pulls(points_warm.pulls(runs), runs),
        points_warm_figures.figure_course(points_warm.course(runs)),
    )
    for figure in figures:
        assert isinstance(figure, Figure)
        figure.savefig(tmp_path / "drawn.png")
    titles = [axis.get_title() for axis in figures[0].axes[: len(STARTS)]]
    assert titles == list(TITLES.values())
    assert set(points_warm.summary(points_warm.table(runs)).index.levels[1]) == set(TITLES.values())
