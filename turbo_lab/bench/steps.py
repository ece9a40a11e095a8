"""The methods at work: one-stage recipes, and trainings that take one step when they are told."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from torch import nn

from turbo_lab.adapters import Worn
from turbo_lab.atomic import save_tensors
from turbo_lab.bench.passes import Pass, counted_passes
from turbo_lab.errors import BadInput
from turbo_lab.fit import Batch, Objective, Record, Shadow, fit
from turbo_lab.recipes import RECIPES, Rates, Recipe, Stage, resolve, turbo
from turbo_lab.store import Store
from turbo_lab.streams import Draw
from turbo_lab.testbeds.postcards import LATENT_SHAPE, spawn_net, train_batch
from turbo_lab.training import workbench

UNIT = "flow"
"""The step that all others are compared with: flow matching of an adapter."""
BATCH_SIZE = 16
ENDLESS = 10**6
"""Steps that `fit` is promised; it is stopped long before."""


def cases(only: str = "", *, batch_size: int = BATCH_SIZE) -> tuple[Recipe, ...]:
    """One-stage recipes: flow matching of an adapter, then every kind of stage of every student.

    Args:
        only: beginning of names; flow matching stays, as the unit. A recipe that varies another,
            as dmd2-2-kl does dmd2-2, costs the same or nearly: it is measured where ``only`` says
            more than the name of that other.
        batch_size: samples of a turn, 1 to 1024.

    Raises:
        BadInput: no name begins like this, or the batch size is out of range.
    """
    if not 1 <= batch_size <= 1024:
        raise BadInput("batch_size", batch_size, "use an integer from 1 to 1024")
    # The ladder's stages are those of others, only longer.
    names = [name for name in RECIPES if name not in turbo.RECIPES]
    students = [r for r in map(resolve, names) if r.teacher is not None]
    rates = {"student": Rates(lr=1e-3, warmup=20)}
    unit = Stage(method="flow", steps=1, batch_size=batch_size, rates=rates, ema=0.99)
    found = [students[0].model_copy(update={"name": UNIT, "stages": (unit,)})]
    found += [case for student in students for case in _kinds(student, batch_size)]
    known = {case.name for case in found}
    kept = [
        case
        for case in found
        if case.name.startswith(only) and len(_varied(case.name, known)) < max(1, len(only))
    ]
    if not kept:
        choice = ", ".join(case.name for case in found)
        raise BadInput("only", only, f"begin one of {choice}")
    return (found[0], *(case for case in kept if case is not found[0]))


def _varied(name: str, names: Iterable[str]) -> str:
    """The name that another one goes on from; empty where there is none."""
    return max((n for n in names if name.startswith(f"{n}-")), key=len, default="")


def _kinds(recipe: Recipe, batch_size: int) -> Iterator[Recipe]:
    """The first stage of every method and teacher in a recipe, each as a recipe of its own."""
    first: dict[tuple[str, str | None], Stage] = {}
    for stage in recipe.stages:
        first.setdefault((stage.method, stage.teacher), stage)
    for (method, teacher), stage in first.items():
        parts = (recipe.name, method, teacher or "") if len(first) > 1 else (recipe.name,)
        name = ".".join(dict.fromkeys(filter(None, parts)))
        stage = stage.model_copy(update={"batch_size": batch_size})
        yield recipe.model_copy(update={"name": name, "stages": (stage,)})


@dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """A training that stands still between calls; a call plays ``rounds`` rounds of it.

    Args:
        records: of `fit`.
        objective: the method.
        networks: those that are passed through, teachers too.
        batch_size: samples of a turn.
    """

    records: Generator[Record]
    objective: Objective
    networks: tuple[nn.Module, ...]
    batch_size: int

    @property
    def rounds(self) -> int:
        """The fewest after which every turn was played."""
        return math.lcm(*(turn.every for turn in self.objective.turns()))

    def __call__(self) -> Mapping[Pass, float]:
        """Take one step, every turn of the method at least once; return its passes per sample."""
        with counted_passes(self.batch_size, self.networks) as tally:
            for _ in range(self.rounds):
                next(self.records)
        return tally

    def close(self) -> None:
        """End the training; trainings end in the opposite order of their beginnings.

        Each keeps the signal handlers it found, and puts them back.
        """
        self.records.close()


def at_work(case: Recipe, store: Store, batch: Batch, device: str) -> Step:
    """Begin the training of a one-stage recipe, as `fit` does it, on one batch again and again."""
    (stage,) = case.stages
    bench = workbench(case, store, device)
    assert isinstance(bench.student, Worn)
    shadow = Shadow(of="student", average=bench.average, decay=stage.ema)
    network = bench.student.host.net
    return begun(case, bench.objective(stage), batch, networks=(network,), shadows=(shadow,))


def begun(
    case: Recipe,
    objective: Objective,
    batch: Batch,
    *,
    networks: tuple[nn.Module, ...],
    shadows: tuple[Shadow, ...] = (),
) -> Step:
    """Begin the training of the method of a one-stage recipe."""
    (stage,) = case.stages
    records = fit(
        objective,
        lambda draw: batch,
        steps=ENDLESS,
        batch_size=stage.batch_size,
        seed=case.seed,
        optimisers={name: rates.optimiser() for name, rates in stage.rates.items()},
        shadows=shadows,
    )
    return Step(
        records=cast("Generator[Record]", records),
        objective=objective,
        networks=networks,
        batch_size=stage.batch_size,
    )


def example(case: Recipe, device: str) -> Batch:
    """Postcards and noise: the batch of every step."""
    draw = Draw(seed=0, step=0, total=case.stages[0].batch_size, stream="bench")
    x, c, _ = train_batch(draw, seed=0, device=device)
    return Batch(x, c, draw.normal("z", LATENT_SHAPE).to(device))


def planted(folder: Path, case: Recipe) -> Store:
    """A store whose only artefact is the teacher of a recipe, with random weights."""
    assert case.teacher is not None

    def write(place: Path) -> None:
        save_tensors(place, "weights.safetensors", weights)

    weights = {k: v.half() for k, v in spawn_net(case.teacher.net, 0).state_dict().items()}
    store = Store(cache=folder)
    store.get_or_make(case.teacher.artefact, case.teacher.spec(), write)
    return store
