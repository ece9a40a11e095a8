"""Aspect buckets: pictures of one area in a few shapes, and batches of one shape each.

A picture goes into the bucket whose ratio of sides is the nearest, so that little of it is cut off.
Every step of a training has one bucket. Which one is a function of seed and step, so that it is the
same on every process, in every part of a batch, and after a run was resumed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property

import torch
from torch import Tensor

from turbo_lab.fit import Batch
from turbo_lab.path import qwen_mu, shift_from_mu
from turbo_lab.streams import Draw, seed_for
from turbo_lab.testbeds.qwen_data import order_of
from turbo_lab.testbeds.qwen_files import CHANNELS, SCALE

RATIOS = ((1, 1), (16, 9), (9, 16), (4, 3), (3, 4), (3, 2), (2, 3))
"""Width to height, of the sizes that Qwen-Image's model card lists. Its sizes that are not square
have up to an eighth fewer pixels than the square; here all have about as many."""
TOKEN = 2 * SCALE
"""Pixels along a token."""

Supply = Callable[[int, Draw], Batch]
"""The batch of a draw, in the order that the seed of a stage gives the data."""


@dataclass(frozen=True, kw_only=True, order=True)
class Shape:
    """Pixels of a picture, multiples of 16."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width} x {self.height}"

    @property
    def tokens(self) -> int:
        """Image tokens."""
        return self.width * self.height // TOKEN**2

    @property
    def latent(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        return (CHANNELS, self.height // SCALE, self.width // SCALE)

    @property
    def shift(self) -> float:
        """Qwen-Image's own timestep shift for so many tokens."""
        return shift_from_mu(qwen_mu(self.tokens))


def square(size: int) -> Shape:
    """The shape of a square picture of ``size`` pixels."""
    return Shape(width=size, height=size)


def shapes_of(size: int) -> tuple[Shape, ...]:
    """The buckets at the area of a square of ``size`` pixels, the square first.

    Each has the sides in tokens w, h with ``w h <= n²`` at which the factor by which ratio and area
    are off, ``max(w/h / r, r h/w) n² / (w h)``, is the smallest; so none needs more memory than the
    square. At small sizes several ratios share a bucket.

    Args:
        size: a multiple of 16.

    Example:
        >>> [str(shape) for shape in shapes_of(512)[:3]]
        ['512 x 512', '672 x 384', '384 x 672']
    """
    found = (_shape_of(size // TOKEN, Fraction(w, h)) for w, h in RATIOS)
    return tuple(dict.fromkeys(found))


def _shape_of(n: int, ratio: Fraction) -> Shape:
    """Of n² tokens at most; a portrait is a landscape on its side."""
    if ratio < 1:
        wide = _shape_of(n, 1 / ratio)
        return Shape(width=wide.height, height=wide.width)
    sides = [(n * n // h, h) for h in range(1, n + 1)]  # a narrower one is off by as much or more

    def off(side: tuple[int, int]) -> tuple[Fraction, int]:
        w, h = side
        return _apart(Fraction(w, h), ratio) * Fraction(n * n, w * h), -w * h

    w, h = min(sides, key=off)
    return Shape(width=w * TOKEN, height=h * TOKEN)


def _apart(a: Fraction, b: Fraction) -> Fraction:
    """``exp |log a - log b|``, exactly."""
    return max(a / b, b / a)


def nearest(width: int, height: int, shapes: Iterable[Shape]) -> Shape:
    """The shape whose ratio of sides is the nearest in its logarithm; of two the first."""
    ratio = Fraction(width, height)
    return min(shapes, key=lambda shape: _apart(Fraction(shape.width, shape.height), ratio))


# --- which batch has which shape ----------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Buckets:
    """The shapes of pictures, and the bucket of every step.

    Attributes:
        of: the shape of each picture, by its number.
    """

    of: tuple[Shape, ...]

    @cached_property
    def members(self) -> Mapping[Shape, tuple[int, ...]]:
        """The numbers of the pictures of each shape that has some, the largest bucket first."""
        each: dict[Shape, list[int]] = {}
        for number, shape in enumerate(self.of):
            each.setdefault(shape, []).append(number)
        ordered = sorted(each.items(), key=lambda item: (-len(item[1]), item[0]))
        return {shape: tuple(numbers) for shape, numbers in ordered}

    @cached_property
    def _places(self) -> Tensor:
        places = {shape: k for k, shape in enumerate(self.members)}
        return torch.tensor([places[shape] for shape in self.of])

    def turn(self, step: int, seed: int) -> tuple[Shape, int]:
        """The bucket of a step, and how many steps before it had the same one.

        Of every n steps, with n pictures, a bucket of m has exactly m, in an order that is drawn.
        """
        epoch, place = divmod(step, len(self.of))
        drawn = self._places[order_of(len(self.of), seed_for(seed, "buckets"), epoch)]
        shape = list(self.members)[int(drawn[place])]
        here = int((drawn[:place] == drawn[place]).sum())
        return shape, epoch * len(self.members[shape]) + here


def bucket_batch(
    buckets: Buckets, supplies: Mapping[Shape, Supply], seed: int, draw: Draw
) -> Batch:
    """The batch of a step, from its bucket alone, whose items come one after the other.

    Args:
        buckets: of the pictures.
        supplies: of each shape; their conditions are places among its members.
        seed: of a stage.
        draw: its step and rows count.
    """
    shape, turn = buckets.turn(draw.step, seed)
    own = seed_for(seed, "bucket", shape.width, shape.height)
    batch = supplies[shape](own, replace(draw, step=turn))
    return batch._replace(c=numbers_at(buckets.members[shape], batch.c))


def numbers_at(members: Sequence[int], places: Tensor) -> Tensor:
    """Numbers of pictures, and so of their prompts, by their places in a bucket."""
    return torch.tensor(members, device=places.device)[places]
