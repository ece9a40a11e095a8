"""Points: what the students of any study are trained and measured by, and one of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import pandas as pd
from torch import Tensor

from turbo_lab.point_students import PointRecipe, load, stage_samples
from turbo_lab.recipes import Profile
from turbo_lab.store import Artefact


@dataclass(frozen=True, kw_only=True)
class PointBudget:
    """How much a profile trains and measures; the code is the same.

    Attributes:
        profile: whose students are trained.
        seeds: trainings of each student.
        samples: points per student at the end.
    """

    profile: Profile
    seeds: int
    samples: int


def budgets(*, quick: int, paper: int) -> Mapping[Profile, PointBudget]:
    """Return the budget of every profile, with so many points per student at the end."""
    return MappingProxyType(
        {
            "smoke": PointBudget(profile="smoke", seeds=1, samples=64),
            "quick": PointBudget(profile="quick", seeds=3, samples=quick),
            "paper": PointBudget(profile="paper", seeds=6, samples=paper),
        }
    )


@dataclass(frozen=True, kw_only=True)
class PointRun:
    """One training."""

    recipe: PointRecipe
    artefact: Artefact

    @property
    def history(self) -> pd.DataFrame:
        """``round`` and the terms that the method watches, such as ``student/g_norm``."""
        return pd.DataFrame(self.artefact.json("history.json"))

    def samples(self, n: int, *, seed: int) -> Tensor:
        """Samples ``[n, 2]`` of the finished student; number i from the same noise everywhere."""
        field = load(self.recipe, self.artefact)
        return stage_samples(self.recipe.stages[-1], field, n=n, seed=seed)
