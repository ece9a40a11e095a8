"""Every method trained on the tiny pipeline: from files to an artefact."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_qwen
import torch
from factory_world import SMALL, changed, fitted, history, job, student_gradient
from torch import Tensor

from turbo_lab import factory, factory_data, factory_memory
from turbo_lab.errors import BadInput, MissingPiece
from turbo_lab.factory_memory import check_memory, memory_plan
from turbo_lab.factory_plan import Job
from turbo_lab.fit import Record, fit
from turbo_lab.recipes.models import Pairs, Rates
from turbo_lab.recipes.qwen_image import (
    QWEN_RECIPES,
    SIZES,
    QwenRecipe,
    resolve_qwen,
    student_times,
)
from turbo_lab.store import Store
from turbo_lab.streams import Draw
from turbo_lab.testbeds.qwen_buckets import square
from turbo_lab.testbeds.qwen_pictures import encoded
from turbo_lab.testbeds.qwen_schedule import Schedule

# --- training -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["progressive", "consistency", "pcm-dmd2-2", "continuous", "direct-2", "dmd2-2"],
)
def test_every_method_trains_and_leaves_an_artefact(
    factory_world: Path, factory_caches: Store, name: str
) -> None:
    work = job(factory_world, name)
    artefact = factory.trained(work, store=factory_caches)
    lines = history(artefact)
    assert [line["stage"] for line in lines] == [k + 1 for k in range(len(work.recipe.stages))]
    for line in lines:
        assert all(torch.tensor(value).isfinite() for value in line["terms"].values())
        assert all(norm > 0 for norm in line["norms"].values())
    assert artefact.json("recipe.json")["recipe"] == json.loads(json.dumps(work.recipe.spec()))
    assert artefact.card["model"] == str(factory_world / "model")
    weights = artefact.tensors()
    assert len(weights) == 2 * 2 * 14  # two halves, two blocks, Wuli's modules
    assert all("lora_A" in key or "lora_B" in key for key in weights)
    assert any(bool(v.any()) for key, v in weights.items() if "lora_B" in key)
    assert factory.trained(work, store=factory_caches).path == artefact.path


def test_another_scheduler_or_tokenizer_is_another_training(
    factory_world: Path, tmp_path: Path
) -> None:
    """The teacher's samples come from its times, and every prompt through the tokenizer."""

    def keys(recipe: str) -> tuple[Any, Any]:
        work = job(tmp_path, recipe)
        times: Any = SimpleNamespace(schedule=Schedule.of(work.bundle))
        plan = factory_data._planned(work, times, 10, square(32), work.prompts, 2, 0)
        return work.specs(), (plan.identity, plan.grid.tolist())

    shutil.copytree(factory_world, tmp_path, dirs_exist_ok=True)
    plain, drawn = keys("dmd2-2"), keys("direct-2")
    changed_json(tmp_path / "model/scheduler/scheduler_config.json", max_shift=1.6)
    assert keys("dmd2-2")[0] == plain[0] and keys("direct-2")[0] != drawn[0]
    assert keys("direct-2")[1] != drawn[1]
    shutil.copytree(factory_world, tmp_path, dirs_exist_ok=True)
    assert (keys("dmd2-2"), keys("direct-2")) == (plain, drawn)
    changed_json(tmp_path / "model/tokenizer/tokenizer.json", version="another")
    assert keys("dmd2-2")[0] != plain[0]
    assert keys("direct-2")[0] != drawn[0] and keys("direct-2")[1] != drawn[1]


