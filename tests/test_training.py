"""From recipe to artefact, on a recipe of seconds; and the shipped artefacts kept honest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from turbo_lab import recipes, training
from turbo_lab.adapters import AdapterSize
from turbo_lab.atomic import save_tensors
from turbo_lab.errors import BadInput, MissingPiece
from turbo_lab.fit import Record
from turbo_lab.methods.flow import FlowMatching
from turbo_lab.path import time_grid
from turbo_lab.postcards import caption_tokens, draw_scenes
from turbo_lab.postcards.captions import null_tokens
from turbo_lab.recipes import RECIPES, Rates, Recipe, six_blocks, trajectory, turbo
from turbo_lab.recipes.adversarial import AGAINST, CONTROL
from turbo_lab.recipes.distribution import VARIANTS
from turbo_lab.recipes.warm import STARTS
from turbo_lab.sample import final, sample
from turbo_lab.store import Store
from turbo_lab.streams import Draw, noise
from turbo_lab.studies.turbo import TRAININGS
from turbo_lab.testbeds.postcards import LATENT_SHAPE, NetSize, Postcards


def teacher_of_seconds() -> Recipe:
    small = NetSize(layers=1, heads=1, head_width=16, text_width=16)
    whole = recipes.resolve("teacher", profile="smoke")
    return whole.model_copy(update={"net": small, "stages": whole.stages[:1]})


@pytest.fixture
def recipe() -> Recipe:
    return teacher_of_seconds()


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    """Where a store finds the teacher of seconds, so that each test need not train it again."""
    store = Store(cache=tmp_path_factory.mktemp("teachers"))
    training.trained(teacher_of_seconds(), store=store)
    return (store.cache,)


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
    with pytest.raises((ValueError, BadInput), match=r"derivative='difference'.*use jvp"):
        options = {"derivative": "difference"}
        recipes.Stage(method="continuous", steps=1, rates={}, options=options, precision="bf16")
    with pytest.raises((ValueError, BadInput), match=r"busts=0\.7"):
        recipes.Stage(method="flow", steps=1, rates={}, posters=0.5, busts=0.7)


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


def test_an_artefact_holds_the_average_and_not_the_last_weights(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    benches: list[training.Workbench] = []
    honest = training.workbench

    def workbench(*given: Any, **options: Any) -> training.Workbench:
        benches.append(honest(*given, **options))
        return benches[-1]

    monkeypatch.setattr(training, "workbench", workbench)
    kept = training.trained(recipe, store=Store(cache=tmp_path)).tensors()
    average, student = (p.state_dict() for p in (benches[0].average, benches[0].student))
    assert kept.keys() == average.keys()
    assert all(torch.equal(v, average[k].half()) for k, v in kept.items())
    assert any(not torch.equal(v, student[k].half()) for k, v in kept.items())


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
        training.workbench(both, store)
    second = training.trained(both, store=store)
    first = store.find(recipe.artefact, recipe.spec())
    assert first is not None and first.key != second.key
    start = training.workbench(both, store).student.state_dict()
    assert all(torch.equal(start[k], v.float()) for k, v in first.tensors().items())
    assert training.replay(both, second, store) == training.recorded(second)
    lines = training.history(second)
    assert [(line["stage"], line["step"]) for line in lines] == [(1, 12), (2, 4)]


AGAIN = {"warm", "warm-second-0.5", "dmd2-2-second-0.5", "gan-balance-0.5", CONTROL}
MANY = {turbo.TURBO, CONTROL, "dmd2-2-second-0.5"}
ONCE = {
    "teacher",
    recipes.EARLY,
    *(f"dmd2-2-{name}" for name in VARIANTS),
    *STARTS,
    *AGAINST,
} - AGAIN
ONCE -= set(turbo.RECIPES)
# Other trainings of the second are shipped without what a replay starts at.
ONCE |= {six_blocks.PCM, six_blocks.TURBO}
FAST = {
    *("teacher", "progressive", "consistency", "continuous", "direct-2"),
    *("dmd2-2", "pcm", "warm", "gan-none", turbo.TURBO),
}
SHIPPED = [
    pytest.param(
        name,
        seed,
        marks=[pytest.mark.slow] if seed or name not in FAST else [],
        id=f"{name}-{seed}",
    )
    for name in RECIPES
    for seed in ((0,) if name in ONCE else range(6 if name in MANY else 3))
]
"""Every recipe with the seeds that are shipped; the unit suite replays one of each method."""


@pytest.mark.parametrize(("name", "seed"), SHIPPED)
def test_shipped_artefacts_replay_with_todays_code(
    name: str, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of seed 0 two steps of the three that are recorded: the second has met the optimiser."""
    steps = training.TRACE_STEPS if seed else 2
    monkeypatch.setattr(training, "TRACE_STEPS", steps)
    recipe = recipes.resolve(name, seed=seed)
    store = Store(cache=tmp_path, shipped=Store.default().shipped)
    artefact = store.find(recipe.artefact, recipe.spec())
    assert artefact is not None, f"{name} is not shipped, or its recipe changed since"
    then, now = training.recorded(artefact), training.replay(recipe, artefact, store)
    # What a half starts from may not be shipped, but one of the two always is.
    # The first steps repeat to rounding; from trained weights, rounding has more to grow on, and
    # of what consistency has left to learn bfloat16 is a part: on another processor 4 percent.
    coarse = recipe.stages[-1].precision == "bf16" and recipe.stages[-1].method == "consistency"
    assert now.first == pytest.approx(then.first[: len(now.first)], rel=2e-3)
    assert now.last == pytest.approx(then.last[: len(now.last)], rel=6e-2 if coarse else 1e-2)
    assert max(len(now.first), len(now.last)) == steps


