"""Students that go on from the student of another recipe, and a fake score that goes on too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from small_lab import TINY

from turbo_lab import recipes, training
from turbo_lab.adapters import AdapterSize
from turbo_lab.errors import BadInput, MissingPiece
from turbo_lab.recipes import Rates, Recipe, Stage
from turbo_lab.recipes.adversarial import AGAINST, CONTROL, START
from turbo_lab.stages import check_stages
from turbo_lab.store import Store
from turbo_lab.workbench import rival_weights

MATCHING = Stage(
    method="dmd2",
    options={"times": (1.0, 0.5), "rival_updates": 2},
    steps=4,
    batch_size=2,
    rates={name: Rates(lr=1e-2) for name in ("student", "fake")},
    teacher="guided",
    guidance_scale=3.0,
)
DIRECT = Stage(
    method="direct",
    options={"times": (1.0, 0.5)},
    steps=2,
    batch_size=2,
    rates={"student": Rates(lr=1e-2)},
    teacher="guided",
    guidance_scale=3.0,
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(cache=tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def first(store: Store) -> Recipe:
    """A trained student of a tiny teacher."""
    whole = recipes.resolve("teacher", profile="smoke")
    teacher = whole.model_copy(update={"net": TINY, "stages": whole.stages[:1]})
    recipe = Recipe(
        name="first", net=TINY, teacher=teacher, adapter=AdapterSize(rank=2), stages=(MATCHING,)
    )
    training.trained(recipe, store=store)
    return recipe


def going_on(first: Recipe, **changed: object) -> Recipe:
    stage = MATCHING.model_copy(update={"rivals_from": "fake", **changed})
    return first.model_copy(update={"name": "second", "stages": (stage,), "start": first})


def test_two_recipes_share_the_artefact_they_go_on_from(first: Recipe, store: Store) -> None:
    second = going_on(first)
    assert second.before == first and second.before.artefact == "postcards/first"
    assert (second.depth, second.steps_before) == (2, first.stages[0].steps)
    assert second.samples_seen == first.samples_seen + 4 * 2
    bench, found = training.workbench(second, store), store.find(first.artefact, first.spec())
    assert found is not None
    own = bench.student.state_dict()
    assert all(torch.equal(own[k], v.float()) for k, v in found.tensors().items())
    known = rival_weights(found, "fake")
    assert known and all(
        torch.equal(bench.rivals["fake"].state_dict()[k], v) for k, v in known.items()
    )
    made = training.trained(second, store=store)
    assert {line["stage"] for line in training.history(made)} == {1, 2}
    assert training.replay(second, made, store) == training.recorded(made)


def test_a_stage_of_its_own_and_a_start_elsewhere_learn_the_same(
    first: Recipe, tmp_path: Path, store: Store
) -> None:
    """One recipe of two stages, and two recipes: the same noise, the same data, the same end."""
    last = MATCHING.model_copy(update={"rivals_from": "fake"})
    whole = first.model_copy(update={"name": "whole", "stages": (MATCHING, last)})
    one = training.trained(whole, store=Store(cache=tmp_path, shipped=(store.cache,)))
    other = training.trained(going_on(first), store=store)
    assert all(torch.equal(a, other.tensors()[k]) for k, a in one.tensors().items())


def test_keys_of_recipes_without_a_start_do_not_say_so(first: Recipe) -> None:
    assert "start" not in first.spec()
    assert going_on(first).spec()["start"] == first.spec()


def test_what_cannot_be_gone_on_from_is_refused(first: Recipe, tmp_path: Path) -> None:
    other = first.model_copy(update={"adapter": AdapterSize(rank=3)})
    with pytest.raises(ValidationError, match="start='first' is not allowed: use a student of"):
        Recipe(**{**dict(going_on(first)), "start": other})
    cold = going_on(first).model_copy(update={"start": None})
    with pytest.raises(BadInput, match="rivals_from='fake' is not allowed: there is no stage"):
        check_stages(cold)
    without = going_on(first.model_copy(update={"stages": (DIRECT,)}))
    with pytest.raises(BadInput, match="'direct', has no fake score"):
        check_stages(without)
    with pytest.raises(MissingPiece, match="is needed as a start"):
        training.workbench(going_on(first), Store(cache=tmp_path))


@pytest.mark.parametrize("name", [CONTROL, *AGAINST])
def test_all_students_of_notebook_05_go_on_from_one(name: str) -> None:
    recipe = recipes.resolve(name, seed=2)
    assert recipe.start == recipes.resolve(START, seed=2)
    assert recipe.times == (1.0, 0.5)
    check_stages(recipe)
    (stage,) = recipe.stages
    assert (stage.gan is None) == (name == CONTROL)
