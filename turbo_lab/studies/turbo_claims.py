"""The claims of notebook 06: the turbo student's quality, and what each ingredient brings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

from turbo_lab.claims import Claim, Interval, Side
from turbo_lab.lab import Lab, Samples
from turbo_lab.recipes.turbo import LONG, TURBO
from turbo_lab.recipes.warm import STEPS
from turbo_lab.studies.distribution import SOURCE
from turbo_lab.studies.every_metric import METRICS, Found, difference, find, interval, reference
from turbo_lab.studies.matching import claim_row
from turbo_lab.studies.students import draw_students
from turbo_lab.studies.textures import TEXTURES
from turbo_lab.studies.turbo import (
    COLD,
    NOTEBOOK,
    SIX,
    SIX_TEACHER,
    TEACHER,
    TITLES,
    TRAININGS,
    WARM,
    Ladder,
    pairs,
)

PLAIN = "the 2-step student"
LONGER = f"{PLAIN}, trained longer in a larger adapter,"
LARGER = f"{PLAIN} of six blocks"


def claims(ladder: Ladder, *, profile: str) -> list[Claim]:
    """C7's quality, and what ingredients and length bring, paired by training, caption, noise."""
    common: dict[str, Any] = {
        "notebook": NOTEBOOK,
        "source": SOURCE,
        "samples": ladder.budget.captions,
        "profile": profile,
        "artefact_keys": ladder.keys,
    }
    made = (
        *((TURBO, *one) for one in _quality(ladder, TURBO, "C7", PLAIN)),
        *((LONG, *one) for one in _quality(ladder, LONG, "C7-long", LONGER)),
        *((SIX, *one) for one in _quality(ladder, SIX, "C7-six", LARGER, SIX_TEACHER)),
        *((TURBO, *one) for one in _ingredients(ladder)),
        *((LONG, *one) for one in _longer(ladder)),
        *((SIX, *one) for one in _larger(ladder)),
    )
    return [
        Claim(**one, **common, seeds=len(pairs(ladder, who, rival)[0])) for who, rival, one in made
    ]


def _gap(ladder: Ladder, metric: str, who: str, rival: str) -> Interval:
    return difference(*pairs(ladder, who, rival), metric)


