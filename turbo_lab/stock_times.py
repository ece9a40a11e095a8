"""How a student is sampled, in the words of diffusers' stock scheduler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from turbo_lab.errors import BadInput
from turbo_lab.path import grid_from_times, time_grid
from turbo_lab.schedules import Schedule, fixed, scheduler_config

TOLERANCE = 1e-6
"""Between a student's times and a scheduler's: float32 and no more."""
_ANY = 1024  # image tokens; a fixed shift does not look at them


class Trained(Protocol):
    """A stage of a recipe, on any testbed."""

    @property
    def method(self) -> str:
        """Name in `turbo_lab.methods.METHODS`."""

    @property
    def options(self) -> Mapping[str, Any]:
        """Of the method."""


def student_times(stage: Trained, steps: int | None = None) -> tuple[float, ...]:
    """Return the times at which the student of a stage is sampled, without the closing 0.

    Args:
        stage: the last of its recipe.
        steps: where the method leaves the number open; else it must be the student's or None.

    Raises:
        BadInput: the student has another number of steps, or any, and none is given.
    """
    options = stage.options
    shift = float(options.get("shift", 1.0))
    if options.get("times"):
        times = tuple(options["times"])
    elif options.get("edges"):
        times = (1.0, *sorted(options["edges"], reverse=True))
    elif stage.method == "progressive":
        # As turbo_lab.methods.progressive.Progressive.edges: points of the teacher's grid.
        n, of = int(options["steps"]), int(options["teacher_steps"])
        own = options.get("teacher_times")
        grid = grid_from_times(own) if own else time_grid(of, shift=shift)
        times = tuple(grid[(k * of + n // 2) // n].item() for k in range(n))
    elif "steps" in options:
        times = tuple(time_grid(int(options["steps"]), shift=shift)[:-1].tolist())
    elif steps is None:
        raise BadInput("steps", None, "this student is for any number of steps; choose one")
    else:
        times = tuple(time_grid(steps, shift=shift)[:-1].tolist())
    if steps is not None and steps != len(times):
        raise BadInput("steps", steps, f"this student has {len(times)}")
    return times


def student_eta(stage: Trained) -> float:
    """Return eta of the student's sampler: consistency of one phase renoises, the others do not."""
    renoises = stage.method in ("consistency", "continuous") and not stage.options.get("edges")
    return 1.0 if renoises else float(stage.options.get("eta", 0.0))


def settings_for(times: Sequence[float]) -> Schedule | None:
    r"""Return the shift and terminal by which a stock scheduler visits exactly these times.

    In n steps it visits ``t_k = shift_time(1 - k / n, s)``, then stretched so that the last is the
    terminal. Stretching keeps ``ρ = (1 - t_1) / (1 - t_{n-1})``, and the shift with this ratio is

    .. math:: s = 1 + \frac{n\,(1 - \rho\,(n-1))}{\rho\,(n-1)^2 - 1}

    So every student of one or two steps has its settings, one of three if 1/4 < ρ < 1, and of
    more than three only if its times were made by a shift and a terminal.

    Args:
        times: falling from 1, without the closing 0.

    Returns:
        Settings for this number of steps; None where no shift and terminal give the times.
    """
    n = len(times)
    if times[0] != 1.0:
        return None
    shift = _shift(times)
    if shift is None:
        return None
    # Two steps have both set, as Wuli's; else a terminal only where it is needed, as Lightning's.
    plain, stretched = fixed(shift), fixed(shift, terminal=times[-1])
    tried = {1: (plain,), 2: (stretched,)}.get(n, (plain, stretched))
    return next((settings for settings in tried if _visits(settings, times)), None)


def _visits(settings: Schedule, times: Sequence[float]) -> bool:
    try:
        visited = settings.grid(len(times), _ANY)
    except BadInput:  # a shift so large or small that its times do not fall
        return False
    return torch.allclose(visited, grid_from_times(times), rtol=0, atol=TOLERANCE)


def _shift(times: Sequence[float]) -> float | None:
    n, last = len(times), times[-1]
    if n == 1:
        return 1.0
    if n == 2:  # the shift that needs no stretching
        return last / (1 - last)
    rho = (1 - times[1]) / (1 - last)
    below = rho * (n - 1) ** 2 - 1
    shift = 1 + n * (1 - rho * (n - 1)) / below if below else 0.0
    return shift if shift > 0 else None


def stock_config(times: Sequence[float], eta: float) -> dict[str, Any]:
    """Return ``scheduler_config.json`` for a ``FlowMatchEulerDiscreteScheduler``.

    Where no settings give the times, it changes no time, and they have to be handed to the
    pipeline as ``sigmas``. A scheduler that renoises draws from PyTorch's global generator.

    Raises:
        BadInput: eta is neither 0 nor 1, or one of several steps begins at t = 0.
    """
    if eta not in (0.0, 1.0):
        raise BadInput("eta", eta, "a stock scheduler takes Euler steps (0) or renoises (1)")
    settings = settings_for(times) or fixed(1.0)
    return {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        **scheduler_config(settings),
        "stochastic_sampling": eta == 1.0 and len(times) > 1,
    }
