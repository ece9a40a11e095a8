"""From the recipe of the mini-DINO to its artefact, and the replay that keeps it honest."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from turbo_lab.atomic import atomic_write_text, save_tensors
from turbo_lab.cpu import tune_allocator
from turbo_lab.dino.distil import Dino, Teacher, spawn_pupil
from turbo_lab.dino.net import load_vit
from turbo_lab.dino.recipe import DinoRecipe
from turbo_lab.fit import Batch, Record, Saving, fit
from turbo_lab.history import TrainingHistory
from turbo_lab.postcards import draw_scenes, render
from turbo_lab.progress import progress
from turbo_lab.store import Artefact, Checkpoints, Store
from turbo_lab.streams import Draw

HEAD_FILE = "head.safetensors"
"""The teacher's head: no features, but what the replay starts from."""
SAVE_SECONDS = 60.0
"""Seconds between two checkpoints: what a kill can cost."""
TRACE_STEPS = 3
"""Steps recorded by each half of a replay trace."""

Watch = Callable[[Record], None]
"""Called after each step with its record."""


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Losses of the first steps from the seed, and of a few steps from the finished weights."""

    first: tuple[float, ...]
    last: tuple[float, ...]


def trained(
    recipe: DinoRecipe,
    *,
    store: Store | None = None,
    fresh: bool = False,
    device: str = "cpu",
    watch: Watch | None = None,
) -> Artefact:
    """Return the artefact of a recipe: from the cache, else shipped, else trained now.

    A killed training continues from its last checkpoint.
    """
    store = store or Store.default()
    make = partial(_make, recipe, store, device, watch or _unwatched)
    return store.get_or_make(recipe.artefact, recipe.spec(), make, fresh=fresh)


def trained_with_progress(
    recipe: DinoRecipe, *, store: Store | None = None, fresh: bool = False, device: str = "cpu"
) -> Artefact:
    """`trained`, with a progress bar."""
    with progress(recipe.steps, f"training {recipe.name}", delay=1) as tick:

        def watch(record: Record) -> None:
            tick(record.step, f"loss {sum(record.terms.values()):.3f}")

        return trained(recipe, store=store, fresh=fresh, device=device, watch=watch)


def backbone(recipe: DinoRecipe, artefact: Artefact) -> Any:
    """Build the backbone of a recipe with the teacher's weights."""
    return load_vit(recipe.vit, artefact.tensors())


def finished(recipe: DinoRecipe, artefact: Artefact) -> Dino:
    """The game as it stands at the end, both players with the teacher's weights."""
    parts = {"vit": artefact.tensors(), "head": artefact.tensors(HEAD_FILE)}
    kept = {f"{name}.{k}": v for name, tensors in parts.items() for k, v in tensors.items()}
    return _resumed(recipe, kept)


def replay(recipe: DinoRecipe, artefact: Artefact) -> Trace:
    """Run today's code, on the CPU, for the steps that the artefact's trace recorded."""
    return _trace(recipe, finished(recipe, artefact))


def recorded(artefact: Artefact) -> Trace:
    """The trace that was recorded when the artefact was made."""
    trace = artefact.json("trace.json")
    return Trace(first=tuple(trace["first"]), last=tuple(trace["last"]))


def real_batch(draw: Draw, *, seed: int, device: str = "cpu") -> Batch:
    """Pictures ``[rows, 3, 32, 32]`` of the train stream for a draw; nothing comes twice."""
    first = draw.step * draw.total
    stop = draw.total if draw.stop is None else draw.stop
    scenes = draw_scenes("train", range(first + draw.start, first + stop), seed=seed)
    return Batch(render(scenes).to(device), None)


def game(recipe: DinoRecipe, device: str = "cpu") -> Dino:
    """Set up student and teacher at the beginning."""
    student = spawn_pupil(recipe.vit, recipe.head, recipe.seed).to(device)
    return Dino(
        student=student,
        teacher=Teacher(student).to(device),
        crops=recipe.crops,
        steps=recipe.steps,
        student_temperature=recipe.student_temperature,
        teacher_temperature=recipe.teacher_temperature,
        momentum=recipe.momentum,
        patches=recipe.patches,
    )


def _make(recipe: DinoRecipe, store: Store, device: str, watch: Watch, folder: Path) -> None:
    tune_allocator()
    work = store.workdir(recipe.artefact, recipe.spec())
    dino = game(recipe, device)
    lines = TrainingHistory(work / "history.jsonl", stage=1)
    saving = Saving(checkpoints=Checkpoints(folder=work), every_seconds=SAVE_SECONDS)
    for record in _fit(recipe, dino, device, saving):
        lines.add(record, last=record.step == recipe.steps)
        watch(record)
    kept = {k: v.cpu().half() for k, v in dino.teacher.pupil.state_dict().items()}
    save_tensors(folder, "weights.safetensors", _part(kept, "vit"))
    save_tensors(folder, HEAD_FILE, _part(kept, "head"))
    trace = _trace(recipe, _resumed(recipe, kept))
    atomic_write_text(folder / "trace.json", json.dumps(dataclasses.asdict(trace)))
    atomic_write_text(folder / "history.jsonl", lines.text())


def _resumed(recipe: DinoRecipe, kept: Mapping[str, Tensor]) -> Dino:
    """The game with these weights for both players, at the end of the training."""
    dino = game(recipe)
    for pupil in (dino.student, dino.teacher.pupil):
        pupil.load_state_dict({name: value.float() for name, value in kept.items()})
    dino.teacher.age.fill_(recipe.steps)
    return dino


def _fit(
    recipe: DinoRecipe, dino: Dino, device: str = "cpu", saving: Saving | None = None
) -> Iterator[Record]:
    return fit(
        dino,
        partial(real_batch, seed=recipe.seed, device=device),
        steps=recipe.steps,
        batch_size=recipe.batch_size,
        seed=recipe.seed,
        optimisers={"student": recipe.rates.optimiser()},
        saving=saving,
    )


def _trace(recipe: DinoRecipe, end: Dino) -> Trace:
    """Losses of the first steps, and of as many from the end, on the CPU."""
    return Trace(first=_losses(recipe, game(recipe)), last=_losses(recipe, end))


def _losses(recipe: DinoRecipe, dino: Dino) -> tuple[float, ...]:
    records = islice(_fit(recipe, dino), TRACE_STEPS)
    return tuple(sum(record.terms.values()) for record in records)


def _part(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors under ``name.``, without it."""
    dotted = f"{name}."
    return {k.removeprefix(dotted): v for k, v in tensors.items() if k.startswith(dotted)}


def _unwatched(record: Record) -> None:
    """Watch nothing."""
