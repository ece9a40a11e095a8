"""The times at which published few-step adapters of Qwen-Image are sampled, from their settings.

A few-step student knows its own times only. Where a sampler takes them from the settings of the
base model instead, the last of few steps begins at t = 0.02, and the picture stays unfinished
(`turbo_lab.path.TerminalWarning`). Settings are those of diffusers'
``FlowMatchEulerDiscreteScheduler``; times are called sigmas there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from turbo_lab.errors import BadInput
from turbo_lab.path import MAX_STEPS, grid_from_times, qwen_mu
from turbo_lab.testbeds.qwen_image import tokens_of
from turbo_lab.testbeds.qwen_schedule import BASE, Schedule, fixed, schedule_from

if TYPE_CHECKING:
    import pandas as pd

CONFIG_KEY, SIGMAS_KEY, STEPS_KEY = "scheduler", "sigmas", "steps"
"""Keys in the metadata of a file of weights: a scheduler's settings, or its times, as JSON."""


# --- the table ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Published:
    """A few-step adapter that others have published, and how it wants to be sampled.

    Attributes:
        name: in this table.
        steps: network steps, each with one call.
        sigmas: where they begin, to four digits.
        schedule: settings that give these sigmas.
        known: "stated" where its authors or their code say so; "reported" where others do.
        source: who says it.
        base: the model it belongs to.
        files: patterns of the names of its files; empty where we know none.
    """

    name: str
    steps: int
    sigmas: tuple[float, ...]
    schedule: Schedule
    known: str
    source: str
    base: str = "Qwen/Qwen-Image"
    files: tuple[str, ...] = ()


PUBLISHED = (
    Published(
        name="wuli-2",
        steps=2,
        sigmas=(1.0, 0.7155),
        schedule=fixed(2.5, terminal=0.7155),
        known="reported",
        source="Tenstorrent's loader of the adapter: mu = ln 2.5, terminal 0.7155",
        base="Qwen/Qwen-Image-2512",
        files=("Wuli-Qwen-Image-2512-Turbo-LoRA-2steps-*",),
    ),
    Published(
        name="wuli-2-comfyui",
        steps=2,
        sigmas=(1.0, 0.75),
        schedule=fixed(3.0),
        known="reported",
        source="a user's script for ComfyUI: ModelSamplingAuraFlow with shift 3",
        base="Qwen/Qwen-Image-2512",
    ),
    Published(
        name="musepublic-3",
        steps=3,
        sigmas=(1.0, 0.8333, 0.5556),
        schedule=fixed(2.5),
        known="reported",
        source="DiffSynth-Studio's example Qwen-Image-Distill-DMD2.py: mu = ln 2.5",
    ),
    Published(
        name="lightning-4",
        steps=4,
        sigmas=(1.0, 0.9, 0.75, 0.5),
        schedule=fixed(3.0),
        known="stated",
        source="Qwen-Image-Lightning, generate_with_diffusers.py: shift ln 3, no terminal",
        files=("Qwen-Image*Lightning-4steps*",),
    ),
    Published(
        name="nvidia-flash-4",
        steps=4,
        sigmas=(1.0, 0.9, 0.75, 0.5),
        schedule=fixed(3.0),
        known="stated",
        source="the model card of nvidia/Qwen-Image-Flash: shift 3",
    ),
    Published(
        name="lightning-8",
        steps=8,
        sigmas=(1.0, 0.9545, 0.9, 0.8333, 0.75, 0.6429, 0.5, 0.3),
        schedule=fixed(3.0),
        known="stated",
        source="Qwen-Image-Lightning, generate_with_diffusers.py: shift ln 3, no terminal",
        files=("Qwen-Image*Lightning-8steps*",),
    ),
    Published(
        name="linoyts-2",
        steps=2,
        sigmas=(1.0, 0.5),
        schedule=fixed(1.0),
        known="stated",
        source="the model card of linoyts/Qwen-Image-2.1-DMD2-2steps: sigmas 1, 0.5",
        base="Qwen/Qwen-Image-2.1 (another architecture)",
    ),
)
"""Left out: TwinFlow's and piFlow's, whose samplers are no Euler steps on a list of times."""


def published(name: str) -> Published:
    """Return a row of `PUBLISHED`.

    Raises:
        BadInput: there is none of this name.
    """
    for row in PUBLISHED:
        if row.name == name:
            return row
    raise BadInput("schedule", name, f"choose one of {', '.join(row.name for row in PUBLISHED)}")


def of_file(file: str) -> Published | None:
    """Return the row of an adapter by the name of its file, or None."""
    for row in PUBLISHED:
        if any(fnmatch(file.lower(), pattern.lower()) for pattern in row.files):
            return row
    return None


# --- diffusers ----------------------------------------------------------------------------------


