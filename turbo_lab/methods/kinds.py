"""What the methods share: the kind of player that learns, distances, and a teacher's step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor

from turbo_lab.errors import BadInput
from turbo_lab.field import Field
from turbo_lab.fit import Player
from turbo_lab.path import MAX_STEPS, expand, shift_time

HUBER = 0.00054
"""c of the pseudo-Huber distance per root of dimension (Song & Dhariwal 2023, section 3.3)."""


class TrainableField(Player, Protocol):
    """A velocity field that is also a player."""

    def __call__(self, x_t: Tensor, t: Tensor, c: Any) -> Tensor:
        """Return the velocity."""


def squared(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference per sample: ``[B, ...]`` -> ``[B]``."""
    return (a - b).square().flatten(1).mean(1)


def pseudo_huber(a: Tensor, b: Tensor) -> Tensor:
    """Pseudo-Huber distance per sample, ``sqrt(mean (a - b)^2 + c^2) - c`` -> ``[B]``.

    Song & Dhariwal 2023 (arXiv 2310.14189, eq. 9) divided by the root of the dimension, so that
    its size does not depend on the resolution.
    """
    return (squared(a, b) + HUBER**2).sqrt() - HUBER


DISTANCES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = MappingProxyType(
    {"l2": squared, "huber": pseudo_huber}
)


def euler(field: Field, x_t: Tensor, t: Tensor, u: Tensor, c: Any) -> Tensor:
    """One Euler step of a field from times t ``[B]`` to u ``[B]``: one evaluation."""
    return x_t + (expand(u, x_t) - expand(t, x_t)) * field(x_t, t, c)


def heun(field: Field, x_t: Tensor, t: Tensor, u: Tensor, c: Any) -> Tensor:
    """One step of Heun's second-order method from t ``[B]`` to u ``[B]``: two evaluations."""
    h = expand(u, x_t) - expand(t, x_t)
    v = field(x_t, t, c)
    return x_t + h / 2 * (v + field(x_t + h * v, u, c))


SOLVERS: Mapping[str, Callable[[Field, Tensor, Tensor, Tensor, Any], Tensor]] = MappingProxyType(
    {"euler": euler, "heun": heun}
)


def chosen(name: str, value: str, of: Mapping[str, Any]) -> None:
    """Raise BadInput unless ``value`` is one of the names in ``of``."""
    if value not in of:
        raise BadInput(name, value, f"choose one of {', '.join(of)}")


def check_steps(name: str, value: int, *, least: int = 1) -> None:
    """Raise BadInput unless ``value`` steps make a grid, see `turbo_lab.path.time_grid`."""
    if not least <= value <= MAX_STEPS:
        raise BadInput(name, value, f"use an integer from {least} to {MAX_STEPS}")


def check_training_times(mean: float, std: float, shift: float) -> None:
    """Raise BadInput unless these make times, see `turbo_lab.path.logit_normal_times`."""
    if not math.isfinite(mean):
        raise BadInput("time_mean", mean, "use a finite number")
    if not 0 < std < math.inf:
        raise BadInput("time_std", std, "use a finite number above 0")
    shift_time(0.5, shift)


def times_at(grid: Tensor, index: Tensor, like: Tensor) -> Tensor:
    """Times ``[B]`` of a grid at per-sample indices, on the device of ``like``."""
    return grid.to(like.device)[index.to(like.device)]


@torch.no_grad()
def walk(field: Field, x_t: Tensor, grid: Tensor, start: Tensor, stop: Tensor, c: Any) -> Tensor:
    """Euler steps of a field down a grid, each sample from its own start to its own stop index.

    Samples that have arrived are not forwarded again.

    Args:
        field: the field to follow.
        x_t: ``[B, ...]`` at the times ``grid[start]``.
        grid: falling times.
        start: ``[B]`` indices into the grid.
        stop: ``[B]`` indices, above start.
        c: condition, a tensor ``[B, ...]`` or None.
    """
    x, at = x_t.clone(), start.clone().to(x_t.device)
    stop = stop.to(x_t.device)
    while bool((going := at < stop).any()):
        rows = going.nonzero()[:, 0]
        t, u = times_at(grid, at[rows], x), times_at(grid, at[rows] + 1, x)
        x[rows] = euler(field, x[rows], t, u, c if c is None else c[rows])
        at[rows] += 1
    return x
