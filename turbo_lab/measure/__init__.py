"""Measurements: small, offline, each validated against ground truth or a closed form.

The names below load their module on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "legibility": ("SignReading", "read_signs"),
    "anatomy": ("BodyReading", "read_bodies"),
    "palette": (
        "GarmentReading",
        "chroma_cdf",
        "chroma_w1",
        "clipped",
        "contrast",
        "hue_kl",
        "hue_mode",
        "hue_shares",
        "hue_truth",
        "read_garments",
        "saturation",
    ),
    "sharpness": ("high_frequency_share", "psd_slope", "radial_power", "scrambled"),
    "texture": (
        "band_energy",
        "expected_band_energy",
        "expected_power",
        "free_ground",
        "ground_patches",
        "read_grounds",
        "Slices",
        "sliced",
        "sliced_wasserstein",
        "window_power",
    ),
    "coverage": ("mode_coverage", "pairwise_distance"),
    "oracles": ("Reading", "fields_of_tokens", "read", "report"),
    "areas": ("AREAS", "area_errors", "area_masks"),
    "truth": ("edited_truth", "fresh_truth", "paste_sign"),
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}

__all__ = sorted(_MODULE)


def __getattr__(name: str) -> Any:
    if name in _MODULE:
        return getattr(import_module(f"{__name__}.{_MODULE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
