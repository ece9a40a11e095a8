"""Recipes: named, frozen, validated; everything a training depends on, and nothing else.

A recipe is a list of stages. Each stage becomes an artefact of its own, whose key is the hash of
the recipe up to that stage: change a number and it is another artefact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from turbo_lab.adapters import AdapterSize
from turbo_lab.errors import BadInput
from turbo_lab.fit import Optimiser
from turbo_lab.methods import METHODS
from turbo_lab.testbeds.postcards import NetSize

Profile = Literal["smoke", "quick", "paper"]

WORLD = 1
"""Version of the postcards' renderer and streams; raised when a picture changes meaning."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Rates(_Frozen):
    """Optimiser of one player, see `turbo_lab.fit.Optimiser`."""

    lr: float = Field(gt=0, le=1)
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(0.01, ge=0)
    warmup: int = Field(0, ge=0)
    final: float = Field(1.0, ge=0, le=1)
    clip: float = Field(1.0, gt=0)

    def optimiser(self) -> Optimiser:
        """The optimiser `fit` understands."""
        return Optimiser(**self.model_dump())


class Pairs(_Frozen):
    """Data drawn from the guided teacher: noise, and where Euler steps from it end."""

    n: int = Field(ge=1, le=1_000_000)
    steps: int = Field(ge=1, le=1000)


class Stage(_Frozen):
    """One method, its options and its budget.

    ``teacher`` is the guided teacher or the student of the stage before; ``pairs`` replaces real
    postcards by the teacher's samples. What is None is left out of the key.
    """

    method: str
    options: Mapping[str, float | int | str | tuple[float, ...]] = Field(default_factory=dict)
    steps: int = Field(ge=1)
    batch_size: int = Field(64, ge=1)
    rates: Mapping[str, Rates]
    ema: float = Field(0.999, ge=0, lt=1)
    sign_grid: int = Field(1, ge=1, le=4)
    posters: float = Field(0.0, ge=0, le=1)
    version: int = Field(1, ge=1)
    teacher: Literal["guided", "before"] | None = None
    guidance_scale: float | None = Field(None, ge=0, le=20)
    pairs: Pairs | None = None

    @field_validator("method")
    @classmethod
    def _known(cls, method: str) -> str:
        if method not in METHODS:
            raise BadInput("method", method, f"choose one of {', '.join(METHODS)}")
        return method


class Recipe(_Frozen):
    """A named list of stages on a testbed.

    A student has a ``teacher``, the recipe of the network it starts from, and is an ``adapter``
    on it.
    """

    name: str
    testbed: Literal["postcards"] = "postcards"
    world: int = WORLD
    net: NetSize = NetSize()
    seed: int = Field(0, ge=0)
    stages: tuple[Stage, ...] = Field(min_length=1)
    teacher: Recipe | None = None
    adapter: AdapterSize | None = None

    @property
    def artefact(self) -> str:
        """Name of the artefact in the store."""
        return f"{self.testbed}/{self.name}"

    @property
    def before(self) -> Recipe | None:
        """The recipe without its last stage: what that stage starts from, if anything."""
        kept = self.stages[:-1]
        return self.model_copy(update={"stages": kept}) if kept else None

    def spec(self) -> dict[str, Any]:
        """What the key of the artefact is made of."""
        return self.model_dump(mode="json", exclude_none=True)

    @property
    def samples_seen(self) -> int:
        """Training samples used in all stages, and in those of the teacher."""
        own = sum(stage.steps * stage.batch_size for stage in self.stages)
        return own + (self.teacher.samples_seen if self.teacher else 0)


def teacher(profile: Profile, seed: int) -> Recipe:
    """The guided flow-matching teacher on postcards: a curriculum of six stages.

    Signs may lie at any whole pixel, so every digit has 16 offsets within its tokens. Trained on
    9,000 steps of postcards alone, bodies and texture come but digits do not follow the caption;
    why this curriculum, and what was not compared with it, is in LOG.md (2026-11-23). So:
    postcards; signs at one offset, where the network learns whose digits to draw; posters of six
    signs at all offsets; postcards again; and, since signs were still getting better, a longer
    round of both: half posters, then postcards alone.
    """
    budget = {
        "smoke": (12, 4, 4, 4, 4, 4),
        "quick": (9_000, 700, 1_900, 2_600, 8_500, 3_500),
        "paper": (20_000, 2_000, 20_000, 20_000, 40_000, 20_000),
    }[profile]
    batch_size = {"smoke": 8, "quick": 64, "paper": 128}[profile]

    def stage(
        steps: int, ema: float, final: float, sign_grid: int = 1, posters: float = 0
    ) -> Stage:
        return Stage(
            method="flow",
            options={"drop": 0.1},
            steps=steps,
            batch_size=batch_size,
            rates={"student": Rates(lr=1.5e-3, warmup=min(200, steps), final=final)},
            ema=ema,
            sign_grid=sign_grid,
            posters=posters,
        )

    first, coarse, posters, between, mixed, last = budget
    stages = (
        stage(first, ema=0.9995, final=0.01),
        stage(coarse, ema=0.99, final=0.5, sign_grid=4),
        stage(posters, ema=0.99, final=0.5, posters=0.8),
        stage(between, ema=0.999, final=0.01),
        stage(mixed, ema=0.999, final=0.3, posters=0.5),
        stage(last, ema=0.999, final=0.01),
    )
    return Recipe(name="teacher", seed=seed, stages=stages)


