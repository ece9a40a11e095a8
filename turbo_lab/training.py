"""From a recipe to an artefact: train, keep history and replay trace, and replay them later."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from turbo_lab.adapters import Host
from turbo_lab.atomic import atomic_write_text, save_tensors
from turbo_lab.cpu import tune_allocator
from turbo_lab.critic import spawn_critic
from turbo_lab.errors import BadInput, MissingPiece
from turbo_lab.field import Field, frozen, guided
from turbo_lab.fit import Batch, Objective, Player, Record, Saving, Shadow, fit
from turbo_lab.history import TrainingHistory
from turbo_lab.keys import key_of
from turbo_lab.methods import METHODS
from turbo_lab.methods.divergences import divergence_named, needs_ratio
from turbo_lab.methods.kinds import TrainableField
from turbo_lab.postcards.captions import TOKENS, VOCABULARY, null_tokens
from turbo_lab.progress import progress
from turbo_lab.recipes import Recipe, Stage
from turbo_lab.store import Artefact, Checkpoints, Store
from turbo_lab.streams import Draw, seed_for
from turbo_lab.testbeds.postcards import (
    LATENT_CHANNELS,
    PairSource,
    PostcardNet,
    pair_batch,
    spawn_net,
    train_batch,
)

PAIRS = "postcards/pairs"
RIVAL_FILE = "rivals.safetensors"
_DRAWN: dict[tuple[str, str], dict[int, Tensor]] = {}
"""Pairs of this process by key and device: the replays of several students share them."""
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
        BadInput: a stage needs the ratio of densities and has nothing to learn it from.
    """
    for stage in recipe.stages:
        _check_ratio(stage)
    store, watch = store or Store.default(), watch or _unwatched
    if not fresh and (found := store.find(recipe.artefact, recipe.spec())):
        return found  # without asking for the stages before it
    if recipe.teacher is not None:
        trained(recipe.teacher, store=store, device=device, watch=watch)  # fresh is for students
    if recipe.before is not None:
        trained(recipe.before, store=store, fresh=fresh, device=device, watch=watch)
    make = partial(_make, recipe, store, device, watch)
    return store.get_or_make(recipe.artefact, recipe.spec(), make, fresh=fresh)


def load_net(recipe: Recipe, artefact: Artefact) -> PostcardNet:
    """Build the network of a recipe with the weights of an artefact, frozen, in eval mode."""
    net = spawn_net(recipe.net, recipe.seed)
    net.load_state_dict(_floats(artefact))
    return net.eval().requires_grad_(False)


def replay(recipe: Recipe, artefact: Artefact, store: Store) -> Trace:
    """Run today's code for the steps that the artefact's trace recorded."""
    return _trace(recipe, store, _floats(artefact), _rival_weights(recipe, artefact))


def recorded(artefact: Artefact) -> Trace:
    """The trace that was recorded when the artefact was made."""
    trace = artefact.json("trace.json")
    return Trace(first=tuple(trace["first"]), last=tuple(trace["last"]))


