"""What a training computes: against counts by hand, and against networks that are counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from factory_world import fitted, job

from turbo_lab import factory, factory_cost
from turbo_lab.bench.passes import counted_passes
from turbo_lab.errors import BadInput
from turbo_lab.factory_cost import Passes, costs, hours, passes_of
from turbo_lab.qwen_plan import device_named
from turbo_lab.recipes.distribution import calls_per_round
from turbo_lab.recipes.qwen_image import QWEN_RECIPES, QwenStage, resolve_qwen
from turbo_lab.recipes.warm import PER_SAMPLE
from turbo_lab.store import Store
from turbo_lab.studies import factory_costs

D, L, N, T = 3072, 60, 4096, 64
"""Width, blocks, image tokens of 1024 px, text tokens."""
LINEARS = 24 * D**2 * L * (N + T)
ATTENTION = 4 * (N + T) ** 2 * D * L


def test_the_teachers_samples_are_a_hundred_passes_each() -> None:
    """1000 pictures of 50 guided steps, 69.3 TFLOP a pass."""
    drawn = costs(resolve_qwen("pcm", size=1024))[0]
    assert drawn.flops == pytest.approx(1000 * 100 * 69.3e12, rel=1e-3)
    assert drawn.flops == pytest.approx(1000 * 100 * (LINEARS + ATTENTION), rel=1e-2)


def test_a_stage_of_dmd2_is_what_it_is_by_hand() -> None:
    """600 rounds of 8: 3.25 passes, and 1.5 with a gradient, a forward twice and a backward.

    A sample takes 1 or 2 passes. The fake learns every round; every other the student takes its
    own step, after 0 or 1 others, and asks the guided teacher and the fake.
    """
    stage = costs(resolve_qwen("dmd2-2", size=1024))[0]
    assert stage.passes == Passes(forward=1.5 + (0.5 + 2 + 1) / 2, gradient=1 + 1 / 2)
    backward = LINEARS + 2.5 * ATTENTION
    picture = 3.25 * (LINEARS + ATTENTION) + 1.5 * (2 * (LINEARS + ATTENTION) + backward)
    assert stage.flops == pytest.approx(600 * 8 * picture, rel=1e-2)
    assert hours(3.6e3 * 989.4e12, device_named("H100")) == pytest.approx(1)


@pytest.mark.parametrize("steps", [2, 4, 8])
@pytest.mark.parametrize("gan", [False, True])
def test_rounds_are_counted_as_on_postcards(steps: int, gan: bool) -> None:
    last = resolve_qwen("turbo", size=1024).stages[-1].gan
    stage = resolve_qwen(f"dmd2-{steps}", size=1024).stages[0]
    stage = stage.model_copy(update={"gan": last if gan else None})
    assert passes_of(stage).calls == pytest.approx(calls_per_round(steps, 2, critic=gan))
    pcm = resolve_qwen("pcm", size=1024).stages[0]
    assert passes_of(pcm).calls == PER_SAMPLE["consistency"]


@pytest.mark.parametrize("steps", [2, 4])
def test_a_critic_looks_at_samples_of_all_steps_of_tdm(steps: int) -> None:
    plain = resolve_qwen(f"tdm-{steps}", size=1024).stages[0]
    judged = plain.model_copy(update={"gan": resolve_qwen("turbo", size=1024).stages[-1].gan})
    with_critic, without = passes_of(judged), passes_of(plain)
    assert with_critic.forward - without.forward == steps
    assert without == passes_of(resolve_qwen(f"dmd2-{steps}", size=1024).stages[0])


CASES: dict[str, dict[str, Any]] = {
    "consistency": {},
    "pcm": {},
    "progressive": {},
    "direct-2": {},
    "continuous": {"warmup": 0},
    "dmd2-2": {"times": (1.0,)},  # one step, so that nothing is drawn
    "tdm-2": {"times": (1.0,)},
    "turbo": {"times": (1.0,)},
}


@pytest.mark.parametrize("name", CASES)
def test_as_many_passes_are_made(factory_world: Path, factory_caches: Store, name: str) -> None:
    """A derivative in forward mode is one pass whose products are those of two."""
    work = job(factory_world, name, keep_activations=True, **_random_eye(name))
    bench = factory._bench(work, factory_caches)
    stage = work.recipe.stages[-1]
    if name == "progressive":
        stage = work.recipe.stages[0]  # the guided teacher's
    stage = stage.model_copy(update={"options": {**stage.options, **CASES[name]}})
    with counted_passes(4, [bench.testbed.host.net]) as tally:
        fitted(bench, bench.objective(stage), stage.rates, steps=2)
    forward, gradient, tangent = (
        sum(count for kind, count in tally.items() if kind.mode == mode) / 2
        for mode in ("forward", "gradient", "tangent")
    )
    assert passes_of(stage) == Passes(forward=forward + 2 * tangent, gradient=gradient)


def _random_eye(name: str) -> dict[str, str]:
    return {"vit": "random"} if name == "turbo" else {}


def test_the_parts_of_a_recipe_add_up() -> None:
    table = factory_costs.stages("turbo")
    assert list(table.index) == ["before", 1, 2, 3, "all"]
    parts = table["PFLOP"].iloc[:-1].astype(float)
    assert table["PFLOP"]["all"] == pytest.approx(parts.sum(), abs=2)
    assert table["h at peak"]["all"] == pytest.approx(0.4 * table["h at 40%"]["all"], abs=0.01)
    whole = factory_costs.totals()
    assert list(whole.index) == list(QWEN_RECIPES)
    assert whole["quick: PFLOP"]["turbo"] == table["PFLOP"]["all"]
    assert device_named("H100").bf16 == device_named("H200").bf16


def test_a_critic_adds_its_samples_and_hardly_its_looks() -> None:
    *_, plain, critic = costs(resolve_qwen("turbo", size=1024))
    fewer = plain.flops + 600 * 8 * 1.5 * (LINEARS + ATTENTION)
    assert critic.flops == pytest.approx(fewer, rel=0.01) and critic.flops > fewer * 0.995


def test_what_is_not_counted_is_refused() -> None:
    stage = QwenStage(method="flow", steps=1, batch_size=1, rates={})
    with pytest.raises(BadInput, match="method='flow' is not allowed"):
        passes_of(stage)
    used = {s.method for name in QWEN_RECIPES for s in resolve_qwen(name, size=64).stages}
    assert used == factory_cost.PASSES.keys()
