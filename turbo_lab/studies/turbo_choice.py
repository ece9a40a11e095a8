"""How the turbo student is chosen: looks at candidates on captions that no notebook reports on.

``python -m turbo_lab.studies.turbo_choice`` prints them again, and with ``--stages`` those at the
student trained longer after each of its stages. Most candidates have one training, so differences
of a few points are no differences; the GAN term's weight was chosen by three.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import pandas as pd

from turbo_lab.lab import Lab, Student, open_lab
from turbo_lab.recipes import EARLY, FAMILIES, student_recipe
from turbo_lab.recipes.adversarial import AGAINST, CONTROL, TURBO
from turbo_lab.recipes.turbo import LONG, RUNGS
from turbo_lab.recipes.warm import STARTS, STEPS
from turbo_lab.studies.every_metric import find, reference

CAPTIONS = 512
LOOKED_AT = (
    "sign_read",
    "ghost_signs",
    "whole_body",
    "hue_kl",
    "chroma_w1",
    "moss_patches",
    "fur_patches",
)
CANDIDATES = (
    *("dmd2", "dmd2-second-0.5", "dmd2-second-0.8"),
    *STARTS,
    CONTROL,
    *AGAINST,
    *(name for name in RUNGS if name.startswith("turbo") and name not in AGAINST),
)
"""Students of one seed: second times, warm starts and their lengths, then critics."""
WEIGHTS = ("dmd2-second-0.5", CONTROL, "turbo-small", "gan-balance-0.5", TURBO)
"""DMD2, then the same warm start with a GAN term of growing weight."""
LENGTHS = (TURBO, LONG)
"""The whole recipe, and the whole recipe trained longer in a larger adapter."""
MORE_CAPTIONS, MORE_TRAININGS = 1000, 3


def looks(
    lab: Lab,
    families: Sequence[str] = CANDIDATES,
    *,
    captions: int = CAPTIONS,
    trainings: int = 1,
    seed: int = 0,
) -> pd.DataFrame:
    """Metrics of the first trainings of each family on the stream ``select``.

    Args:
        lab: with the teacher.
        families: students of two steps.
        captions: how many.
        trainings: of each family; their mean is returned.
        seed: of the noise.

    Returns:
        One row per family, one column per metric of `LOOKED_AT`.
    """
    rows = {}
    for family in families:
        students = [lab.student(family, steps=STEPS, seed=k) for k in range(trainings)]
        found = [_look(lab, one, captions=captions, seed=seed) for one in students]
        rows[family] = pd.DataFrame(found).mean()
    return pd.DataFrame(rows).T


def by_stage(
    lab: Lab, *, captions: int = CAPTIONS, trainings: int = MORE_TRAININGS, seed: int = 0
) -> pd.DataFrame:
    """Metrics of the student trained longer after each of its stages; arguments as of `looks`.

    The stages before its last are not shipped: they are trained if they are nowhere.

    Returns:
        One row per stage and training, one column per metric of `LOOKED_AT`.
    """
    rows = {}
    for training in range(trainings):
        whole = student_recipe(LONG, steps=STEPS, seed=training)
        assert whole.start is not None and whole.start.before is not None
        for stage, recipe in enumerate((whole.start.before, whole.start, whole), start=1):
            student = lab.worn(recipe, lab.trained(recipe), family=LONG, steps=STEPS)
            rows[stage, training] = _look(lab, student, captions=captions, seed=seed)
    return pd.DataFrame(rows).T.sort_index().rename_axis(["stage", "training"])


def _look(lab: Lab, student: Student, *, captions: int, seed: int) -> dict[str, float]:
    sampling = student.sampling(n=captions, seed=seed, stream="select")
    drawn = lab.samples(sampling, FAMILIES[student.family].title, student)
    return find(drawn.images, drawn.scenes, reference(1024)).all_values(LOOKED_AT)


if __name__ == "__main__":
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--stages", action="store_true", help=f"{LONG} alone, stage by stage")
    by = asked.parse_args()
    bench = open_lab(teacher=EARLY)
    if by.stages:
        print(by_stage(bench).round(3).to_string())
    else:
        print(looks(bench).round(3).to_string())
        for families in (WEIGHTS, LENGTHS):
            more = looks(bench, families, captions=MORE_CAPTIONS, trainings=MORE_TRAININGS)
            print(more.round(3).to_string())
