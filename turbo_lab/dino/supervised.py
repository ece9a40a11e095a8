"""The supervised ceiling: the backbone of the mini-DINO, trained on the labels it is probed for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from turbo_lab.atomic import atomic_write_text, save_tensors
from turbo_lab.cpu import tune_allocator
from turbo_lab.dino.net import VitSize, load_vit, spawn_vit
from turbo_lab.fit import Batch, Player, Record, Saving, Turn, fit
from turbo_lab.history import TrainingHistory
from turbo_lab.postcards import HUE_MODES, Scenes, draw_scenes, render
from turbo_lab.postcards.captions import ARMS, GROUNDS, LEGS
from turbo_lab.progress import progress
from turbo_lab.recipes import WORLD, Profile, Rates
from turbo_lab.store import Checkpoints, Store
from turbo_lab.streams import Draw, seed_for

TARGETS: Mapping[str, int] = {
    "ground": len(GROUNDS),
    "arms": len(ARMS),
    "legs": len(LEGS),
    "first digit": 10,
    "second digit": 10,
    "hue": len(HUE_MODES),
}
"""What a network is asked about a postcard, and how many answers there are."""

STEPS: Mapping[Profile, int] = {"smoke": 8, "quick": 1800, "paper": 18_000}
BATCH: Mapping[Profile, int] = {"smoke": 8, "quick": 48, "paper": 256}


def labels(scenes: Scenes) -> Tensor:
    """The answers ``[B, 6]`` long, one column per target."""
    arms, legs, ground, tens, units = scenes.fields.unbind(1)
    return torch.stack([ground, arms, legs, tens, units, scenes.hue_mode], dim=1)


class CeilingRecipe(BaseModel):
    """Backbone and budget of the supervised ceiling."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = "dino-ceiling"
    world: int = WORLD
    seed: int = Field(0, ge=0)
    vit: VitSize = VitSize()
    steps: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    rates: Rates

    @property
    def artefact(self) -> str:
        """Name of the artefact in the store."""
        return f"postcards/{self.name}"

    def spec(self) -> dict[str, Any]:
        """What the key of the artefact is made of."""
        return self.model_dump(mode="json")


def ceiling_recipe(profile: Profile = "quick") -> CeilingRecipe:
    """Return the recipe of the ceiling: about the compute of the mini-DINO."""
    steps = STEPS[profile]
    rates = Rates(lr=1.5e-3, weight_decay=0.02, warmup=min(100, steps // 4), final=0.03)
    return CeilingRecipe(steps=steps, batch_size=BATCH[profile], rates=rates)


class Reader(nn.Module):
    """The backbone, and one linear layer on class token and mean patch token for all targets."""

    def __init__(self, vit: Any, width: int) -> None:
        super().__init__()
        self.vit = vit
        self.answers = nn.Linear(2 * width, sum(TARGETS.values()))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return logits ``[B, answers]`` per target for pictures ``[B, 3, 32, 32]``."""
        tokens = self.vit.forward_features(x)
        seen = torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], dim=1)
        return self.answers(seen).split(list(TARGETS.values()), dim=1)


@dataclass(frozen=True, kw_only=True)
class Supervised:
    """Cross-entropy of every target, summed: ordinary supervised training."""

    student: Reader

    @property
    def players(self) -> Mapping[str, Player]:
        """One player: the student."""
        return {"student": self.student}

    def turns(self) -> Sequence[Turn]:
        """One turn per round."""
        return (Turn(name="labels", loss=self.loss, moves=("student",)),)

    def loss(self, batch: Batch, draw: Draw) -> dict[str, Tensor]:
        """One term per target, per sample ``[B]``; ``batch.c`` are labels ``[B, 6]``."""
        said = self.student(batch.x)
        return {
            name: cross_entropy(logits, right, reduction="none")
            for name, logits, right in zip(TARGETS, said, batch.c.unbind(1), strict=True)
        }


def ceiling(recipe: CeilingRecipe, *, store: Store | None = None) -> Any:
    """Return the backbone trained on labels, from the store or trained now."""
    store = store or Store.default()
    make = partial(_make, recipe, store)
    artefact = store.get_or_make(recipe.artefact, recipe.spec(), make)
    return load_vit(recipe.vit, artefact.tensors())


def _labelled(draw: Draw, *, seed: int) -> Batch:
    first = draw.step * draw.total
    stop = draw.total if draw.stop is None else draw.stop
    scenes = draw_scenes("train", range(first + draw.start, first + stop), seed=seed)
    return Batch(render(scenes), labels(scenes))


def _reader(recipe: CeilingRecipe) -> Reader:
    vit = spawn_vit(recipe.vit, recipe.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(recipe.seed, "answers"))
        return Reader(vit, recipe.vit.width)


def _make(recipe: CeilingRecipe, store: Store, folder: Path) -> None:
    tune_allocator()
    work = store.workdir(recipe.artefact, recipe.spec())
    reader = _reader(recipe)
    lines = TrainingHistory(work / "history.jsonl", stage=1)
    with progress(recipe.steps, f"training {recipe.name}", delay=1) as tick:
        for record in _fit(recipe, reader, Saving(checkpoints=Checkpoints(folder=work))):
            lines.add(record, last=record.step == recipe.steps)
            tick(record.step, f"loss {sum(record.terms.values()):.3f}")
    weights = {k: v.detach().half() for k, v in reader.vit.state_dict().items()}
    save_tensors(folder, "weights.safetensors", weights)
    atomic_write_text(folder / "history.jsonl", lines.text())


def _fit(recipe: CeilingRecipe, reader: Reader, saving: Saving) -> Iterator[Record]:
    return fit(
        Supervised(student=reader),
        partial(_labelled, seed=recipe.seed),
        steps=recipe.steps,
        batch_size=recipe.batch_size,
        seed=recipe.seed,
        optimisers={"student": recipe.rates.optimiser()},
        saving=saving,
    )
