"""Recipes of students on points: the network they start from, and the stages that train them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal

from pydantic import BaseModel, ConfigDict, field_validator, model_validator
from pydantic import Field as Limits

from turbo_lab.errors import BadInput
from turbo_lab.path import time_grid
from turbo_lab.recipes import Pairs, Profile, Rates, Stage
from turbo_lab.recipes.trajectory import CHAIN, DIRECT_STEPS
from turbo_lab.testbeds.points import MIXTURES

PATH_STEPS = 64
"""Heun steps to the end of an exact path."""
BASE_GRID = 256
"""Times at which the base is fitted to the exact velocity."""
CALLS: Mapping[Profile, int] = {"smoke": 4_000, "quick": 1_200_000, "paper": 12_000_000}
"""Network calls that each method may spend on all its students of one seed together, counted as in
`turbo_lab.recipes`: one per sample and forward pass, of the exact teacher too, and three where a
gradient is taken. The pairs of direct distillation are not counted, which favours it."""
CONSISTENCY_GRID = 10
"""Steps of the teacher's grid in consistency distillation. Chosen by looking at students of ring8
at quick: the longer the chain of its own predictions, the more their errors add up. With 40 steps,
as on postcards, 77% of its one-step samples lay outside 3 sigma, with 10 steps 28%."""
CONTINUOUS = {"time_std": 1.6}
"""Continuous-time consistency: wide times, and ρ rises over 3/4 of the steps, not over 1/5 as on
postcards. Chosen likewise, on a seed that is not measured: 72% outside at one step and 69% at
eight became 57% and 24%; a rate that ends at 1% and not at 10% of its peak, used for every method,
then gave 42% and 22%. The shipped seeds average
73% and 44%, an earlier run of them 61% and 23%: far from converged, and not stable."""
BATCH: Mapping[Profile, int] = {"smoke": 32, "quick": 128, "paper": 256}
TRAJECTORY = ("direct", "progressive", "consistency", "continuous")
"""The families of `student_recipe`: methods that follow the teacher's paths."""

RIVAL_WIDTH = 64
"""Width of the networks of distribution matching: 28 kB each, since many are shipped."""
RIVAL_CALLS: Mapping[Profile, int] = {"smoke": 5_000, "quick": 2_000_000, "paper": 16_000_000}
"""Network calls that each DMD2 student and its fake may spend together, see `rival_calls`."""
RIVAL_ETA = 0.0
"""Of the sampler of DMD2 students: Euler steps, as on postcards."""
RIVAL_BATCH: Mapping[Profile, int] = {"smoke": 32, "quick": 256, "paper": 512}


