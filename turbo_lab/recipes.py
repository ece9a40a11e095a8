"""Recipes: named, frozen, validated; everything a training depends on, and nothing else.

A recipe is a list of stages. Each stage becomes an artefact of its own, whose key is the hash of
the recipe up to that stage: change a number and it is another artefact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

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


class Stage(_Frozen):
    """One method, its options and its budget."""

    method: str
    options: Mapping[str, float | int | str] = Field(default_factory=dict)
    steps: int = Field(ge=1)
    batch_size: int = Field(64, ge=1)
    rates: Mapping[str, Rates]
    ema: float = Field(0.999, ge=0, lt=1)
    sign_grid: int = Field(1, ge=1, le=4)
    posters: float = Field(0.0, ge=0, le=1)
    version: int = Field(1, ge=1)

    @field_validator("method")
    @classmethod
    def _known(cls, method: str) -> str:
        if method not in METHODS:
            raise BadInput("method", method, f"choose one of {', '.join(METHODS)}")
        return method


class Recipe(_Frozen):
    """A named list of stages on a testbed."""

    name: str
    testbed: Literal["postcards"] = "postcards"
    world: int = WORLD
    net: NetSize = NetSize()
    seed: int = Field(0, ge=0)
    stages: tuple[Stage, ...] = Field(min_length=1)

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
        return self.model_dump(mode="json")


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


RECIPES: Mapping[str, Callable[[Profile, int], Recipe]] = MappingProxyType({"teacher": teacher})


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
