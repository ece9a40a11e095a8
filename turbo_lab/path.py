"""The straight path between data and noise, and the times a sampler visits on it.

Conventions, used in the whole package: t = 0 is data, t = 1 is noise, and

    x_t = (1 - t) x + t z        v = z - x        x clean, z noise, x_t mixed, u the next time
    x̂ = x_t - t v                ẑ = x_t + (1 - t) v              score = -ẑ / t

Times are a number or ``[B]``, images ``[B, ...]``. Times keep float32 precision: half precision
inputs give float32 results, because bfloat16 cannot tell 0.7155 from 0.7148.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from turbo_lab.errors import BadInput

Time = Tensor | float
_T = TypeVar("_T", float, Tensor)

MAX_STEPS = 1000
FEW_STEPS = 8
LOW_TERMINAL = 0.05


class TerminalWarning(UserWarning):
    """A many-step terminal stretch is applied to a few-step grid."""


# --- the path -----------------------------------------------------------------------------------


def expand(t: Time, x: Tensor) -> Tensor:
    """Shape times for arithmetic with images: ``t`` (number or ``[B]``) -> ``[B or 1, 1, ...]``.

    The result is on the device of ``x``, in its dtype or float32, whichever is wider.

    Raises:
        BadInput: ``t`` has more than one axis, or neither 1 nor B entries.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    t = torch.as_tensor(t, dtype=dtype, device=x.device)
    if t.ndim > 1 or (t.ndim == 1 and t.shape[0] not in (1, *x.shape[:1])):
        raise BadInput("t", tuple(t.shape), f"times are one number or [B] with B = {len(x)}")
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim))


def mix(x: Tensor, z: Tensor, t: Time) -> Tensor:
    """Mix data and noise: ``x_t = (1 - t) x + t z``, t in [0, 1]."""
    t = expand(t, x)
    return (1 - t) * x + t * z


def velocity(x: Tensor, z: Tensor) -> Tensor:
    """Return the velocity of the straight path: ``v = dx_t/dt = z - x``."""
    return z - x


def split(x_t: Tensor, v: Tensor, t: Time) -> tuple[Tensor, Tensor]:
    """Read data and noise off a velocity: ``x̂ = x_t - t v``, ``ẑ = x_t + (1 - t) v``.

    It inverts ``mix``: ``split(mix(x, z, t), velocity(x, z), t) == (x, z)``.
    """
    t = expand(t, x_t)
    return x_t - t * v, x_t + (1 - t) * v


def score(x_t: Tensor, v: Tensor, t: Time) -> Tensor:
    """Return the score ``∇ log p_t(x_t) = -ẑ / t``, t in (0, 1]; it is not finite at t = 0."""
    _, z_hat = split(x_t, v, t)
    return -z_hat / expand(t, x_t)


def step(
    x_t: Tensor, v: Tensor, t: Time, u: Time, eta: float = 0.0, eps: Tensor | None = None
) -> Tensor:
    """Go from time t to time u: ``x_u = (1 - u) x̂ + u (√(1 - η²) ẑ + η ε)``.

    η = 0 is Euler (DDIM), ``x_t + (u - t) v``; η = 1 predicts x̂ and renoises it.

    Args:
        x_t: ``[B, ...]`` at time t.
        v: ``[B, ...]`` velocity at (x_t, t).
        t: present time, in [0, 1].
        u: next time, in [0, 1].
        eta: share of fresh noise, in [0, 1].
        eps: ``[B, ...]`` fresh standard normal noise; needed when eta > 0 and u > 0.

    Raises:
        BadInput: eta outside [0, 1], or fresh noise is needed and not given.
    """
    check_eta(eta)
    if eta == 0:
        return x_t + (expand(u, x_t) - expand(t, x_t)) * v
    x_hat, z_hat = split(x_t, v, t)
    u = expand(u, x_t)
    if eps is None:
        if bool((u > 0).any()):
            raise BadInput("eps", None, f"eta={eta} needs fresh noise wherever u > 0")
        return x_hat
    return (1 - u) * x_hat + u * (math.sqrt(1 - eta**2) * z_hat + eta * eps)


def secant(x_t: Tensor, x_u: Tensor, t: Time, u: Time) -> Tensor:
    """Return the velocity of the chord, ``(x_t - x_u) / (t - u)``, t ≠ u.

    One Euler step from (x_t, t) with this velocity lands on x_u: it is the target of
    progressive distillation (Salimans and Ho, 2022) written for velocities.
    """
    return (x_t - x_u) / (expand(t, x_t) - expand(u, x_t))


def check_eta(eta: float) -> None:
    """Raise BadInput unless eta is in [0, 1]."""
    if not 0 <= eta <= 1:
        raise BadInput("eta", eta, "use a number from 0 (Euler) to 1 (predict and renoise)")


# --- times --------------------------------------------------------------------------------------


def shift_time(t: _T, s: float) -> _T:
    """Shift times towards noise: ``t' = s t / (1 + (s - 1) t)``, s > 0; s = 1 changes nothing."""
    if not 0 < s < math.inf:
        raise BadInput("shift", s, "use a finite number above 0 (1 is no shift)")
    return s * t / (1 + (s - 1) * t)


def shift_from_mu(mu: float) -> float:
    """Turn the exponential form of the shift into the linear one: ``s = e^μ``.

    ``e^μ / (e^μ + 1/t - 1) = s t / (1 + (s - 1) t)``, so both forms are one family.
    """
    return math.exp(mu)


