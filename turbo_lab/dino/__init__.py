"""Mini-DINO: a small vision transformer, self-distilled on postcards, as frozen features."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from turbo_lab.dino.net import VitSize, spawn_vit, tapped
from turbo_lab.dino.recipe import LOCAL, NAME, DinoRecipe, dino_recipe, local_recipe
from turbo_lab.dino.training import backbone, trained, trained_with_progress
from turbo_lab.features import VitFeatures
from turbo_lab.store import Store

__all__ = [
    "LOCAL",
    "NAME",
    "RECIPES",
    "DinoRecipe",
    "dino_features",
    "dino_recipe",
    "local_recipe",
    "random_features",
    "trained",
    "trained_with_progress",
]

RECIPES: Mapping[str, Callable[..., DinoRecipe]] = {NAME: dino_recipe, LOCAL: local_recipe}
"""By name; each takes a profile and ``seed``."""


def dino_features(
    store: Store | None = None,
    *,
    blocks: Sequence[int] | None = None,
    recipe: DinoRecipe | None = None,
) -> VitFeatures:
    """Tap a mini-DINO: patch tokens ``[B, 64, D]`` of pictures in [-1, 1], per block.

    Args:
        store: where it is looked for; trained now if it is nowhere.
        blocks: from 0, rising; all if None.
        recipe: of the one meant; that of the critics if None.

    Raises:
        BadInput: a block that is not there.
    """
    recipe = recipe or dino_recipe()
    return tapped(backbone(recipe, trained_with_progress(recipe, store=store)), blocks)


def random_features(
    seed: int = 0, *, size: VitSize | None = None, blocks: Sequence[int] | None = None
) -> VitFeatures:
    """Tap the same backbone as it comes from a seed, untrained.

    Raises:
        BadInput: a block that is not there.
    """
    return tapped(spawn_vit(size or dino_recipe().vit, seed), blocks)
