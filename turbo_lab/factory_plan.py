"""A training on Qwen-Image before it starts: everything checked, and the memory it will need."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from turbo_lab.errors import BadInput, MissingPiece
from turbo_lab.methods import METHODS
from turbo_lab.recipes.models import Profile
from turbo_lab.recipes.qwen_image import ADAPTER, QwenRecipe, QwenStage, resolve_qwen
from turbo_lab.testbeds.qwen_data import read_prompts
from turbo_lab.testbeds.qwen_files import (
    DEFAULT_MODEL,
    Bundle,
    counted_parameters,
    dtype_on,
    located,
)
from turbo_lab.testbeds.qwen_pictures import file_hash, find_images

RANKS = (64, 32, 16, 8, 4)
"""Ranks that are suggested where memory is short."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training that has been checked; build it with `check`.

    Attributes:
        recipe: what to train.
        bundle: the model.
        prompts: texts.
        images: files, one for each prompt; empty if the recipe does without.
        device: cpu or cuda.
        keep_activations: do not recompute them in the backward pass: more memory, less time, and
            the same gradients, so it is no part of the key.
    """

    recipe: QwenRecipe
    bundle: Bundle
    prompts: tuple[str, ...]
    images: tuple[Path, ...] = ()
    device: str = "cpu"
    keep_activations: bool = False

    @property
    def artefact(self) -> str:
        """Name of the artefact in the store."""
        return f"qwen_image/{self.recipe.name}"

    def specs(self) -> list[dict[str, Any]]:
        """What the key of each stage is made of: the recipe so far, the model and the data."""
        facts: dict[str, Any] = {
            "model": self.bundle.identity("transformer"),
            "encoder": self.bundle.identity("text_encoder"),
            "dtype": str(dtype_on(self.device)).removeprefix("torch."),
            "prompts": _text_hash(self.prompts),
        }
        if self.images:
            facts["vae"] = self.bundle.identity("vae")
            facts["images"] = _text_hash(file_hash(file) for file in self.images)
        stages = range(len(self.recipe.stages))
        return [{"recipe": self.recipe.until(k).spec(), **facts} for k in stages]


def _text_hash(texts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def check(
    *,
    recipe: str = "",
    model: str = DEFAULT_MODEL,
    prompts: Path | None = None,
    images: Path | None = None,
    size: int = 512,
    profile: Profile = "quick",
    seed: int = 0,
    rank: int = ADAPTER.rank,
    device: str = "cpu",
    keep_activations: bool = False,
) -> Job:
    """Resolve a training and check all of it but the memory; nothing is loaded or written.

    Args:
        recipe: name of a recipe, see `turbo_lab.recipes.qwen_image.QWEN_RECIPES`.
        model: folder of a pipeline, or its id on a hub.
        prompts: text file, one prompt per line.
        images: folder of pictures; the k-th by name goes with the k-th prompt.
        size: pixels of the square pictures, a multiple of 16.
        profile: smoke, quick or paper.
        seed: of the training.
        rank: of the adapters.
        device: cpu or cuda.
        keep_activations: see `Job`.

    Raises:
        BadInput: a value is not allowed, or a file is not what it should be.
        MissingPiece: the model is nowhere.
    """
    resolved = resolve_qwen(
        recipe, size=size, profile=profile, seed=seed, rank=rank, images=images is not None
    )
    if prompts is None:
        raise BadInput("prompts", None, "name a text file with one prompt per line")
    texts = read_prompts(prompts)
    files = () if images is None else find_images(images, size=size)
    if files and len(files) != len(texts):
        needs = f"there are {len(files)} images; write one prompt for each, in the order of names"
        raise BadInput("prompts", f"{len(texts)} prompts", needs)
    bundle = located(model)
    return Job(
        recipe=resolved,
        bundle=bundle,
        prompts=texts,
        images=files,
        device=device,
        keep_activations=keep_activations,
    )


# --- memory -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes of what is held at once, from parameter counts; activations come on top."""

    base: int
    adapters: int
    gradients: int
    optimiser: int
    text_encoder: int
    vae: int

    @property
    def phases(self) -> dict[str, int]:
        """Bytes of each phase; one network is freed before the next is loaded."""
        training = self.base + self.adapters + self.gradients + self.optimiser
        encoding = {"encoding prompts": self.text_encoder}
        if self.vae:
            encoding["encoding images"] = self.vae
        return {**encoding, "training": training}

    def lines(self) -> list[str]:
        """The plan as text, one line for each number."""
        parts = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        rows = {name.replace("_", " "): size for name, size in parts.items() if size}
        table = [f"{name:18s}{gigabytes(size):>12s}" for name, size in rows.items()]
        needs = [f"{name:18s}{gigabytes(size):>12s}" for name, size in self.phases.items()]
        return [*table, "", "needed at once, before activations:", *needs]


