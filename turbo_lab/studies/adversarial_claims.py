"""Claims C5 and C6 of notebook 05: what DMD2 loses, and what a GAN term brings back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from turbo_lab import claims as cl
from turbo_lab.claims import Claim, Interval
from turbo_lab.recipes.adversarial import CONTROL
from turbo_lab.recipes.warm import STEPS
from turbo_lab.studies.adversarial import DIRECT, GAN, NOTEBOOK, TEACHER, Comparison
from turbo_lab.studies.distribution import SOURCE
from turbo_lab.studies.matching import claim_row
from turbo_lab.studies.textures import TEXTURES, nearer


def claims(comparison: Comparison, *, profile: str) -> list[Claim]:
    """C5 and C6, paired by training seed, caption and noise."""
    common: dict[str, Any] = {
        "notebook": NOTEBOOK,
        "source": SOURCE,
        "samples": comparison.budget.captions,
        "profile": profile,
        "artefact_keys": comparison.keys,
    }
    seeds = comparison.budget.seeds
    main = [Claim(**one, **common, seeds=seeds) for one in _main_claims(comparison)]
    return main + [Claim(**one, **common, seeds=1) for one in _ablation_claims(comparison)]


def _main_claims(comparison: Comparison) -> Iterator[dict[str, Any]]:
    found, real = comparison.measured, comparison.real
    for ground in TEXTURES:
        gap = f"patch distance to real {ground}, minus that of"

        def than(one: str, other: str, ground: str = ground) -> Interval:
            return nearer(real, found[one], found[other], [ground])

        yield claim_row(
            f"C5-{ground}",
            f"DMD2 at {STEPS} steps loses {ground} against its teacher",
            f"{gap} the teacher",
            than(DIRECT, TEACHER),
            "above",
            0,
        )
        yield claim_row(
            f"C6-{ground}",
            f"with a GAN, {ground} is nearer to real than with DMD2 alone",
            f"{gap} DMD2 at {STEPS} steps",
            than(GAN, DIRECT),
            "below",
            0,
        )
        yield claim_row(
            f"C6-term-{ground}",
            f"the GAN term itself brings {ground} nearer to real",
            f"{gap} as much more DMD2 from the same start",
            than(GAN, CONTROL),
            "below",
            0,
        )
        yield claim_row(f"C6-pass-{ground}", f"the {STEPS}-step student with a GAN passes its "
                        f"teacher on {ground}", f"{gap} the teacher", than(GAN, TEACHER),
                        "below", 0)  # fmt: skip
    for id_, other, title in (("C6-read", DIRECT, f"DMD2 at {STEPS} steps"),
                              ("C6-term-read", CONTROL, "as much more DMD2")):  # fmt: skip
        more = found[GAN].values["sign_read"] - found[other].values["sign_read"]
        who = "the GAN costs" if other == CONTROL else "warm start and GAN together cost"
        yield claim_row(id_, f"{who} at most two points of signs read",
                        f"signs read, minus those of {title}", cl.crossed_bootstrap(more),
                        "above", -0.02)  # fmt: skip
    bodies = found[GAN].values["whole_body"] - found[CONTROL].values["whole_body"]
    yield claim_row("C6-term-bodies", "the GAN costs at most two points of whole bodies",
                    "whole bodies, minus those of as much more DMD2", cl.crossed_bootstrap(bodies),
                    "above", -0.02)  # fmt: skip


_CHANGES = (
    (
        "C6-rho",
        GAN,
        "turbo-teacher-data",
        "real data on the critic's side helps",
        "teacher images only",
    ),
    ("C6-dino", GAN, "turbo-random", "DINO features beat random ones", "a random ViT"),
    ("C6-weight", GAN, "turbo-small", "a larger weight helps", "a small weight"),
)
"""Claims about one thing changed: id, with, without, statement, what it is held against."""


def _ablation_claims(comparison: Comparison) -> Iterator[dict[str, Any]]:
    for id_, one, other, statement, against in _CHANGES:
        if {one, other} <= set(comparison.families):
            a, b = (comparison.measured[name].training(0) for name in (one, other))
            yield claim_row(id_, statement, "patch distance to real moss and fur, minus that with "
                            f"{against}", nearer(comparison.real, a, b, TEXTURES),
                            "below", 0)  # fmt: skip
