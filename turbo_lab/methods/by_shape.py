"""One method in several copies that differ in an option, such as the shift of their times."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from turbo_lab.errors import BadInput
from turbo_lab.fit import Batch, Objective, Player, Terms, Turn
from turbo_lab.streams import Draw

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class ByShape:
    """A method for batches of several shapes: each batch is seen by the copy for its own.

    Args:
        copies: of one method, with the same players and turns, by shape of a sample, without its
            place in the batch.
    """

    copies: Mapping[Shape, Objective]

    def __post_init__(self) -> None:
        if not self.copies:
            raise BadInput("copies", {}, "use one method at least")

    @property
    def players(self) -> Mapping[str, Player]:
        """The players, which the copies share."""
        return self._first.players

    def turns(self) -> Sequence[Turn]:
        """The turns of the first copy, each with the loss of the copy that its batch needs."""
        turns = enumerate(self._first.turns())
        return [dataclasses.replace(turn, loss=_Dispatched(self.copies, k)) for k, turn in turns]

    @property
    def _first(self) -> Objective:
        return next(iter(self.copies.values()))


@dataclass(frozen=True)
class _Dispatched:
    """The loss of turn k of the copy for a batch."""

    copies: Mapping[Shape, Objective]
    k: int

    def __call__(self, batch: Batch, draw: Draw) -> Terms:
        shape = tuple(batch.x.shape[1:])
        if shape not in self.copies:
            known = ", ".join(map(str, self.copies))
            raise BadInput("batch", shape, f"the shapes are {known}")
        return self.copies[shape].turns()[self.k].loss(batch, draw)
