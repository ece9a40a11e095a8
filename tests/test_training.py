"""From recipe to artefact, on a recipe of seconds; and the shipped artefacts kept honest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from turbo_lab import recipes, training
from turbo_lab.errors import BadInput, MissingPiece
from turbo_lab.fit import Record
from turbo_lab.methods.flow import FlowMatching
from turbo_lab.recipes import RECIPES, Recipe
from turbo_lab.store import Store
from turbo_lab.testbeds.postcards import NetSize


@pytest.fixture
def recipe() -> Recipe:
    small = NetSize(layers=1, heads=1, head_width=16, text_width=16)
    whole = recipes.resolve("teacher", profile="smoke")
    return whole.model_copy(update={"net": small, "stages": whole.stages[:1]})


def test_recipes_are_named_checked_and_keyed_by_everything_they_say() -> None:
    quick = recipes.resolve("teacher")
    assert quick == recipes.resolve("teacher", profile="quick", seed=0)
    others = [recipes.resolve("teacher", profile="paper"), recipes.resolve("teacher", seed=1)]
    assert all(other.spec() != quick.spec() for other in others)
    for wrong, name in (
        ({"name": "tacher"}, "recipe='tacher'"),
        ({"name": "teacher", "profile": "fast"}, "profile='fast'"),
        ({"name": "teacher", "seed": -1}, "seed=-1"),
    ):
        with pytest.raises(BadInput, match=name):
            recipes.resolve(**wrong)  # type: ignore[arg-type]
    with pytest.raises((ValueError, BadInput), match="method"):
        recipes.Stage(method="magic", steps=1, rates={})


def test_a_stopped_training_continues_and_ends_as_an_unstopped_one(
    recipe: Recipe, tmp_path: Path
) -> None:
    straight = training.trained(recipe, store=Store(cache=tmp_path / "a"))
    seen: list[int] = []

    def trip(record: Record, done: int) -> None:
        seen.append(record.step)
        if record.step == 7 and len(seen) == 7:
            raise RuntimeError("the power went out")

    store = Store(cache=tmp_path / "b")
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr(training, "SAVE_SECONDS", 0.0)  # a checkpoint after every step
        with pytest.raises(RuntimeError, match="power"):
            training.trained(recipe, store=store, watch=trip)
    resumed = training.trained(recipe, store=store, watch=trip)
    assert seen == list(range(1, 13))
    a, b = straight.tensors(), resumed.tensors()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert [line["step"] for line in training.history(resumed)] == [12]


def test_an_artefact_tells_where_it_comes_from_and_replays(recipe: Recipe, tmp_path: Path) -> None:
    store = Store(cache=tmp_path)
    artefact = training.trained(recipe, store=store)
    assert json.loads(artefact.file("recipe.json").read_text()) == artefact.spec
    assert {"machine", "versions", "seconds"} <= artefact.card.keys()
    trace = training.recorded(artefact)
    assert training.replay(recipe, artefact, store) == trace
    assert len(trace.first) == len(trace.last) == training.TRACE_STEPS
    assert sum(trace.last) < sum(trace.first)  # it learnt something


def test_a_replay_notices_code_that_changed_its_meaning(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(cache=tmp_path)
    artefact = training.trained(recipe, store=store)
    honest = FlowMatching.loss
    monkeypatch.setattr(
        FlowMatching,
        "loss",
        lambda self, batch, draw: {"velocity": 1.02 * honest(self, batch, draw)["velocity"]},
    )
    then, now = training.recorded(artefact), training.replay(recipe, artefact, store)
    assert now.first[0] == pytest.approx(1.02 * then.first[0], rel=1e-4)


def test_a_second_stage_starts_from_the_first_and_is_an_artefact_of_its_own(
    recipe: Recipe, tmp_path: Path
) -> None:
    (stage,) = recipe.stages
    both = recipe.model_copy(update={"stages": (stage, stage.model_copy(update={"steps": 4}))})
    assert both.before == recipe and recipe.before is None
    store = Store(cache=tmp_path)
    with pytest.raises(MissingPiece, match="turbo-lab train teacher"):
        training.starting_net(both, store)
    second = training.trained(both, store=store)
    first = store.find(recipe.artefact, recipe.spec())
    assert first is not None and first.key != second.key
    start = training.starting_net(both, store).state_dict()
    assert all(torch.equal(start[k], v.float()) for k, v in first.tensors().items())
    assert training.replay(both, second, store) == training.recorded(second)
    lines = training.history(second)
    assert [(line["stage"], line["step"]) for line in lines] == [(1, 12), (2, 4)]


@pytest.mark.parametrize("name", RECIPES)
def test_shipped_artefacts_replay_with_todays_code(name: str, tmp_path: Path) -> None:
    recipe = recipes.resolve(name)
    store = Store(cache=tmp_path, shipped=Store.default().shipped)
    artefact = store.find(recipe.artefact, recipe.spec())
    assert artefact is not None, f"{name} is not shipped, or its recipe changed since"
    then, now = training.recorded(artefact), training.replay(recipe, artefact, store)
    # The first steps repeat to rounding; from trained weights, rounding has more to grow on.
    assert now.first == pytest.approx(then.first, rel=2e-3)
    assert now.last == pytest.approx(then.last, rel=1e-2)
