"""A walk through the sampler that can be taken in pieces, and where its seconds go."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from types import MappingProxyType

import torch
from torch import Tensor

from turbo_lab.field import Condition, frozen, guided
from turbo_lab.field import Field as VelocityField
from turbo_lab.lab import Lab
from turbo_lab.sample import State, sample
from turbo_lab.streams import noise

TOGETHER, APART = "together", "apart"
TEACHERS = {TOGETHER: "both rows in one forward", APART: "a forward for each row"}
"""How the guided teacher is called."""
PARTS = {
    "network": "network",
    "guidance": "mixing guided velocities",
    "sampler": "steps of the sampler",
    "ends": "noise and decoding",
}
"""What a picture's seconds are spent on; layers of an adapter belong to the network."""


@dataclass(kw_only=True, eq=False)
class Clock:
    """Seconds by part; waits for a GPU before it looks."""

    device: str
    spent: dict[str, float] = dataclass_field(default_factory=lambda: defaultdict(float))

    def now(self) -> float:
        """Seconds, when everything that was asked for is done."""
        if torch.device(self.device).type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def around(self, part: str, field: VelocityField) -> VelocityField:
        """A field whose calls are timed."""

        def timed(x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
            began = self.now()
            v = field(x_t, t, c)
            self.spent[part] += self.now() - began
            return v

        return timed


@dataclass(frozen=True, kw_only=True, eq=False)
class Apart:
    """Guidance in two forwards of the field, the one with the caption first."""

    field: VelocityField
    null: Tensor
    scale: float

    def __call__(self, x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
        """Return the guided velocity."""
        v_cond = self.field(x_t, t, c)
        v_null = self.field(x_t, t, self.null.expand(len(x_t), -1).to(c))
        return v_null + self.scale * (v_cond - v_null)


GUIDES: Mapping[str, Callable[[VelocityField, Tensor, float], VelocityField]] = MappingProxyType(
    {
        TOGETHER: guided,
        APART: lambda field, null, scale: Apart(field=field, null=null, scale=scale),
    }
)


@dataclass(kw_only=True, eq=False)
class Run:
    """One walk from noise to pictures that can be taken in pieces."""

    field: VelocityField
    scale: float
    null: Tensor
    device: str
    guidance: str = TOGETHER
    clock: Clock = dataclass_field(init=False)
    states: Iterator[State] = dataclass_field(init=False)
    last: State | None = dataclass_field(default=None, init=False)

    def begin(self, grid: Tensor, shape: Sequence[int], tokens: Tensor, seed: int) -> None:
        """Draw the noise of the pictures."""
        self.clock = Clock(device=self.device)
        inner = self.clock.around("network", frozen(self.field))
        outer = self.clock.around("guided", GUIDES[self.guidance](inner, self.null, self.scale))
        began = self.clock.now()
        start = noise(shape, seed=seed, stream="z", indices=range(len(tokens))).to(self.device)
        self.states = sample(outer, grid, start, tokens.to(self.device))
        self.clock.spent["ends"] += self.clock.now() - began

    def advance(self, steps: int) -> None:
        """Take so many steps."""
        began = self.clock.now()
        for _ in range(steps):
            self.last = next(self.states)
        self.clock.spent["walk"] += self.clock.now() - began

    def end(self, lab: Lab) -> Tensor:
        """Make pictures ``[B, 3, 32, 32]`` of what the walk led to."""
        assert self.last is not None
        began = self.clock.now()
        pictures = lab.testbed.decode(self.last.x.cpu())
        self.clock.spent["ends"] += self.clock.now() - began
        return pictures

    def parts(self) -> dict[str, float]:
        """Seconds so far, by the names of `PARTS`."""
        spent = self.clock.spent
        return {
            "network": spent["network"],
            "guidance": spent["guided"] - spent["network"],
            "sampler": spent["walk"] - spent["guided"],
            "ends": spent["ends"],
        }
