"""Trainings of the factory on a tiny pipeline, two prompts and two images."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import tiny_qwen

from turbo_lab import factory_plan
from turbo_lab.adapters import AdapterSize
from turbo_lab.factory_plan import Job
from turbo_lab.store import Artefact

SMALL = AdapterSize(rank=4, alpha=4, targets=("to_q", "to_v", "img_mlp.net.2", "img_mod.1"))


def write_world(folder: Path, model: Path) -> Path:
    """Write a folder with a model, two prompts and two images."""
    shutil.copytree(model, folder / "model")
    tiny_qwen.write_prompts(folder / "prompts.txt", "a cat", "two dogs on the moss")
    tiny_qwen.write_images(folder / "images", n=2)
    return folder


def write_shaped(world: Path) -> Path:
    """Write ``five.txt`` and ``shaped``: prompts, and three wide pictures, a square, a tall one."""
    if not (world / "shaped").exists():
        tiny_qwen.write_prompts(world / "five.txt", "one", "two words", "three", "four", "a fifth")
        for k, (width, height) in enumerate(((160, 90), (80, 80), (96, 64), (70, 100), (100, 60))):
            folder = tiny_qwen.write_images(world / "some", n=k + 1, width=width, height=height)
            (world / "shaped").mkdir(exist_ok=True)
            (folder / f"{k:02d}.png").rename(world / "shaped" / f"{k:02d}.png")
    return world / "shaped"


def job(world: Path, recipe: str, **options: Any) -> Job:
    """Check a training at `smoke`, 32 pixels and rank 4."""
    return factory_plan.check(
        **{
            "recipe": recipe,
            "model": str(world / "model"),
            "prompts": world / "prompts.txt",
            "size": 32,
            "profile": "smoke",
            "rank": 4,
            **options,
        }
    )


def changed(job: Job, **values: Any) -> Job:
    """The same with another recipe."""
    return dataclasses.replace(job, recipe=job.recipe.model_copy(update=values))


def history(artefact: Artefact) -> list[dict[str, Any]]:
    """Lines of its training."""
    return [json.loads(line) for line in artefact.file("history.jsonl").read_text().splitlines()]
