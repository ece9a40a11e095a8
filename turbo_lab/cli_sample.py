"""``turbo-lab sample``: its options, and which testbed each belongs to."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from turbo_lab.cli_options import DeviceOption, SeedOption, check_profile_and_seed, only_for
from turbo_lab.errors import BadInput


def sample(
    captions: Annotated[
        list[str] | None, typer.Argument(help="What the pictures show, one or more.")
    ] = None,
    testbed: Annotated[str, typer.Option(help="postcards or qwen_image.")] = "postcards",
    caption: Annotated[
        list[str] | None, typer.Option(help="The same as an option; repeatable.")
    ] = None,
    student: Annotated[
        str,
        typer.Option(help="A distilled student: a family such as dmd2, or a key; else teacher."),
    ] = "",
    steps: Annotated[
        int | None, typer.Option(help="Of the sampler: 40 for the teacher, 2 for a student.")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Guidance scale of the teacher, 4; 1 is without.")
    ] = None,
    seed: SeedOption = 0,
    grid: Annotated[str, typer.Option(help="Rows and columns, for example 4x4.")] = "",
    first: Annotated[int, typer.Option(help="Number of the first picture: of its noise.")] = 0,
    out: Annotated[Path, typer.Option(help="The PNG file to write.")] = Path("sample.png"),
    device: DeviceOption = "auto",
    model: Annotated[str, typer.Option(help="qwen_image: folder of a pipeline, or its id.")] = "",
    lora: Annotated[
        list[Path] | None, typer.Option(help="qwen_image: file of an adapter; repeatable.")
    ] = None,
    weight: Annotated[
        list[float] | None, typer.Option(help="qwen_image: of each adapter; 1 if not given.")
    ] = None,
    schedule: Annotated[
        str, typer.Option(help="qwen_image: a published one, such as wuli-2; else the adapter's.")
    ] = "",
    size: Annotated[str, typer.Option(help="qwen_image: WIDTHxHEIGHT, 1024x1024.")] = "",
    batch: Annotated[
        int | None, typer.Option(help="qwen_image: pictures in all; else one of each prompt.")
    ] = None,
    precision: Annotated[str, typer.Option(help="qwen_image: full or fp8.")] = "",
    attention: Annotated[
        str, typer.Option(help="qwen_image: cudnn, flash, efficient or math; else PyTorch chooses.")
    ] = "",
    compiled: Annotated[
        bool, typer.Option("--compile", help="qwen_image: compile blocks and decoder.")
    ] = False,
    offload: Annotated[
        bool, typer.Option("--offload", help="qwen_image: keep blocks in the computer's memory.")
    ] = False,
    keep: Annotated[
        list[str] | None,
        typer.Option(help="qwen_image: layers that fp8 leaves, such as img_mlp; repeatable."),
    ] = None,
    without: Annotated[
        list[str] | None,
        typer.Option(
            help="qwen_image: leave out fused, known-times, by-length, collapsed, channels-last, "
            "or all, which is a stock pipeline; repeatable."
        ),
    ] = None,
) -> None:
    """Draw pictures for captions with the teacher or a student."""
    check_profile_and_seed("quick", seed)
    texts = [*(captions or []), *(caption or [])]
    fast: dict[str, Any] = {
        **{"precision": precision, "attention": attention},
        **{"compiled": compiled, "offload": offload, "keep": tuple(keep or ())},
    }
    theirs: dict[str, Any] = {
        **{"model": model, "lora": lora, "weight": weight, "schedule": schedule},
        **{"size": size, "batch": batch, "without": without, **fast},
    }
    if testbed == "qwen_image":
        only_for("postcards", testbed, {"student": student, "grid": grid, "first": first or None})
        from turbo_lab import qwen_draw
        from turbo_lab.qwen_order import Fast
        from turbo_lab.qwen_order import without as left_out

        parts = Fast(**{option: value for option, value in fast.items() if value})
        done = qwen_draw.draw(
            texts,
            out,
            model=model,
            loras=lora or [],
            weights=weight or [],
            schedule=schedule,
            steps=steps,
            size=size,
            batch=batch,
            seed=seed,
            guidance_scale=guidance,
            fast=left_out(parts, without or []),
            device=device,
        )
        typer.echo("\n".join(done))
        return
    if testbed != "postcards":
        raise BadInput("testbed", testbed, "choose postcards or qwen_image")
    only_for("qwen_image", testbed, theirs)
    from turbo_lab import pictures

    order = pictures.checked_order(
        captions=texts,
        grid=grid,
        steps=steps,
        guidance=guidance,
        seed=seed,
        first=first,
        student=student,
    )
    pictures.sample_images(order, out, device=device)
    typer.echo(str(out))
