"""A GAN term in a recipe: its players, its data and its keys, on a tiny teacher."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from small_lab import TINY

import turbo_lab.dino
from turbo_lab import recipes, training
from turbo_lab.adapters import AdapterSize
from turbo_lab.dino import random_features
from turbo_lab.errors import BadInput, TurboLabError
from turbo_lab.features import VitFeatures
from turbo_lab.fit import Record
from turbo_lab.methods.gan import WithGan
from turbo_lab.recipes import Gan, Pairs, Rates, Recipe, Stage
from turbo_lab.store import Store
from turbo_lab.streams import Draw
from turbo_lab.testbeds.postcards import LATENT_SHAPE, decode, encode

PLAIN = Stage(
    method="dmd2",
    options={"times": (1.0, 0.7155), "rival_updates": 2},
    steps=3,
    batch_size=4,
    rates={name: Rates(lr=1e-3) for name in ("student", "fake", "critic")},
    teacher="guided",
    guidance_scale=3.0,
)
MIXED = Gan(
    features="random",
    rho=0.5,
    pairs=Pairs(n=8, steps=2),
    balance=0.5,
    r1=0.01,
    augment=("colour", "translation", "cutout"),
    noise_range=(0.0, 0.3),
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Store]:
    """The recipe of a tiny teacher, and a store that has it."""
    whole = recipes.resolve("teacher", profile="smoke")
    recipe = whole.model_copy(update={"net": TINY, "stages": whole.stages[:1]})
    store = Store(cache=tmp_path_factory.mktemp("store"))
    training.trained(recipe, store=store)
    return recipe, store


def student(teacher: Recipe, gan: Gan | None, **changed: object) -> Recipe:
    """A student of the tiny teacher with a GAN term."""
    stage = PLAIN.model_copy(update={"gan": gan, **changed})
    return recipes.resolve("dmd2-2", profile="smoke").model_copy(
        update={"net": TINY, "teacher": teacher, "adapter": AdapterSize(rank=2), "stages": (stage,)}
    )


def _critic(recipe: Recipe, store: Store) -> WithGan:
    bench = training.workbench(recipe, store)
    method = bench.objective(recipe.stages[-1])
    assert isinstance(method, WithGan)
    return method


def test_adversarial_phases_may_look_through_the_teacher(home: tuple[Recipe, Store]) -> None:
    """The heads learn and are kept; the teacher they look through stays as it is."""
    teacher, store = home
    phased = PLAIN.model_copy(
        update={
            "method": "consistency",
            "options": {"edges": (0.7155,), "grid_steps": 4, "adversarial_weight": 0.1},
            "rates": {name: Rates(lr=1e-3) for name in ("student", "critic")},
            "taps": "teacher",
        }
    )
    recipe = student(teacher, None).model_copy(update={"stages": (phased,)})
    artefact = training.trained(recipe, store=store)
    kept = artefact.tensors(training.RIVAL_FILE)
    fresh = training.workbench(recipe, store).rivals["critic"].state_dict()
    assert {name.removeprefix("critic/") for name in kept} == set(fresh)
    assert not any("transformer" in name for name in kept)
    assert any(not torch.equal(kept[f"critic/{k}"].float(), v) for k, v in fresh.items())
    assert training.replay(recipe, artefact, store) == training.recorded(artefact)
    idle = phased.model_copy(update={"options": {"edges": (0.7155,), "grid_steps": 4}})
    with pytest.raises(BadInput, match="taps='teacher' is not allowed: this stage has no critic"):
        training.trained(recipe.model_copy(update={"stages": (idle,)}), store=store)


@pytest.mark.parametrize("features", ["teacher", "fake", "pixels", "random"])
def test_every_kind_of_features_trains_and_replays(
    features: str, home: tuple[Recipe, Store]
) -> None:
    teacher, store = home
    gan = Gan(features=features, rho=1.0, weight=0.1, heads="caption", width=8, loss="hinge")
    recipe = student(teacher, gan)
    records: list[Record] = []
    artefact = training.trained(
        recipe, store=store, watch=lambda record, done: records.append(record)
    )
    last = [record for record in records if "student/gan" in record.terms][-1]
    assert last.terms["student/gan_pull"] > 0 and last.norms["student"] > 0
    assert all(record.norms["critic"] > 0 for record in records)
    assert {key.split("/")[0] for key in artefact.tensors(training.RIVAL_FILE)} == {
        "fake",
        "critic",
    }
    assert training.replay(recipe, artefact, store) == training.recorded(artefact)


def test_a_stopped_training_with_everything_on_ends_as_an_unstopped_one(
    home: tuple[Recipe, Store], tmp_path: Path
) -> None:
    teacher, store = home
    recipe, other = student(teacher, MIXED), Store(cache=tmp_path)
    ended = training.trained(recipe, store=store)
    assert len([e for e in store.entries() if e.name == training.PAIRS]) == 1

    def trip(record: Record, done: int) -> None:
        if "critic/r1" in record.terms and record.step == 2:
            raise RuntimeError("the power went out")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "SAVE_SECONDS", 0.0)
        with pytest.raises(RuntimeError, match="power"):
            training.trained(recipe, store=other, watch=trip)
    resumed = training.trained(recipe, store=other)
    for file in ("weights.safetensors", training.RIVAL_FILE):
        one, same = ended.tensors(file), resumed.tensors(file)
        assert one.keys() == same.keys() and all(torch.equal(one[k], same[k]) for k in one)
    assert training.replay(recipe, resumed, other) == training.recorded(resumed)


def test_the_mini_dino_is_asked_for_at_its_blocks(
    home: tuple[Recipe, Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def dino(store: Store, *, blocks: tuple[int, ...] | None = None) -> VitFeatures:
        asked.append((store, blocks))
        return random_features(0, blocks=blocks)

    monkeypatch.setattr(turbo_lab.dino, "dino_features", dino)
    teacher, store = home
    method = _critic(student(teacher, Gan(blocks=(0, 1), rho=1.0, weight=1.0)), store)
    draw = Draw(seed=0, step=0, total=2)
    batch = training.workbench(student(teacher, None), store).batches(draw)
    terms = method.critic_loss(batch, draw)
    assert asked == [(store, (0, 1))]
    assert all(bool(term.isfinite().all()) for term in terms.values())


def test_images_are_shown_to_what_looks_at_images_and_latents_to_the_rest(
    home: tuple[Recipe, Store],
) -> None:
    teacher, store = home
    x, draw = torch.randn(3, *LATENT_SHAPE), Draw(seed=0, step=0, total=3)
    for features, seen in (("random", decode(x)), ("pixels", decode(x)), ("fake", x)):
        gan = Gan(features=features, rho=1.0, weight=1.0)
        assert torch.equal(_critic(student(teacher, gan), store).show(x, draw), seen)
    changed = (
        _critic(student(teacher, MIXED.model_copy(update={"features": f})), store).show(x, draw)
        for f in ("pixels", "teacher")
    )
    image, latent = changed
    assert torch.equal(encode(image), latent)  # the same picture, changed in the same way


def test_the_real_side_is_postcards_or_the_teachers_samples_and_the_method_keeps_its_prompts(
    home: tuple[Recipe, Store],
) -> None:
    teacher, store = home
    draw = Draw(seed=0, step=1, total=4)
    plain = training.workbench(student(teacher, None), store).batches(draw)
    sides = {}
    for rho in (0.0, 1.0):
        recipe = student(teacher, MIXED.model_copy(update={"rho": rho}))
        bench = training.workbench(recipe, store)
        assert torch.equal(bench.batches(draw).x, plain.x)
        (source,) = bench.sources.values()
        assert bench.gan is not None
        sides[rho] = bench.gan.real(draw), source.rows([i % 8 for i in range(4, 8)])
    postcards, samples = sides[1.0][0], sides[0.0][0]
    assert torch.equal(postcards.x, plain.x) and torch.equal(postcards.c, plain.c)
    assert torch.equal(samples.x, sides[0.0][1].x) and torch.equal(samples.c, sides[0.0][1].c)


def test_a_stage_without_the_term_is_the_stage_it_was() -> None:
    spec = recipes.resolve("dmd2-2").spec()
    assert "gan" not in spec["stages"][0]
    keyed = student(recipes.resolve("teacher"), MIXED).spec()["stages"][0]["gan"]
    assert keyed["rho"] == 0.5 and "weight" not in keyed


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, "either a weight or a balance"),
        ({"weight": 1.0, "balance": 1.0}, "either a weight or a balance"),
        ({"weight": 1.0, "rho": 0.9}, "rho=0.9 needs samples of the teacher"),
        ({"weight": 1.0, "noise_range": (0.5, 0.1)}, "noise_range"),
        ({"weight": 1.0, "features": "pixels", "blocks": (1,)}, "pixels have no blocks"),
        ({"weight": 1.0, "rho": 1.1}, "rho"),
        ({"weight": 1.0, "features": "inception"}, "features"),
        ({"weight": 1.0, "augment": ("flip",)}, "augment"),
    ],
)
def test_a_term_that_does_not_fit_itself_is_refused(changed: dict[str, object], said: str) -> None:
    with pytest.raises((ValidationError, TurboLabError), match=said):
        Gan(**{"rho": 1.0, **changed})


RATIO = {"options": {"times": (1.0,), "divergence": "js"}, "pairs": Pairs(n=8, steps=2)}
PHASES = {"method": "consistency", "options": {"edges": (0.5,)}}


@pytest.mark.parametrize(
    ("gan", "changed", "said"),
    [
        (MIXED, {"rates": {"student": Rates(lr=1e-3)}}, "rates=.*player 'critic'"),
        (MIXED, {"method": "progressive", "options": {}}, "'progressive' makes no clean samples"),
        (MIXED.model_copy(update={"eye": "0" * 12}), {}, "eye='000000000000'.*mini-DINO"),
        (MIXED, PHASES, "'consistency' makes no clean samples"),
        (MIXED, RATIO, "'dmd2' has a critic of its own"),
        (
            MIXED.model_copy(update={"features": "fake"}),
            {"method": "direct", "options": {"steps": 2}},
            "'direct' has no fake score",
        ),
    ],
)
def test_a_stage_that_does_not_fit_its_term_is_refused_before_any_work(
    gan: Gan, changed: dict[str, object], said: str, tmp_path: Path
) -> None:
    recipe = student(recipes.resolve("teacher"), gan, **changed)
    store = Store(cache=tmp_path)
    for work in (training.trained, training.workbench):
        with pytest.raises(BadInput, match=said):
            work(recipe, store=store)
    alone = recipe.model_copy(update={"teacher": None, "adapter": None})
    with pytest.raises(BadInput, match=r"no teacher|no clean|critic of its own|no fake|rates|eye"):
        training.trained(alone, store=store)
    assert not list(store.entries())
