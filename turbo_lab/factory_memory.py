"""The memory that a training on Qwen-Image will need, counted before anything is loaded."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from turbo_lab.adapters import AdapterSize
from turbo_lab.errors import MissingPiece
from turbo_lab.factory_cost import costs, lines
from turbo_lab.factory_plan import Asked, Job, found, gans, has_before, looks_at_pictures, rivals
from turbo_lab.memory import gigabytes
from turbo_lab.qwen_gan import critic_bytes
from turbo_lab.qwen_plan import ENCODER, VAE, device_named
from turbo_lab.qwen_sizes import Model, TransformerSize, VaeSize
from turbo_lab.recipes.qwen_models import QwenRecipe
from turbo_lab.testbeds.qwen_files import DEFAULT_MODEL, check_weights, dtype_on, located
from turbo_lab.testbeds.qwen_sizes import Counts, adapter_parameters, counted_parameters

RANKS = (64, 32, 16, 8, 4)
"""Ranks that are suggested where memory is short."""
PUBLISHED_SIZES = ("Qwen/Qwen-Image", DEFAULT_MODEL)
"""Models whose sizes are the defaults of `turbo_lab.qwen_sizes.Model`."""


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes of what is held at once, from parameter counts; activations come on top.

    ``loading`` is a base that is kept in fewer bytes, before it is; 0 where it stays as it was.
    """

    base: int
    adapters: int
    gradients: int
    optimiser: int
    text_encoder: int
    vae: int
    critic: int = 0
    loading: int = 0

    @property
    def phases(self) -> dict[str, int]:
        """Bytes of each phase; one network is freed before the next is loaded."""
        training = self.base + self.adapters + self.gradients + self.optimiser + self.critic
        encoding = {"encoding prompts": self.text_encoder}
        if self.vae:
            encoding["encoding images"] = self.vae
        if self.loading:
            encoding["loading"] = self.loading + self.adapters
        return {**encoding, "training": training}

    def lines(self) -> list[str]:
        """The plan as text, one line for each number."""
        parts = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        parts["loading"] = 0  # the base again, and a phase below
        rows = {name.replace("_", " "): size for name, size in parts.items() if size}
        table = [f"{name:18s}{gigabytes(size):>12s}" for name, size in rows.items()]
        needs = [f"{name:18s}{gigabytes(size):>12s}" for name, size in self.phases.items()]
        return [*table, "", "needed at once, before activations:", *needs]


def memory_plan(job: Asked) -> MemoryPlan:
    """Count the bytes of a training from settings alone; no weights are read.

    Where the model was not found, the settings are Qwen-Image's.
    """
    if isinstance(job, Job):
        counts = counted_parameters(job.bundle, job.recipe.adapter)
    else:
        counts = published_counts(job.recipe.adapter)
    return planned(
        job.recipe,
        counts,
        _model(job).transformer,
        each=torch.empty((), dtype=dtype_on(job.device)).element_size(),
        encodes=bool(job.images),
    )


def published_counts(adapter: AdapterSize) -> Counts:
    """Parameters of Qwen-Image's networks, and of an adapter; no file is needed."""
    return Counts(
        transformer=TransformerSize().parameters,
        adapter=adapter_parameters(_empty_transformer(), adapter),
        text_encoder=ENCODER,
        vae=VAE,
    )


@cache
def _empty_transformer() -> nn.Module:
    """The full-size transformer, without memory."""
    from accelerate import init_empty_weights
    from diffusers import QwenImageTransformer2DModel

    with init_empty_weights():
        net: nn.Module = QwenImageTransformer2DModel()
    return net


def planned(
    recipe: QwenRecipe, counts: Counts, size: TransformerSize, *, each: int, encodes: bool
) -> MemoryPlan:
    """Count the bytes of a training from the sizes of its networks.

    Adapters, their gradients and both moments of AdamW are float32. One player has gradients at a
    time: `turbo_lab.fit` drops them after each turn.

    Args:
        recipe: what is trained.
        counts: parameters.
        size: of the transformer.
        each: bytes of a frozen number.
        encodes: whether there are real images.
    """
    moving = 1 + len(rivals(recipe))
    worn = moving + 1 + has_before(recipe)  # the average, and the stage before
    saved = size.blocks_weights * (each - 1) - 4 * size.blocks_rows if recipe.storage else 0
    return MemoryPlan(
        base=each * counts.transformer - saved,
        loading=each * counts.transformer if recipe.storage else 0,
        adapters=4 * counts.adapter * worn,
        gradients=4 * counts.adapter,
        optimiser=8 * counts.adapter * moving,
        text_encoder=each * counts.text_encoder,
        vae=each * counts.vae if encodes else 0,
        critic=_critic_bytes(recipe, size, decoder=counts.vae, each=each),
    )


def _critic_bytes(recipe: QwenRecipe, size: TransformerSize, *, decoder: int, each: int) -> int:
    """Of the largest critic of the stages; one is dropped before the next is made."""
    sizes = {"width": size.width, "depth": size.layers, "decoder": decoder, "each": each}
    return max((critic_bytes(gan, **sizes) for gan in gans(recipe)), default=0)


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


def check_parts(job: Job) -> None:
    """Refuse a local pipeline whose weights, of parts that the training will load, do not fit.

    Raises:
        MissingPiece: see `turbo_lab.testbeds.qwen_files.check_weights`.
    """
    decodes = bool(job.images) or looks_at_pictures(job.recipe)
    parts = ("transformer", "text_encoder", *(("vae",) if decodes else ()))
    check_weights(job.bundle, parts)


def _fits(job: Job, rank: int, free: int) -> bool:
    adapter = job.recipe.adapter.model_copy(update={"rank": rank})
    smaller = dataclasses.replace(job, recipe=job.recipe.model_copy(update={"adapter": adapter}))
    return max(memory_plan(smaller).phases.values()) <= free


def plan_of(one: Asked) -> Asked:
    """What a plan is made from: with the model where it is at hand, else from published sizes.

    Raises:
        MissingPiece: the model is nowhere and its sizes are not known, or it is not complete.
    """
    try:
        located(one.model)
    except MissingPiece:
        if one.model not in PUBLISHED_SIZES:
            raise
        return one
    return found(one)


def described(job: Asked) -> str:
    """The resolved recipe, the memory plan and what is computed, as text."""
    recipe = json.dumps(job.recipe.spec(), indent=1)
    data = f"{len(job.prompts)} prompts, {len(job.images)} images"
    where = [f"model {job.model} on {job.device}, {data}"]
    if not isinstance(job, Job):
        where.append(f"{job.model} is not at hand: sizes are those of Qwen-Image as published")
    if job.buckets is not None:
        sizes = (f"{len(members)} of {shape}" for shape, members in job.buckets.members.items())
        where.append(f"buckets: {', '.join(sizes)}")
    costed = lines(costs(job.recipe, _model(job)), device_named("H100"))
    return "\n".join([recipe, "", *where, "", *memory_plan(job).lines(), "", *costed])


def _model(job: Asked) -> Model:
    """Sizes of the networks that a training runs; the text encoder's do not matter."""
    if not isinstance(job, Job):
        return Model()
    return Model(
        transformer=TransformerSize.of(job.bundle.config("transformer")),
        vae=VaeSize.of(job.bundle.config("vae")),
    )
