"""How the turbo student is chosen: looks at candidates on captions that no notebook reports on.

``python -m turbo_lab.studies.turbo_choice`` prints them again. One training of each candidate, so
differences of a few points are no differences.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from turbo_lab.lab import Lab, open_lab
from turbo_lab.recipes import FAMILIES
from turbo_lab.recipes.adversarial import AGAINST, CONTROL
from turbo_lab.recipes.turbo import RUNGS
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


def looks(
    lab: Lab, families: Sequence[str] = CANDIDATES, *, captions: int = CAPTIONS, seed: int = 0
) -> pd.DataFrame:
    """Metrics of the first training of each family on the stream ``select``.

    Args:
        lab: with the teacher.
        families: students of two steps.
        captions: how many.
        seed: of the noise.

    Returns:
        One row per family, one column per metric of `LOOKED_AT`.
    """
    real, rows = reference(1024), {}
    for family in families:
        student = lab.student(family, steps=STEPS)
        sampling = student.sampling(n=captions, seed=seed, stream="select")
        drawn = lab.samples(sampling, FAMILIES[family].title, student)
        rows[family] = find(drawn.images, drawn.scenes, real).all_values(LOOKED_AT)
    return pd.DataFrame(rows).T


if __name__ == "__main__":
    print(looks(open_lab()).round(3).to_string())
