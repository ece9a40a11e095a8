"""Students of notebook 05: the warm 2-step student goes on with a GAN term beside its DMD2."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from turbo_lab.errors import BadInput
from turbo_lab.recipes.distribution import RIVAL_UPDATES, calls_per_round
from turbo_lab.recipes.models import Family, Folder, Gan, Pairs, Profile, Rates, Recipe
from turbo_lab.recipes.warm import STEPS, warm
from turbo_lab.testbeds.photos import Place, folder_digest

START = "warm-second-0.5"
"""The student that all go on from, of the same seed: the best 2-step student before."""
CALLS: Mapping[Profile, int] = {"smoke": 1_000, "quick": 40_000, "paper": 600_000}
"""Network calls of this stage. Features of a critic are not counted, nor the teacher's samples on
its real side, which all share; the student's samples that it looks at are."""
PAIRS = {
    "smoke": Pairs(n=8, steps=4),
    "quick": Pairs(n=1024, steps=40),
    "paper": Pairs(n=4096, steps=40),
}
"""Samples of the guided teacher on a critic's real side, by profile."""
EYE = "7ec2ed4eb727"
"""Key of the mini-DINO, whose recipe stands above these in the package; a test holds them equal."""
TAPS_NOISE = (0.0, 0.2)
"""Times to which latents are noised before the taps of a network that has learnt to see noise."""


Looks = Literal["dino", "teacher", "fake", "pixels", "random"]


@dataclass(frozen=True, kw_only=True)
class Against:
    """The critic of a student.

    Args:
        title: for tables and figures.
        features: what the critic looks through.
        rho: share of real postcards on its real side; the rest is the teacher's.
        balance: of the gradients, see `turbo_lab.methods.gan.WithGan`.
        loss: of the game.
    """

    title: str
    features: Looks = "dino"
    rho: float = 0.5
    balance: float = 2.0
    loss: Literal["logistic", "hinge"] = "logistic"

    def gan(self, profile: Profile) -> Gan:
        """The GAN term of a stage."""
        return Gan(
            features=self.features,
            eye=EYE if self.features == "dino" else None,
            rho=self.rho,
            pairs=None if self.rho == 1 else PAIRS[profile],
            balance=self.balance,
            loss=self.loss,
            augment=("translation",),
            noise_range=TAPS_NOISE if self.features in ("teacher", "fake") else (0.0, 0.0),
        )


LOOKS: Mapping[Looks, str] = MappingProxyType(
    {
        "dino": "mini-DINO",
        "teacher": "taps of the teacher",
        "fake": "taps of the fake score",
        "pixels": "pixels",
        "random": "random ViT",
    }
)
"""What a critic may look through, and its title."""

# Chosen on captions of `select`, which no notebook reports on, by the looks that
# `turbo_lab.studies.turbo_choice` prints; LOG.md has them.
MAIN = Against(title="+ GAN")
TURBO = "turbo"
"""The student with the main critic: notebook 06 knows it as the whole recipe."""
AGAINST: Mapping[str, Against] = MappingProxyType(
    {
        TURBO: MAIN,
        "gan-teacher": replace(MAIN, features="teacher", title=LOOKS["teacher"]),
        "gan-fake": replace(MAIN, features="fake", title=LOOKS["fake"]),
        "gan-pixels": replace(MAIN, features="pixels", title=LOOKS["pixels"]),
        "turbo-random": replace(MAIN, features="random", title=LOOKS["random"]),
        "turbo-teacher-data": replace(MAIN, rho=0.0, title="rho 0"),
        **{f"gan-rho-{r:g}": replace(MAIN, rho=r, title=f"rho {r:g}") for r in (0.25, 0.75, 1.0)},
        "turbo-small": replace(MAIN, balance=0.125, title="balance 0.125"),
        **{
            f"gan-balance-{b:g}": replace(MAIN, balance=b, title=f"balance {b:g}") for b in (0.5, 8)
        },
        "gan-hinge": replace(MAIN, loss="hinge", title="hinge loss"),
    }
)
"""Students with a GAN term by family; the first is the main one, each other changes one thing.
Those called turbo are rungs of notebook 06 too."""
CONTROL = "gan-none"
"""The same start and as many calls, without a critic."""


