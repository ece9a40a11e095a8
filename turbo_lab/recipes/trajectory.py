"""Students of notebook 02: trajectory distillation at equal network calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from types import MappingProxyType
from typing import Literal

from turbo_lab.adapters import AdapterSize
from turbo_lab.errors import BadInput
from turbo_lab.path import time_grid
from turbo_lab.recipes.models import Family, Option, Pairs, Profile, Rates, Recipe, Stage
from turbo_lab.recipes.teacher import GUIDANCE, early
from turbo_lab.stock_times import student_times

CHAIN = (16, 8, 4, 2, 1)
"""Steps of the progressive students; the guided teacher walks 32."""
CALLS: Mapping[Profile, int] = {"smoke": 1_500, "quick": 100_000, "paper": 1_500_000}
"""Network calls that each trajectory method may spend on all its students together: one per image
and forward pass, three where a gradient is taken. Equal for all, so that methods are compared and
not budgets; the pairs of direct distillation are not counted, which favours it."""


ADAPTER = AdapterSize(rank=8, alpha=8)
"""Of every student but one: 0.2 million parameters, so that three trainings can be shipped."""


def student(
    name: str, seed: int, stages: tuple[Stage, ...], *, adapter: AdapterSize = ADAPTER
) -> Recipe:
    """An adapter on the shipped `early` teacher, trained by stages."""
    base = early("quick", 0)
    return Recipe(name=name, seed=seed, net=base.net, stages=stages, teacher=base, adapter=adapter)


def _distill(
    method: str,
    profile: Profile,
    calls: float,
    *,
    per_sample: int,
    options: Mapping[str, float | int | str | tuple[float, ...]],
    teacher: Literal["guided", "before"] | None = "guided",
    pairs: Pairs | None = None,
) -> Stage:
    """A stage of as many steps as its calls pay for.

    Args:
        method: name in `METHODS`.
        profile: smoke, quick or paper.
        calls: network calls it may spend.
        per_sample: calls of one sample in one step: a forward pass is 1, with a gradient 3.
        options: of the method.
        teacher: who teaches.
        pairs: data drawn from the teacher.
    """
    batch_size = {"smoke": 4, "quick": 16, "paper": 32}[profile]
    steps = max(2, int(calls / (per_sample * batch_size)))
    return Stage(
        method=method,
        options=options,
        steps=steps,
        batch_size=batch_size,
        rates={"student": Rates(lr=5e-4, warmup=min(20, steps), final=0.1)},
        ema=0.99,
        teacher=teacher,
        guidance_scale=GUIDANCE if teacher == "guided" or pairs else None,
        pairs=pairs,
    )


def progressive(
    profile: Profile,
    seed: int,
    *,
    teacher_steps: int = 32,
    chain: tuple[int, ...] = CHAIN,
    doubled: int = 2,
    calls: Mapping[Profile, int] = CALLS,
    name: str = "progressive",
) -> Recipe:
    """Guided teacher steps, halved stage by stage; guidance is distilled in the first.

    Args:
        profile: smoke, quick or paper.
        seed: of the training.
        teacher_steps: of the guided teacher, for example 40 with the chain 20, 10, 5, 2, 1.
        chain: steps of the student after each stage, falling.
        doubled: so many last stages are twice as long, as in the code of Consistency Models.
        calls: network calls of all stages together, by profile.
        name: of the recipe.
    """
    unit = calls[profile] / (len(chain) + doubled)
    stages: list[Stage] = []
    for k, (before, steps) in enumerate(pairwise((teacher_steps, *chain))):
        substeps = -(-before // steps)  # the most that one student step spans
        options: dict[str, Option] = {"steps": steps, "teacher_steps": before}
        if k and (own := student_times(stages[-1])) != tuple(time_grid(before)[:-1].tolist()):
            options["teacher_times"] = own
        stage = _distill(
            "progressive",
            profile,
            unit * (2 if k >= len(chain) - doubled else 1),
            per_sample=3 + substeps * (1 if k else 2),
            options=options,
            teacher="before" if k else "guided",
        )
        stages.append(stage)
    return student(name, seed, tuple(stages))


def consistency(
    profile: Profile,
    seed: int,
    *,
    calls: Mapping[Profile, int] = CALLS,
    name: str = "consistency",
) -> Recipe:
    """Discrete consistency distillation: one student for any number of steps.

    Args:
        profile: smoke, quick or paper.
        seed: of the training.
        calls: network calls, by profile.
        name: of the recipe.
    """
    options = {"grid_steps": 40}
    stage = _distill("consistency", profile, calls[profile], per_sample=6, options=options)
    return student(name, seed, (stage,))


def continuous(profile: Profile, seed: int) -> Recipe:
    """Continuous-time consistency; ρ rises over the first fifth of the steps."""
    stage = _distill("continuous", profile, CALLS[profile], per_sample=7, options={})
    stage = stage.model_copy(update={"options": {"warmup": stage.steps // 5}})
    return student("continuous", seed, (stage,))


def direct(steps: int) -> Callable[[Profile, int], Recipe]:
    """Direct distillation unrolled over ``steps``; a student for each number of steps."""

    def recipe(profile: Profile, seed: int) -> Recipe:
        stage = _distill(
            "direct",
            profile,
            CALLS[profile] / len(DIRECT_STEPS),
            per_sample=3 * steps,
            options={"steps": steps},
            teacher=None,
            pairs=Pairs(n={"smoke": 8, "quick": 2048, "paper": 16_384}[profile], steps=32),
        )
        return student(f"direct-{steps}", seed, (stage,))

    return recipe


DIRECT_STEPS = (8, 4, 2, 1)


def _of_chain(steps: int, profile: Profile, seed: int) -> Recipe:
    if steps not in CHAIN:
        raise BadInput("steps", steps, f"choose one of {', '.join(map(str, CHAIN))}")
    whole = progressive(profile, seed)
    return whole.model_copy(update={"stages": whole.stages[: CHAIN.index(steps) + 1]})


def _of_direct(steps: int, profile: Profile, seed: int) -> Recipe:
    if steps not in DIRECT_STEPS:
        raise BadInput("steps", steps, f"choose one of {', '.join(map(str, DIRECT_STEPS))}")
    return direct(steps)(profile, seed)


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "direct": Family(title="direct distillation", eta=0.0, recipe=_of_direct),
        "progressive": Family(title="progressive", eta=0.0, recipe=_of_chain),
        "consistency": Family(
            title="consistency",
            eta=1.0,
            recipe=lambda steps, profile, seed: consistency(profile, seed),
        ),
        "continuous": Family(
            title="continuous consistency",
            eta=1.0,
            recipe=lambda steps, profile, seed: continuous(profile, seed),
        ),
    }
)
"""Methods whose students notebooks compare; each has one for 1, 2, 4 and 8 steps."""

RECIPES: Mapping[str, Callable[[Profile, int], Recipe]] = MappingProxyType(
    {
        "progressive": progressive,
        "consistency": consistency,
        "continuous": continuous,
        **{f"direct-{steps}": direct(steps) for steps in DIRECT_STEPS},
    }
)