def test_every_training_of_the_best_student_is_shipped(tmp_path: Path) -> None:
    store = Store(cache=tmp_path, shipped=Store.default().shipped)
    for seed in range(TRAININGS):
        recipe = recipes.resolve(six_blocks.TURBO, seed=seed)
        assert store.find(recipe.artefact, recipe.spec()) is not None, seed


def test_what_is_kept_without_a_start_replays_its_other_half(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (stage,) = recipe.stages
    both = recipe.model_copy(update={"stages": (stage, stage.model_copy(update={"steps": 4}))})
    store = Store(cache=tmp_path / "a")
    second = training.trained(both, store=store)
    alone = Store(cache=tmp_path / "b", shipped=(tmp_path / "checkout" / "x" / "artifacts",))
    (tmp_path / "checkout" / "x").mkdir(parents=True)
    (tmp_path / "checkout" / "pyproject.toml").touch()
    alone.ship(second)
    found = alone.find(both.artefact, both.spec())
    assert found is not None
    now, then = training.replay(both, found, alone), training.recorded(second)
    assert (now.first, now.last) == ((), then.last)


@pytest.fixture
def student(recipe: Recipe) -> Recipe:
    """A progressive student of the teacher of seconds: a guided stage, then one of its own."""
    whole = recipes.resolve("progressive", profile="smoke")
    tiny = AdapterSize(rank=2, targets=("to_q", "img_mlp.net.2"))  # more take longer to put on
    stages = whole.stages[:2]
    return whole.model_copy(
        update={"net": recipe.net, "teacher": recipe, "adapter": tiny, "stages": stages}
    )


def test_a_teachers_key_does_not_know_of_students() -> None:
    spec = recipes.resolve("teacher").spec()
    assert not {"teacher", "adapter"} & spec.keys()
    assert not {"teacher", "guidance_scale", "pairs"} & spec["stages"][0].keys()


def test_a_student_is_an_adapter_that_replays_and_leaves_its_teacher_alone(
    student: Recipe, tmp_path: Path, teachers: tuple[Path, ...]
) -> None:
    store = Store(cache=tmp_path, shipped=teachers)
    artefact = training.trained(student, store=store)
    assert student.teacher is not None and student.before is not None
    base = store.find(student.teacher.artefact, student.teacher.spec())
    first = store.find(student.artefact, student.before.spec())
    assert base is not None and first is not None
    assert all(".lora_" in name for name in artefact.tensors())
    assert training.replay(student, artefact, store) == training.recorded(artefact)
    bench = training.workbench(student, store)
    start = bench.student.state_dict()
    assert all(torch.equal(start[k], v.float()) for k, v in first.tensors().items())
    x, t = torch.randn(2, *LATENT_SHAPE), torch.tensor([0.3, 0.9])
    c = caption_tokens(["a figure with arms raised, legs apart, on moss, the sign reads 42"] * 2)
    with torch.no_grad():
        before = bench.pieces["teacher"](x, t, c)  # type: ignore[operator]
        assert torch.equal(before, bench.student(x, t, c))
        plain = training.load_net(student.teacher, base)(x, t, c)
    assert not torch.equal(before, plain)  # two stages did change something


def beside(student: Recipe, name: str) -> Recipe:
    """A recipe at smoke, for the teacher and with the adapter of a student."""
    same = {"net": student.net, "teacher": student.teacher, "adapter": student.adapter}
    return recipes.resolve(name, profile="smoke").model_copy(update=same)


def test_students_resume_and_share_their_pairs(
    student: Recipe, tmp_path: Path, teachers: tuple[Path, ...]
) -> None:
    straight = beside(student, "direct-2")
    a, b = (Store(cache=tmp_path / name, shipped=teachers) for name in "ab")
    ended = training.trained(straight, store=a)
    trips: list[int] = []

    def trip(record: Record, done: int) -> None:
        trips.append(record.step)
        if len(trips) == 15:
            raise RuntimeError("the power went out")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "SAVE_SECONDS", 0.0)
        with pytest.raises(RuntimeError, match="power"):
            training.trained(straight, store=b, watch=trip)
    resumed = training.trained(straight, store=b, watch=trip)
    assert all(torch.equal(resumed.tensors()[k], v) for k, v in ended.tensors().items())
    assert training.replay(straight, resumed, b) == training.recorded(resumed)
    training.trained(beside(student, "direct-1"), store=a)
    assert len([e for e in a.entries() if e.name == training.PAIRS]) == 1


