"""Trainings of the factory on a tiny pipeline, two prompts and two images."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tiny_qwen
import torch
from torch import Tensor

from turbo_lab import factory, factory_plan
from turbo_lab.adapters import AdapterSize
from turbo_lab.factory_plan import Job
from turbo_lab.fit import Objective, fit
from turbo_lab.recipes.models import Rates
from turbo_lab.store import Artefact
from turbo_lab.streams import Draw

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


def fitted(
    bench: factory.Bench, objective: Objective, rates: Mapping[str, Rates], *, steps: int
) -> None:
    """Train on batches of four; every term is finite at every step."""
    for record in fit(
        objective,
        lambda draw: bench.supply(0, draw),
        steps=steps,
        batch_size=4,
        seed=0,
        optimisers={who: rate.optimiser() for who, rate in rates.items()},
    ):
        assert all(torch.tensor(value).isfinite() for value in record.terms.values())


def student_gradient(bench: factory.Bench, work: Job) -> dict[str, Tensor]:
    """Of the student's turn, with adapters that differ; another is worn by the backward pass."""
    for k, player in enumerate(bench.players.values()):
        for _, parameter in player.named_parameters():
            numbers = torch.Generator().manual_seed(k)
            with torch.no_grad():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=numbers))
    student = bench.players["student"]
    for _, parameter in student.named_parameters():
        parameter.requires_grad_(True)
    turn = bench.objective(work.recipe.stages[0]).turns()[-1]
    assert turn.moves == ("student",)
    draw = Draw(seed=1, step=0, total=2)
    losses = turn.loss(bench.supply(1, draw), draw)
    with bench.testbed.host.wearing("average"):
        torch.stack([loss.sum() for loss in losses.values()]).sum().backward()
    return {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
