"""Every method of the package on the tiny pipeline, those that have no recipe for it too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from factory_world import SMALL, changed, fitted, history, job
from test_factory_gan import GANS

from turbo_lab import factory
from turbo_lab.factory_plan import Job
from turbo_lab.methods import METHODS
from turbo_lab.methods.gan import Generates
from turbo_lab.recipes.models import Pairs, Rates
from turbo_lab.recipes.qwen_image import QWEN_RECIPES, QwenStage, resolve_qwen
from turbo_lab.store import Store
from turbo_lab.streams import Draw

FAST = Rates(lr=1e-2, final=0.1)
BARE: dict[str, dict[str, Any]] = {  # methods without a recipe
    "flow": {"rates": {"student": FAST}, "options": {"drop": 0.0}},
    "transition": {
        "rates": {"student": FAST, "head": FAST},
        "options": {"times": (1.0, 0.7155), "inner_steps": 2},
        "teacher": "guided",
    },
}
GENERATES = {
    "direct": "direct-2",
    "consistency": "consistency",
    "dmd2": "dmd2-2",
    "tdm": "tdm-2",
}


def bare(world: Path, method: str) -> Job:
    """Two prompts and a picture of the teacher for each."""
    work = job(world, "direct-2", keep_activations=True)
    stage = QwenStage(method=method, steps=2, batch_size=2, **BARE[method])
    return changed(work, stages=(stage,), pairs=Pairs(n=2, steps=10))


def test_no_method_is_left_out() -> None:
    used = {s.method for name in QWEN_RECIPES for s in resolve_qwen(name, size=64).stages}
    assert used.isdisjoint(BARE) and used | BARE.keys() == METHODS.keys()


@pytest.mark.parametrize(
    ("method", "term", "steps", "share"),
    [("flow", "velocity", 40, 0.9), ("transition", "fold", 40, 0.9)],
)
def test_a_method_without_a_recipe_learns_two_prompts_by_heart(
    factory_world: Path, factory_caches: Store, method: str, term: str, steps: int, share: float
) -> None:
    work = bare(factory_world, method)
    bench = factory._bench(work, factory_caches)
    objective = bench.objective(work.recipe.stages[0])
    (turn,) = objective.turns()

    def measured() -> float:
        draw = Draw(seed=7, step=0, total=32)
        with torch.no_grad():
            return float(turn.loss(bench.supply(7, draw), draw)[term].mean())

    net = bench.testbed.host.net
    base = {key: v.clone() for key, v in net.state_dict().items() if "lora_" not in key}
    before = measured()
    fitted(bench, objective, dict.fromkeys(work.recipe.stages[0].rates, FAST), steps=steps)
    assert measured() < share * before
    assert all(torch.equal(net.state_dict()[key], v) for key, v in base.items())


@pytest.mark.parametrize(
    "method", sorted(k for k, v in METHODS.items() if issubclass(v, Generates))
)
def test_a_critic_stands_beside_every_method_that_makes_samples(
    factory_world: Path, factory_caches: Store, method: str
) -> None:
    work = job(factory_world, GENERATES[method])
    last = work.recipe.stages[-1]
    rates = {**last.rates, "critic": Rates(lr=2e-3)}
    stage = QwenStage.model_validate(
        {
            **last.model_dump(),
            "rates": rates,
            "gan": GANS["teacher"],
            "steps": 2,
            "teacher": "guided",
        }
    )
    artefact = factory.trained(changed(work, stages=(stage,), adapter=SMALL), store=factory_caches)
    (line,) = history(artefact)
    assert {"critic/teacher", "critic/student", "student/gan"} <= {
        name.replace(f"{method}/gan", "student/gan") for name in line["terms"]
    }
    assert all(torch.tensor(value).isfinite() for value in line["terms"].values())
    assert line["norms"]["critic"] > 0 and line["norms"]["student"] > 0
