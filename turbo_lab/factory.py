"""Training on Qwen-Image: from a checked job to an artefact.

One frozen base is loaded once. Student, average and, where a method asks for them, the student of
the stage before and a fake are adapters on it; the teacher is the base with none.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from turbo_lab.atomic import atomic_write_text, save_tensors
from turbo_lab.checkpoints import Checkpoints
from turbo_lab.errors import MissingPiece
from turbo_lab.factory_data import image_supply, supplies_of
from turbo_lab.factory_memory import check_memory, check_parts
from turbo_lab.factory_plan import Job, gans, has_before, rivals
from turbo_lab.fit import Objective, Player, Record, Saving, Shadow, fit
from turbo_lab.gan_pieces import GanPieces
from turbo_lab.history import TrainingHistory
from turbo_lab.memory import free_memory
from turbo_lab.methods import METHODS
from turbo_lab.methods.by_shape import ByShape
from turbo_lab.methods.transition import spawn_latent_head
from turbo_lab.progress import VARIABLE, progress
from turbo_lab.qwen_gan import opened_eye, qwen_gan_pieces
from turbo_lab.qwen_storage import stored_with_error
from turbo_lab.ranks import ALONE, Ranks, joined
from turbo_lab.recipes.models import Option
from turbo_lab.recipes.qwen_image import QwenRecipe, QwenStage, options_at
from turbo_lab.recipes.qwen_models import QwenGan
from turbo_lab.store import Artefact, Store
from turbo_lab.streams import noise, seed_for
from turbo_lab.testbeds.qwen_buckets import Shape, Supply
from turbo_lab.testbeds.qwen_data import embedded
from turbo_lab.testbeds.qwen_files import load_vae
from turbo_lab.testbeds.qwen_image import QwenImage, open_testbed

FAKE, HEAD = "fake", "head"
RIVAL_FILE = "rivals.safetensors"
"""The fake score as it was when its student was finished, in case a stage goes on from it."""
PROBED = 2
"""Prompts that a base kept in fp8 is asked with, before and after."""
SAVE_SECONDS = 600.0
"""Seconds between two checkpoints; one of a rank-64 student with a fake has some 17 GB."""

Watch = Callable[[Record, int], None]
"""Called after each step with its record and the number of steps done, all stages counted."""


def trained(
    job: Job,
    *,
    store: Store | None = None,
    fresh: bool = False,
    watch: Watch | None = None,
    ranks: Ranks = ALONE,
) -> Artefact:
    """Return the artefact of a training: from the store, else trained now.

    Each stage is an artefact with ``weights.safetensors`` (the averaged adapter, float32, named as
    PEFT does), ``history.jsonl`` and ``recipe.json``; one with a fake score keeps that one too, in
    ``rivals.safetensors``. A killed run continues from its last checkpoint, bit for bit; so do its
    caches. ``fresh`` trains again, from the same caches. Of several processes (``ranks``), which
    have to see the same store, each trains on its rows of every batch, and the first alone writes.

    Raises:
        MissingPiece: weights are missing or damaged, or memory is short.
        NonFinite: a loss stopped being a number.
    """
    store, specs = store or Store.default(), job.specs()
    if ranks.agreed(not fresh and store.find(job.artefact, specs[-1]) is not None):
        return _written(store, job, specs[-1])
    check_memory(job, free_memory(job.device))
    check_parts(job)
    bench = cache(partial(_bench, job, store))
    made: Artefact | None = None
    for k, spec in enumerate(specs):
        train = partial(_train, job, k, store, bench, made, watch or _unwatched, ranks)
        if ranks.writes:
            store.get_or_make(job.artefact, spec, partial(_lead, ranks, train), fresh=fresh)
        _follow(ranks, train)
        made = _written(store, job, spec)
    assert made is not None
    return made


def _lead(ranks: Ranks, train: Callable[[Path | None], None], folder: Path) -> None:
    """Make the artefact, and have the other processes train along."""
    ranks.agreed(True)
    train(folder)


def _follow(ranks: Ranks, train: Callable[[Path | None], None]) -> None:
    """Train along, if there is something to train, until the first process has its artefact."""
    while ranks.agreed(False):
        train(None)


def _written(store: Store, job: Job, spec: Mapping[str, Any]) -> Artefact:
    found = store.find(job.artefact, spec)
    if found is None:
        raise MissingPiece(f"{job.artefact} is not in the store of every process: share one cache.")
    return found


def train_with_progress(
    job: Job, *, fresh: bool = False, store: Store | None = None
) -> Artefact | None:
    """`trained`, with progress shown, by all processes of a launcher; the first alone gets it."""
    ranks = joined(job.device)
    if not ranks.writes:
        os.environ[VARIABLE] = "off"
    total = sum(stage.steps for stage in job.recipe.stages)
    with progress(total, f"training {job.recipe.name}", delay=1) as tick:

        def watch(record: Record, done: int) -> None:
            tick(done, f"loss {sum(record.terms.values()):.3f}")

        artefact = trained(job, store=store, fresh=fresh, watch=watch, ranks=ranks)
    return artefact if ranks.writes else None


def _unwatched(record: Record, done: int) -> None:
    """Watch nothing."""


Critics = Callable[[QwenGan, int], GanPieces]
"""The GAN term of a stage, for its seed."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What the stages of a training share: the loaded testbed, its players and the data.

    Attributes:
        testbed: with everything worn on it.
        players: by name.
        supply: of the methods' batches.
        critics: of the stages that have one.
        shapes: of pictures, where batches have several.
        base_error: how far the base moved by being kept in fewer bytes.
    """

    testbed: QwenImage
    players: Mapping[str, Player]
    supply: Supply
    critics: Critics | None = None
    shapes: tuple[Shape, ...] = ()
    base_error: float | None = None

    def objective(self, stage: QwenStage, seed: int = 0) -> Objective:
        """Build the method of a stage from the pieces it has fields for, in a GAN term if asked.

        Where there are several shapes, each has a copy with the shift of its own.
        """
        around: Callable[[Objective], Objective] = _as_it_is
        if stage.gan is not None and self.critics is not None:
            around = self.critics(stage.gan, seed).around
        if not self.shapes:
            return around(self._method(stage, stage.options))
        size = self.testbed.size
        copies: dict[tuple[int, ...], Objective] = {
            shape.latent: around(self._method(stage, options_at(stage.options, size, shape.shift)))
            for shape in self.shapes
        }
        return ByShape(copies=copies)

    def _method(self, stage: QwenStage, options: Mapping[str, Option]) -> Objective:
        taught = {"guided": self.testbed.teacher, "before": self.players.get("before")}
        pieces: dict[str, Any] = {
            **{name: self.players[name] for name in self.players if name != "before"},
            "plain": self.testbed.plain,
            "null": self.testbed.null,
        }
        if stage.teacher is not None:
            pieces["teacher"] = taught[stage.teacher]
        wanted = stage.fields & pieces.keys()
        return METHODS[stage.method](**{name: pieces[name] for name in wanted}, **options)


def _as_it_is(method: Objective) -> Objective:
    return method


def _bench(job: Job, store: Store) -> Bench:
    """Fill the caches, load the base, and put the players on it."""
    recipe, place = job.recipe, job.device
    eyes = {  # first: where their weights are missing, nothing was computed for nothing
        gan: opened_eye(gan, job.vit, seed=recipe.seed)
        for gan in gans(recipe)
        if gan.features == "dino"
    }
    prompts = embedded(job.bundle, job.prompts, recipe.negative, store=store, device=place)
    images = image_supply(job, store)
    testbed = open_testbed(
        job.bundle,
        prompts,
        size=recipe.size,
        guidance_scale=recipe.guidance_scale,
        device=place,
    )
    supplies = supplies_of(job, testbed, images, store)  # pairs from a base without adapters
    if not job.keep_activations:
        testbed.host.checkpointing()
    players = _players(recipe, testbed)
    base_error = _kept_in_fp8(testbed) if recipe.storage else None

    def critics(gan: QwenGan, seed: int) -> GanPieces:
        return qwen_gan_pieces(
            gan,
            real=supplies.real(gan, seed),
            players={**players, "teacher": testbed.host.bare},
            vae=partial(load_vae, job.bundle, job.device),
            eye=eyes.get(gan),
            seed=seed,
            device=place,
        )

    return Bench(
        testbed=testbed,
        players=players,
        supply=supplies.of(recipe),
        critics=critics,
        shapes=() if job.buckets is None else tuple(job.buckets.members),
        base_error=base_error,
    )


def _kept_in_fp8(testbed: QwenImage) -> float:
    """Round the base below its adapters, and return how far it moved, on some prompts' noise."""
    net = testbed.host.net
    numbers = range(min(PROBED, testbed.prompts))
    x_t = noise(testbed.shape, seed=0, stream="storage", indices=numbers).to(testbed.device)
    t = torch.full((len(x_t),), 0.5, device=testbed.device)
    transformer = net.get_submodule(testbed.host.part)
    return stored_with_error(testbed.plain, transformer, x_t, t, torch.tensor(list(numbers)))


