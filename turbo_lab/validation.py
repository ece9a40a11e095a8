"""From a pydantic field to the sentence that says what it allows."""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo


def allowed(field: FieldInfo) -> str:
    """Return what a field allows, for example "use an integer from 1 to 1000"."""
    kind: Any = field.annotation
    if get_origin(kind) is Literal:
        return "use one of " + ", ".join(map(repr, get_args(kind)))
    bounds = {
        word: getattr(mark, word)
        for mark in field.metadata
        for word in ("ge", "le")
        if getattr(mark, word, None) is not None
    }
    if any(getattr(mark, "pattern", None) for mark in field.metadata):
        return f"write {field.description}"  # a field with a pattern says it in words, too
    if get_origin(kind) is tuple:
        return "use a tuple of numbers"
    noun = {int: "an integer", float: "a number", bool: "True or False", str: "text"}[kind]
    if len(bounds) == 2:
        return f"use {noun} from {bounds['ge']} to {bounds['le']}"
    limits = {"ge": "of at least", "le": "of at most"}
    return " ".join([f"use {noun}", *(f"{limits[word]} {bound}" for word, bound in bounds.items())])
