"""A training on Qwen-Image before it starts: everything about it checked but the memory."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from turbo_lab.errors import BadInput
from turbo_lab.features import HUB, RANDOM
from turbo_lab.recipes.models import Pairs, Profile
from turbo_lab.recipes.qwen_changes import changed
from turbo_lab.recipes.qwen_image import ADAPTER, QwenRecipe, resolve_qwen
from turbo_lab.recipes.qwen_models import QwenGan
from turbo_lab.testbeds.qwen_buckets import Buckets, Shape, shapes_of
from turbo_lab.testbeds.qwen_data import warn_of_cuts
from turbo_lab.testbeds.qwen_files import DEFAULT_MODEL, SCALE, Bundle, dtype_on, located
from turbo_lab.testbeds.qwen_pictures import assigned, check_pictures, file_hash, list_images
from turbo_lab.testbeds.qwen_schedule import Schedule
from turbo_lab.testbeds.qwen_sources import (
    OTHER_TABLES,
    TABLES,
    Picture,
    Shards,
    is_sharded,
    read_column,
    read_prompts,
    read_shards,
)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A training of which all is checked but the model; build it with `asked`.

    Attributes:
        recipe: what to train.
        model: what was asked for, a folder or an id.
        prompts: texts.
        images: files, one for each prompt; empty if the recipe does without.
        shapes: of the bucket of each image; empty where all are squares.
        device: cpu or cuda.
        keep_activations: do not recompute them in the backward pass: more memory, less time, and
            the same gradients, so it is no part of the key.
        vit: weights of a critic's vision transformer: ``hub``, ``random``, or a file.
    """

    recipe: QwenRecipe
    model: str
    prompts: tuple[str, ...]
    images: tuple[Picture, ...] = ()
    shapes: tuple[Shape, ...] = ()
    device: str = "cpu"
    keep_activations: bool = False
    vit: str = HUB

    @property
    def buckets(self) -> Buckets | None:
        """Which batch has which shape; None where all have the same."""
        return Buckets(of=self.shapes) if self.shapes else None


@dataclass(frozen=True, kw_only=True)
class Job(Asked):
    """A training that has been checked; build it with `check`.

    Attributes:
        bundle: the model as it was found.
    """

    bundle: Bundle

    @property
    def artefact(self) -> str:
        """Name of the artefact in the store."""
        return f"qwen_image/{self.recipe.name}"

    def specs(self) -> list[dict[str, Any]]:
        """What the key of each stage is made of: the recipe so far, the model and the data."""
        facts: dict[str, Any] = {
            "model": self.bundle.identity("transformer"),
            "encoder": self.bundle.identity("text_encoder"),
            "tokenizer": self.bundle.identity("tokenizer"),
            "dtype": str(dtype_on(self.device)).removeprefix("torch."),
            "prompts": _text_hash(self.prompts),
        }
        if self.images:
            facts["vae"] = self.bundle.identity("vae")
            facts["images"] = _text_hash(file_hash(file) for file in self.images)
        recipes = [self.recipe.until(k) for k in range(len(self.recipe.stages))]
        return [
            {"recipe": r.spec(), **facts, **self._drawn_for(r), **self._seen_by_critic(r)}
            for r in recipes
        ]

    def _drawn_for(self, recipe: QwenRecipe) -> dict[str, Any]:
        """When the teacher is called, where stages of a recipe learn from samples of it."""
        return {"schedule": asdict(Schedule.of(self.bundle))} if pairs_of(recipe) else {}

    def _seen_by_critic(self, recipe: QwenRecipe) -> dict[str, Any]:
        """What a critic looks through, where the stages of a recipe have one that sees pictures."""
        if not looks_at_pictures(recipe):
            return {}
        known = self.vit in (HUB, RANDOM)
        weights = self.vit if known else {"sha256": file_hash(Path(self.vit))}
        return {"vae": self.bundle.identity("vae"), "vit": weights}