def changed_json(file: Path, **values: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_real_images_train_too(factory_world: Path, factory_caches: Store) -> None:
    work = job(factory_world, "consistency", images=factory_world / "images")
    assert work.recipe.source == "images" and work.recipe.pairs is None
    artefact = factory.trained(work, store=factory_caches)
    assert (
        artefact.key != factory.trained(job(factory_world, "consistency"), store=factory_caches).key
    )
    bench = factory._bench(work, factory_caches)
    whole = bench.supply(0, Draw(seed=0, step=0, total=2))
    latents = encoded(
        work.bundle, work.images, shape=square(32), store=factory_caches, device="cpu"
    )
    for x, c in zip(whole.x, whole.c.tolist(), strict=True):
        assert torch.equal(x, latents[c])


@pytest.mark.parametrize(
    ("name", "term", "steps", "share"),
    [
        ("progressive", "chord", 40, 0.8),
        ("consistency", "consistency", 40, 0.85),
        ("continuous", "tangent", 30, 0.95),
        ("direct-2", "endpoint", 40, 0.3),
        ("dmd2-2", "velocity", 30, 0.95),
    ],
)
def test_two_prompts_are_learnt_by_heart(
    factory_world: Path, factory_caches: Store, name: str, term: str, steps: int, share: float
) -> None:
    """On fixed draws, before and after; of DMD2, the loss of the fake is the one that means much.

    The base does not move, nor does any adapter that the method does not train. Continuous
    consistency is held at the beginning of its warm-up, where its goal does not move.
    """
    work = job(factory_world, name, keep_activations=True)
    (stage, *_) = work.recipe.stages
    slow = 1e-3 if name == "dmd2-2" else 1e-2  # the fake must keep up with the student
    rates = {who: Rates(lr=slow if who == "student" else 1e-2, final=0.1) for who in stage.rates}
    options = {**stage.options, **({"warmup": 10**9} if name == "continuous" else {})}
    stage = stage.model_copy(update={"rates": rates, "options": options})
    pairs = work.recipe.pairs and Pairs(n=2, steps=10)
    bench = factory._bench(changed(work, stages=(stage,), pairs=pairs), factory_caches)
    objective = bench.objective(stage)
    turn = next(turn for turn in objective.turns() if turn.name != "student")

    def measured() -> float:
        draws = [Draw(seed=7, step=k, total=16) for k in range(2)]
        with torch.no_grad():
            losses = [turn.loss(bench.supply(7, draw), draw)[term].mean() for draw in draws]
        return float(torch.stack(losses).mean())

    net = bench.testbed.host.net
    base = {key: v.clone() for key, v in net.state_dict().items() if "lora_" not in key}
    before = measured()
    fitted(bench, objective, rates, steps=steps)
    assert measured() < share * before
    assert all(torch.equal(net.state_dict()[key], v) for key, v in base.items())
    moved = {
        who
        for who, player in bench.players.items()
        if any(bool(v.any()) for key, v in player.state_dict().items() if "lora_B" in key)
    }
    assert moved == set(rates)


def test_a_stage_leaves_its_average_and_every_player_of_the_next_starts_there(
    factory_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, store = changed(job(factory_world, "progressive"), adapter=SMALL), Store(cache=tmp_path)
    benches: list[factory.Bench] = []
    honest = factory._bench

    def bench(*given: Any) -> factory.Bench:
        benches.append(honest(*given))
        return benches[-1]

    monkeypatch.setattr(factory, "_bench", bench)
    kept = factory.trained(work, store=store).tensors()
    players = benches[0].players
    assert players.keys() == {"student", "average", "before"}
    ends = {name: player.state_dict() for name, player in players.items()}
    assert all(torch.equal(ends["average"][k], v) for k, v in kept.items())
    assert any(not torch.equal(ends["student"][k], v) for k, v in kept.items())
    before = store.find(work.artefact, work.specs()[0])
    assert before is not None
    fresh = honest(work, store).players
    factory._go_on(fresh, work.recipe.stages[1], before)
    for player in fresh.values():
        start = player.state_dict()
        assert all(torch.equal(start[k], v) for k, v in before.tensors().items())


@pytest.mark.parametrize(("name", "killed_at"), [("progressive", 5), ("dmd2-2", 3)])
def test_a_killed_training_ends_as_one_that_was_not(
    factory_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, killed_at: int
) -> None:
    """In the second of two stages, and between a fake's turn and the next one of the student."""
    work = changed(job(factory_world, name), adapter=SMALL)
    straight = factory.trained(work, store=Store(cache=tmp_path / "a"))
    seen: list[int] = []

    def trip(record: Record, done: int) -> None:
        seen.append(done)
        if seen == list(range(1, killed_at + 1)):
            raise RuntimeError("the power went out")

    monkeypatch.setattr(factory, "SAVE_SECONDS", 0.0)  # a checkpoint after every step
    store = Store(cache=tmp_path / "b")
    with pytest.raises(RuntimeError, match="power"):
        factory.trained(work, store=store, watch=trip)
    folders = {path.parent.name for path in (tmp_path / "b" / "work").rglob("step-*")}
    assert len(folders) == 1
    resumed = factory.trained(work, store=store, watch=trip)
    total = sum(stage.steps for stage in work.recipe.stages)
    assert seen == list(range(1, total + 1))
    a, b = straight.tensors(), resumed.tensors()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert [line["step"] for line in history(resumed)] == [s.steps for s in work.recipe.stages]


def test_checkpoints_hold_adapters_and_optimisers_only(
    factory_world: Path, factory_caches: Store
) -> None:
    work = changed(job(factory_world, "dmd2-2"), adapter=SMALL)
    bench = factory._bench(work, factory_caches)
    names: set[str] = set()
    stage = work.recipe.stages[0]

    class Spy:
        def latest(self) -> None:
            return None

        def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
            names.update(tensors)

    saving = factory.Saving(checkpoints=Spy(), every_steps=1)  # type: ignore[arg-type]
    shadow = factory.Shadow(of="student", average=bench.players["average"], decay=0.9)
    records = fit(
        bench.objective(stage),
        lambda draw: bench.supply(0, draw),
        steps=1,
        batch_size=2,
        seed=0,
        optimisers={who: rates.optimiser() for who, rates in stage.rates.items()},
        shadows=(shadow,),
        saving=saving,
    )
    next(records)
    kinds = {tuple(name.split("/")[:2]) for name in names}
    assert kinds == {
        *(("player", "student"), ("player", "fake"), ("shadow", "0")),
        *(("adam", "student"), ("adam", "fake")),
    }
    assert all("lora_" in name for name in names if not name.startswith("adam"))


@pytest.mark.parametrize("name", ["consistency", "direct-2", "dmd2-2"])
def test_gradients_are_the_same_with_and_without_recomputation(
    factory_world: Path, factory_caches: Store, name: str
) -> None:
    """Adapters that differ are worn between forward and backward; the right one is recomputed."""
    got: list[dict[str, Tensor]] = []
    for keep in (True, False):
        work = job(factory_world, name, keep_activations=keep)
        bench = factory._bench(changed(work, adapter=SMALL), factory_caches)
        got.append(student_gradient(bench, work))
    assert got[0].keys() == got[1].keys() and got[0]
    for key, gradient in got[0].items():
        torch.testing.assert_close(got[1][key], gradient, rtol=1e-5, atol=1e-8)


# --- what is checked before ---------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", QWEN_RECIPES)
def test_recipes_are_published_sizes_at_every_resolution(name: str, size: int) -> None:
    for profile in ("smoke", "quick", "paper"):
        recipe = resolve_qwen(name, size=size, profile=profile)
        assert (recipe.adapter.rank, len(recipe.adapter.targets)) == (64, 14)
        assert recipe.guidance_scale == 4 and recipe.negative == " "
        for stage in recipe.stages:
            rows = -(-stage.batch_size // stage.micro_batches)
            assert rows * recipe.tokens <= 8192 or rows == 1
            if "shift" in stage.options:
                shift = {512: 1.714, 1024: 2.001, 1328: 2.303}[size]
                assert stage.options["shift"] == pytest.approx(shift, abs=1e-3)
    assert recipe != resolve_qwen(name, size=size, seed=1)
    assert QwenRecipe.model_validate_json(recipe.model_dump_json()) == recipe


def test_students_are_trained_at_published_times() -> None:
    assert student_times(2) == (1.0, 0.7155)
    assert student_times(4) == (1.0, 0.9, 0.75, 0.5)
    assert student_times(8) == (1.0, 0.9545, 0.9, 0.8333, 0.75, 0.6429, 0.5, 0.3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"recipe": "magic"}, "recipe='magic' is not allowed: choose one of progressive"),
        ({"recipe": ""}, "recipe='' is not allowed: choose one of progressive"),
        ({"size": 100}, "size=100 is not allowed: use a multiple of 16"),
        ({"rank": 0}, "rank=0 is not allowed: use an integer from 1 to 256"),
        ({"prompts": None}, "prompts=None is not allowed: name a text file"),
        ({"prompts": Path("nowhere.txt")}, "prompts='nowhere.txt' is not allowed"),
        ({"images": Path("nowhere")}, "images='given' is not allowed: dmd2-2 learns from prompts"),
        ({"recipe": "progressive", "images": Path("nowhere")}, "images='nowhere' is not allowed"),
    ],
)
def test_wrong_options_are_one_sentence(
    factory_world: Path, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(BadInput) as error:
        job(factory_world, **{"recipe": "dmd2-2", **options})
    assert str(error.value).startswith(said)


def test_images_and_prompts_must_be_as_many(factory_world: Path, tmp_path: Path) -> None:
    three = tiny_qwen.write_prompts(tmp_path / "three.txt", "a", "b", "c")
    with pytest.raises(BadInput, match="there are 2 images; write one prompt for each"):
        job(factory_world, "progressive", prompts=three, images=factory_world / "images")


def _bytes(work: Job, players: Sequence[str], moving: int) -> int:
    bench_parameters = factory_memory.counted_parameters(work.bundle, work.recipe.adapter)
    adapter = 4 * bench_parameters.adapter
    return 4 * bench_parameters.transformer + adapter * (len(players) + 1 + 2 * moving)


@pytest.mark.parametrize(
    ("name", "moving"), [("progressive", 1), ("consistency", 1), ("dmd2-2", 2)]
)
def test_the_memory_plan_counts_what_is_held(
    factory_world: Path, factory_caches: Store, name: str, moving: int
) -> None:
    work = changed(job(factory_world, name), adapter=SMALL)
    players = factory._bench(work, factory_caches).players
    assert memory_plan(work).phases["training"] == _bytes(work, list(players), moving)
    on_gpu = memory_plan(dataclasses.replace(work, device="cuda"))
    assert 2 * on_gpu.base == memory_plan(work).base  # bfloat16
    assert on_gpu.adapters == memory_plan(work).adapters


def test_memory_that_is_short_is_said_with_what_would_fit(factory_world: Path) -> None:
    work = job(factory_world, "dmd2-2", rank=64)
    low = max(memory_plan(job(factory_world, "dmd2-2", rank=16)).phases.values())
    check_memory(work, None)
    check_memory(work, 10**12)
    with pytest.raises(MissingPiece, match=r"Training dmd2-2 needs .* --rank 16 would fit\.$"):
        check_memory(work, low)
    with pytest.raises(MissingPiece, match=r"a device with .* GB free would do\.$"):
        check_memory(work, 1000)


def test_a_training_without_memory_loads_and_writes_nothing(
    factory_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(factory, "free_memory", lambda device: 1000)
    monkeypatch.setattr(factory, "open_testbed", lambda *_, **__: pytest.fail("it was loaded"))
    with pytest.raises(MissingPiece, match="before activations"):
        factory.trained(job(factory_world, "dmd2-2"), store=Store(cache=tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


def test_weights_are_missed_before_anything_is_computed(
    factory_world: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(factory_world / "model", tmp_path / "model")
    (model / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(MissingPiece, match=r"The transformer of .* is not complete"):
        factory.trained(
            job(factory_world, "dmd2-2", model=str(model)), store=Store(cache=tmp_path / "c")
        )
    assert not (tmp_path / "c").exists()
