"""``turbo-lab train``: its options, and which of them belong to Qwen-Image."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from turbo_lab.cli_options import (
    DeviceOption,
    FreshOption,
    ProfileOption,
    SeedOption,
    check_profile_and_seed,
    given,
    say,
)
from turbo_lab.errors import BadInput

if TYPE_CHECKING:
    from turbo_lab.notebook_params import Profile


def train(
    name: Annotated[
        str,
        typer.Argument(help="A recipe on postcards, such as teacher; dino; or qwen_image."),
    ],
    profile: ProfileOption = "quick",
    seed: SeedOption = 0,
    fresh: FreshOption = False,
    device: DeviceOption = "auto",
    ship: Annotated[
        bool, typer.Option("--ship", help="Copy it into the package of this checkout.")
    ] = False,
    recipe: Annotated[str, typer.Option(help="qwen_image: its recipe, such as dmd2-2.")] = "",
    model: Annotated[str, typer.Option(help="qwen_image: folder of a pipeline, or its id.")] = "",
    prompts: Annotated[
        Path | None, typer.Option(help="qwen_image: text file, one prompt per line.")
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            help="Folder of pictures: one for each prompt of qwen_image; real ones of turbo."
        ),
    ] = None,
    size: Annotated[
        int | None, typer.Option(help="qwen_image: pixels of the square pictures.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="qwen_image: of the adapters.")] = None,
    column: Annotated[
        str, typer.Option(help="qwen_image: of a csv, jsonl or parquet file of prompts.")
    ] = "",
    vit: Annotated[
        str, typer.Option(help="qwen_image: weights of the critic's DINO: hub, random or a file.")
    ] = "",
    storage: Annotated[
        str, typer.Option(help="qwen_image: fp8 keeps linear layers of the base in it.")
    ] = "",
    buckets: Annotated[
        str, typer.Option(help="qwen_image: aspect trains on images in about their own ratio.")
    ] = "",
    keep_activations: Annotated[
        bool, typer.Option("--keep-activations", help="qwen_image: faster, and far more memory.")
    ] = False,
    change: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="qwen_image: STAGE.NAME=VALUE, another number in the recipe that --dry-run "
            "prints, as 2.options.rival_updates=1 or all.options.times=1,0.5; repeatable.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="qwen_image: show recipe and memory, and stop.")
    ] = False,
) -> None:
    """Train a recipe, or find it trained: in the cache, or shipped with the package."""
    check_profile_and_seed(profile, seed)
    chosen = {
        **{"recipe": recipe, "model": model, "prompts": prompts, "images": images},
        **{"size": size, "rank": rank, "dry_run": dry_run, "keep_activations": keep_activations},
        **{"vit": vit, "column": column, "storage": storage, "buckets": buckets},
        **{"set": change},
    }
    options = {option: value for option, value in chosen.items() if given(value)}
    if name == "qwen_image":
        if ship:
            raise BadInput("ship", True, "adapters of Qwen-Image are too large to ship")
        _train_qwen(device, fresh, {"profile": profile, "seed": seed, **options})
        return
    for option, value in options.items():
        if option != "images":
            raise BadInput(option, str(value), f"it is for qwen_image, not for {name}")
    from turbo_lab import lab

    artefact = lab.train(
        name,
        profile=cast("Profile", profile),
        seed=seed,
        fresh=fresh,
        device=device,
        ship=ship,
        images=images,
    )
    say(artefact)


def _train_qwen(device: str, fresh: bool, options: dict[str, Any]) -> None:
    """Check all of a training on Qwen-Image, then show it or do it."""
    from turbo_lab import factory, factory_memory, factory_plan, lab

    dry_run = options.pop("dry_run", False)
    known = dry_run and device in ("cpu", "cuda")  # a plan needs no GPU to be made
    place = device if known else lab.chosen_device(device)
    changes = options.pop("set", ())
    asked = factory_plan.asked(**options, changes=changes, device=place)
    if dry_run:
        typer.echo(factory_memory.described(factory_memory.plan_of(asked)))
        return
    job = factory_plan.found(asked)
    if (artefact := factory.train_with_progress(job, fresh=fresh)) is not None:
        say(artefact)
        if job.recipe.storage:
            error = artefact.card["base_error"]
            typer.echo(f"its base in {job.recipe.storage} was off by {error:.2e}")