def _quality(
    ladder: Ladder, who: str, begun: str, student: str, teacher: str = TEACHER
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Is a student of 2 NFE near its teacher of 80?"""
    rows: tuple[tuple[str, str, str, Side, float], ...] = (
        ("signs", "sign_read", "reads as many signs as its teacher, within 3 points",
         "above", -0.03),
        ("bodies", "whole_body", "has as many whole bodies as its teacher, within 5 points",
         "above", -0.05),
        ("moss", "moss_patches", "is as near to real moss as its teacher, or nearer",
         "below", 0.0),
        ("fur", "fur_patches", "is as near to real fur as its teacher, or nearer",
         "below", 0.0),
    )  # fmt: skip
    for id_, metric, statement, side, threshold in rows:
        title = f"{METRICS[metric].title}, minus those of the teacher at 40 steps"
        gap, said = _gap(ladder, metric, who, teacher), f"{student} {statement}"
        yield teacher, claim_row(f"{begun}-{id_}", said, title, gap, side, threshold)
    for id_, metric, threshold in (("hues", "hue_kl", 0.10), ("chroma", "chroma_w1", 0.0)):
        found = ladder.found[who]
        if metric == "hue_kl":
            value, title = interval(found, metric), "hue KL to truth, nats"
            said = f"{student} keeps the hues that the caption leaves open"
        else:
            value = difference(found, _scaled(ladder, teacher), metric)
            title = "chroma W1 to real, minus 1.5 times the teacher's"
            said = f"{student} has colours at most 1.5 times as far from real as its teacher's"
        yield teacher, claim_row(f"{begun}-{id_}", said, title, value, "below", threshold)


def _scaled(ladder: Ladder, rung: str = TEACHER) -> list[Found]:
    (teacher,) = ladder.found[rung]
    return [looser(teacher)]


def looser(teacher: Found) -> Found:
    """The teacher, with the distance of its chroma to real half as large again."""
    real = teacher.real.cdf
    return replace(teacher, cdf=real + 1.5 * (teacher.cdf - real))


_INGREDIENTS: tuple[tuple[str, str, str, Side, str], ...] = (
    ("L-progressive", "progressive-more", "sign_read", "above", "reads more signs than progressive "
     "distillation"),
    ("L-consistency", "consistency-more", "sign_read", "above", "reads more signs than consistency "
     "distillation"),
    ("L-dmd2-bodies", COLD, "whole_body", "above", "has more whole bodies than DMD2 alone"),
    ("L-dmd2-fur", COLD, "fur_patches", "below", "is nearer to real fur than DMD2 alone"),
    ("L-gan-fur", WARM, "fur_patches", "below", "is nearer to real fur than without its GAN term"),
    ("L-gan-signs", WARM, "sign_alone", "above", "has one sign, which is read, in more "
     "pictures than without its GAN term"),
    ("L-gan-chroma", WARM, "chroma_w1", "below", "has truer colours than without its GAN term"),
    ("L-warm", "turbo-cold", "whole_body", "above", "has more whole bodies than without a warm "
     "start"),
    ("L-data", "turbo-teacher-data", "fur_patches", "below", "is nearer to real fur than without "
     "real data"),
    ("L-dino", "turbo-random", "fur_patches", "below", "is nearer to real fur than with random "
     "features"),
    ("L-weight", "turbo-small", "fur_patches", "below", "is nearer to real fur than with a small "
     "weight"),
)  # fmt: skip
"""What each ingredient should bring: id, rival, metric, side, statement."""


def _ingredients(ladder: Ladder) -> Iterator[tuple[str, dict[str, Any]]]:
    for id_, rival, metric, side, said in _INGREDIENTS:
        title = f"{METRICS[metric].title}, minus those of {TITLES[rival]}"
        statement = f"{PLAIN} {said}"
        gap = _gap(ladder, metric, TURBO, rival)
        yield rival, claim_row(id_, statement, title, gap, side, 0.0)


def _longer(ladder: Ladder) -> Iterator[tuple[str, dict[str, Any]]]:
    """What more calls and a larger adapter bring together, and what they break."""
    rows: tuple[tuple[str, str, str, Side], ...] = (
        ("L-long-signs", "sign_read", "reads more signs than turbo", "above"),
        ("L-long-bodies", "whole_body", "has more whole bodies than turbo", "above"),
        ("L-long-fur", "fur_patches", "is further from real fur than turbo", "above"),
    )
    for id_, metric, said, side in rows:
        title = f"{METRICS[metric].title}, minus those of turbo"
        gap = _gap(ladder, metric, LONG, TURBO)
        yield TURBO, claim_row(id_, f"{LONGER} {said}", title, gap, side, 0.0)


def _larger(ladder: Ladder) -> Iterator[tuple[str, dict[str, Any]]]:
    """What a better teacher and far more phased consistency bring together."""
    rows: tuple[tuple[str, str, str, Side], ...] = (
        ("L-six-right", "all_right", "has more pictures all right than turbo trained longer",
         "above"),
        ("L-six-hues", "hue_kl", "keeps hues nearer to the truth than turbo trained longer",
         "below"),
    )  # fmt: skip
    for id_, metric, said, side in rows:
        title = f"{METRICS[metric].title}, minus those of {TITLES[LONG]}"
        gap = _gap(ladder, metric, SIX, LONG)
        yield LONG, claim_row(id_, f"{LARGER} {said}", title, gap, side, 0.0)


def bars(
    lab: Lab, teacher: Samples, *, seeds: int = TRAININGS
) -> Iterator[tuple[str, Interval, Literal["at least", "at most"], float]]:
    """Name, value with its interval, and the limit of each bar of the turbo student.

    It is the student of six blocks; those of the ladder are there to be compared. Bars that are
    relative to the teacher are differences from it on the same captions and noise.

    Args:
        lab: with its teacher.
        teacher: its samples for the captions.
        seeds: trainings of the student.
    """
    scenes, real = teacher.scenes, reference(4096)
    drawn = draw_students(lab, [(SIX, STEPS, k) for k in range(seeds)], captions=len(scenes))
    ours = [find(one.images, scenes, real) for one in drawn.samples.values()]
    theirs = [find(teacher.images, scenes, real)]
    yield "turbo.signs_read", interval(ours, "sign_read"), "at least", 0.97
    bodies = difference(ours, theirs, "whole_body")
    yield "turbo.whole_body_minus_teacher", bodies, "at least", -0.05
    yield "turbo.hue_kl", interval(ours, "hue_kl"), "at most", 0.10
    chroma = difference(ours, [looser(theirs[0])], "chroma_w1")
    yield "turbo.chroma_w1_minus_1.5_teacher", chroma, "at most", 0.0
    for ground in TEXTURES:
        gap = difference(ours, theirs, f"{ground}_patches")
        yield f"turbo.{ground}_patches_minus_teacher", gap, "at most", 0.0
