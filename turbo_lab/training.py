"""From a recipe to an artefact: train, keep history and replay trace, and replay them later."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from torch import nn

from turbo_lab.atomic import atomic_write_text, save_tensors
from turbo_lab.cpu import tune_allocator
from turbo_lab.errors import MissingPiece
from turbo_lab.fit import Objective, Record, Saving, Shadow, fit
from turbo_lab.methods import METHODS
from turbo_lab.postcards.captions import null_tokens
from turbo_lab.recipes import Recipe, Stage
from turbo_lab.store import Artefact, Checkpoints, Store
from turbo_lab.streams import seed_for
from turbo_lab.testbeds.postcards import PostcardNet, spawn_net, train_batch

HISTORY_EVERY = 20
"""Steps per line of history.jsonl (a line is the mean over them)."""
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
    """
    store, watch = store or Store.default(), watch or _unwatched
    if not fresh and (found := store.find(recipe.artefact, recipe.spec())):
        return found  # without asking for the stages before it
    if recipe.before is not None:
        trained(recipe.before, store=store, fresh=fresh, device=device, watch=watch)
    make = partial(_make, recipe, store, device, watch)
    return store.get_or_make(recipe.artefact, recipe.spec(), make, fresh=fresh)


def starting_net(recipe: Recipe, store: Store) -> PostcardNet:
    """Build the network that the last stage of a recipe starts from.

    Raises:
        MissingPiece: the stage before it is not in the store.
    """
    if recipe.before is None:
        return spawn_net(recipe.net, recipe.seed)
    found = store.find(recipe.artefact, recipe.before.spec())
    if found is None:
        raise MissingPiece(
            f"{recipe.artefact} starts from a stage that is not in the store; "
            f"run turbo-lab train {recipe.name} --fresh."
        )
    return load_net(recipe.before, found).train().requires_grad_(True)


def load_net(recipe: Recipe, artefact: Artefact) -> PostcardNet:
    """Build the network of a recipe with the weights of an artefact, frozen, in eval mode."""
    net = spawn_net(recipe.net, recipe.seed)
    net.load_state_dict({k: v.float() for k, v in artefact.tensors().items()})
    return net.eval().requires_grad_(False)


def replay(recipe: Recipe, artefact: Artefact, store: Store) -> Trace:
    """Run today's code for the steps that the artefact's trace recorded."""
    start, finished = starting_net(recipe, store), load_net(recipe, artefact)
    return Trace(first=_losses(recipe, start), last=_losses(recipe, finished))


def recorded(artefact: Artefact) -> Trace:
    """The trace that was recorded when the artefact was made."""
    trace = artefact.json("trace.json")
    return Trace(first=tuple(trace["first"]), last=tuple(trace["last"]))


def history(artefact: Artefact) -> list[dict[str, Any]]:
    """The training history through all stages: one record per `HISTORY_EVERY` steps."""
    lines = artefact.file("history.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _make(recipe: Recipe, store: Store, device: str, watch: Watch, folder: Path) -> None:
    tune_allocator()
    stage = recipe.stages[-1]
    earlier = sum(s.steps for s in recipe.stages[:-1])
    work = store.workdir(recipe.artefact, recipe.spec())
    net = starting_net(recipe, store).to(device)
    average = copy.deepcopy(net).requires_grad_(False)
    lines = _History(work / "history.jsonl", stage=len(recipe.stages))
    saving = Saving(checkpoints=Checkpoints(folder=work), every_seconds=SAVE_SECONDS)
    for record in _fit(recipe, net, average, saving):
        lines.add(record, last=record.step == stage.steps)
        watch(record, earlier + record.step)
    # Half precision holds an averaged weight to 3 digits more than its own training noise.
    weights = {k: v.detach().cpu().half() for k, v in average.state_dict().items()}
    save_tensors(folder, "weights.safetensors", weights)
    finished = spawn_net(recipe.net, recipe.seed)
    finished.load_state_dict({k: v.float() for k, v in weights.items()})
    trace = {
        "first": _losses(recipe, starting_net(recipe, store)),
        "last": _losses(recipe, finished),
    }
    atomic_write_text(folder / "trace.json", json.dumps(trace))
    atomic_write_text(folder / "history.jsonl", _earlier_history(recipe, store) + lines.text())


def objective_of(stage: Stage, net: nn.Module) -> Objective:
    """Build the method of a stage around a network."""
    return METHODS[stage.method](student=net, null=null_tokens(1), **stage.options)  # type: ignore[arg-type]


def _fit(
    recipe: Recipe,
    net: PostcardNet,
    average: PostcardNet | None = None,
    saving: Saving | None = None,
) -> Iterator[Record]:
    stage = recipe.stages[-1]
    seen = sum(s.steps * s.batch_size for s in recipe.stages[:-1])
    shadows = (Shadow(of="student", average=average, decay=stage.ema),) if average else ()
    device = next(net.parameters()).device
    return fit(
        objective_of(stage, net.train()),
        partial(
            train_batch,
            seed=recipe.seed,
            skip=seen,
            sign_grid=stage.sign_grid,
            posters=stage.posters,
            device=device,
        ),
        steps=stage.steps,
        batch_size=stage.batch_size,
        seed=_stage_seed(recipe),
        optimisers={name: rates.optimiser() for name, rates in stage.rates.items()},
        shadows=shadows,
        saving=saving,
    )


def _stage_seed(recipe: Recipe) -> int:
    """Every stage draws other noise; the first draws that of the recipe's own seed."""
    stage = len(recipe.stages) - 1
    return seed_for(recipe.seed, "stage", stage) if stage else recipe.seed


def _losses(recipe: Recipe, net: PostcardNet) -> tuple[float, ...]:
    records = islice(_fit(recipe, net), TRACE_STEPS)
    return tuple(sum(record.terms.values()) for record in records)


def _unwatched(record: Record, done: int) -> None:
    """Watch nothing."""


def _earlier_history(recipe: Recipe, store: Store) -> str:
    """history.jsonl of the stages before the last, which travels with each stage."""
    found = recipe.before and store.find(recipe.artefact, recipe.before.spec())
    return found.file("history.jsonl").read_text(encoding="utf-8") if found else ""


class _History:
    """history.jsonl in the work folder: appended while training, cut back on resume."""

    def __init__(self, path: Path, stage: int) -> None:
        self.path, self.stage = path, stage
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        self.kept: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines()]
        self.open: list[Record] = []

    def add(self, record: Record, *, last: bool) -> None:
        # Lines from beyond the checkpoint that this run resumed from are being made again.
        self.kept = [line for line in self.kept if line["step"] < record.step]
        self.open.append(record)
        if record.step % HISTORY_EVERY == 0 or last:
            self.kept.append({"stage": self.stage, **_mean(self.open)})
            self.open = []
            atomic_write_text(self.path, self.text())

    def text(self) -> str:
        return "".join(json.dumps(line) + "\n" for line in self.kept)


def _mean(records: list[Record]) -> dict[str, Any]:
    def mean(of: Callable[[Record], Any]) -> dict[str, float]:
        names = {name for record in records for name in of(record)}
        got = {name: [of(r)[name] for r in records if name in of(r)] for name in sorted(names)}
        return {name: round(sum(values) / len(values), 6) for name, values in got.items()}

    seconds = round(sum(r.seconds for r in records) / len(records), 4)
    return {
        "step": records[-1].step,
        "terms": mean(lambda r: r.terms),
        "norms": mean(lambda r: r.norms),
        "seconds": seconds,
    }
