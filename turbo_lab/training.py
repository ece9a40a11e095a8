"""From a recipe to an artefact: train, keep history and replay trace, and replay them later."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from turbo_lab.atomic import atomic_write_text, save_tensors
from turbo_lab.checkpoints import Checkpoints
from turbo_lab.cpu import tune_allocator
from turbo_lab.errors import MissingPiece
from turbo_lab.fit import Record, Saving, Shadow, fit
from turbo_lab.history import TrainingHistory
from turbo_lab.recipes import Recipe
from turbo_lab.stages import check_stages, rivals_of
from turbo_lab.store import Artefact, Store
from turbo_lab.streams import seed_for
from turbo_lab.workbench import (
    PAIRS,
    RIVAL_FILE,
    Workbench,
    draw_all_pairs,
    floats,
    load_net,
    workbench,
)

__all__ = [
    "PAIRS",
    "RIVAL_FILE",
    "TRACE_STEPS",
    "Trace",
    "Watch",
    "Workbench",
    "history",
    "load_net",
    "recorded",
    "replay",
    "trained",
    "workbench",
]

SAVE_SECONDS = 60.0
"""Seconds between two checkpoints: what a kill can cost."""
TRACE_STEPS = 3
"""Steps recorded by each half of a replay trace."""

Watch = Callable[[Record, int], None]
"""Called after each step with its record and the number of steps done, all stages counted."""


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Losses of the first steps from the seed, and of a few steps from the finished weights."""

    first: tuple[float, ...]
    last: tuple[float, ...]


def trained(
    recipe: Recipe,
    *,
    store: Store | None = None,
    fresh: bool = False,
    device: str = "cpu",
    watch: Watch | None = None,
) -> Artefact:
    """Return the artefact of a recipe: from the cache, else shipped, else trained now.

    Each stage is an artefact of its own and starts from the averaged weights of the one before.
    A killed training continues from its last checkpoint; two processes asking at once train once.

    Raises:
        BadInput: a stage asks for what it has not been given, see `turbo_lab.stages`.
    """
    check_stages(recipe)
    store, watch = store or Store.default(), watch or _unwatched
    if not fresh and (found := store.find(recipe.artefact, recipe.spec())):
        return found  # without asking for the stages before it
    if recipe.teacher is not None:
        trained(recipe.teacher, store=store, device=device, watch=watch)  # fresh is for students
    if recipe.before is not None:
        trained(recipe.before, store=store, fresh=fresh, device=device, watch=watch)
    make = partial(_make, recipe, store, device, watch)
    return store.get_or_make(recipe.artefact, recipe.spec(), make, fresh=fresh)


def replay(recipe: Recipe, artefact: Artefact, store: Store) -> Trace:
    """Run today's code for the steps that the artefact's trace recorded.

    What is shipped may have been left without the stage before it, or without its rivals: the half
    of the trace that cannot be run without them is empty then.

    Raises:
        MissingPiece: neither half can be run.
    """
    stage, before = recipe.stages[-1], recipe.before
    started = before is None or store.find(before.artefact, before.spec()) is not None
    ended = not rivals_of(stage) or artefact.has(RIVAL_FILE)
    if not started and (not ended or stage.teacher == "before"):
        raise MissingPiece(f"{recipe.artefact} was kept without what a replay starts from.")
    weights = floats(artefact.tensors())
    return Trace(
        first=_losses(recipe, workbench(recipe, store)) if started else (),
        last=_last_losses(recipe, store, weights, _rival_weights(recipe, artefact), started)
        if ended
        else (),
    )


def recorded(artefact: Artefact) -> Trace:
    """The trace that was recorded when the artefact was made."""
    trace = artefact.json("trace.json")
    return Trace(first=tuple(trace["first"]), last=tuple(trace["last"]))