def scheduler_config(schedule: Schedule) -> dict[str, Any]:
    """Return settings for diffusers' ``FlowMatchEulerDiscreteScheduler``, in its words."""
    return {
        "num_train_timesteps": MAX_STEPS,
        "use_dynamic_shifting": True,
        "time_shift_type": "exponential",
        "base_image_seq_len": schedule.base_tokens,
        "max_image_seq_len": schedule.max_tokens,
        "base_shift": schedule.base_shift,
        "max_shift": schedule.max_shift,
        "shift_terminal": schedule.terminal,
    }


def stock_sigmas(schedule: Schedule, steps: int, *, size: int = 1024) -> Tensor:
    """Return the times of a stock ``QwenImagePipeline``: ``[steps + 1]``, from 1 to 0.

    They equal ``schedule.grid(steps, tokens)``, which needs no diffusers and warns of a low
    terminal.

    Args:
        schedule: settings.
        steps: network steps.
        size: pixels of a square picture; without effect where the shift is fixed.
    """
    import numpy as np
    from diffusers import FlowMatchEulerDiscreteScheduler

    ends = (schedule.base_tokens, schedule.max_tokens, schedule.base_shift, schedule.max_shift)
    scheduler = FlowMatchEulerDiscreteScheduler(**scheduler_config(schedule))
    mu = qwen_mu(tokens_of(size), *ends)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    sigmas: Tensor = scheduler.sigmas
    return sigmas


# --- what a file says ---------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """How an adapter wants to be sampled, as far as its file says.

    Attributes:
        steps: network steps; None where it does not say.
        schedule: settings; None where it does not say, or gives times.
        sigmas: the times themselves, without the closing 0; empty where it does not say.
    """

    steps: int | None = None
    schedule: Schedule | None = None
    sigmas: tuple[float, ...] = ()

    @property
    def silent(self) -> bool:
        """Whether it says nothing about times."""
        return self.schedule is None and not self.sigmas


def wanted_by(metadata: Mapping[str, str]) -> Wanted:
    """Read the metadata of a safetensors file: ``sigmas``, or ``scheduler`` and ``steps``, as JSON.

    Without a scheduler ``steps`` is not looked at: strangers may mean those of a training.

    Raises:
        BadInput: one of them is not what it should be.
    """
    sigmas, config = _parsed(metadata, SIGMAS_KEY), _parsed(metadata, CONFIG_KEY)
    times = () if sigmas is None else _times(sigmas)
    if config is None:
        return Wanted(steps=len(times) or None, sigmas=times)
    if not isinstance(config, dict):
        raise BadInput(CONFIG_KEY, str(config)[:80], "write the scheduler's settings as an object")
    steps = _parsed(metadata, STEPS_KEY)
    if steps is not None and (type(steps) is not int or not 1 <= steps <= MAX_STEPS):
        raise BadInput(STEPS_KEY, str(steps)[:80], f"use an integer from 1 to {MAX_STEPS}")
    return Wanted(steps=len(times) or steps, schedule=schedule_from(config), sigmas=times)


def _parsed(metadata: Mapping[str, str], key: str) -> Any:
    text = metadata.get(key)
    if text is None:
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise BadInput(key, text[:80], "write it as JSON") from None


def _times(sigmas: Any) -> tuple[float, ...]:
    plain = isinstance(sigmas, list) and 1 <= len(sigmas) <= MAX_STEPS + 1
    if not plain or not all(type(t) in (int, float) and 0 <= t <= 1 for t in sigmas):
        allowed = "write falling times from 1 to 0 as a list of numbers"
        raise BadInput(SIGMAS_KEY, str(sigmas)[:80], allowed)
    grid = grid_from_times(sigmas)  # where the least times are 0 in float32
    return tuple(float(t) for t, kept in zip(sigmas, grid, strict=False) if kept > 0)


# --- for a reader -------------------------------------------------------------------------------


def spoiled(row: Published) -> dict[str, Tensor]:
    """Return the times of an adapter under settings that are easily used by mistake.

    The first keeps the adapter's shift and leaves the model's terminal of 0.02; the second are the
    model's own settings at 1024 pixels. ``[steps]`` each, without the closing 0.
    """
    kept = replace(row.schedule, terminal=BASE.terminal)
    return {
        "terminal 0.02": stock_sigmas(kept, row.steps)[:-1],
        "the model's own": stock_sigmas(BASE, row.steps)[:-1],
    }


def table() -> pd.DataFrame:
    """One row per published adapter: settings, its times, and its times under two mistakes."""
    import pandas as pd

    rows = [
        {
            "adapter": row.name,
            "base": row.base,
            "steps": row.steps,
            "shift": round(math.exp(row.schedule.base_shift), 4),
            "terminal": row.schedule.terminal,
            "sigmas": _short(stock_sigmas(row.schedule, row.steps)[:-1]),
            **{f"with {name}": _short(times) for name, times in spoiled(row).items()},
            "known": row.known,
            "source": row.source,
        }
        for row in PUBLISHED
    ]
    return pd.DataFrame(rows).set_index("adapter")


def _short(times: Tensor) -> str:
    return ", ".join(f"{t:.4g}" for t in torch.as_tensor(times).tolist())