# --- students of notebook 02 --------------------------------------------------------------------

GUIDANCE = 4.0
"""Guidance scale that every student distils."""
CHAIN = (16, 8, 4, 2, 1)
"""Steps of the progressive students; the guided teacher walks 32."""
CALLS = {"smoke": 1_500, "quick": 100_000, "paper": 1_500_000}
"""Network calls that each trajectory method may spend on all its students together: one per image
and forward pass, three where a gradient is taken. Equal for all, so that methods are compared and
not budgets; the pairs of direct distillation are not counted, which favours it."""


ADAPTER = AdapterSize(rank=8, alpha=8)
"""Of every student: 0.2 million parameters, so that three trainings of each can be shipped."""


def _student(name: str, seed: int, stages: tuple[Stage, ...]) -> Recipe:
    base = teacher("quick", 0)
    return Recipe(name=name, seed=seed, net=base.net, stages=stages, teacher=base, adapter=ADAPTER)


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
) -> Recipe:
    """Guided teacher steps, halved stage by stage; guidance is distilled in the first.

    Args:
        profile: smoke, quick or paper.
        seed: of the training.
        teacher_steps: of the guided teacher, for example 40 with the chain 20, 10, 5, 2, 1.
        chain: steps of the student after each stage, falling.
        doubled: so many last stages are twice as long, as in the code of Consistency Models.
    """
    unit = CALLS[profile] / (len(chain) + doubled)
    stages = []
    for k, (before, steps) in enumerate(pairwise((teacher_steps, *chain))):
        substeps = -(-before // steps)  # the most that one student step spans
        stage = _distill(
            "progressive",
            profile,
            unit * (2 if k >= len(chain) - doubled else 1),
            per_sample=3 + substeps * (1 if k else 2),
            options={"steps": steps, "teacher_steps": before},
            teacher="before" if k else "guided",
        )
        stages.append(stage)
    return _student("progressive", seed, tuple(stages))


def consistency(profile: Profile, seed: int) -> Recipe:
    """Discrete consistency distillation: one student for any number of steps."""
    options = {"grid_steps": 40}
    stage = _distill("consistency", profile, CALLS[profile], per_sample=6, options=options)
    return _student("consistency", seed, (stage,))


def continuous(profile: Profile, seed: int) -> Recipe:
    """Continuous-time consistency; ρ rises over the first fifth of the steps."""
    stage = _distill("continuous", profile, CALLS[profile], per_sample=7, options={})
    stage = stage.model_copy(update={"options": {"warmup": stage.steps // 5}})
    return _student("continuous", seed, (stage,))


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
        return _student(f"direct-{steps}", seed, (stage,))

    return recipe


DIRECT_STEPS = (8, 4, 2, 1)


@dataclass(frozen=True, kw_only=True)
class Family:
    """How a method's students are reached and sampled.

    Args:
        title: for tables and figures.
        eta: of the sampler: 0 is Euler, 1 predicts and renoises.
        recipe: ``(steps, profile, seed)`` to the recipe of the student for that many steps.
    """

    title: str
    eta: float
    recipe: Callable[[int, Profile, int], Recipe]


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


def student_recipe(family: str, *, steps: int, profile: Profile = "quick", seed: int = 0) -> Recipe:
    """Return the recipe of a family's student for a number of steps.

    Raises:
        BadInput: unknown family, or one that has no student for so many steps.
    """
    if family not in FAMILIES:
        raise BadInput("student", family, f"choose one of {', '.join(FAMILIES)}")
    return FAMILIES[family].recipe(steps, profile, seed)


RECIPES: Mapping[str, Callable[[Profile, int], Recipe]] = MappingProxyType(
    {
        "teacher": teacher,
        "progressive": progressive,
        "consistency": consistency,
        "continuous": continuous,
        **{f"direct-{steps}": direct(steps) for steps in DIRECT_STEPS},
    }
)


def resolve(name: str, *, profile: Profile = "quick", seed: int = 0) -> Recipe:
    """Return the recipe of a name.

    Raises:
        BadInput: unknown name or profile, or a negative seed.
    """
    if name not in RECIPES:
        raise BadInput("recipe", name, f"choose one of {', '.join(RECIPES)}")
    if profile not in ("smoke", "quick", "paper"):
        raise BadInput("profile", profile, "choose smoke, quick or paper")
    if seed < 0:
        raise BadInput("seed", seed, "use an integer of at least 0")
    return RECIPES[name](profile, seed)