def test_pairs_are_the_teachers_samples_and_never_the_noise_that_is_measured(
    student: Recipe, tmp_path: Path, teachers: tuple[Path, ...]
) -> None:
    store = Store(cache=tmp_path, shipped=teachers)
    direct = beside(student, "direct-1")
    assert direct.teacher is not None
    base = training.trained(direct.teacher, store=store)
    batch = training.workbench(direct, store).batches(Draw(seed=0, step=1, total=4, start=1))
    teacher = Postcards(net=training.load_net(direct.teacher, base)).guided(recipes.GUIDANCE)
    expected = final(sample(teacher, time_grid(32), batch.z, batch.c))
    torch.testing.assert_close(batch.x, expected, rtol=1e-4, atol=1e-5)
    measured = noise(LATENT_SHAPE, seed=0, stream="z", indices=range(5, 8))
    assert len(batch.x) == 3 and not torch.equal(batch.z, measured)
    again = training.workbench(direct, store).batches(Draw(seed=0, step=3, total=4, start=1))
    torch.testing.assert_close(again.x, batch.x, rtol=1e-4, atol=1e-5)  # pair 8 is pair 0


def test_pairs_of_a_teacher_trained_again_are_drawn_again(
    student: Recipe, tmp_path: Path, teachers: tuple[Path, ...]
) -> None:
    store = Store(cache=tmp_path, shipped=teachers)
    direct = beside(student, "direct-1")
    assert direct.teacher is not None
    base = training.trained(direct.teacher, store=store)
    draw = Draw(seed=0, step=0, total=2)
    first = training.workbench(direct, store).batches(draw)

    def shifted(folder: Path) -> None:
        weights = {k: v + 0.1 for k, v in base.tensors().items()}
        save_tensors(folder, "weights.safetensors", weights)

    store.get_or_make(direct.teacher.artefact, direct.teacher.spec(), shifted, fresh=True)
    again = training.workbench(direct, store).batches(draw)
    assert torch.equal(first.z, again.z) and not torch.equal(first.x, again.x)


def test_guidance_of_zero_is_the_null_caption_and_not_the_plain_teacher(
    student: Recipe, tmp_path: Path, teachers: tuple[Path, ...]
) -> None:
    store = Store(cache=tmp_path, shipped=teachers)
    stage = student.stages[0].model_copy(update={"guidance_scale": 0.0})
    bench = training.workbench(student.model_copy(update={"stages": (stage,)}), store)
    x, t = noise(LATENT_SHAPE, seed=0, stream="x", indices=range(2)), torch.full((2,), 0.5)
    tokens = draw_scenes("eval", range(2)).tokens
    guide, plain = bench.pieces["teacher"], bench.pieces["plain"]
    null = null_tokens(1).expand_as(tokens)
    torch.testing.assert_close(guide(x, t, tokens), plain(x, t, null))  # type: ignore[operator]
    assert not torch.equal(plain(x, t, null), plain(x, t, tokens))  # type: ignore[operator]


