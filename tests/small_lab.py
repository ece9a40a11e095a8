"""A laboratory of seconds: a tiny teacher, and students of two steps per stage.

Their adapters are on two modules: to put on 14 takes longer than to train these students.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from turbo_lab import claims, recipes, training
from turbo_lab.adapters import AdapterSize
from turbo_lab.lab import Lab
from turbo_lab.recipes import Recipe, student_recipe
from turbo_lab.store import Store
from turbo_lab.testbeds.postcards import NetSize, Postcards

TINY = NetSize(layers=1, heads=1, head_width=16, text_width=16)
ADAPTER = AdapterSize(rank=2, targets=("to_q", "img_mlp.net.2"))


def small_lab(folder: Path) -> Lab:
    """A bench with a teacher of seconds."""
    whole = recipes.resolve("teacher", profile="smoke")
    recipe = whole.model_copy(update={"net": TINY, "stages": whole.stages[:1]})
    store = Store(cache=folder)
    artefact = training.trained(recipe, store=store)
    net = training.load_net(recipe, artefact)
    return Lab(
        recipe=recipe, artefact=artefact, testbed=Postcards(net=net), store=store, device="cpu"
    )


def small(recipe: Recipe, teacher: Recipe) -> Recipe:
    """The recipe of a student of the tiny teacher, two steps per stage."""
    stages = tuple(stage.model_copy(update={"steps": 2}) for stage in recipe.stages)
    changed = {"net": TINY, "teacher": teacher, "adapter": ADAPTER, "stages": stages}
    if recipe.start is not None:
        changed["start"] = small(recipe.start, teacher)
    return recipe.model_copy(update=changed)


def small_student(
    lab: Lab, family: str, *, steps: int, profile: recipes.Profile, seed: int
) -> Recipe:
    """`student_recipe`, for the tiny teacher."""
    return small(student_recipe(family, steps=steps, profile="smoke", seed=seed), lab.recipe)


@contextmanager
def quick_study(lab: Lab) -> Iterator[None]:
    """Studies of `small_student` with a replay trace of one step, and 100 resamples per interval.

    What they find is looked at for its shape and its direction only.
    """
    honest = claims.crossed_bootstrap

    def quick(*rows: Any, **options: Any) -> claims.Interval:
        return honest(*rows, **{**options, "resamples": 100})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("turbo_lab.lab.student_recipe", partial(small_student, lab))
        patch.setattr(training, "TRACE_STEPS", 1)
        patch.setattr(claims, "crossed_bootstrap", quick)
        yield
