"""A recipe for Qwen-Image with other numbers, from texts such as ``2.options.rival_updates=1``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from turbo_lab.errors import BadInput
from turbo_lab.methods import METHODS
from turbo_lab.recipes.qwen_image import micro_batches
from turbo_lab.recipes.qwen_models import QwenRecipe, QwenStage

SET = "set"
"""The option of the command line whose values these are."""
EVERY = "all"


def changed(recipe: QwenRecipe, changes: Sequence[str]) -> QwenRecipe:
    """Return a recipe in which each change replaces a value that is there.

    A change is ``STAGE.NAME=VALUE``: the number of a stage from 1, or ``all`` for those that have
    the name; a name as in the recipe that ``--dry-run`` prints, such as ``steps``,
    ``options.times``, ``rates.student.lr`` or ``gan.balance``; a value of the kind that is there,
    lists with commas. What follows from a batch's size is worked out again. The other values make
    another key.

    Args:
        recipe: to start from.
        changes: in their order.

    Raises:
        BadInput: a change names nothing, or its value is not allowed there.
    """
    for change in changes:
        recipe = _one(recipe, change)
    return recipe


def _one(recipe: QwenRecipe, change: str) -> QwenRecipe:
    place, sign, text = change.partition("=")
    stage, _, name = place.partition(".")
    if not sign or not name:
        raise BadInput(SET, change, "write STAGE.NAME=VALUE, such as 2.options.rival_updates=1")
    at = _stages(recipe, stage, name, change)
    dumped = recipe.model_dump()
    for k in at:
        *above, last = name.split(".")
        within = _within(dumped["stages"][k], above)
        within[last] = _parsed(text, within[last], change)
        if name == "batch_size":
            within["micro_batches"] = micro_batches(recipe.size, max(1, within[last]))
    try:
        made = QwenRecipe.model_validate(dumped)
    except ValidationError as error:
        raise BadInput(
            SET, change, error.errors()[0]["msg"].removeprefix("Value error, ")
        ) from None
    for k in at:
        _check_method(made.stages[k], change)
    return made


def _stages(recipe: QwenRecipe, stage: str, name: str, change: str) -> list[int]:
    """Numbers from 0 of the stages that are meant and have the name."""
    count = len(recipe.stages)
    meant = range(count)
    if stage != EVERY:
        if not (stage.isascii() and stage.isdecimal() and 1 <= int(stage) <= count):
            raise BadInput(SET, change, f"begin with a stage from 1 to {count}, or with {EVERY}")
        meant = range(int(stage) - 1, int(stage))
    found = [k for k in meant if name in _names(recipe.stages[k].model_dump())]
    if not found:
        known = sorted({n for k in meant for n in _names(recipe.stages[k].model_dump())})
        raise BadInput(SET, change, f"no such value is there; choose one of {', '.join(known)}")
    return found


_FIXED = ("method", "micro_batches", "teacher", "rivals_from")
"""What makes a recipe another one, or follows from the rest."""


def _names(stage: dict[str, Any]) -> list[str]:
    """Paths of the values of a stage that can be changed."""
    found = []
    for name, value in stage.items():
        if isinstance(value, dict):
            found += [f"{name}.{inner}" for inner in _names(value)]
        elif value is not None and name not in _FIXED:
            found.append(name)
    return found


def _within(stage: dict[str, Any], path: Sequence[str]) -> dict[str, Any]:
    for name in path:
        stage = stage[name]
    return stage


def _parsed(text: str, old: object, change: str) -> object:
    """A value of the kind of the old one."""
    try:
        if isinstance(old, tuple):
            kind = type(old[0]) if old else str
            return tuple(kind(part) for part in text.split(","))
        return type(old)(text)  # type: ignore[call-arg]
    except ValueError:
        words = f"values of the kind of {old!r}, with commas between them"
        kinds = {int: "an integer", float: "a number"}
        raise BadInput(SET, change, f"use {kinds.get(type(old), words)}") from None


def _check_method(stage: QwenStage, change: str) -> None:
    """Have the method look at its options now, and not once the model is loaded."""
    method = METHODS[stage.method]
    given = {f.name for f in dataclasses.fields(method) if f.default is dataclasses.MISSING}
    try:
        method(**dict.fromkeys(given - stage.options.keys()), **stage.options)
    except BadInput as error:
        raise BadInput(SET, change, f"{error.parameter}: {error.allowed}") from None