def _players(recipe: QwenRecipe, testbed: QwenImage) -> dict[str, Player]:
    """The adapters of a recipe, all starting as the base, and a head if one is asked for."""
    student = testbed.spawn("student", recipe.adapter, seed=recipe.seed)
    copies = ("average", "before") if has_before(recipe) else ("average",)
    return {
        "student": student,
        **{name: testbed.host.copy(student, name) for name in copies},
        **{name: testbed.spawn(name, recipe.adapter, seed=recipe.seed) for name in rivals(recipe)},
        **_head(recipe, testbed),
    }


def _head(recipe: QwenRecipe, testbed: QwenImage) -> dict[str, Player]:
    """The small network of transition matching; a prompt's number is all that it hears of it."""
    if not any(HEAD in stage.fields for stage in recipe.stages):
        return {}
    sizes = {"channels": testbed.shape[0], "vocabulary": testbed.prompts, "tokens": 1}
    return {HEAD: spawn_latent_head(**sizes, seed=recipe.seed).to(testbed.device)}


def _train(
    job: Job,
    k: int,
    store: Store,
    opened: Callable[[], Bench],
    before: Artefact | None,
    watch: Watch,
    ranks: Ranks,
    folder: Path | None,
) -> None:
    """Train stage k from the artefact of the stage before it; write it, where there is a folder."""
    bench, stage = opened(), job.recipe.stages[k]
    if before is not None:
        _go_on(bench.players, stage, before)
    seed = seed_for(job.recipe.seed, "stage", k) if k else job.recipe.seed
    work = store.workdir(job.artefact, job.specs()[k]) if folder else None
    saving = None
    if work is not None:
        saving = Saving(checkpoints=Checkpoints(folder=work), every_seconds=SAVE_SECONDS)
    records = fit(
        bench.objective(stage, seed),
        partial(bench.supply, seed),
        steps=stage.steps,
        batch_size=stage.batch_size,
        micro_batches=stage.micro_batches,
        seed=seed,
        optimisers={name: rates.optimiser() for name, rates in stage.rates.items()},
        shadows=(Shadow(of="student", average=bench.players["average"], decay=stage.ema),),
        saving=saving,
        ranks=ranks,
    )
    lines = TrainingHistory(work / "history.jsonl", stage=k + 1) if work else None
    earlier = sum(s.steps for s in job.recipe.stages[:k])
    for record in records:
        if lines is not None:
            lines.add(record, last=record.step == stage.steps)
        watch(record, earlier + record.step)
    if folder is not None and lines is not None:
        _write(folder, job, stage, bench, before, lines)


def _write(
    folder: Path,
    job: Job,
    stage: QwenStage,
    bench: Bench,
    before: Artefact | None,
    lines: TrainingHistory,
) -> None:
    players = bench.players
    save_tensors(folder, "weights.safetensors", players["average"].state_dict())
    if FAKE in stage.fields:
        save_tensors(folder, RIVAL_FILE, players[FAKE].state_dict())
    so_far = before.file("history.jsonl").read_text("utf-8") if before is not None else ""
    atomic_write_text(folder / "history.jsonl", so_far + lines.text())
    error = {} if bench.base_error is None else {"base_error": bench.base_error}
    atomic_write_text(folder / "card.json", json.dumps({"model": job.bundle.model, **error}))


def _go_on(players: Mapping[str, Player], stage: QwenStage, before: Artefact) -> None:
    """Let the players start where the stage before ended."""
    student = before.tensors()
    for name in {"student", "average", "before"} & players.keys():
        players[name].load_state_dict(student)
    if stage.rivals_from is not None:
        started = student if stage.rivals_from == "before" else before.tensors(RIVAL_FILE)
        players[FAKE].load_state_dict(started)