def gan(profile: Profile, seed: int, *, name: str = TURBO) -> Recipe:
    """The warm student, and a stage of DMD2 with a GAN term, or without for the control.

    Its fake score goes on from that of the start. The rates are a fraction of those before: a
    student that moves as fast as in DMD2 outruns its critic, and learns to fool it instead of what
    it is shown. LOG.md has the looks.

    Args:
        profile: smoke, quick or paper.
        seed: of the training, and of the start's.
        name: of `AGAINST`, or `CONTROL`.
    """
    term = None if name == CONTROL else AGAINST[name].gan(profile)
    return going_on(warm(profile, seed, name=START), profile, name=name, term=term)


def going_on(start: Recipe, profile: Profile, *, name: str, term: Gan | None) -> Recipe:
    """A 2-step student that goes on by `CALLS` of DMD2, with a GAN term or without.

    Args:
        start: the student before, by DMD2 in its last stage.
        profile: smoke, quick or paper.
        name: of the recipe.
        term: the GAN term, if any.
    """
    last = start.stages[-1]
    per_round = calls_per_round(STEPS, RIVAL_UPDATES, critic=term is not None)
    rounds = max(2 * RIVAL_UPDATES, int(CALLS[profile] / (per_round * last.batch_size)))
    rates = {
        "student": Rates(lr=1e-4, betas=(0.0, 0.999), warmup=10, final=0.1),
        "fake": Rates(lr=5e-4, betas=(0.0, 0.999), warmup=10, final=0.1),
    }
    if term is not None:
        rates["critic"] = Rates(lr=5e-3, betas=(0.0, 0.99), warmup=10)
    stage = last.model_copy(
        update={"steps": rounds, "rates": rates, "gan": term, "rivals_from": "fake"}
    )
    return start.model_copy(update={"name": name, "stages": (stage,), "start": start})


def real_folder(path: str | Path, *, side: int | None = None, place: Place = "random") -> Folder:
    """Name a folder of photographs by its contents.

    Args:
        path: of the folder; png, jpg and webp files in it are used.
        side: pixels of the squares that are cut out and come to 32 by area; None for the shorter
            side of each picture.
        place: of the squares.

    Raises:
        BadInput: no such folder, no picture in it, or one that cannot be read or is too small.
    """
    digest = folder_digest(Path(path), side=side)
    return Folder(digest=digest, side=side, place=place, path=str(Path(path).absolute()))


def with_folder(recipe: Recipe, folder: Folder) -> Recipe:
    """The recipe with photographs where its critic saw real postcards.

    A recipe whose critic looks through a network that is told captions, as that of ``gan-teacher``,
    has none for a photograph: use ``turbo``, ``gan-pixels`` or ``turbo-random``.

    Raises:
        BadInput: no stage has a GAN term, or its critic asks for captions or shows no real side.
    """
    if not any(stage.gan for stage in recipe.stages):
        raise BadInput("recipe", recipe.name, "it has no GAN term that could look at photographs")
    stages = tuple(
        s.model_copy(update={"gan": _seeing(s.gan, folder)}) if s.gan else s for s in recipe.stages
    )
    return recipe.model_copy(update={"stages": stages})


def _seeing(gan: Gan, folder: Folder) -> Gan:
    changed = gan.model_copy(update={"folder": folder})
    changed.check_folder()
    return changed


def _family(steps: int, profile: Profile, seed: int, *, name: str) -> Recipe:
    if steps != STEPS:
        raise BadInput("steps", steps, f"choose {STEPS}")
    return gan(profile, seed, name=name)


_TITLES = {CONTROL: "no GAN, as many calls", **{name: a.title for name, a in AGAINST.items()}}

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        name: Family(title=title, eta=0.0, recipe=partial(_family, name=name))
        for name, title in _TITLES.items()
    }
)

RECIPES: Mapping[str, Callable[[Profile, int], Recipe]] = MappingProxyType(
    {name: partial(gan, name=name) for name in _TITLES}
)
