"""Which features see texture on real photographs? A small critic of each, asked elsewhere.

The critic is that of the GAN term, heads on frozen features, with photographs as its real side. It
learns from the left parts of `photo_textures` to tell true squares from altered ones, and is asked
about squares of the right parts: 0.5 is a guess, 1 is always right. None of these features has seen
a photograph before: the mini-DINO and the teacher know postcards alone.

The measure is the area under the ROC curve (AUC), the chance that a true square gets a higher logit
than an altered one (Hanley & McNeil 1982); its intervals are over critics and places together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from turbo_lab import claims as cl
from turbo_lab.adapters import Host
from turbo_lab.claims import Claim, Interval
from turbo_lab.critic import logistic
from turbo_lab.dino import dino_recipe
from turbo_lab.fit import Batch, Terms, Turn, fit
from turbo_lab.gan_pieces import LATENT, features_of
from turbo_lab.heads import Heads, spawn_heads
from turbo_lab.keys import key_of
from turbo_lab.lab import Lab
from turbo_lab.optimisers import Optimiser
from turbo_lab.postcards.captions import null_tokens
from turbo_lab.progress import progress
from turbo_lab.recipes import Gan
from turbo_lab.recipes.adversarial import LOOKS as ALL_LOOKS
from turbo_lab.recipes.adversarial import Looks
from turbo_lab.streams import Draw
from turbo_lab.studies.matching import claim_row
from turbo_lab.studies.photo_textures import (
    ALTERED,
    MATERIALS,
    NOTEBOOK,
    SOURCE,
    TRUE,
    asked,
    photograph,
)
from turbo_lab.testbeds.photos import Photos
from turbo_lab.testbeds.postcards import encode

LOOKS: Mapping[Looks, str] = MappingProxyType(
    {name: ALL_LOOKS[name] for name in ("pixels", "random", "dino", "teacher")}
)
"""Features, and their titles. The taps of a fake score begin as those of the teacher."""
TASKS = ("blurred", "phases scrambled")
BATCH = 16
"""Squares of either side in a step."""
RESAMPLES = 300


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much a profile does; the code is the same.

    Args:
        steps: of every critic.
        crops: squares of either side that it learns from.
        most: squares of a photograph's right part that it is asked about, at most.
        seeds: critics of each kind.
    """

    steps: int
    crops: int
    most: int
    seeds: int


BUDGETS: Mapping[str, Budget] = MappingProxyType(
    {
        "smoke": Budget(steps=4, crops=16, most=4, seeds=2),
        "quick": Budget(steps=100, crops=192, most=32, seeds=3),
        "paper": Budget(steps=1000, crops=2048, most=32, seeds=6),
    }
)

Tokens = tuple[Tensor, ...]
"""Of every tap, ``[n, N_k, D_k]``."""


@dataclass(frozen=True, kw_only=True)
class Told:
    """Logits of critics for the same places: ``[seeds, squares]`` true, and altered."""

    true: np.ndarray
    other: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What every critic said, by features and task, and the artefacts behind the features."""

    told: Mapping[tuple[Looks, str], Told]
    budget: Budget
    keys: tuple[str, ...]


# --- squares ------------------------------------------------------------------------------------


def learnt_from(how: str, n: int) -> Tensor:
    """Squares ``[n, 3, 32, 32]`` from anywhere in the left parts, as they are or altered."""
    parts = [photograph(name).reference for name in MATERIALS]
    altered = parts if how == TRUE else [ALTERED[how](part) for part in parts]
    draw = Draw(seed=0, step=0, total=n, stream=f"photographs/{how}")
    return Photos(pictures=tuple(altered), side=32).crops(draw)


def asked_about(how: str, most: int) -> Tensor:
    """Squares side by side of the right parts, spread over each; the same places for all."""
    parts = [asked(name, how) for name in MATERIALS]
    return torch.cat([part[:: -(-len(part) // most)] for part in parts])


# --- critics ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Telling:
    """Heads that learn to tell two sets of tokens apart, by the logistic loss of every vote."""

    heads: Heads
    true: Tokens
    other: Tokens

    @property
    def players(self) -> Mapping[str, Heads]:
        """The heads are the only player."""
        return {"critic": self.heads}

    def turns(self) -> Sequence[Turn]:
        """One turn."""
        return (Turn(name="critic", loss=self.loss, moves=("critic",)),)

    def loss(self, batch: Batch, draw: Draw) -> Terms:
        """Terms per row ``[B]``; ``batch.x [B, 2]`` are rows of either side."""
        n = len(batch.x)
        both = zip(self.true, self.other, strict=True)
        votes = self.heads([torch.cat([a[batch.x[:, 0]], b[batch.x[:, 1]]]) for a, b in both], None)
        return {k: v.mean(1) for k, v in logistic(votes[:n], votes[n:]).items()}

    def batches(self, draw: Draw) -> Batch:
        """Rows of either side, drawn anew in every step."""
        rows = [draw.integers(n, len(of[0])) for n, of in (("a", self.true), ("b", self.other))]
        return Batch(torch.stack(rows, dim=1), None)


def trained_heads(true: Tokens, other: Tokens, *, steps: int, seed: int) -> Heads:
    """Train heads to tell two sets of tokens apart, at the rates of the GAN term's critic."""
    heads = spawn_heads([tokens.shape[-1] for tokens in true], seed=seed)
    telling = Telling(heads=heads, true=true, other=other)
    optimisers = {"critic": Optimiser(lr=5e-3, betas=(0.0, 0.99), warmup=10)}
    run = fit(
        telling, telling.batches, steps=steps, batch_size=BATCH, seed=seed, optimisers=optimisers
    )
    for _ in run:
        pass
    return heads


