"""What notebook 07 shows: few steps beside many on a tiny pipeline, and claims that can fail."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from small_lab import quick_study

from turbo_lab import explore
from turbo_lab.errors import BadInput
from turbo_lab.lab import Lab
from turbo_lab.qwen_workshop import TINY_SIZE, Workshop, workshop
from turbo_lab.recipes.qwen_image import QWEN_RECIPES, resolve_qwen
from turbo_lab.studies import factory_claims, factory_network, factory_pictures, factory_recipes
from turbo_lab.studies.factory_claims import STATED, Equality
from turbo_lab.studies.factory_pictures import Budget, LastTimes

BUDGET = Budget(prompts=1, postcards=4)


@pytest.fixture(scope="module")
def shop() -> Workshop:
    return workshop(size="64", device="cpu")


@pytest.fixture(scope="module")
def lasts(study_lab: Lab) -> Iterator[LastTimes]:
    with quick_study(study_lab):
        yield factory_pictures.last_times(study_lab, BUDGET, family="warm")


def test_a_model_and_its_adapter_come_together() -> None:
    for given, missing in (({"model": "a/b"}, "lora"), ({"lora": "x.safetensors"}, "model")):
        with pytest.raises(BadInput, match=f"{missing}='' is not allowed"):
            workshop(**given)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="size="):
        workshop(size="63x-1")


def test_the_tiny_workshop_draws_the_adapter_and_the_base_from_one_noise(shop: Workshop) -> None:
    assert shop.tiny and "noise" in str(shop) and shop.size != TINY_SIZE
    both = factory_pictures.compared(shop, BUDGET, seed=3)
    rows = factory_pictures.times(both)
    assert list(rows["passes per picture"]) == [2, 100]
    assert rows["first times"].iloc[0] == "1, 0.7155"
    few, many = both.few.drawn.pixels, both.many.drawn.pixels
    assert few.shape == many.shape == (1, 64, 64, 3) and not torch.equal(few, many)
    again = factory_pictures.compared(shop, BUDGET, seed=3)
    assert torch.equal(again.few.drawn.pixels, few)
    assert factory_pictures.figure_pictures(both).axes


def test_claims_hold_on_the_tiny_pipeline_and_fail_where_something_is_off(
    shop: Workshop, lasts: LastTimes
) -> None:
    equality = factory_claims.measured(shop, pictures=1)
    made = {c.id: c for c in factory_claims.claims(equality, lasts, profile="smoke")}
    assert all(made[f"F{k}"].verdict == "holds" for k in range(1, 9))
    off = replace(equality, few=1e-3, guided=1e-3, decoding=1e-4, calls_many=2.0)
    broken = {c.id: c for c in factory_claims.claims(off, lasts, profile="smoke")}
    assert all(broken[f"F{k}"].verdict != "holds" for k in (4, 5, 6, 8))
    assert isinstance(equality, Equality) and made["F9"].samples == BUDGET.postcards


def test_what_is_counted_is_the_stated_size() -> None:
    assert factory_claims.network_parameters() / 1e9 == pytest.approx(STATED, abs=0.01)
    parts = factory_network.parts_table()
    assert len(parts) > 3 and factory_network.turbo_sum().notna().all(axis=None)


def test_the_factorys_turbo_is_shown_stage_by_stage_with_its_critic() -> None:
    stages = factory_recipes.resolved(["turbo"])
    assert list(stages.index) == [("turbo", k) for k in (1, 2, 3)]
    assert "critic 0.002" in stages["learning rates"].iloc[-1]
    assert list(stages["learns from"]) == ["real images", "prompts alone", "prompts alone"]
    assert stages["critic's real side"].iloc[-1].startswith("50% real images")
    critics = factory_recipes.critics(["pcm", "turbo"])
    assert list(critics.index) == [("turbo", 3)]
    assert critics["decoded"].iloc[0] == "256 px"
    assert critics["its real side"].iloc[0] == stages["critic's real side"].iloc[-1]


def test_commands_train_what_the_tables_show() -> None:
    with_critic, without = factory_recipes.commands(["turbo", "pcm"], size=512).splitlines()
    assert with_critic.endswith("--prompts prompts.txt --images photos/ --size 512")
    assert without.endswith("--prompts prompts.txt --size 512")
    assert factory_recipes.chosen("turbo") == resolve_qwen("turbo", size=1024, images=True)
    assert list(factory_recipes.resolved(["pcm"])["learns from"]) == ["teacher's samples"]


def test_every_option_of_every_recipe_is_explained() -> None:
    used = {o for n in QWEN_RECIPES for s in resolve_qwen(n, size=64).stages for o in s.options}
    assert used == factory_recipes.LEGEND.keys()
    lines = factory_recipes.legend(["progressive"]).splitlines()
    assert [line.split(":")[0] for line in lines] == ["steps", "teacher_steps", "shift"]


def test_memory_at_full_size_follows_from_ranks_and_widths() -> None:
    """Of 14 layers with inputs and outputs of 50 widths in all, 60 blocks, at rank 64.

    Student, fake and average are worn; the first two have moments, one at a time gradients.
    """
    plan = factory_recipes.memory(["dmd2-2", "turbo"])
    adapter = 64 * 50 * 3072 * 60
    assert plan["dmd2-2"].to_dict() == {
        "text encoder, freed before": 16.58,
        "frozen base": 40.86,
        "adapters": round(3 * 4 * adapter / 1e9, 2),
        "gradients": round(4 * adapter / 1e9, 2),
        "optimiser": round(2 * 8 * adapter / 1e9, 2),
        "critic": 0.0,
        "training, all": round((2 * 20_430_401_088 + (12 + 4 + 16) * adapter) / 1e9, 2),
    }
    more = plan["turbo"] - plan["dmd2-2"]
    assert 0 < more["critic"] < 1
    assert more["training, all"] == pytest.approx(more["critic"], abs=0.01)


def test_the_own_times_of_a_student_come_first(lasts: LastTimes) -> None:
    own, wrong = lasts.images
    assert own.startswith("its own: 1, 0.7155") and wrong.endswith("1, 0.02")
    assert not torch.equal(*lasts.images.values())
    assert factory_pictures.figure_last_times(lasts, columns=2).axes


def test_the_explorer_draws_and_says_what_is_wrong_with_the_times(shop: Workshop) -> None:
    box = explore.factory_explorer(shop)
    assert b"\x89PNG" in _pictures(box)


def _pictures(widget: object) -> bytes:
    """All PNG bytes in a tree of widgets."""
    own = bytes(getattr(widget, "value", b"")) if type(widget).__name__ == "Image" else b""
    return own + b"".join(_pictures(child) for child in getattr(widget, "children", ()))