def history(artefact: Artefact) -> list[dict[str, Any]]:
    """The training history through all stages: one record per `HISTORY_EVERY` steps."""
    lines = artefact.file("history.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


# --- the workbench ------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Workbench:
    """What a stage works with: the student, its average, and everything a method may ask for.

    ``pieces`` go by the names of the methods' fields: student, average, teacher, plain, null, and
    the rivals, which learn along with the student: fake, and critic where a ratio is needed.
    """

    student: TrainableField
    average: TrainableField
    pieces: Mapping[str, object]
    batches: Callable[[Draw], Batch]
    rivals: Mapping[str, Player] = dataclasses.field(default_factory=dict)

    def objective(self, stage: Stage) -> Objective:
        """Build the method of a stage from the pieces it has fields for."""
        kind = METHODS[stage.method]
        wanted = _fields_of(stage) & self.pieces.keys()
        return kind(**{name: self.pieces[name] for name in wanted}, **stage.options)


RIVALS = ("fake",)
"""Players that start as the teacher and learn along with the student."""

CRITIC = "critic"
"""The player that learns the ratio of teacher to student, where the divergence of a stage needs it:
without it a stage is, to the bit, what it was before critics."""


def _fields_of(stage: Stage) -> set[str]:
    return {f.name for f in dataclasses.fields(METHODS[stage.method])}


def _asks_ratio(stage: Stage) -> bool:
    """Whether the divergence of a stage weighs samples by a ratio."""
    if CRITIC not in _fields_of(stage):
        return False
    name = str(stage.options.get("divergence", "rkl"))
    alpha = float(str(stage.options.get("alpha", 0.0)))
    divergence_named(name, alpha)
    return needs_ratio(name, alpha)


def _check_ratio(stage: Stage) -> None:
    """A critic tells samples of the teacher from the student's: it needs them, and a rate."""
    if not _asks_ratio(stage):
        return
    needs = f"divergence={stage.options['divergence']!r} needs"
    if stage.pairs is None:
        raise BadInput("pairs", None, f"{needs} samples of the teacher for its critic")
    if CRITIC not in stage.rates:
        raise BadInput("rates", sorted(stage.rates), f"{needs} one for player {CRITIC!r} too")


def workbench(recipe: Recipe, store: Store, device: str = "cpu") -> Workbench:
    """Set up the last stage of a recipe, at its beginning.

    Raises:
        BadInput: the stage needs the ratio of densities and has nothing to learn it from.
        MissingPiece: the stage before it, or the teacher, is not in the store.
    """
    _check_ratio(recipe.stages[-1])
    return (_net_bench if recipe.teacher is None else _adapter_bench)(recipe, store, device)


def _net_bench(recipe: Recipe, store: Store, device: str) -> Workbench:
    """A whole network learns: from its seed, or from the stage before."""
    net = spawn_net(recipe.net, recipe.seed)
    if recipe.before is not None:
        net.load_state_dict(_floats(_found(recipe.before, store)))
    net = net.to(device).train()
    average = copy.deepcopy(net).requires_grad_(False)
    pieces = {"student": net, "null": null_tokens(1)}
    batches = _real(recipe, device)
    return Workbench(student=net, average=average, pieces=pieces, batches=batches)


def _adapter_bench(recipe: Recipe, store: Store, device: str) -> Workbench:
    """An adapter on the teacher's network learns; the bare network, or a copy, teaches it."""
    assert recipe.teacher is not None and recipe.adapter is not None
    stage = recipe.stages[-1]
    artefact = _found(recipe.teacher, store)
    host = Host(load_net(recipe.teacher, artefact).to(device), part="transformer")
    student = host.add("student", recipe.adapter, seed=recipe.seed)
    if recipe.before is not None:
        student.load_state_dict(_floats(_found(recipe.before, store)))
    average = host.copy(student, "average")
    plain = frozen(host.bare)
    guide = guided(plain, null_tokens(1), stage.guidance_scale or 1.0)
    wanted = sorted(_fields_of(stage).intersection(RIVALS))
    rivals: dict[str, Player] = {
        name: host.add(name, recipe.adapter, seed=recipe.seed) for name in wanted
    }
    if _asks_ratio(stage):
        table = {"vocabulary": VOCABULARY, "tokens": TOKENS}
        critic = spawn_critic(channels=LATENT_CHANNELS, seed=recipe.seed, **table)
        rivals[CRITIC] = critic.to(device)
    pieces: dict[str, object] = {
        "student": student,
        "average": average,
        "plain": plain,
        "null": null_tokens(1),
        **rivals,
    }
    if stage.teacher == "guided":
        pieces["teacher"] = guide
    elif stage.teacher == "before":
        pieces["teacher"] = frozen(host.copy(student, "before"))
    batches = _real(recipe, device)
    if stage.pairs is not None:
        batches = partial(pair_batch, _pair_source(recipe, stage, store, guide, device))
    return Workbench(
        student=student, average=average, pieces=pieces, batches=batches, rivals=rivals
    )


def _real(recipe: Recipe, device: str) -> Callable[[Draw], Batch]:
    """Postcards that no earlier stage has seen."""
    stage = recipe.stages[-1]
    return partial(
        train_batch,
        seed=recipe.seed if recipe.teacher is None else recipe.teacher.seed,
        skip=recipe.samples_seen - stage.steps * stage.batch_size,
        sign_grid=stage.sign_grid,
        posters=stage.posters,
        device=device,
    )


def _pair_source(
    recipe: Recipe, stage: Stage, store: Store, guide: Field, device: str
) -> PairSource:
    """Pairs of a stage, kept in the store once all of them have been drawn."""
    assert recipe.teacher is not None and stage.pairs is not None
    spec = _pair_spec(recipe, stage)
    source = PairSource(
        field=guide,
        n=stage.pairs.n,
        steps=stage.pairs.steps,
        seed=recipe.teacher.seed,
        device=device,
        known=_DRAWN.setdefault((key_of(spec), device), {}),
    )
    found = store.find(PAIRS, spec)
    if found is not None:
        source.known.update(_rows(found.tensors("pairs.safetensors")))
    return source


def _pair_spec(recipe: Recipe, stage: Stage) -> dict[str, object]:
    assert recipe.teacher is not None and stage.pairs is not None
    return {
        "teacher": recipe.teacher.spec(),
        "guidance_scale": stage.guidance_scale,
        **stage.pairs.model_dump(),
    }


def _draw_all_pairs(recipe: Recipe, store: Store, device: str) -> None:
    """Draw the pairs of the last stage once and keep them, so that every student shares them."""
    stage = recipe.stages[-1]

    def draw(folder: Path) -> None:
        bench = workbench(recipe, store, device)
        source: PairSource = bench.batches.args[0]  # type: ignore[attr-defined]
        with progress(source.n, f"{source.n} samples of the teacher") as tick:
            for first in range(0, source.n, 64):
                source.rows(range(first, min(first + 64, source.n)))
                tick(min(first + 64, source.n), "")
        samples = torch.stack([source.known[i] for i in range(source.n)])
        save_tensors(folder, "pairs.safetensors", {"x": samples})

    store.get_or_make(PAIRS, _pair_spec(recipe, stage), draw)


def _rows(tensors: Mapping[str, Tensor]) -> dict[int, Tensor]:
    return dict(enumerate(tensors["x"]))


def _found(recipe: Recipe, store: Store) -> Artefact:
    found = store.find(recipe.artefact, recipe.spec())
    if found is None:
        raise MissingPiece(
            f"{recipe.artefact} is needed as a start and is not in the store; "
            f"run turbo-lab train {recipe.name} --fresh."
        )
    return found


def _floats(artefact: Artefact) -> dict[str, Tensor]:
    return _as_floats(artefact.tensors())


def _rival_weights(recipe: Recipe, artefact: Artefact) -> dict[str, Tensor]:
    """Weights of the rivals as they were when the student was finished, ``name/key``."""
    has = _fields_of(recipe.stages[-1]).intersection(RIVALS)  # who has a critic has a fake
    return _as_floats(artefact.tensors(RIVAL_FILE)) if has else {}


def _as_floats(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.float() for k, v in tensors.items()}


# --- training -----------------------------------------------------------------------------------


def _make(recipe: Recipe, store: Store, device: str, watch: Watch, folder: Path) -> None:
    tune_allocator()
    stage = recipe.stages[-1]
    if stage.pairs is not None:
        _draw_all_pairs(recipe, store, device)
    earlier = sum(s.steps for s in recipe.stages[:-1])
    work = store.workdir(recipe.artefact, recipe.spec())
    bench = workbench(recipe, store, device)
    lines = TrainingHistory(work / "history.jsonl", stage=len(recipe.stages))
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
    trace = _trace(recipe, store, _as_floats(weights), _as_floats(rivals))
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
    stage = len(recipe.stages) - 1
    return seed_for(recipe.seed, "stage", stage) if stage else recipe.seed


def _trace(
    recipe: Recipe, store: Store, weights: Mapping[str, Tensor], rivals: Mapping[str, Tensor]
) -> Trace:
    """Losses of the first steps, and of as many from given weights, on the CPU."""
    first = _losses(recipe, workbench(recipe, store))
    bench = workbench(recipe, store)
    bench.student.load_state_dict(weights)
    for name, rival in bench.rivals.items():
        own = {k.removeprefix(f"{name}/"): v for k, v in rivals.items() if k.startswith(f"{name}/")}
        rival.load_state_dict(own)
    return Trace(first=first, last=_losses(recipe, bench))


def _losses(recipe: Recipe, bench: Workbench) -> tuple[float, ...]:
    records = islice(_fit(recipe, bench), TRACE_STEPS)
    return tuple(sum(record.terms.values()) for record in records)


def _unwatched(record: Record, done: int) -> None:
    """Watch nothing."""


def _earlier_history(recipe: Recipe, store: Store) -> str:
    """history.jsonl of the stages before the last, which travels with each stage."""
    found = recipe.before and store.find(recipe.artefact, recipe.before.spec())
    return found.file("history.jsonl").read_text(encoding="utf-8") if found else ""
