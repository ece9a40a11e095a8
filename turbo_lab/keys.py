"""The key of a recipe: a hash of its one canonical text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from math import isfinite
from typing import Any

from turbo_lab.errors import BadInput


def canonical(spec: Mapping[str, Any]) -> str:
    """Return the one JSON text of a spec: sorted keys, no spaces, floats by ``repr``.

    Raises:
        BadInput: a value that is not None, bool, int, finite float, str, list, tuple or dict, or
            a key that is not a str.

    Example:
        >>> canonical({"b": (1, 1.0), "a": None})
        '{"a":null,"b":[1,1.0]}'
    """
    if not isinstance(spec, Mapping):
        raise BadInput("spec", spec, "use a mapping of names to values")
    return json.dumps(_plain(dict(spec), "spec"), sort_keys=True, separators=(",", ":"))


def key_of(spec: Mapping[str, Any]) -> str:
    """Return the 12 hex digits that name a spec: SHA-256 of its canonical text."""
    return hashlib.sha256(canonical(spec).encode()).hexdigest()[:12]


def _plain(value: object, where: str) -> object:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if not isfinite(value):
            raise BadInput(where, value, "use a finite number")
        return value
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise BadInput(f"{where} key", key, "use text for names")
        return {str(key): _plain(item, f"{where}.{key}") for key, item in value.items()}
    raise BadInput(where, value, "use None, bool, int, float, str, list, tuple or dict")
