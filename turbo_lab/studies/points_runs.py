"""Points: which DMD2 students part A of notebook 03 trains, and on which budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from turbo_lab.point_students import rival_recipe, trained
from turbo_lab.progress import progress
from turbo_lab.recipes import Profile
from turbo_lab.recipes.models import Option
from turbo_lab.store import Store
from turbo_lab.studies.points_budget import PointBudget, PointRun
from turbo_lab.studies.points_plane import PlaneBudget
from turbo_lab.studies.points_tilt import TiltBudget

WORLDS = ("ring8", "grid25", "rare")
LAGS = (1, 2, 5, 10)
"""Updates of the fake for each of the student's; 5 is the plain student's."""
LITTLE_NOISE = (0.02, 0.3)
ROLLOUT_WORLDS = ("grid25", "rare")

VARIANTS: Mapping[str, Mapping[str, Option]] = MappingProxyType(
    {
        "plain": {},
        "little noise": {"noise_range": LITTLE_NOISE},
        "forward": {"rollout": "forward"},
        **{f"rivals-{k}": {"rival_updates": k} for k in LAGS if k != 5},
    }
)
"""Options of DMD2 by which students differ."""
TITLES: Mapping[str, str] = MappingProxyType(
    {
        "plain": "as usual",
        "little noise": f"compared at t < {LITTLE_NOISE[1]:g}",
        "forward": "noised data, not own states",
        "rivals-1": "1 update of the fake",
        **{f"rivals-{k}": f"{k} updates of the fake" for k in LAGS if k not in (1, 5)},
    }
)
"""Of `VARIANTS`, in tables."""


class Key(NamedTuple):
    """What a student is: variant, world and steps."""

    variant: str
    world: str
    steps: int


WANTED = (
    *(Key("plain", world, steps) for world in WORLDS for steps in (1, 2)),
    Key("little noise", "rare", 1),
    *(Key(variant, "rare", 1) for variant in VARIANTS if variant.startswith("rivals")),
    *(Key("forward", world, 2) for world in ROLLOUT_WORLDS),
)


@dataclass(frozen=True, kw_only=True)
class Budget(PointBudget):
    """How much a profile trains and measures; the code is the same.

    Attributes:
        floors: sets of exact data that are measured for comparison.
        plane: of the alpha-beta plane.
        tilt: of the guided teacher.
    """

    floors: int
    plane: PlaneBudget
    tilt: TiltBudget


BUDGETS: Mapping[Profile, Budget] = MappingProxyType(
    {
        "smoke": Budget(
            profile="smoke", seeds=1, samples=64, floors=1,
            plane=PlaneBudget(profile="smoke", seeds=1, steps=2, batch_size=16, centres=16),
            tilt=TiltBudget(seeds=1, base_steps=2, rounds=2, batch_size=16),
        ),
        "quick": Budget(
            profile="quick", seeds=3, samples=4096, floors=8,
            plane=PlaneBudget(profile="quick", seeds=3, steps=400),
            tilt=TiltBudget(seeds=3, base_steps=1000, rounds=2000),
        ),
        "paper": Budget(
            profile="paper", seeds=6, samples=16_384, floors=8,
            plane=PlaneBudget(
                profile="paper", seeds=6, steps=1500,
                grid=(-0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5),
            ),
            tilt=TiltBudget(seeds=6, base_steps=4000, rounds=6000),
        ),
    }
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Run(PointRun):
    """One training."""

    key: Key
    seed: int

    @property
    def clouds(self) -> dict[int, Tensor]:
        """Samples ``[CLOUD, 2]`` of the averaged student on the way, by round."""
        found = self.artefact.tensors("clouds.safetensors")
        return {int(name): x.float() for name, x in sorted(found.items(), key=lambda i: int(i[0]))}

    @property
    def rounds(self) -> int:
        """Rounds of the training: updates of the fake."""
        return self.recipe.stages[-1].steps


@dataclass(frozen=True, kw_only=True)
class Runs:
    """All trainings of part A with a learned fake.

    Attributes:
        budget: they were trained with.
        runs: key to one run per seed.
        seed: of the sampling noise.
    """

    budget: Budget
    runs: Mapping[Key, tuple[Run, ...]]
    seed: int = 0

    @cached_property
    def samples(self) -> Mapping[Key, Tensor]:
        """Samples of the finished students, ``[seeds, samples, 2]``."""
        n, seed = self.budget.samples, self.seed
        return {
            key: torch.stack([run.samples(n, seed=seed) for run in runs])
            for key, runs in self.runs.items()
        }

    @property
    def keys(self) -> tuple[str, ...]:
        """Artefact keys."""
        return tuple(sorted({run.artefact.key for runs in self.runs.values() for run in runs}))


def training_runs(
    budget: Budget, *, seed: int = 0, store: Store | None = None, fresh: bool = False
) -> Runs:
    """Train (or find) every student that has a learned fake.

    Student and fake start as one network fitted to the exact velocity; the teacher is the exact
    mixture. All students have the same network calls to spend.

    Args:
        budget: one of `BUDGETS`.
        seed: of the noise that finished students are sampled from.
        store: where artefacts are.
        fresh: train again.
    """
    wanted = [(key, k) for key in WANTED for k in range(budget.seeds)]
    runs: dict[Key, tuple[Run, ...]] = {}
    with progress(len(wanted), "DMD2 on points") as tick:
        for done, (key, k) in enumerate(wanted):
            tick(done, f"{key.world}, {key.variant}, {key.steps} steps, seed {k}")
            recipe = rival_recipe(
                steps=key.steps, profile=budget.profile, seed=k, world=key.world,
                options=VARIANTS[key.variant],
            )  # fmt: skip
            artefact = trained(recipe, store=store, fresh=fresh)
            run = Run(key=key, seed=k, recipe=recipe, artefact=artefact)
            runs[key] = (*runs.get(key, ()), run)
    return Runs(budget=budget, runs=runs, seed=seed)
