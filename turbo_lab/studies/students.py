"""Samples of many students, for the same captions from the same noise."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from turbo_lab.lab import Lab, Samples, Student
from turbo_lab.progress import progress
from turbo_lab.recipes import FAMILIES, Profile

Key = tuple[str, int, int]
"""Family, steps and seed of the training."""


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Students and their samples, by key."""

    students: dict[Key, Student] = field(default_factory=dict)
    samples: dict[Key, Samples] = field(default_factory=dict)

    @property
    def keys(self) -> tuple[str, ...]:
        """Artefact keys of the students and of their samples."""
        trained = sorted({s.artefact.key for s in self.students.values()})
        return (*trained, *(s.key for s in self.samples.values()))


def draw_students(
    lab: Lab,
    wanted: Iterable[Key],
    *,
    captions: int,
    noises: int = 1,
    seed: int = 0,
    profile: Profile = "quick",
) -> Drawn:
    """Sample students at the steps and times they were trained for.

    Args:
        lab: with the teacher.
        wanted: which students.
        captions: how many.
        noises: samples of each caption.
        seed: of the noise.
        profile: of the students' trainings.
    """
    drawn, keys = Drawn(), list(wanted)
    with progress(len(keys), "students") as tick:
        for done, (family, steps, k) in enumerate(keys, start=1):
            student = lab.student(family, steps=steps, seed=k, profile=profile)
            name = f"{FAMILIES[family].title}, {steps} steps, seed {k}"
            sampling = student.sampling(n=captions * noises, noises=noises, seed=seed)
            drawn.students[family, steps, k] = student
            drawn.samples[family, steps, k] = lab.samples(sampling, name, student)
            tick(done, name)
    return drawn
