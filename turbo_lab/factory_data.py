"""What the stages of a training on Qwen-Image learn from: caches filled, and batches of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from turbo_lab.errors import BadInput
from turbo_lab.factory_plan import Job, pairs_of
from turbo_lab.fit import Batch
from turbo_lab.methods.gan import mixed
from turbo_lab.recipes.models import Pairs
from turbo_lab.recipes.qwen_image import PASS_TOKENS, QwenRecipe
from turbo_lab.recipes.qwen_models import QwenGan
from turbo_lab.store import Store
from turbo_lab.streams import Draw, seed_for
from turbo_lab.testbeds.qwen_buckets import (
    Shape,
    Supply,
    bucket_batch,
    numbers_at,
    square,
)
from turbo_lab.testbeds.qwen_data import (
    PairPlan,
    drawn_pairs,
    image_batch,
    pair_batch,
    prompt_batch,
)
from turbo_lab.testbeds.qwen_image import QwenImage
from turbo_lab.testbeds.qwen_pictures import encoded


@dataclass(frozen=True, kw_only=True)
class Supplies:
    """Where batches come from, each for the seed of a stage.

    Attributes:
        prompts: prompts alone.
        images: latents of real images, if there are any.
        teacher: samples of the guided teacher, by how many and in how many steps.
    """

    prompts: Supply
    images: Supply | None = None
    teacher: Mapping[Pairs, Supply] = field(default_factory=dict)

    def of(self, recipe: QwenRecipe) -> Supply:
        """What the methods of a recipe learn from."""
        if recipe.source == "images" and self.images is not None:
            return self.images
        return self.prompts if recipe.pairs is None else self.teacher[recipe.pairs]

    def real(self, gan: QwenGan, seed: int) -> Callable[[Draw], Batch]:
        """The real side of a critic: images with probability rho, else the teacher's samples.

        Raises:
            BadInput: it is to show images, and there are none.
        """
        if gan.rho > 0 and self.images is None:
            raise BadInput("rho", gan.rho, "there are no real images to show; use 0")
        drawn = None if gan.pairs is None else self.teacher.get(gan.pairs)
        # One of the two may be missing, and is then never asked.
        images, teacher = (partial(side or self.prompts, seed) for side in (self.images, drawn))
        return mixed(images, teacher, gan.rho)


def supplies_of(job: Job, testbed: QwenImage, images: Supply | None, store: Store) -> Supplies:
    """All that the stages of a recipe learn from; samples of the teacher are drawn now."""
    drawn = {pairs: _taught(job, testbed, pairs, store) for pairs in pairs_of(job.recipe)}
    return Supplies(
        prompts=partial(prompt_batch, len(job.prompts), testbed.shape, job.device),
        images=images,
        teacher=drawn,
    )


# --- real images --------------------------------------------------------------------------------


def image_supply(job: Job, store: Store) -> Supply | None:
    """The latents of a job's images, encoded now where the store lacks them; None without any."""
    if not job.images:
        return None
    if job.buckets is None:
        return _encoded(job, range(len(job.images)), square(job.recipe.size), store)
    members = job.buckets.members
    each = {shape: _encoded(job, members[shape], shape, store) for shape in members}
    return partial(bucket_batch, job.buckets, each)


def _encoded(job: Job, numbers: range | tuple[int, ...], shape: Shape, store: Store) -> Supply:
    files = [job.images[k] for k in numbers]
    latents = encoded(job.bundle, files, shape=shape, store=store, device=job.device)
    return partial(image_batch, latents, len(files), job.device)


# --- samples of the teacher ---------------------------------------------------------------------


def _taught(job: Job, testbed: QwenImage, pairs: Pairs, store: Store) -> Supply:
    """Samples of the teacher; in buckets, of the shapes of the images whose prompts they have."""
    if job.buckets is None:
        shape, seed = square(testbed.size), seed_for(job.recipe.seed, "pairs")
        plan = _planned(job, testbed, pairs.steps, shape, job.prompts, pairs.n, seed)
        return partial(pair_batch, drawn_pairs(plan, testbed.teacher, store), job.device)
    each = {shape: _in_bucket(job, testbed, pairs, shape, store) for shape in job.buckets.members}
    return partial(bucket_batch, job.buckets, each)


def _in_bucket(job: Job, testbed: QwenImage, pairs: Pairs, shape: Shape, store: Store) -> Supply:
    """Of n samples the share that the bucket has of the images, at least one, with its prompts."""
    assert job.buckets is not None
    members = job.buckets.members[shape]
    n = max(1, round(pairs.n * len(members) / len(job.images)))
    prompts = tuple(job.prompts[k] for k in members)
    seed = seed_for(job.recipe.seed, "pairs", shape.width, shape.height)
    plan = _planned(job, testbed, pairs.steps, shape, prompts, n, seed)

    def teacher(x_t: Tensor, t: Tensor, c: Tensor) -> Tensor:
        return testbed.teacher(x_t, t, numbers_at(members, c))

    return partial(pair_batch, drawn_pairs(plan, teacher, store), job.device)


def _planned(
    job: Job,
    testbed: QwenImage,
    steps: int,
    shape: Shape,
    prompts: tuple[str, ...],
    n: int,
    seed: int,
) -> PairPlan:
    return PairPlan(
        identity={
            "model": job.bundle.identity("transformer"),
            "encoder": job.bundle.identity("text_encoder"),
            "tokenizer": job.bundle.identity("tokenizer"),
            "guidance_scale": job.recipe.guidance_scale,
            "negative": job.recipe.negative,
            "device": job.device,
        },
        prompts=prompts,
        grid=testbed.schedule.grid(steps, shape.tokens),
        shape=shape.latent,
        n=n,
        seed=seed,
        at_once=max(1, PASS_TOKENS // job.recipe.tokens),
        device=job.device,
    )