def _text_hash(texts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def check(**options: Any) -> Job:
    """Resolve a training and check all of it but the memory; no weights are read, none written.

    Args:
        options: of `asked`.

    Raises:
        BadInput: a value is not allowed, or a file is not what it should be.
        MissingPiece: the model is nowhere.

    Warns:
        CutWarning: prompts are longer than what the model reads of them.
    """
    return found(asked(**options))


def found(one: Asked) -> Job:
    """Find the model of a training; see `check`."""
    bundle = located(one.model)
    warn_of_cuts(bundle, one.prompts)
    fields = {field.name: getattr(one, field.name) for field in dataclasses.fields(one)}
    return Job(**fields, bundle=bundle)


def asked(
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
    vit: str = "",
    column: str = "",
    storage: str = "",
    buckets: str = "",
    changes: Sequence[str] = (),
) -> Asked:
    """Resolve a training and check all of it but the model and the memory.

    Args:
        recipe: name of a recipe, see `turbo_lab.recipes.qwen_image.QWEN_RECIPES`.
        model: folder of a pipeline, or its id on a hub.
        prompts: text file, one prompt per line, or a csv, jsonl or parquet table; None where tar
            shards have captions.
        images: folder of pictures, a tar shard, or a folder of these; the k-th by name goes with
            the k-th prompt.
        size: pixels of the square pictures, a multiple of 16.
        profile: smoke, quick or paper.
        seed: of the training.
        rank: of the adapters.
        device: cpu or cuda.
        keep_activations: see `Job`.
        vit: see `Job`; empty for ``hub``.
        column: of a table, where it is not ``prompt``.
        storage: of the frozen base in training: ``fp8``, or empty for as it was loaded.
        buckets: ``aspect`` for images in about the ratio that they have; empty for squares.
        changes: of the recipe's numbers, see `turbo_lab.recipes.qwen_changes.changed`.

    Raises:
        BadInput: a value is not allowed, or a file is not what it should be.
    """
    resolved = resolve_qwen(
        recipe, size=size, profile=profile, seed=seed, rank=rank, images=images is not None
    )
    resolved = changed(resolved, changes)
    _check_real(resolved)
    resolved = _stored(resolved, storage, keep_activations)
    resolved = _bucketed(resolved, buckets)
    _check_vit(vit, resolved)
    files, captions = _pictures(images)
    shapes = _checked(files, resolved)
    texts = _texts(prompts, column, captions)
    if files and len(files) != len(texts):
        needs = f"there are {len(files)} images; write one prompt for each, in the order of names"
        raise BadInput("prompts", f"{len(texts)} prompts", needs)
    return Asked(
        recipe=resolved,
        model=model,
        prompts=texts,
        images=files,
        shapes=shapes,
        device=device,
        keep_activations=keep_activations,
        vit=vit or HUB,
    )


def _check_real(recipe: QwenRecipe) -> None:
    """Refuse a critic that is to show real images where there are none."""
    for gan in gans(recipe):
        if gan.rho > 0 and recipe.source != "images":
            raise BadInput("rho", gan.rho, "there are no real images to show; give --images")


def _pictures(images: Path | None) -> tuple[tuple[Picture, ...], tuple[str, ...]]:
    """Pictures, and the captions that came with them."""
    if images is None:
        return (), ()
    if not is_sharded(images):
        return list_images(images), ()
    shards: Shards = read_shards(images)
    return shards.pictures, shards.captions


def _checked(pictures: tuple[Picture, ...], recipe: QwenRecipe) -> tuple[Shape, ...]:
    """Check that pictures are large enough, and return their buckets, if there are to be any."""
    if recipe.buckets is not None:
        return assigned(pictures, shapes_of(recipe.size))
    check_pictures(pictures, size=recipe.size)
    return ()


def _texts(prompts: Path | None, column: str, captions: tuple[str, ...]) -> tuple[str, ...]:
    if prompts is None and captions:
        return captions
    if prompts is None:
        raise BadInput("prompts", None, "name a text file with one prompt per line, or a table")
    if prompts.suffix.lower() in TABLES:
        return read_column(prompts, column)
    if prompts.suffix.lower() in OTHER_TABLES:
        wanted = f"make it a {', '.join(TABLES)} file, or a text file with one prompt per line"
        raise BadInput("prompts", str(prompts), wanted)
    if column:
        raise BadInput("column", column, f"{prompts.name} is no table of {', '.join(TABLES)}")
    return read_prompts(prompts)


def _stored(recipe: QwenRecipe, storage: str, keep_activations: bool) -> QwenRecipe:
    """The recipe with its base kept so."""
    if not storage:
        return recipe
    if storage != "fp8":
        raise BadInput("storage", storage, "use fp8, or leave it out")
    if keep_activations:
        allowed = (
            "it would keep wide weights too, and fp8 would save nothing; leave one of them out"
        )
        raise BadInput("keep_activations", True, allowed)
    return recipe.model_copy(update={"storage": storage})


def _bucketed(recipe: QwenRecipe, buckets: str) -> QwenRecipe:
    """The recipe with its images in buckets; a critic's crop must fit the narrowest."""
    if buckets in ("", "square"):
        return recipe
    if buckets != "aspect":
        raise BadInput("buckets", buckets, "use aspect or square")
    if recipe.source != "images":
        allowed = f"{recipe.name} has no images here, and all else is square; leave it out"
        raise BadInput("buckets", buckets, allowed)
    narrowest = min(min(shape.width, shape.height) for shape in shapes_of(recipe.size))
    for gan in gans(recipe):
        if gan.features == "dino" and gan.crop * SCALE > narrowest:
            allowed = f"the critic's crops have {gan.crop * SCALE} pixels, the narrowest bucket"
            raise BadInput("buckets", buckets, f"{allowed} {narrowest}; use a larger size")
    return recipe.model_copy(update={"buckets": buckets})


def _check_vit(vit: str, recipe: QwenRecipe) -> None:
    """Refuse weights that nothing looks through, and a file that is not there."""
    if vit and not looks_at_pictures(recipe):
        raise BadInput("vit", vit, f"{recipe.name} has no critic that looks at pictures")
    file = Path(vit)
    if vit not in ("", HUB, RANDOM) and (file.suffix != ".safetensors" or not file.is_file()):
        raise BadInput("vit", vit, f"use {HUB}, {RANDOM} or a safetensors file that is there")


# --- what a recipe asks for ----------------------------------------------------------------------


def has_before(recipe: QwenRecipe) -> bool:
    """Whether a stage is taught by the student of the stage before."""
    return any(stage.teacher == "before" for stage in recipe.stages)


def pairs_of(recipe: QwenRecipe) -> tuple[Pairs, ...]:
    """Samples of the teacher that a recipe needs: the methods' data, and critics' real sides."""
    wanted = (recipe.pairs, *(gan.pairs for gan in gans(recipe) if gan.rho < 1))
    return tuple(dict.fromkeys(pairs for pairs in wanted if pairs is not None))


def rivals(recipe: QwenRecipe) -> list[str]:
    """Names of the players that start as the teacher and learn along with the student."""
    return ["fake"] if any("fake" in stage.fields for stage in recipe.stages) else []


def gans(recipe: QwenRecipe) -> list[QwenGan]:
    """The GAN terms of the stages that have one."""
    return [stage.gan for stage in recipe.stages if stage.gan is not None]


def looks_at_pictures(recipe: QwenRecipe) -> bool:
    """Whether a critic sees decoded pictures, through a network of its own."""
    return any(gan.features == "dino" for gan in gans(recipe))
