"""Points: distance to the modes, the exact map, and its l2-optimal blurred versions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from turbo_lab.atomic import save_tensors
from turbo_lab.claims import wilson
from turbo_lab.errors import BadInput
from turbo_lab.point_students import path_end, sampled
from turbo_lab.recipes import Profile
from turbo_lab.store import Store
from turbo_lab.streams import noise
from turbo_lab.testbeds.points import WITHIN_3_SIGMA, points

WORLDS = ("ring8", "grid25", "rare")
"""Mixtures whose modes do not overlap, so that `PERFECT` holds."""
PERFECT = 1 - WITHIN_3_SIGMA
"""Share of exact data outside 3 sigma of every mode, 0.0111."""
REACH = 5.0
"""Half width of the square of noise on which the exact map is known."""

EXACT_STEPS = (1, 2, 4, 8, 16, 32, 64)
"""Euler steps of the exact field."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much a profile measures; the code is the same.

    Attributes:
        profile: whose students are trained.
        seeds: students per method.
        samples: points per student and number of steps, and per exact map.
        spacing: of the square lattice of noise for the exact map.
        resolutions: h of the maps of finite resolution; 0, or between spacing and 1.
    """

    profile: Profile
    seeds: int
    samples: int
    spacing: float
    resolutions: tuple[float, ...]


BUDGETS: Mapping[Profile, Budget] = MappingProxyType(
    {
        "smoke": Budget(
            profile="smoke", seeds=1, samples=64, spacing=0.25, resolutions=(0, 0.25, 0.5, 1)
        ),
        "quick": Budget(
            profile="quick",
            seeds=3,
            samples=2048,
            spacing=0.05,
            resolutions=(0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1),
        ),
        "paper": Budget(
            profile="paper",
            seeds=6,
            samples=8192,
            spacing=0.025,
            resolutions=(
                0,
                0.025,
                0.05,
                0.1,
                0.15,
                0.2,
                0.25,
                0.3,
                0.4,
                0.5,
                0.6,
                0.7,
                0.8,
                0.9,
                1,
            ),
        ),
    }
)


class ExactMap(NamedTuple):
    """Ends x_T ``[G, G, 2]`` of the exact paths from a lattice of noise with this axis ``[G]``."""

    axis: Tensor
    ends: Tensor
    key: str


def exact_map(world: str, spacing: float, store: Store | None = None) -> ExactMap:
    """Return the exact map of a mixture on a lattice, float64, from the store or computed now."""
    axis = lattice(spacing)

    def make(folder: Path) -> None:
        ends = path_end(points(world).teacher, torch.cartesian_prod(axis, axis))
        save_tensors(folder, "map.safetensors", {"ends": ends})

    spec = {"world": world, "spacing": spacing, "reach": REACH, "version": 1}
    artefact = (store or Store.default()).get_or_make("points/exact-map", spec, make)
    ends = artefact.tensors("map.safetensors")["ends"].view(len(axis), len(axis), 2)
    return ExactMap(axis, ends, artefact.key)


@dataclass(frozen=True, kw_only=True)
class OptimalMaps:
    """What no training can beat: the l2-optimal maps of one mixture, at the same noise.

    Attributes:
        world: the mixture.
        z: ``[n, 2]`` noise.
        blurred: resolution h to ``f_h(z)``, see `blurred`; h = 0 is the exact map.
        euler: N to the ends of N Euler steps of the exact field; N = 1 is the mean of the data.
        key: of the exact map in the store.
    """

    world: str
    z: Tensor
    blurred: Mapping[float, Tensor]
    euler: Mapping[float, Tensor]
    key: str

    @property
    def table(self) -> pd.DataFrame:
        """Share outside 3 sigma of every mode, with Wilson intervals.

        Columns ``map`` ("resolution" or "euler"), ``at`` (h or N), ``value``, ``low``, ``high``.
        """
        kinds = {"resolution": self.blurred, "euler": self.euler}
        rows = [
            {"map": kind, "at": float(at), **_interval(outside(self.world, x))}
            for kind, maps in kinds.items()
            for at, x in maps.items()
        ]
        return pd.DataFrame(rows)

    def resolution(self, share: float) -> float:
        """The h at which the optimal map leaves this share outside, linear between those known."""
        rows = self.table.query("map == 'resolution'").sort_values("at")
        return float(np.interp(share, np.maximum.accumulate(rows["value"]), rows["at"]))


def optimal_maps(
    budget: Budget, *, world: str = "ring8", seed: int = 0, store: Store | None = None
) -> OptimalMaps:
    """Compute the l2-optimal maps without a network.

    Raises:
        BadInput: a world whose modes overlap.
    """
    check_world(world)
    teacher = points(world).teacher
    z = noise((2,), seed=seed, stream="z", indices=range(budget.samples))
    axis, ends, key = exact_map(world, budget.spacing, store)
    exact = path_end(teacher, z.double())
    n = budget.samples
    return OptimalMaps(
        world=world,
        z=z,
        blurred={h: exact if h == 0 else blurred(axis, ends, z, h) for h in budget.resolutions},
        euler={k: sampled(teacher, steps=k, eta=0, n=n, seed=seed) for k in EXACT_STEPS},
        key=key,
    )


def lattice(spacing: float) -> Tensor:
    """Coordinates from -REACH to REACH, float64."""
    n = round(REACH / spacing)
    return spacing * torch.arange(-n, n + 1, dtype=torch.float64)


def blurred(axis: Tensor, ends: Tensor, z: Tensor, h: float) -> Tensor:
    r"""The l2-optimal map of a student that sees its noise through a resolution h.

    The path from noise z' ends at x_T(z'). A student that is told
    :math:`z = \sqrt{1 - h^2}\, z' + h\, \xi`, again N(0, I), can do no better in l2 than

    .. math:: f_h(z) = E[x_T(z') \mid z]
              = E_\zeta\, x_T\big(\sqrt{1 - h^2}\, z + h\, \zeta\big), \quad \zeta \sim N(0, I)

    since z' given z is :math:`N(\sqrt{1 - h^2}\, z, h^2 I)`. This is the Ornstein-Uhlenbeck
    smoothing of x_T: its slope is at most about 1/h times the height of a jump. The expectation
    is a sum over the lattice; Gauss-Hermite nodes would converge slowly across the jumps of x_T
    and would ask for x_T where it is not known.

    Args:
        axis: ``[G]`` evenly spaced coordinates of the lattice.
        ends: ``[G, G, 2]`` x_T on it.
        z: ``[n, 2]`` where to evaluate.
        h: from the spacing of the lattice to 1; 1 is the mean of the data.

    Returns:
        ``[n, 2]`` float64.

    Raises:
        BadInput: h outside its range.
    """
    spacing = float(axis[1] - axis[0])
    if not spacing * (1 - 1e-9) <= h <= 1:
        raise BadInput("h", h, f"use 0 (the exact map) or a number from {spacing:g} to 1")
    centre = (1 - h**2) ** 0.5 * z.double()
    logits = -(((centre[..., None] - axis) / h) ** 2) / 2  # [n, 2, G]
    across, along = logits.softmax(-1).unbind(1)
    return torch.einsum("na,nad->nd", across, torch.einsum("nb,abd->nad", along, ends))


def sigmas(world: str, x: Tensor) -> Tensor:
    """Distance of samples ``[n, 2]`` to the nearest mode, in its standard deviations, ``[n]``."""
    teacher = points(world).teacher
    return (torch.cdist(x.double(), teacher.means) / teacher.stds).amin(1)


def outside(world: str, x: Tensor) -> Tensor:
    """Tell which samples ``[n, 2]`` lie outside 3 sigma of every mode, ``[n]`` bool."""
    return sigmas(world, x) > 3


def check_world(world: str) -> None:
    """Raise BadInput unless the modes of this world do not overlap."""
    if world not in WORLDS:
        raise BadInput("world", world, f"choose one of {', '.join(WORLDS)}")


def _interval(flags: Tensor) -> dict[str, float]:
    found = wilson(int(flags.sum()), len(flags))
    return {"value": found.value, "low": found.low, "high": found.high}
