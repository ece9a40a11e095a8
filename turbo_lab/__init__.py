"""Few-step diffusion distillation: understand it, measure it, repeat it.

Submodules load on first use, so that ``import turbo_lab`` costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

__version__ = "0.1.0"

_MODULES = (
    "bars",
    "claims",
    "errors",
    "explore",
    "field",
    "figures",
    "fit",
    "lab",
    "measure",
    "methods",
    "path",
    "recipes",
    "runner",
    "sample",
    "store",
    "streams",
    "testbeds",
)
__all__ = ["__version__", *_MODULES]


def __getattr__(name: str) -> ModuleType:
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
