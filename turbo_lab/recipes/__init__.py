"""Recipes: named, frozen, validated; everything a training depends on, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import get_args

from turbo_lab.errors import BadInput
from turbo_lab.recipes import adversarial, distribution, six_blocks, trajectory, turbo, warm
from turbo_lab.recipes.adversarial import real_folder, with_folder
from turbo_lab.recipes.models import (
    WORLD,
    Family,
    Folder,
    Gan,
    Pairs,
    Profile,
    Rates,
    Recipe,
    Stage,
)
from turbo_lab.recipes.teacher import EARLY, GUIDANCE, early, teacher

__all__ = [
    "EARLY",
    "FAMILIES",
    "GUIDANCE",
    "RECIPES",
    "WORLD",
    "Family",
    "Folder",
    "Gan",
    "Pairs",
    "Profile",
    "Rates",
    "Recipe",
    "Stage",
    "real_folder",
    "resolve",
    "student_recipe",
    "teacher",
    "with_folder",
]

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        **trajectory.FAMILIES,
        **distribution.FAMILIES,
        **warm.FAMILIES,
        **adversarial.FAMILIES,
        **turbo.FAMILIES,
        **six_blocks.FAMILIES,
    }
)
"""Students that notebooks compare, by method."""


def student_recipe(family: str, *, steps: int, profile: Profile = "quick", seed: int = 0) -> Recipe:
    """Return the recipe of a family's student for a number of steps.

    Raises:
        BadInput: unknown family or profile, a negative seed, or no student for so many steps.
    """
    if family not in FAMILIES:
        raise BadInput("student", family, f"choose one of {', '.join(FAMILIES)}")
    _check(profile, seed)
    return FAMILIES[family].recipe(steps, profile, seed)


RECIPES: Mapping[str, Callable[[Profile, int], Recipe]] = MappingProxyType(
    {
        "teacher": teacher,
        EARLY: early,
        **trajectory.RECIPES,
        **distribution.RECIPES,
        **warm.RECIPES,
        **adversarial.RECIPES,
        **turbo.RECIPES,
        **six_blocks.RECIPES,
    }
)


def resolve(name: str, *, profile: Profile = "quick", seed: int = 0) -> Recipe:
    """Return the recipe of a name.

    Raises:
        BadInput: unknown name or profile, or a negative seed.
    """
    if name not in RECIPES:
        raise BadInput("recipe", name, f"choose one of {', '.join(RECIPES)}")
    _check(profile, seed)
    return RECIPES[name](profile, seed)


def _check(profile: str, seed: int) -> None:
    if profile not in get_args(Profile):
        raise BadInput("profile", profile, "choose smoke, quick or paper")
    if seed < 0:
        raise BadInput("seed", seed, "use an integer of at least 0")