def answers(lab: Lab, budget: Budget, *, seed: int = 0) -> Answers:
    """Train a critic for every kind of features, task and seed, and ask it elsewhere.

    Args:
        lab: with the teacher, and the store of the mini-DINO.
        budget: of the critics.
        seed: of the first critic.
    """
    pictures = {how: learnt_from(how, budget.crops) for how in (TRUE, *TASKS)}
    questions = {how: asked_about(how, budget.most) for how in (TRUE, *TASKS)}
    told: dict[tuple[Looks, str], Told] = {}
    with progress(len(LOOKS), "critics of photographs") as tick:
        for done, looks in enumerate(LOOKS, start=1):
            rows = []
            for k in range(seed, seed + budget.seeds):
                if k == seed or looks == "random":  # the other features have no seed
                    known, new = (
                        {how: tokens_of(lab, looks, images, k) for how, images in some.items()}
                        for some in (pictures, questions)
                    )
                rows.append([_asked(known, new, task, budget.steps, k) for task in TASKS])
            for task, of in zip(TASKS, zip(*rows, strict=True), strict=True):
                true, other = (np.stack(side) for side in zip(*of, strict=True))
                told[looks, task] = Told(true=true, other=other)
            tick(done, LOOKS[looks])
    keys = (lab.artefact.key, key_of(dino_recipe().spec()))
    return Answers(told=told, budget=budget, keys=keys)


def _asked(
    known: Mapping[str, Tokens], new: Mapping[str, Tokens], task: str, steps: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Logits ``[squares]`` for the true and the altered squares that a critic never saw."""
    heads = trained_heads(known[TRUE], known[task], steps=steps, seed=seed)
    with torch.no_grad():
        true, other = (heads(new[how], None).mean(1).numpy() for how in (TRUE, task))
    return true, other


def tokens_of(lab: Lab, looks: Looks, images: Tensor, seed: int) -> Tokens:
    """Tokens of images ``[n, 3, 32, 32]``; clean, under the null caption where one is asked."""
    host = Host(lab.testbed.net, part="transformer")
    features = features_of(
        Gan(features=looks, rho=1.0, weight=1.0),
        players={"teacher": host.bare},
        store=lab.store,
        seed=seed,
        device="cpu",
    )
    parts = []
    with torch.no_grad():  # not above: a mini-DINO that is nowhere is trained now
        for some in images.split(128):
            x = encode(some) if looks in LATENT else some
            parts.append(features(x, torch.zeros(len(x)), null_tokens(len(x))))
    return tuple(torch.cat(taps) for taps in zip(*parts, strict=True))


# --- how often they are right -------------------------------------------------------------------


def auc(true: np.ndarray, other: np.ndarray) -> float:
    """Area under the ROC curve of every critic ``[seeds, squares]``, averaged over critics.

    Critics are not pooled: their logits have no common zero.
    """
    gap = true[:, :, None] - other[:, None, :]
    return float(((gap > 0) + 0.5 * (gap == 0)).mean())


def right(of: Answers, looks: Looks, task: str) -> Interval:
    """AUC with its interval over critics and places."""
    told = of.told[looks, task]
    return cl.crossed_bootstrap(told.true, told.other, statistic=auc, resamples=RESAMPLES)


def better(of: Answers, one: Looks, other: Looks) -> Interval:
    """AUC with some features minus that with others, averaged over tasks, paired by place."""
    pairs = [of.told[looks, task] for task in TASKS for looks in (one, other)]
    rows = [side for told in pairs for side in (told.true, told.other)]

    def statistic(*sides: np.ndarray) -> float:
        areas = [auc(true, of) for true, of in zip(sides[::2], sides[1::2], strict=True)]
        return float(np.mean(areas[::2]) - np.mean(areas[1::2]))

    return cl.crossed_bootstrap(*rows, statistic=statistic, resamples=RESAMPLES)


def table(of: Answers) -> pd.DataFrame:
    """AUC in long form: ``features, task, value, low, high``."""
    return pd.DataFrame(
        [
            {"features": looks, "task": task, **vars(right(of, looks, task))}
            for looks, task in of.told
        ]
    )


def wide(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per kind of features, one column per task, as ``value [low, high]``."""
    texts = rows.assign(
        text=[f"{r.value:.2f} [{r.low:.2f}, {r.high:.2f}]" for r in rows.itertuples()]
    )
    shown = texts.pivot(index="features", columns="task", values="text")
    return shown.loc[list(LOOKS), list(TASKS)].rename(index=dict(LOOKS))


def claims(of: Answers, *, profile: str) -> list[Claim]:
    """Whether a critic on the mini-DINO tells photographs from altered ones, and beats others."""
    asked_of = "AUC on the right parts of four photographs"
    rows = [
        claim_row(f"T-dino-{short}", f"a critic on the mini-DINO sees {task} photographs",
                  asked_of, right(of, "dino", task), "above", 0.5)
        for short, task in zip(("blur", "phases"), TASKS, strict=True)
    ]  # fmt: skip
    others: Mapping[Looks, str] = {"random": "a random ViT", "pixels": "pixels"}
    rows += [
        claim_row(f"T-dino-{other}", f"on photographs, the mini-DINO tells more than {title}",
                  f"{asked_of}, both tasks, minus that with {title}", better(of, "dino", other),
                  "above", 0)
        for other, title in others.items()
    ]  # fmt: skip
    n = of.told["dino", TASKS[0]].true.shape[1]
    common: dict[str, Any] = {"notebook": NOTEBOOK, "source": SOURCE, "profile": profile}
    return [
        Claim(**row, **common, samples=n, seeds=of.budget.seeds, artefact_keys=of.keys)
        for row in rows
    ]