def memory_plan(job: Job) -> MemoryPlan:
    """Count the bytes of a training from settings alone; no weights are read.

    Adapters, their gradients and both moments of AdamW are float32. One player has gradients at a
    time: `turbo_lab.fit` drops them after each turn.
    """
    counts = counted_parameters(job.bundle, job.recipe.adapter)
    each = torch.empty((), dtype=dtype_on(job.device)).element_size()
    moving = 1 + len(rivals(job.recipe))
    worn = moving + 1 + has_before(job.recipe)  # the average, and the stage before
    return MemoryPlan(
        base=each * counts.transformer,
        adapters=4 * counts.adapter * worn,
        gradients=4 * counts.adapter,
        optimiser=8 * counts.adapter * moving,
        text_encoder=each * counts.text_encoder,
        vae=each * counts.vae if job.images else 0,
    )


def check_memory(job: Job, free: int | None) -> None:
    """Refuse a training that cannot fit in ``free`` bytes, and say what would.

    Raises:
        MissingPiece: with the numbers, and a lower rank or a device that is large enough.
    """
    plan = memory_plan(job)
    phase, needed = max(plan.phases.items(), key=lambda item: item[1])
    if free is None or needed <= free:
        return
    fitting = (r for r in RANKS if r < job.recipe.adapter.rank and _fits(job, r, free))
    rank = next(fitting, None)
    way = f"--rank {rank} would fit" if rank else f"a device with {gigabytes(needed)} free would do"
    raise MissingPiece(
        f"{phase.capitalize()} {job.recipe.name} needs {gigabytes(needed)} before activations, and "
        f"{gigabytes(free)} are free on {job.device}: {way}."
    )


def check_weights(job: Job) -> None:
    """Refuse a local pipeline that lacks weights which the training will load; reads none.

    Raises:
        MissingPiece: naming the first file that is missing.
    """
    parts = ("transformer", "text_encoder", *(("vae",) if job.images else ()))
    for part in parts if job.bundle.commit is None else ():  # a hub is asked for each when needed
        job.bundle.weights(part)


def _fits(job: Job, rank: int, free: int) -> bool:
    adapter = job.recipe.adapter.model_copy(update={"rank": rank})
    smaller = dataclasses.replace(job, recipe=job.recipe.model_copy(update={"adapter": adapter}))
    return max(memory_plan(smaller).phases.values()) <= free


def free_memory(device: str) -> int | None:
    """Free bytes of the GPU, or of the machine; None where that cannot be asked."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    except OSError:
        return None
    kilobytes = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return 1024 * int(kilobytes[0]) if kilobytes else None


def gigabytes(size: int) -> str:
    """Bytes as text, rounded up in the last digit: a plan must not promise too little."""
    return f"{math.ceil(size / 1e7) / 100:,.2f} GB"


def described(job: Job) -> str:
    """The resolved recipe and the memory plan as text."""
    recipe = json.dumps(job.recipe.spec(), indent=1)
    data = f"{len(job.prompts)} prompts, {len(job.images)} images"
    where = f"model {job.bundle.model} on {job.device}, {data}"
    return "\n".join([recipe, "", where, "", *memory_plan(job).lines()])


# --- what a recipe asks for ----------------------------------------------------------------------


def has_before(recipe: QwenRecipe) -> bool:
    """Whether a stage is taught by the student of the stage before."""
    return any(stage.teacher == "before" for stage in recipe.stages)


def rivals(recipe: QwenRecipe) -> list[str]:
    """Names of the players that start as the teacher and learn along with the student."""
    asked = {name for stage in recipe.stages for name in fields_of(stage)}
    return sorted(asked.intersection({"fake"}))


def fields_of(stage: QwenStage) -> set[str]:
    """Names of what the method of a stage can be given."""
    return {f.name for f in dataclasses.fields(METHODS[stage.method])}
