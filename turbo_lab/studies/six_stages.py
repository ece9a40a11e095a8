"""The best student after each of its stages, and TDM in place of the last ones.

``python -m turbo_lab.studies.six_stages`` prints it for the stream ``select``, on which no notebook
reports. Stages that are nowhere are trained: up to 25 minutes of a core each.
"""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from turbo_lab.lab import Lab, open_lab
from turbo_lab.recipes import Recipe, resolve
from turbo_lab.recipes.models import Option, Profile
from turbo_lab.recipes.six_blocks import EDGE, PCM, TURBO
from turbo_lab.recipes.warm import STEPS
from turbo_lab.sampling import Sampling
from turbo_lab.studies.every_metric import find, reference

CAPTIONS = 1000
LOOKED_AT = (
    *("sign_read", "sign_alone", "all_right", "ghost_signs", "sign_lost", "whole_body"),
    *("hue_kl", "chroma_w1", "moss_patches", "fur_patches"),
)
NOISE_SHIFT = 2.0
"""Of TDM's times, in the range of each step; not compared with others."""


def with_tdm(after: int, *, profile: Profile = "quick", seed: int = 0) -> Recipe:
    """The recipe of the best student up to a stage, and one stage of TDM after it.

    Its rates are those of the stage whose place it takes, but three fifths of the student's where
    distribution matching went before; so are its rounds, and half of them there.

    Args:
        after: stages of distribution matching before it, 0 or 2.
        profile: smoke, quick or paper.
        seed: of the trainings.
    """
    whole = resolve(TURBO, profile=profile, seed=seed)
    first, again = whole.stages[:2]
    like = again if after else first
    options: dict[str, Option] = {
        "times": (1.0, EDGE),
        "rival_updates": 1,
        "noise_shift": NOISE_SHIFT,
        "margin": 0.02,
    }
    changed: dict[str, object] = {"method": "tdm", "options": options}
    if after:
        slower = like.rates["student"].model_copy(update={"lr": 3e-4})
        changed |= {"rates": {**like.rates, "student": slower}, "steps": max(2, like.steps // 2)}
    return whole.model_copy(
        update={"stages": (*whole.stages[:after], like.model_copy(update=changed))}
    )


def candidates() -> Mapping[str, Recipe]:
    """What is looked at, by title; the stages of DMD2 are `with_tdm`'s and the best student's."""
    whole = resolve(TURBO)
    twice = whole.before
    assert twice is not None and twice.before is not None
    return {
        "PCM": resolve(PCM),
        "PCM, DMD2": twice.before,
        "PCM, DMD2 twice": twice,
        "PCM, DMD2 twice, GAN": whole,
        "PCM, TDM": with_tdm(0),
        "PCM, DMD2 twice, TDM": with_tdm(2),
    }


def looks(bench: Lab, recipes: Mapping[str, Recipe], *, captions: int = CAPTIONS) -> pd.DataFrame:
    """Metrics of students at two steps, and last of their teacher.

    Args:
        bench: of the teacher.
        recipes: title to recipe, one training each.
        captions: of the stream ``select``.

    Returns:
        One row per title, one column per metric of `LOOKED_AT`.
    """
    rows, real = {}, reference(1024)
    for title, recipe in recipes.items():
        student = bench.worn(recipe, bench.trained(recipe), family=TURBO, steps=STEPS)
        drawn = bench.samples(student.sampling(n=captions, stream="select"), title, student)
        rows[title] = find(drawn.images, drawn.scenes, real).all_values(LOOKED_AT)
    drawn = bench.samples(Sampling(n=captions, stream="select"), "teacher")
    rows["teacher"] = find(drawn.images, drawn.scenes, real).all_values(LOOKED_AT)
    return pd.DataFrame(rows).T


if __name__ == "__main__":
    print(looks(open_lab(teacher="teacher"), candidates()).round(3).to_string())
