"""A teacher on captions that no notebook reports on, on which its training is decided.

``python -m turbo_lab.studies.teacher_looks`` prints the rows that LOG.md has of ``select``.
"""

from __future__ import annotations

import argparse

import pandas as pd

from turbo_lab.lab import Lab, open_lab
from turbo_lab.sampling import TEACHER_GUIDANCE, Sampling
from turbo_lab.studies.every_metric import find, reference

LOOKED_AT = ("sign_read", "ghost_signs", "sign_lost", "whole_body", "hue_kl",
             "moss_energy", "fur_energy", "moss_patches", "fur_patches")  # fmt: skip


def look(lab: Lab, *, captions: int, guidance_scale: float, shift: float = 1.0) -> pd.Series:
    """Measure a teacher at 40 steps on the stream ``select``.

    Args:
        lab: of the teacher.
        captions: the first ones, at least 1.
        guidance_scale: of its samples, 1 to 20.
        shift: timestep shift of the sampler.

    Returns:
        One value per metric of `LOOKED_AT`; units are those of
        `turbo_lab.studies.every_metric.METRICS`.

    Raises:
        ValidationError: a number is out of its range, see `turbo_lab.sampling.Sampling`.
    """
    asked = {"n": captions, "guidance_scale": guidance_scale, "shift": shift}
    drawn = lab.samples(Sampling(stream="select", **asked), "teacher on select")
    return pd.Series(find(drawn.images, drawn.scenes, reference(1024)).all_values(LOOKED_AT))


if __name__ == "__main__":
    given = argparse.ArgumentParser(description=__doc__)
    given.add_argument("--teacher", default="teacher", help="teacher or teacher-early")
    given.add_argument("--captions", type=int, default=1000, help="of select")
    given.add_argument("--guidance", type=float, default=TEACHER_GUIDANCE, help="of its samples")
    given.add_argument("--shift", type=float, default=1.0, help="of the sampler's times")
    chosen = given.parse_args()
    bench = open_lab(device="cpu", teacher=chosen.teacher)
    found = look(
        bench, captions=chosen.captions, guidance_scale=chosen.guidance, shift=chosen.shift
    )
    print(bench.artefact.key)
    print(found.round(4).to_string())