PLAIN = recipes.Stage(
    method="dmd2",
    options={"times": (1.0, 0.7155), "rival_updates": 2},
    steps=6,
    batch_size=4,
    rates={"student": Rates(lr=1e-3), "fake": Rates(lr=1e-3)},
    teacher="guided",
    guidance_scale=3.0,
)
WEIGHED = PLAIN.model_copy(
    update={
        "options": {**PLAIN.options, "divergence": "alpha", "alpha": 0.5},
        "rates": {**PLAIN.rates, "critic": Rates(lr=1e-3)},
        "pairs": recipes.Pairs(n=8, steps=2),
    }
)


@pytest.mark.parametrize(("stage", "rivals"), [(PLAIN, {"fake"}), (WEIGHED, {"fake", "critic"})])
def test_a_student_with_rivals_resumes_and_replays(
    stage: recipes.Stage,
    rivals: set[str],
    student: Recipe,
    tmp_path: Path,
    teachers: tuple[Path, ...],
) -> None:
    """DMD2 through a recipe: the rivals are kept beside the student, for the replay."""
    recipe = student.model_copy(update={"name": "dmd2", "stages": (stage,)})
    a, b = (Store(cache=tmp_path / name, shipped=teachers) for name in "ab")
    ended = training.trained(recipe, store=a)

    def trip(record: Record, done: int) -> None:
        if "fake/velocity" in record.terms and record.step == 4:
            raise RuntimeError("the power went out")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "SAVE_SECONDS", 0.0)
        with pytest.raises(RuntimeError, match="power"):
            training.trained(recipe, store=b, watch=trip)
    resumed = training.trained(recipe, store=b)
    kept = ended.tensors(training.RIVAL_FILE)
    assert {key.split("/")[0] for key in kept} == rivals
    assert all(bool(v.any()) for k, v in kept.items() if "score" in k)  # the critic has learnt
    for file in ("weights.safetensors", training.RIVAL_FILE):
        one, other = ended.tensors(file), resumed.tensors(file)
        assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    assert training.replay(recipe, resumed, b) == training.recorded(resumed)


def test_a_critic_comes_only_with_a_divergence_that_asks_for_a_ratio(
    student: Recipe, tmp_path: Path, teachers: tuple[Path, ...]
) -> None:
    store = Store(cache=tmp_path, shipped=teachers)
    assert student.teacher is not None
    training.trained(student.teacher, store=store)
    named = {"rkl": {"divergence": "rkl"}, "alpha 0": {"divergence": "alpha", "alpha": 0.0}}
    for options in ({}, *named.values()):
        stage = PLAIN.model_copy(update={"options": {**PLAIN.options, **options}})
        recipe = student.model_copy(update={"name": "dmd2", "stages": (stage,)})
        bench = training.workbench(recipe, store)
        assert list(bench.rivals) == ["fake"] and "critic" not in bench.pieces
        assert list(bench.objective(stage).players) == ["student", "fake"]
    recipe = student.model_copy(update={"name": "dmd2", "stages": (WEIGHED,)})
    bench = training.workbench(recipe, store)
    assert list(bench.objective(WEIGHED).players) == ["student", "fake", "critic"]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"pairs": None}, "pairs=None is not allowed: divergence='alpha' needs samples"),
        ({"rates": PLAIN.rates}, "rates=.*divergence='alpha' needs one for player 'critic'"),
        ({"options": {"times": (1.0,), "divergence": "magic"}}, "divergence='magic'"),
    ],
)
def test_a_ratio_without_what_it_is_learnt_from_is_refused_before_any_work(
    changed: dict[str, object], said: str, student: Recipe, tmp_path: Path
) -> None:
    stage = WEIGHED.model_copy(update=changed)
    recipe = student.model_copy(update={"name": "dmd2", "stages": (*student.stages[:1], stage)})
    store = Store(cache=tmp_path)
    for work in (training.trained, training.workbench):
        with pytest.raises(BadInput, match=said):
            work(recipe, store=store)
    assert not list(store.entries())


