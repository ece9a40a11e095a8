"""One colour per method in every figure, and lighter and darker shades of it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
from matplotlib.colors import to_hex, to_rgb

from turbo_lab.errors import BadInput
from turbo_lab.figures import ACCENT, INK, SECOND, THIRD

METHODS: Mapping[str, str] = MappingProxyType(
    {
        "teacher": INK,
        "naive": INK,
        "direct": SECOND,
        "progressive": THIRD,
        "consistency": "#8b5aa8",
        "continuous": "#b8860b",
        "dmd2": ACCENT,
        "pcm": "#62b6ac",
        "warm": "#147a75",
        "warm-start": "#62b6ac",  # it is PCM, stopped early
        "gan-none": "#147a75",  # more of the same DMD2
        "turbo": "#6b4423",
    }
)
"""By family of students. A family that is not here has the colour of the one whose name its own
begins with: ``dmd2-second-0.5`` that of ``dmd2``."""


def colour_of(family: str) -> str:
    """The colour of a family's method.

    Raises:
        BadInput: no method has this name, nor one that it begins with.
    """
    parts = family.split("-")
    for k in range(len(parts), 0, -1):
        if (name := "-".join(parts[:k])) in METHODS:
            return METHODS[name]
    raise BadInput("family", family, f"let it begin with one of {', '.join(METHODS)}")


def shades(family: str, n: int) -> tuple[str, ...]:
    """So many shades of a method's colour, from light to dark; one is the colour itself."""
    own = np.array(to_rgb(colour_of(family)))
    places = np.linspace(-1, 1, n) if n > 1 else [0.0]
    mixed = [own + 0.55 * -at * (1 - own) if at < 0 else own * (1 - 0.45 * at) for at in places]
    return tuple(to_hex(tuple(colour)) for colour in mixed)
