"""Phased consistency through recipes: where a fake starts, what a stage keeps and hands on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from turbo_lab import recipes, training
from turbo_lab.adapters import AdapterSize
from turbo_lab.errors import BadInput
from turbo_lab.methods import phase_edges
from turbo_lab.recipes import RECIPES, Pairs, Rates, Recipe, Stage
from turbo_lab.store import Store
from turbo_lab.testbeds.postcards import NetSize

PHASED = Stage(
    method="consistency",
    options={"edges": phase_edges(2, 2.5), "grid_steps": 8},
    steps=3,
    batch_size=4,
    rates={"student": Rates(lr=1e-2)},
    ema=0.5,
    teacher="guided",
    guidance_scale=3.0,
)
ADVERSARIAL = PHASED.model_copy(
    update={
        "options": {**PHASED.options, "adversarial_weight": 0.1},
        "rates": {**PHASED.rates, "critic": Rates(lr=1e-3)},
    }
)
MATCHED = Stage(
    method="dmd2",
    options={"times": (1.0, 0.7155), "rival_updates": 1},
    steps=2,
    batch_size=4,
    rates={"student": Rates(lr=1e-3), "fake": Rates(lr=1e-3)},
    teacher="guided",
    guidance_scale=3.0,
)
WARM = MATCHED.model_copy(update={"rivals_from": "before"})


@pytest.fixture(scope="module")
def base() -> Recipe:
    whole = recipes.resolve("teacher", profile="smoke")
    size = NetSize(layers=1, heads=1, head_width=16, text_width=16)
    (stage, *_) = whole.stages
    return whole.model_copy(
        update={"net": size, "stages": (stage.model_copy(update={"steps": 2}),)}
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(cache=tmp_path_factory.mktemp("store"))


def staged(base: Recipe, *stages: Stage) -> Recipe:
    return Recipe(
        name="warm", net=base.net, stages=stages, teacher=base, adapter=AdapterSize(rank=2)
    )


def test_a_phased_student_is_sampled_at_its_edges(base: Recipe) -> None:
    assert staged(base, PHASED).times == (1.0, phase_edges(2, 2.5)[0])
    assert staged(base, PHASED, MATCHED).times == (1.0, 0.7155)
    one = PHASED.model_copy(update={"options": {"grid_steps": 8}})
    assert staged(base, one).times == ()


def test_where_a_fake_starts_is_left_out_of_keys_that_do_not_say(base: Recipe) -> None:
    for name in RECIPES:
        recipe = recipes.resolve(name)
        said = ["rivals_from" in stage for stage in recipe.spec()["stages"]]
        assert said == [stage.rivals_from is not None for stage in recipe.stages]
    cold, warm = staged(base, PHASED, MATCHED), staged(base, PHASED, WARM)
    assert cold.spec() != warm.spec() and cold.before == warm.before
    assert warm.spec()["stages"][1]["rivals_from"] == "before"


def test_a_fake_starts_as_the_teacher_or_as_the_warm_student(base: Recipe, store: Store) -> None:
    cold, warm = staged(base, PHASED, MATCHED), staged(base, PHASED, WARM)
    training.trained(cold, store=store)
    artefact = training.trained(warm, store=store)
    first = store.find(warm.artefact, warm.before.spec())  # type: ignore[union-attr]
    assert first is not None and len([e for e in store.entries() if e.name == warm.artefact]) == 3
    student = training.workbench(warm, store)
    begun = {name: rival.state_dict() for name, rival in student.rivals.items()}
    assert all(torch.equal(begun["fake"][k], v.float()) for k, v in first.tensors().items())
    assert all(torch.equal(begun["fake"][k], v) for k, v in student.student.state_dict().items())
    as_teacher = training.workbench(cold, store).rivals["fake"].state_dict()
    assert all(not v.any() for k, v in as_teacher.items() if "lora_B" in k)
    assert any(bool(v.any()) for k, v in begun["fake"].items() if "lora_B" in k)
    assert training.replay(warm, artefact, store) == training.recorded(artefact)


def test_an_adversarial_stage_trains_keeps_its_critic_and_replays(
    base: Recipe, store: Store
) -> None:
    recipe = staged(base, ADVERSARIAL, WARM)
    artefact = training.trained(recipe, store=store)
    assert recipe.before is not None
    first = store.find(recipe.artefact, recipe.before.spec())
    assert first is not None
    assert {key.split("/")[0] for key in first.tensors(training.RIVAL_FILE)} == {"critic"}
    assert training.replay(recipe.before, first, store) == training.recorded(first)
    assert list(training.workbench(recipe, store).rivals) == ["fake"]  # the critic stays behind
    assert "adversarial" in "".join(training.history(artefact)[0]["terms"])


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ((WARM,), "rivals_from='before' is not allowed: there is no stage before"),
        ((PHASED, PHASED.model_copy(update={"rivals_from": "before"})), "has no rival to start"),
        (
            (ADVERSARIAL.model_copy(update={"rates": PHASED.rates}),),
            "rates=.*adversarial_weight=0.1 needs one for player 'critic'",
        ),
    ],
)
def test_stages_that_miss_something_are_refused_before_any_work(
    stages: tuple[Stage, ...], said: str, base: Recipe, tmp_path: Path
) -> None:
    work: tuple[Callable[..., object], ...] = (training.trained, training.workbench)
    store = Store(cache=tmp_path)
    for function in work:
        with pytest.raises(BadInput, match=said):
            function(staged(base, *stages), store=store)
    assert not list(store.entries())


def test_a_weighed_divergence_may_follow_an_adversarial_stage(base: Recipe, store: Store) -> None:
    """Two critics of two kinds: each stage has its own, from the seed."""
    weighed = WARM.model_copy(
        update={
            "options": {**WARM.options, "divergence": "kl"},
            "rates": {**WARM.rates, "critic": Rates(lr=1e-3)},
            "pairs": Pairs(n=4, steps=2),
        }
    )
    training.trained(staged(base, ADVERSARIAL), store=store)
    bench = training.workbench(staged(base, ADVERSARIAL, weighed), store)
    assert list(bench.rivals) == ["fake", "critic"]
