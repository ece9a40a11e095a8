"""How samples are asked for: steps, times and guidance, checked before anything is drawn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from turbo_lab.errors import BadInput
from turbo_lab.path import grid_from_times, time_grid
from turbo_lab.validation import allowed

TEACHER_STEPS = 40
TEACHER_GUIDANCE = 4.0
"""Qwen-Image's own scale, taken over and not tuned; LOG.md compares it with 2 in one look."""


Stream = Literal["critic", "eval", "select"]


class Sampling(BaseModel):
    """How to sample the teacher or a student; frozen, and the key under which samples are kept."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(TEACHER_STEPS, ge=1, le=1000)
    guidance_scale: float = Field(TEACHER_GUIDANCE, ge=0, le=20)
    rescale: Literal["none", "token", "sample"] = "none"
    shift: float = Field(1.0, gt=0, le=100)
    times: tuple[float, ...] = ()
    """Explicit times, falling from 1, one per step; they take the place of steps and shift."""
    eta: float = Field(0.0, ge=0, le=1)
    n: int = Field(256, ge=1, le=100_000)
    noises: int = Field(1, ge=1, le=10_000)
    """Samples of each caption: n / noises captions, each that many times in a row."""
    stream: Stream = "eval"
    seed: int = Field(0, ge=0)

    @property
    def grid(self) -> Tensor:
        """The sampler's times ``[steps + 1]``, falling to 0."""
        if self.times:
            return grid_from_times(self.times)
        return time_grid(self.steps, shift=self.shift)

    @model_validator(mode="after")
    def _one_time_per_step(self) -> Sampling:
        if self.times and (len(self.times) != self.steps or not self.times[-1]):
            allowed = f"give one per step, {self.steps} of them, without the closing 0"
            raise BadInput("times", self.times, allowed)
        if self.times and self.times[0] != 1:
            raise BadInput("times", self.times, "the first must be 1, where there is only noise")
        if self.n % self.noises:
            raise BadInput("n", self.n, f"use a multiple of noises, {self.noises}")
        _ = self.grid  # refuses times that do not fall
        return self


def checked_sampling(values: Mapping[str, object]) -> Sampling:
    """Validate sampling parameters.

    Raises:
        BadInput: naming the first parameter that is out of range.
    """
    try:
        return Sampling.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        if isinstance(said := first.get("ctx", {}).get("error"), BadInput):
            raise said from None
        name = str(first["loc"][0])
        field = Sampling.model_fields.get(name)
        why = allowed(field) if field else f"choose of {', '.join(Sampling.model_fields)}"
        raise BadInput(name, first["input"], why) from None
