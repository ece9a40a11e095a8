"""Mini-DINO: a small vision transformer, self-distilled on postcards, as frozen features."""

from __future__ import annotations

from collections.abc import Sequence

from turbo_lab.dino.net import VitSize, spawn_vit, tapped
from turbo_lab.dino.recipe import NAME, DinoRecipe, dino_recipe
from turbo_lab.dino.training import backbone, trained, trained_with_progress
from turbo_lab.features import VitFeatures
from turbo_lab.store import Store

__all__ = [
    "NAME",
    "DinoRecipe",
    "dino_features",
    "dino_recipe",
    "random_features",
    "trained",
    "trained_with_progress",
]


def dino_features(
    store: Store | None = None, *, blocks: Sequence[int] | None = None
) -> VitFeatures:
    """Tap the mini-DINO: patch tokens ``[B, 64, D]`` of pictures in [-1, 1], per block.

    Args:
        store: where it is looked for; trained now if it is nowhere.
        blocks: from 0, rising; all if None.

    Raises:
        BadInput: a block that is not there.
    """
    recipe = dino_recipe()
    return tapped(backbone(recipe, trained_with_progress(recipe, store=store)), blocks)


def random_features(
    seed: int = 0, *, size: VitSize | None = None, blocks: Sequence[int] | None = None
) -> VitFeatures:
    """Tap the same backbone as it comes from a seed, untrained.

    Raises:
        BadInput: a block that is not there.
    """
    return tapped(spawn_vit(size or dino_recipe().vit, seed), blocks)
