"""The cases of the benchmark on networks of one head, and trainings that are begun and closed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from turbo_lab.bench.passes import Pass
from turbo_lab.bench.steps import Step, at_work, cases, example
from turbo_lab.recipes import Recipe
from turbo_lab.store import Store
from turbo_lab.testbeds.postcards import NetSize

SMALL = NetSize(layers=1, heads=1, head_width=16, text_width=16)
BARE, WORN = Pass("forward", False), Pass("forward", True)
GRADIENT, TANGENT = Pass("gradient", True), Pass("tangent", True)


def tiny(case: Recipe, **options: float | int | str) -> Recipe:
    """The same recipe on a network of one head, with other options of its method."""
    assert case.teacher is not None
    (stage,) = case.stages
    stage = stage.model_copy(update={"options": {**stage.options, **options}})
    teacher = case.teacher.model_copy(update={"net": SMALL})
    return case.model_copy(update={"net": SMALL, "teacher": teacher, "stages": (stage,)})


CASES = {case.name: tiny(case) for case in cases(batch_size=2)}


@contextmanager
def trainings(store: Store) -> Iterator[Callable[[Recipe], Step]]:
    """Begin trainings; at the end they are closed, the last one first."""
    steps: list[Step] = []

    def begin(case: Recipe) -> Step:
        steps.append(at_work(case, store, example(case, "cpu"), "cpu"))
        return steps[-1]

    yield begin
    for step in reversed(steps):
        step.close()
