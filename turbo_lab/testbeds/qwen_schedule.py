"""Times of Qwen-Image's many-step sampler, from the settings of a stock scheduler.

Settings are those of diffusers' ``FlowMatchEulerDiscreteScheduler``, and may be anybody's: of a
pipeline in a folder, or of a file of weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from turbo_lab.errors import BadInput
from turbo_lab.path import check_falling, qwen_mu, shift_from_mu, time_grid

if TYPE_CHECKING:
    from turbo_lab.testbeds.qwen_files import Bundle

MAX_MU = 20.0
"""Of a shift's logarithm, either way. Published ones are below 2; beyond, times are 0 or 1."""
LARGEST = 1e6
"""Of any setting. JSON has integers that no float can hold."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Times of a sampler, from the settings of its scheduler.

    The number of image tokens chooses the shift, and the last time is stretched to ``terminal``.
    """

    base_tokens: int
    max_tokens: int
    base_shift: float
    max_shift: float
    terminal: float | None

    @staticmethod
    def of(bundle: Bundle) -> Schedule:
        """Read the model's own settings, with diffusers' defaults where one is missing."""
        return schedule_from(bundle.config("scheduler"))

    def shift(self, tokens: int) -> float:
        """Shift s of `turbo_lab.path.shift_time` for so many image tokens.

        Raises:
            BadInput: the settings give one for this size that no sampler can use.
        """
        ends = (self.base_tokens, self.max_tokens, self.base_shift, self.max_shift)
        mu = qwen_mu(tokens, *ends)
        if abs(mu) > MAX_MU:
            allowed = (
                f"a scheduler's mu for {tokens} image tokens is from -{MAX_MU:g} to {MAX_MU:g}"
            )
            raise BadInput("mu", mu, allowed)
        return shift_from_mu(mu)

    def grid(self, steps: int, tokens: int) -> Tensor:
        """Times of the many-step sampler ``[steps + 1]``, falling from 1 to 0.

        One step begins at 1 and is not stretched; diffusers' own scheduler divides by 0 there.

        Raises:
            BadInput: no number of steps, or settings with which times do not fall in float32.
        """
        terminal = None if steps == 1 else self.terminal
        grid = time_grid(steps, shift=self.shift(tokens), terminal=terminal)
        check_falling(grid)
        return grid


BASE = Schedule(
    base_tokens=256, max_tokens=8192, base_shift=0.5, max_shift=0.9, terminal=0.02
)  # fmt: skip
"""Qwen-Image's and Qwen-Image-2512's own settings, for many steps."""


def fixed(shift: float, terminal: float | None = None) -> Schedule:
    """Return settings whose shift is the same for every size: ``μ = ln shift``."""
    mu = math.log(shift)
    return replace(BASE, base_shift=mu, max_shift=mu, terminal=terminal)


def schedule_from(config: Mapping[str, Any]) -> Schedule:
    """Read the settings of a ``FlowMatchEulerDiscreteScheduler``, a fixed or a dynamic shift.

    Raises:
        BadInput: a setting has another type or size, or belongs to another kind of schedule.
    """
    for option in _OTHER_KINDS:
        if config.get(option):
            raise BadInput(option, config[option], "only Euler steps on shifted times are known")
    if config.get("time_shift_type", "exponential") != "exponential":
        raise BadInput("time_shift_type", config["time_shift_type"], "it must be exponential")
    null = config.get("shift_terminal") is None
    terminal = 0.0 if null else _number(config, "shift_terminal", 0.0)
    if not 0 <= terminal < 1:
        raise BadInput("shift_terminal", terminal, "use a number from 0 to below 1, or null")
    if not config.get("use_dynamic_shifting", False):
        shift = _number(config, "shift", 1.0)
        if shift < 1 / LARGEST:
            raise BadInput("shift", shift, f"use a number from {1 / LARGEST:g} to {LARGEST:g}")
        return fixed(shift, terminal or None)
    base_tokens = _number(config, "base_image_seq_len", 256)
    max_tokens = _number(config, "max_image_seq_len", 4096)
    if base_tokens == max_tokens:
        raise BadInput("max_image_seq_len", max_tokens, "it must not be the base's")
    mus = {key: _number(config, key, default) for key, default in _MUS.items()}
    for key, mu in mus.items():
        if abs(mu) > MAX_MU:
            raise BadInput(key, mu, f"use a number from -{MAX_MU:g} to {MAX_MU:g}")
    return Schedule(
        base_tokens=base_tokens,  # type: ignore[arg-type]
        max_tokens=max_tokens,  # type: ignore[arg-type]
        **mus,
        terminal=terminal or None,
    )


_MUS = {"base_shift": 0.5, "max_shift": 1.15}
_OTHER_KINDS = (
    *("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"),
    *("invert_sigmas", "stochastic_sampling"),
)


def _number(config: Mapping[str, Any], key: str, default: float) -> float:
    """A setting that is a number of a size that can be computed with."""
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadInput(key, str(value)[:80], "use a number")
    if not abs(value) <= LARGEST:  # NaN is not either
        raise BadInput(key, str(value)[:80], f"use a number from {-LARGEST:g} to {LARGEST:g}")
    return value
