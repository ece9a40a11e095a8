"""Students with random adapters on the smallest transformer, exported for others."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from test_testbed import TINY

from turbo_lab.adapters import AdapterSize, Host
from turbo_lab.atomic import atomic_write_text, save_tensors
from turbo_lab.delivery import Delivery, delivery
from turbo_lab.lora_export import export_lora
from turbo_lab.recipes import Recipe, student_recipe
from turbo_lab.store import Artefact, Store
from turbo_lab.testbeds.postcards import PostcardNet, spawn_net

SIZE = AdapterSize(rank=3, alpha=6.0, targets=("to_q", "to_k", "img_mlp.net.2", "img_mod.1"))
"""Alpha is twice the rank, and modulation layers are adapted."""
STUDENTS: Mapping[str, tuple[str, int]] = {
    "published times": ("warm", 2),
    "second time moved": ("warm-second-0.5", 2),
    "explicit sigmas": ("dmd2", 4),
    "uniform times": ("direct", 8),
    "one step": ("progressive", 1),
    "renoising": ("consistency", 2),
}
EXPORTS = [
    *((name, "diffusers") for name in STUDENTS),
    *((name, "comfyui") for name in ("published times", "second time moved")),
]


def lively_net() -> PostcardNet:
    """A fresh network hardly depends on its caption; larger weights make every path count."""
    net = spawn_net(TINY, 0).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(2.0)
    return net


@dataclass(frozen=True, kw_only=True)
class World:
    """Students whose adapters are random, and their exports."""

    store: Store
    folder: Path
    students: Mapping[str, Delivery]

    def lora(self, name: str, format: str) -> Path:
        return self.place(name, format) / "lora.safetensors"

    def place(self, name: str, format: str) -> Path:
        return self.folder / f"{name.replace(' ', '-')}-{format}"


def small(recipe: Recipe) -> Recipe:
    assert recipe.teacher is not None
    teacher = recipe.teacher.model_copy(update={"net": TINY})
    return recipe.model_copy(update={"net": TINY, "adapter": SIZE, "teacher": teacher})


def made(recipe: Recipe, store: Store) -> Artefact:
    """An artefact of a recipe with a random adapter in half precision, as training writes it."""

    def make(folder: Path) -> None:
        student = Host(spawn_net(TINY, 0), part="transformer").add("student", SIZE, seed=1)
        numbers = torch.Generator().manual_seed(2)
        weights = {
            key: torch.randn(value.shape, generator=numbers).mul(0.2).half()
            for key, value in student.state_dict().items()
        }
        save_tensors(folder, "weights.safetensors", weights)
        atomic_write_text(folder / "card.json", json.dumps({"model": "tiny"}))

    return store.get_or_make(recipe.artefact, recipe.spec(), make)


def make_world(folder: Path) -> World:
    store = Store(cache=folder / "cache")
    students = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "turbo_lab.delivery.student_recipe", lambda *a, **k: small(student_recipe(*a, **k))
        )
        for name, (family, steps) in STUDENTS.items():
            made(small(student_recipe(family, steps=steps)), store)
            students[name] = delivery(family, steps=steps, store=store)
    world = World(folder=folder / "exports", store=store, students=students)
    for name, format in EXPORTS:
        world.place(name, format).mkdir(parents=True)
        export_lora(students[name], world.lora(name, format), format=format)
    return world
