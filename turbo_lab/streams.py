"""Randomness keyed by (seed, stream, step), never taken from global state.

Whoever needs random numbers names them. Two different names give independent numbers, the same
name gives the same numbers: so resuming a run, changing the batch size of a sampler or splitting
a batch over micro-batches and processes does not change what is drawn.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from turbo_lab.errors import BadInput


def seed_for(seed: int, *stream: str | int) -> int:
    """Derive a 63-bit seed from a base seed and a stream name (BLAKE2b of both).

    Example:
        >>> seed_for(0, "train", 1) == seed_for(0, "train", 1) != seed_for(0, "train", 2)
        True
    """
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise BadInput("seed", seed, "use an integer of at least 0")
    text = json.dumps([seed, *stream]).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def generator(seed: int, *stream: str | int) -> torch.Generator:
    """Return a CPU generator for a named stream."""
    return torch.Generator().manual_seed(seed_for(seed, *stream))


def rng(seed: int, *stream: str | int) -> np.random.Generator:
    """Return a NumPy generator (Philox, counter based) for a named stream."""
    return np.random.Generator(np.random.Philox(key=seed_for(seed, *stream)))


def noise(shape: Sequence[int], *, seed: int, stream: str, indices: Sequence[int]) -> Tensor:
    """Draw standard normal noise, one generator per image.

    Args:
        shape: shape of one image, without the batch.
        seed: base seed, at least 0.
        stream: name of the draw, for example ``"z"`` or ``"renoise/1"``.
        indices: which images; image i is the same in every batch it appears in.

    Returns:
        ``[len(indices), *shape]`` float32 on the CPU.
    """
    rows = [torch.randn(tuple(shape), generator=generator(seed, stream, int(i))) for i in indices]
    return torch.stack(rows) if rows else torch.empty(0, *shape)


@dataclass(frozen=True, kw_only=True)
class Draw:
    """Randomness of one training step, seen by the rows ``start:stop`` of a batch of ``total``.

    Every method draws for the whole batch and keeps its rows, so micro-batches and processes
    slice one and the same draw.
    """

    seed: int
    step: int
    total: int
    start: int = 0
    stop: int | None = None
    stream: str = "step"

    def rows(self, start: int, stop: int) -> Draw:
        """Return the view of the rows ``start:stop`` of the batch."""
        return replace(self, start=start, stop=stop)

    def sub(self, name: str) -> Draw:
        """Return an independent child stream."""
        return replace(self, stream=f"{self.stream}/{name}")

    def normal(self, name: str, shape: Sequence[int]) -> Tensor:
        """Draw ``[rows, *shape]`` standard normal numbers."""
        return self._cut(torch.randn(self.total, *shape, generator=self.generator(name)))

    def uniform(self, name: str) -> Tensor:
        """Draw ``[rows]`` numbers uniform in [0, 1)."""
        return self._cut(torch.rand(self.total, generator=self.generator(name)))

    def integers(self, name: str, high: int) -> Tensor:
        """Draw ``[rows]`` integers uniform in 0 .. high - 1."""
        return self._cut(torch.randint(high, (self.total,), generator=self.generator(name)))

    def shared(self, name: str, high: int) -> int:
        """Draw one integer in 0 .. high - 1, the same for every row, micro-batch and process."""
        return int(torch.randint(high, (), generator=self.generator(name)))

    def generator(self, name: str) -> torch.Generator:
        """Return the generator of the whole batch for one named draw of this step."""
        return generator(self.seed, self.stream, name, self.step)

    def _cut(self, rows: Tensor) -> Tensor:
        return rows[self.start : self.stop]