class PointGan(BaseModel):
    """A GAN term beside the last stage, as `turbo_lab.recipes.Gan` on points.

    The critic is a `turbo_lab.testbeds.points.PointCritic`. Its real side is data with probability
    ``rho``, else exact samples of the teacher. Either ``weight`` or ``balance`` is given; its
    optimiser is ``rates["critic"]`` of the stage.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rho: float = Limits(ge=0, le=1)
    width: int = Limits(64, ge=1)
    depth: int = Limits(2, ge=0)
    weight: float | None = Limits(None, ge=0, allow_inf_nan=False)
    balance: float | None = Limits(None, gt=0, allow_inf_nan=False)
    loss: Literal["logistic", "hinge"] = "logistic"
    r1: float = Limits(0.0, ge=0, allow_inf_nan=False)
    r1_step: float = Limits(0.01, gt=0, le=1)
    noise_range: tuple[float, float] = (0.0, 0.0)

    @model_validator(mode="after")
    def _one(self) -> PointGan:
        if (self.weight is None) == (self.balance is None):
            raise BadInput("weight", self.weight, "give either a weight or a balance")
        if not 0 <= self.noise_range[0] <= self.noise_range[1] <= 1:
            raise BadInput("noise_range", self.noise_range, "use two times, 0 to 1, not falling")
        return self


class PointRecipe(BaseModel):
    """A network on points and the stages that train it; `turbo_lab.recipes.Recipe` for points.

    ``base`` is the recipe of the network it starts from; without one it starts from its seed. In
    a stage, teacher "guided" is the exact field, "before" the student of the stage before. ``gan``
    belongs to the last stage alone.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    world: str = "ring8"
    width: int = Limits(128, ge=1)
    depth: int = Limits(3, ge=0)
    seed: int = Limits(0, ge=0)
    stages: tuple[Stage, ...] = Limits(min_length=1)
    base: PointRecipe | None = None
    gan: PointGan | None = None

    @field_validator("world")
    @classmethod
    def _known(cls, world: str) -> str:
        if world not in MIXTURES:
            raise BadInput("world", world, f"choose one of {', '.join(MIXTURES)}")
        return world

    @field_validator("stages")
    @classmethod
    def _unguided(cls, stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
        for stage in stages:
            if stage.guidance_scale not in (None, 1):
                raise BadInput("guidance_scale", stage.guidance_scale, "points have none: use 1")
        return stages

    @property
    def artefact(self) -> str:
        """Name of the artefact in the store."""
        return f"points/{self.name}"

    @property
    def before(self) -> PointRecipe | None:
        """The recipe without its last stage: what that stage starts from, if anything."""
        kept = self.stages[:-1]
        return self.model_copy(update={"stages": kept, "gan": None}) if kept else None

    def spec(self) -> dict[str, object]:
        """What the key of the artefact is made of."""
        return self.model_dump(mode="json", exclude_none=True)


# --- the recipes --------------------------------------------------------------------------------


def base_recipe(
    profile: Profile = "quick", *, seed: int = 0, world: str = "ring8", width: int = 128
) -> PointRecipe:
    """A network fitted to the exact velocity; a narrower one in fewer steps.

    Progressive distillation with as many steps as its teacher regresses on the velocity itself:
    the chord of one Euler step. Flow matching has the same optimum, but its target z - x scatters
    around the velocity, and a small budget would go into averaging that away.
    """
    steps = {"smoke": 8, "quick": 3_000, "paper": 12_000}[profile] * width // 128
    stage = Stage(
        method="progressive",
        options={"steps": BASE_GRID, "teacher_steps": BASE_GRID},
        steps=steps,
        batch_size={"smoke": 32, "quick": 256, "paper": 512}[profile],
        rates={"student": Rates(lr=2e-3, warmup=min(100, steps), final=0.01)},
        ema=0.99,
        teacher="guided",
    )
    return PointRecipe(name="base", world=world, width=width, seed=seed, stages=(stage,))


def student_recipe(
    family: str,
    *,
    steps: int,
    profile: Profile = "quick",
    seed: int = 0,
    world: str = "ring8",
) -> PointRecipe:
    """Return the recipe of a family's student for a number of steps, all from one base.

    Raises:
        BadInput: unknown family, or one that has no student for so many steps.
    """
    if family not in _STAGES:
        raise BadInput("family", family, f"choose one of {', '.join(_STAGES)}")
    name = f"direct-{steps}" if family == "direct" else family
    return PointRecipe(
        name=name,
        world=world,
        seed=seed,
        stages=_STAGES[family](steps, profile),
        base=base_recipe(profile, world=world),
    )


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
    """A stage of as many steps as its calls pay for."""
    steps = max(2, int(calls / (per_sample * BATCH[profile])))
    return Stage(
        method=method,
        options=options,
        steps=steps,
        batch_size=BATCH[profile],
        rates={"student": Rates(lr=1e-3, warmup=min(20, steps), final=0.01)},
        ema=0.99,
        teacher=teacher,
        pairs=pairs,
    )


def _progressive(steps: int, profile: Profile) -> tuple[Stage, ...]:
    """32 exact steps, halved down to ``steps``; the stages to 2 and 1 are doubled."""
    if steps not in CHAIN:
        raise BadInput("steps", steps, f"choose one of {', '.join(map(str, CHAIN))}")
    unit = CALLS[profile] / (len(CHAIN) + 2)
    return tuple(
        _distill(
            "progressive",
            profile,
            unit * (2 if n <= 2 else 1),
            per_sample=5,
            options={"steps": n, "teacher_steps": 2 * n},
            teacher="guided" if n == CHAIN[0] else "before",
        )
        for n in CHAIN[: CHAIN.index(steps) + 1]
    )


def _consistency(steps: int, profile: Profile) -> tuple[Stage, ...]:
    options = {"grid_steps": CONSISTENCY_GRID}
    return (_distill("consistency", profile, CALLS[profile], per_sample=5, options=options),)


def _continuous(steps: int, profile: Profile) -> tuple[Stage, ...]:
    stage = _distill("continuous", profile, CALLS[profile], per_sample=6, options=CONTINUOUS)
    options = {**CONTINUOUS, "warmup": stage.steps * 3 // 4}
    return (stage.model_copy(update={"options": options}),)


def _direct(steps: int, profile: Profile) -> tuple[Stage, ...]:
    if steps not in DIRECT_STEPS:
        raise BadInput("steps", steps, f"choose one of {', '.join(map(str, DIRECT_STEPS))}")
    pairs = Pairs(n={"smoke": 64, "quick": 32_768, "paper": 131_072}[profile], steps=PATH_STEPS)
    calls = CALLS[profile] / len(DIRECT_STEPS)
    options = {"steps": steps}
    stage = _distill(
        "direct", profile, calls, per_sample=3 * steps, options=options, teacher=None, pairs=pairs
    )
    return (stage,)


_STAGES: Mapping[str, Callable[[int, Profile], tuple[Stage, ...]]] = {
    "direct": _direct,
    "progressive": _progressive,
    "consistency": _consistency,
    "continuous": _continuous,
}
assert tuple(_STAGES) == TRAJECTORY


def rival_recipe(
    *,
    steps: int,
    profile: Profile = "quick",
    seed: int = 0,
    world: str = "ring8",
    options: Mapping[str, float | int | str | tuple[float, ...]] = MappingProxyType({}),
    width: int = RIVAL_WIDTH,
) -> PointRecipe:
    """Return the recipe of a DMD2 student: it and its fake start as one base, the teacher is exact.

    All have the same network calls to spend, so a student that waits longer for its fake moves
    less often.

    Args:
        steps: of the student, evenly spaced in time.
        profile: smoke, quick or paper.
        seed: of the training.
        world: the mixture.
        options: of `turbo_lab.methods.DMD2`, over those written here.
        width: of its network.
    """
    times = tuple(time_grid(steps)[:-1].tolist())
    chosen = {"times": times, "eta": RIVAL_ETA, "rival_updates": 5, **options}
    calls = rival_calls(steps, int(str(chosen["rival_updates"])), str(chosen.get("rollout", "")))
    rounds = max(4, int(RIVAL_CALLS[profile] / (calls * RIVAL_BATCH[profile])))
    rates = {"weight_decay": 0.0, "warmup": min(20, rounds), "final": 0.05}
    stage = Stage(
        method="dmd2",
        options=chosen,
        steps=rounds,
        batch_size=RIVAL_BATCH[profile],
        rates={"student": Rates(lr=1e-3, **rates), "fake": Rates(lr=2e-3, **rates)},
        ema=0.99,
        teacher="guided",
    )
    base = base_recipe(profile, world=world, width=width)
    return PointRecipe(
        name=f"dmd2-{steps}", world=world, width=width, seed=seed, stages=(stage,), base=base
    )


STARTS = ("cold", "consistency", "pcm", "pcm-fake", "transition")
"""How a DMD2 student may start: as the base, or by a stage of its own; with ``pcm-fake`` the fake
score starts as the student of that stage too."""
WARM_SHARE = 0.25
"""Of the network calls that a warm start spends."""


def warm_recipe(
    start: str, *, steps: int = 2, profile: Profile = "quick", seed: int = 0, world: str = "ring8"
) -> PointRecipe:
    """Return the recipe of a DMD2 student with a start of its own, at equal network calls.

    Stages are a warm one, with `WARM_SHARE` of the calls, and the one of `rival_recipe` with the
    rest. The fake starts as the base, but for ``pcm-fake``.

    Args:
        start: one of `STARTS`; ``cold`` is `rival_recipe` itself.
        steps: of the student; ``pcm`` has as many phases.
        profile: smoke, quick or paper.
        seed: of the training.
        world: the mixture.

    Raises:
        BadInput: unknown start.
    """
    if start not in STARTS:
        raise BadInput("start", start, f"choose one of {', '.join(STARTS)}")
    cold = rival_recipe(steps=steps, profile=profile, seed=seed, world=world)
    if start == "cold":
        return cold
    (direct,) = cold.stages
    changed: dict[str, object] = {"steps": max(4, int(direct.steps * (1 - WARM_SHARE)))}
    if start == "pcm-fake":
        changed["rivals_from"] = "before"
    first = _warm_stage(start.removesuffix("-fake"), profile, direct.options["times"])
    stages = (first, direct.model_copy(update=changed))
    return cold.model_copy(update={"name": f"{start}-{cold.name}", "stages": stages})


def _warm_stage(start: str, profile: Profile, times: object) -> Stage:
    """5 calls per sample: 3 with gradient, the teacher and the own prediction, or it twice.

    Those of a head are not counted: 11 of a network three quarters as large.
    """
    assert isinstance(times, tuple)
    batch_size = RIVAL_BATCH[profile]
    steps = max(4, int(WARM_SHARE * RIVAL_CALLS[profile] / (5 * batch_size)))
    rate = Rates(lr=1e-3, weight_decay=0.0, warmup=min(20, steps), final=0.05)
    edges = times[1:] if start == "pcm" else ()
    return Stage(
        method="transition" if start == "transition" else "consistency",
        options={"times": times}
        if start == "transition"
        else {"grid_steps": CONSISTENCY_GRID, "edges": edges},
        steps=steps,
        batch_size=batch_size,
        rates={"student": rate, "head": rate} if start == "transition" else {"student": rate},
        ema=0.99,
        teacher="guided",
    )


def rival_calls(steps: int, rival_updates: int, rollout: str) -> float:
    """Network calls per sample in a round of DMD2, the exact teacher's too, three with a gradient.

    The fake's turn takes the student's steps to the drawn one, and learns (3). The student's turn
    takes the steps before the drawn one, that one with a gradient (3), and asks teacher and fake.
    Noised real data take no steps before the drawn one.
    """
    before = 0 if rollout == "forward" else (steps - 1) / 2
    return before + 1 + 3 + (before + 3 + 2) / rival_updates


GAN_WIDTH = 48
"""Width of the students of the GAN study, 17 kB each."""
GAN_RIVAL_UPDATES = 2
"""Of the fake and of the critic for each of the student's, which has further to go here."""


def gan_recipe(
    gan: PointGan,
    *,
    steps: int = 4,
    profile: Profile = "quick",
    seed: int = 0,
    world: str = "ring8-tilted",
) -> PointRecipe:
    """Return the recipe of a DMD2 student with a GAN term, in as many rounds as one without.

    What the critic costs comes on top: a sample of the student in every round, and its own calls.

    Args:
        gan: the term; of weight 0 it is watched, and not followed.
        steps: of the student.
        profile: smoke, quick or paper.
        seed: of the training.
        world: the teacher's mixture; data are of `turbo_lab.testbeds.points.truth_of` it.
    """
    plain = rival_recipe(
        steps=steps, profile=profile, seed=seed, world=world,
        options={"rival_updates": GAN_RIVAL_UPDATES}, width=GAN_WIDTH,
    )  # fmt: skip
    (stage,) = plain.stages
    critic = stage.rates["fake"].model_copy(update={"lr": 4e-3, "betas": (0.0, 0.99)})
    stages = (stage.model_copy(update={"rates": {**stage.rates, "critic": critic}}),)
    return plain.model_copy(update={"name": f"gan-{steps}", "stages": stages, "gan": gan})
