"""The recipe of the mini-DINO: everything its training depends on, and nothing else."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from turbo_lab.dino.distil import HeadSize
from turbo_lab.dino.net import VitSize
from turbo_lab.dino.transplants import Transplants
from turbo_lab.dino.views import Crops
from turbo_lab.errors import BadInput
from turbo_lab.recipes import WORLD, Profile, Rates

NAME = "dino"
STEPS: dict[Profile, int] = {"smoke": 8, "quick": 6000, "paper": 20_000}
BATCH: dict[Profile, int] = {"smoke": 8, "quick": 256, "paper": 256}
CROPS = (Transplants(wide=12, piece=8, shift=0, coloured=0.15, cover=0.1, grey=0.5, noise=0.05),)
"""Pieces, most of them signs, each set anywhere into two other postcards: nothing else is shared,
so a digit has to look alike at every place. LOG.md has the looks that chose it."""


class DinoRecipe(BaseModel):
    """Backbone, head, views and budget of a self-distillation; see `turbo_lab.dino.distil.Dino`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = NAME
    world: int = WORLD
    seed: int = Field(0, ge=0)
    vit: VitSize = VitSize()
    head: HeadSize = HeadSize(prototypes=512)
    crops: tuple[Crops | Transplants, ...] = Field(CROPS, min_length=1)
    steps: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    rates: Rates
    student_temperature: float = Field(0.1, gt=0)
    teacher_temperature: float = Field(0.04, gt=0)
    momentum: float = Field(0.98, ge=0, lt=1)
    patches: float = Field(0.15, ge=0)
    version: int = Field(1, ge=1)

    @property
    def artefact(self) -> str:
        """Name of the artefact in the store."""
        return f"postcards/{self.name}"

    def spec(self) -> dict[str, Any]:
        """What the key of the artefact is made of."""
        return self.model_dump(mode="json")


def dino_recipe(profile: Profile = "quick", *, seed: int = 0) -> DinoRecipe:
    """Return the recipe of the mini-DINO that critics look through.

    Raises:
        BadInput: unknown profile, or a negative seed.
    """
    if profile not in STEPS:
        raise BadInput("profile", profile, f"choose one of {', '.join(STEPS)}")
    if seed < 0:
        raise BadInput("seed", seed, "use an integer of at least 0")
    steps = STEPS[profile]
    return DinoRecipe(seed=seed, steps=steps, batch_size=BATCH[profile], rates=_rates(steps))


def _rates(steps: int) -> Rates:
    return Rates(lr=2e-3, weight_decay=0.04, warmup=min(100, steps // 4), final=0.05)