def qwen_mu(
    tokens: int,
    base_tokens: int = 256,
    max_tokens: int = 8192,
    base_shift: float = 0.5,
    max_shift: float = 0.9,
) -> float:
    """Return Qwen-Image's μ, linear in the number of image tokens.

    ``μ = base_shift + (tokens - base_tokens) (max_shift - base_shift) / (max_tokens -
    base_tokens)``; a 1328 x 1328 image has 83² = 6889 tokens and μ = 0.834, so s = 2.30.
    """
    slope = (max_shift - base_shift) / (max_tokens - base_tokens)
    return base_shift + (tokens - base_tokens) * slope


def stretch(times: Tensor, terminal: float) -> Tensor:
    """Stretch falling times so that the last equals ``terminal`` and t = 1 stays.

    ``t' = 1 - (1 - t) (1 - terminal) / (1 - t_last)``, as ``stretch_shift_to_terminal`` of
    diffusers' FlowMatchEulerDiscreteScheduler.

    Raises:
        BadInput: terminal outside (0, 1), or the last time is 1 and cannot move.
    """
    if not 0 < terminal < 1:
        raise BadInput("terminal", terminal, "use a number between 0 and 1, or None")
    if times[-1] >= 1:
        raise BadInput("terminal", terminal, "a one-step grid starts at 1, so leave it None")
    return 1 - (1 - times) * (1 - terminal) / (1 - times[-1])


def time_grid(steps: int, *, shift: float = 1.0, terminal: float | None = None) -> Tensor:
    """Return the times of a sampler, ``[steps + 1]`` float32 falling from exactly 1 to exactly 0.

    ``t_i = shift_time(1 - i / steps, shift)`` for i < steps, then ``stretch`` to ``terminal`` if
    given, then 0.

    Args:
        steps: network steps, 1 to 1000.
        shift: s of ``shift_time``, above 0; from the exponential form, ``shift_from_mu(mu)``.
        terminal: where the last step starts, in (0, 1), or None for no stretch.

    Raises:
        BadInput: a parameter is outside its range.

    Warns:
        TerminalWarning: terminal <= 0.05 with steps <= 8, see the message.

    Example:
        >>> time_grid(4, shift=3.0).tolist()
        [1.0, 0.8999999761581421, 0.75, 0.5, 0.0]
    """
    if not isinstance(steps, int) or isinstance(steps, bool) or not 1 <= steps <= MAX_STEPS:
        raise BadInput("steps", steps, f"use an integer from 1 to {MAX_STEPS}")
    times = shift_time(1 - torch.arange(steps, dtype=torch.float64) / steps, shift)
    if terminal is not None:
        times = stretch(times, terminal)
        _warn_low_terminal(steps, terminal)
    return torch.cat([times, times.new_zeros(1)]).float()


def _warn_low_terminal(steps: int, terminal: float) -> None:
    if steps <= FEW_STEPS and terminal <= LOW_TERMINAL:
        warnings.warn(
            f"terminal={terminal} with steps={steps} spends the last of so few steps at"
            f" t={terminal}, where almost no noise is left: use terminal=None, or the value the"
            " few-step student was trained with.",
            TerminalWarning,
            stacklevel=3,
        )


def grid_from_times(times: Sequence[float] | Tensor) -> Tensor:
    """Check explicit times (sigmas) and append the closing 0 if it is missing.

    Returns:
        ``[n + 1]`` float32, strictly falling, from at most 1 to exactly 0.

    Raises:
        BadInput: no time above 0, a time outside [0, 1], or times that do not fall strictly.

    Example:
        >>> grid_from_times([1.0, 0.75]).tolist()
        [1.0, 0.75, 0.0]
    """
    grid = torch.as_tensor(times, dtype=torch.float32).detach().cpu().flatten()
    if len(grid) and grid[-1] != 0:
        grid = torch.cat([grid, grid.new_zeros(1)])
    check_falling(grid)
    return grid


def check_falling(grid: Tensor) -> None:
    """Raise BadInput unless the grid is ``[n >= 2]``, in [0, 1] and strictly falling."""
    inside = bool(((grid >= 0) & (grid <= 1)).all())  # False for NaN too
    if grid.ndim != 1 or len(grid) < 2 or not inside or not bool((grid.diff() < 0).all()):
        shown = [round(float(t), 4) for t in grid.flatten()[:12]]
        raise BadInput("times", shown, "use at least two times in [0, 1], each below the last")


def logit_normal_times(
    normals: Tensor, mean: float = 0.0, std: float = 1.0, shift: float = 1.0
) -> Tensor:
    """Turn standard normal numbers into training times: ``t = shift_time(σ(mean + std n), shift)``.

    Args:
        normals: ``[B]`` standard normal numbers.
        mean: location of logit(t); 0 centres t on 1/2.
        std: width of logit(t), above 0.
        shift: s of ``shift_time``, applied last.

    Returns:
        ``[B]`` times in (0, 1).

    Raises:
        BadInput: std or shift is not above 0.

    Source: Esser et al. 2024, "Scaling Rectified Flow Transformers", section 3.1.
    """
    if not 0 < std < math.inf:
        raise BadInput("std", std, "use a finite number above 0")
    return shift_time(torch.sigmoid(mean + std * normals), shift)