def history(artefact: Artefact) -> list[dict[str, Any]]:
    """The training history through all stages: one record per `HISTORY_EVERY` steps."""
    lines = artefact.file("history.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _rival_weights(recipe: Recipe, artefact: Artefact) -> dict[str, Tensor]:
    """Weights of the rivals as they were when the student was finished, ``name/key``."""
    return floats(artefact.tensors(RIVAL_FILE)) if rivals_of(recipe.stages[-1]) else {}


def _make(recipe: Recipe, store: Store, device: str, watch: Watch, folder: Path) -> None:
    tune_allocator()
    stage = recipe.stages[-1]
    draw_all_pairs(recipe, store, device)
    earlier = recipe.steps_before
    work = store.workdir(recipe.artefact, recipe.spec())
    bench = workbench(recipe, store, device)
    lines = TrainingHistory(work / "history.jsonl", stage=recipe.depth)
    saving = Saving(checkpoints=Checkpoints(folder=work), every_seconds=SAVE_SECONDS)
    shadow = Shadow(of="student", average=bench.average, decay=stage.ema)
    for record in _fit(recipe, bench, (shadow,), saving):
        lines.add(record, last=record.step == stage.steps)
        watch(record, earlier + record.step)
    # Half precision holds an averaged weight to 3 digits more than its own training noise.
    weights = {k: v.detach().cpu().half() for k, v in bench.average.state_dict().items()}
    save_tensors(folder, "weights.safetensors", weights)
    rivals = {
        f"{name}/{k}": v.detach().cpu().half()
        for name, rival in bench.rivals.items()
        for k, v in rival.state_dict().items()
    }
    if rivals:
        save_tensors(folder, RIVAL_FILE, rivals)
    trace = Trace(
        first=_losses(recipe, workbench(recipe, store)),
        last=_last_losses(recipe, store, floats(weights), floats(rivals), True),
    )
    atomic_write_text(folder / "trace.json", json.dumps(dataclasses.asdict(trace)))
    atomic_write_text(folder / "history.jsonl", _earlier_history(recipe, store) + lines.text())


def _fit(
    recipe: Recipe,
    bench: Workbench,
    shadows: Sequence[Shadow] = (),
    saving: Saving | None = None,
) -> Iterator[Record]:
    stage = recipe.stages[-1]
    return fit(
        bench.objective(stage),
        bench.batches,
        steps=stage.steps,
        batch_size=stage.batch_size,
        seed=_stage_seed(recipe),
        optimisers={name: rates.optimiser() for name, rates in stage.rates.items()},
        shadows=shadows,
        saving=saving,
    )


def _stage_seed(recipe: Recipe) -> int:
    """Every stage draws other noise; the first draws that of the recipe's own seed."""
    stage = recipe.depth - 1
    return seed_for(recipe.seed, "stage", stage) if stage else recipe.seed


def _last_losses(
    recipe: Recipe,
    store: Store,
    weights: Mapping[str, Tensor],
    rivals: Mapping[str, Tensor],
    started: bool,
) -> tuple[float, ...]:
    """Losses of a few steps from given weights, on the CPU.

    Args:
        recipe: whose last stage it is.
        store: where the teacher is.
        weights: of the student.
        rivals: of those that learn beside it, ``name/key``.
        started: whether the stage before is in the store.
    """
    bench = workbench(recipe, store, weights=None if started else weights)
    bench.student.load_state_dict(weights)
    for name, rival in bench.rivals.items():
        own = {k.removeprefix(f"{name}/"): v for k, v in rivals.items() if k.startswith(f"{name}/")}
        rival.load_state_dict(own)
    return _losses(recipe, bench)


def _losses(recipe: Recipe, bench: Workbench) -> tuple[float, ...]:
    records = islice(_fit(recipe, bench), TRACE_STEPS)
    return tuple(sum(record.terms.values()) for record in records)


def _unwatched(record: Record, done: int) -> None:
    """Watch nothing."""


def _earlier_history(recipe: Recipe, store: Store) -> str:
    """history.jsonl of the stages before the last, which travels with each stage."""
    found = recipe.before and store.find(recipe.before.artefact, recipe.before.spec())
    return found.file("history.jsonl").read_text(encoding="utf-8") if found else ""
