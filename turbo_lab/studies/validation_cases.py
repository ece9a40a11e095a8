"""What each corruption must move, and the written list of what else it may move, with reasons.

The list was made while looking at quick with seeds 0 and 1 and at paper with seed 0: only other
seeds test it. Reasons are what the pictures suggest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from turbo_lab.studies.every_metric import METRICS

SLOPES = ("psd_slope", "moss_slope", "fur_slope")
SPECTRUM = ("high_frequency_share", *SLOPES)
ENERGIES = ("moss_energy", "fur_energy")
PATCHES = ("moss_patches", "fur_patches")
COLOUR = ("saturation", "chroma_w1")
LEGIBLE = ("sign_read", "sign_alone", "digits_right", "all_right")
BODY = ("whole_body", "pose_right", "all_right")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One corruption: its own metrics and its allowed couplings.

    Attributes:
        own: metric to direction, +1 where it must rise with the strength, -1 where it must fall;
            none for a control, which may move nothing.
        coupled: reason to the metrics that it lets move, whatever the direction.
    """

    own: Mapping[str, int]
    coupled: Mapping[str, tuple[str, ...]]

    @property
    def listed(self) -> frozenset[str]:
        """Every metric of the list of couplings."""
        return frozenset(metric for metrics in self.coupled.values() for metric in metrics)

    @property
    def quiet(self) -> tuple[str, ...]:
        """The metrics that must stay inside their null band."""
        return tuple(m for m in METRICS if m not in self.own and m not in self.listed)


_FEW_HUES: Mapping[str, tuple[str, ...]] = {
    "garments of one hue are more alike": ("diversity",),
    "hues differ in luminance, and in how they mix at edges": ("contrast", *COLOUR),
}
_PLATE = "a plate is white, flat, sharp and far from every ground"

CASES: Mapping[str, Case] = {
    "blur": Case(
        own=dict.fromkeys((*SPECTRUM, *ENERGIES), -1),
        coupled={
            "strokes of one pixel vanish": (*LEGIBLE, "sign_lost"),
            "limbs two pixels wide fade": BODY,
            "neighbouring colours mix": (*COLOUR, "hue_kl"),
            "variance goes": ("contrast", "diversity"),
            "grain is in the patches": PATCHES,
        },
    ),
    "sharpen": Case(
        own=dict.fromkeys(("high_frequency_share", *ENERGIES), 1),
        coupled={
            "halos take limbs away from the colour of skin": BODY,
            "edges overshoot, and are cut": ("clipped", *COLOUR),
            "variance comes": ("contrast", "diversity"),
            "grain is in the spectrum and the patches": (*SLOPES, *PATCHES),
        },
    ),
    "noise": Case(
        own=dict.fromkeys(SLOPES, 1),
        coupled={
            "it has power at every frequency": ("high_frequency_share", "moss_energy"),
            "it is in the patches": PATCHES,
            "limbs leave the colour of skin, garments their hue": (*BODY, "hue_kl"),
            "channels drift apart, and are cut": ("clipped", *COLOUR),
            "variance comes": ("contrast", "diversity"),
        },
    ),
    "contrast": Case(
        own={"contrast": 1, "clipped": 1},
        coupled={
            "skin changes its colour": BODY,
            "differences of channels grow": COLOUR,
            "variance comes": ("diversity", *ENERGIES, *PATCHES),
            "plate and skin are cut, the ground is not": SPECTRUM,
        },
    ),
    "chroma": Case(
        own=dict.fromkeys(COLOUR, 1),
        coupled={
            "the purest garments are cut": ("clipped",),
            "colours differ more": ("diversity",),
        },
    ),
    "hue collapse": Case(
        own={"hue_kl": 1},
        coupled={
            "it empties the other modes": ("coverage",),
            **_FEW_HUES,
        },
    ),
    "hue loss": Case(
        own={"coverage": -1},
        coupled={
            "a lost mode is a difference from the truth": ("hue_kl",),
            **_FEW_HUES,
        },
    ),
    "one layout": Case(own={"diversity": -1}, coupled={}),
    "limbs": Case(
        own={"whole_body": -1},
        coupled={
            "a limb that lacks has no pose": ("pose_right", "all_right"),
            "ground takes the place of bright skin": ("contrast", *COLOUR),
        },
    ),
    "pose": Case(
        own={"pose_right": -1, "all_right": -1},
        coupled={"a caption's pictures have both poses": ("diversity",)},
    ),
    "glyph erosion": Case(
        own={"sign_read": -1},
        coupled={
            "too few pixels tell the digits": (
                "sign_alone",
                "digits_right",
                "sign_lost",
                "all_right",
            ),
            "ink is the finest detail and the darkest": ("contrast", *SPECTRUM),
        },
    ),
    "digit swap": Case(
        own={"digits_right": -1},
        coupled={"reading includes the digits": ("sign_read", "sign_alone", "all_right")},
    ),
    "sign loss": Case(
        own={"sign_lost": 1},
        coupled={
            "what is not there is not read": LEGIBLE,
            _PLATE: ("diversity", *COLOUR, "contrast", *SPECTRUM),
        },
    ),
    "ghost sign": Case(
        own={"ghost_signs": 1, "sign_alone": -1},
        coupled={
            "a picture is right with one sign": ("all_right",),
            _PLATE: ("diversity", *COLOUR, "contrast", *SPECTRUM),
        },
    ),
    "combed moss": Case(own={"moss_patches": 1}, coupled={}),
    "phase scramble": Case(
        own=dict.fromkeys(PATCHES, 1),
        coupled={
            "nothing is to be seen any more": (*LEGIBLE, "sign_lost", *BODY),
            "waves can look like a plate": ("ghost_signs",),
            "there is no garment": ("hue_kl", "coverage"),
            "sums of waves pass the border": ("clipped", *COLOUR, "diversity"),
            "the ground takes the spectrum of the whole picture": (*SPECTRUM, "moss_energy"),
        },
    ),
    "grain scramble": Case(own={}, coupled={}),
}
"""By the names of `corruptions.ALL`."""
CONTROL = "grain scramble"
"""Gives another real picture, so no metric may move: the grain is a Gaussian field."""