FROM_TEACHER = [n for n in RECIPES if (r := recipes.resolve(n)).teacher and r.start is None]
"""Students that go on from another recipe's are trained by test_adversarial_study.py."""


@pytest.mark.parametrize("name", FROM_TEACHER)
def test_every_student_recipe_trains_at_smoke(
    name: str, student: Recipe, tmp_path: Path, teachers: tuple[Path, ...]
) -> None:
    small = {"net": student.net, "teacher": student.teacher, "adapter": student.adapter}
    recipe = recipes.resolve(name, profile="smoke").model_copy(update=small)
    cut = tuple(stage.model_copy(update={"steps": 2}) for stage in recipe.stages)
    artefact = training.trained(
        recipe.model_copy(update={"stages": cut}), store=Store(cache=tmp_path, shipped=teachers)
    )
    assert len(training.history(artefact)) == len(cut)


def test_the_teacher_goes_on_from_the_early_ones_stages(tmp_path: Path) -> None:
    small = {"net": NetSize(layers=1, heads=1, head_width=16, text_width=8)}
    early, whole = (
        recipes.resolve(name, profile="smoke").model_copy(update=small)
        for name in (recipes.EARLY, "teacher")
    )
    store = Store(cache=tmp_path)
    training.trained(early, store=store)
    artefact = training.trained(whole, store=store)
    assert len(list(store.entries())) == len(whole.stages) == len(early.stages) + 10
    blocks = training.load_net(whole, artefact).transformer.transformer_blocks
    assert (early.size.layers, whole.size.layers, len(blocks)) == (1, 6, 6)
    assert training.replay(whole, artefact, store) == training.recorded(artefact)


@pytest.mark.parametrize("asked", [[4], [3], [6, 6], [6, 5]])
def test_a_network_that_would_not_grow_is_refused(asked: list[int]) -> None:
    whole = recipes.resolve("teacher", profile="smoke").model_dump()
    whole["stages"] = [{**whole["stages"][0], "layers": layers} for layers in asked]
    with pytest.raises(
        ValidationError, match=f"layers={asked[-1]} is not allowed: a network grows"
    ):
        Recipe.model_validate(whole)


def test_an_adapter_does_not_grow() -> None:
    student = recipes.resolve("dmd2-4", profile="smoke").model_dump()
    student["stages"][0]["layers"] = 6
    with pytest.raises(
        ValidationError, match="layers=6 is not allowed: an adapter keeps its network"
    ):
        Recipe.model_validate(student)


def test_trajectory_methods_have_the_same_network_calls_to_spend() -> None:
    calls = {"progressive": [7, 5, 5, 5, 5], "consistency": [6], "continuous": [7]}
    spent = {
        name: sum(
            stage.steps * stage.batch_size * per
            for stage, per in zip(recipes.resolve(name).stages, each, strict=True)
        )
        for name, each in calls.items()
    }
    spent["direct"] = sum(
        3 * steps * stage.steps * stage.batch_size
        for steps in trajectory.DIRECT_STEPS
        for stage in recipes.resolve(f"direct-{steps}").stages
    )
    assert all(
        total == pytest.approx(trajectory.CALLS["quick"], rel=0.01) for total in spent.values()
    )


def test_a_progressive_chain_may_start_at_forty_steps_and_end_at_one() -> None:
    chain = (20, 10, 5, 2, 1)
    recipe = trajectory.progressive("quick", 0, teacher_steps=40, chain=chain, doubled=2)
    assert [s.options["steps"] for s in recipe.stages] == list(chain)
    assert [s.options["teacher_steps"] for s in recipe.stages] == [40, *chain[:-1]]
    assert [s.teacher for s in recipe.stages] == ["guided"] + ["before"] * 4
    # Halved from 5, the 2 steps are from 1 to 0.4 to 0; that is where the last stage asks them.
    own = [s.options.get("teacher_times") for s in recipe.stages]
    assert own[:4] == [None] * 4 and own[4] == pytest.approx((1.0, 0.4))
    lengths = [s.steps for s in recipe.stages]
    assert lengths[4] == pytest.approx(2 * lengths[1], rel=0.01)  # doubled, the same two substeps
