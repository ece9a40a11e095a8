"""Adapters as players of fit: each turn moves its own, and a killed training goes on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from adapters_world import SMALL, new_host, same
from torch import Tensor

from turbo_lab.adapters import Worn
from turbo_lab.checkpoints import Checkpoints
from turbo_lab.fit import Batch, Record, Saving, Shadow, Turn, fit
from turbo_lab.optimisers import Optimiser
from turbo_lab.streams import Draw


@dataclass(frozen=True, kw_only=True)
class Game:
    """A student and a fake on one base; each loss depends on both, and on the bare teacher."""

    student: Worn
    fake: Worn
    moved: list[set[str]] = field(default_factory=list)
    last: dict[str, Tensor] = field(default_factory=dict)

    @property
    def players(self) -> dict[str, Worn]:
        return {"student": self.student, "fake": self.fake}

    def turns(self) -> tuple[Turn, ...]:
        return (
            Turn(name="fake", loss=self.loss, moves=("fake",), then=self.note),
            Turn(name="student", loss=self.loss, moves=("student",), every=2, then=self.note),
        )

    def loss(self, batch: Batch, draw: Draw) -> dict[str, Tensor]:
        x_t, t = batch.x + draw.normal("z", batch.x.shape[1:]), draw.uniform("t")
        with torch.no_grad():
            target = self.student.host.bare(x_t, t, batch.c)
        u = self.student(x_t, t, batch.c)
        error = self.fake(u, t, batch.c) - target  # two adapters in one graph
        return {"both": error.square().mean((1, 2, 3))}

    def note(self) -> None:
        """Who changed since the last turn, or the start: parts of names, "base" for the rest."""
        now = {k: v.clone() for k, v in self.student.host.net.state_dict().items()}
        parts = {k: next((n for n in self.players if f".{n}." in k), "base") for k in now}
        changed = {k for k in now if k in self.last and not torch.equal(now[k], self.last[k])}
        self.moved.append({parts[k] for k in changed})
        self.last.update(now)


def game(*, checkpointed: bool = True) -> tuple[Game, list[Shadow]]:
    host = new_host()
    student, fake = (host.add(name, SMALL, seed=3) for name in ("student", "fake"))
    if checkpointed:
        host.checkpointing()
    average = host.copy(student, "average")
    return Game(student=student, fake=fake), [Shadow(of="student", average=average, decay=0.9)]


def batches(draw: Draw) -> Batch:
    x = draw.normal("x", (12, 16, 16))
    return Batch(x, torch.zeros(len(x), 5, dtype=torch.long))


def rounds(
    play: Game, shadows: list[Shadow], steps: int, saving: Saving | None = None
) -> Iterator[Record]:
    plan = Optimiser(lr=0.01)
    return fit(
        play,
        batches,
        steps=steps,
        batch_size=2,
        seed=0,
        optimisers={"student": plan, "fake": plan},
        shadows=shadows,
        saving=saving,
    )


def states(play: Game, shadows: list[Shadow]) -> Mapping[str, Mapping[str, Tensor]]:
    average = shadows[0].average.state_dict()
    return {"a": play.student.state_dict(), "b": play.fake.state_dict(), "c": average}


def test_each_turn_moves_exactly_its_player_and_never_the_base() -> None:
    play, _ = game()
    play.note()
    records = list(rounds(play, [], 3))
    assert play.moved[1:] == [{"fake"}, {"student"}, {"fake"}, {"fake"}, {"student"}]
    assert all(value > 0 for record in records for value in record.norms.values())
    assert all(p.grad is None for p in play.student.host.net.parameters())


def test_checkpointing_does_not_change_the_training() -> None:
    (plain, _), (checkpointed, _) = game(checkpointed=False), game()
    for play in (plain, checkpointed):
        list(rounds(play, [], 2))
    for key, value in plain.student.state_dict().items():
        torch.testing.assert_close(checkpointed.student.state_dict()[key], value)


def test_killed_and_resumed_it_ends_with_the_same_bits(tmp_path: Path) -> None:
    straight = game()
    list(rounds(*straight, 4))
    for until in (1, 3, 4):
        resumed = game()  # as in a fresh process
        saving = Saving(checkpoints=Checkpoints(folder=tmp_path), every_steps=1)
        for record in rounds(*resumed, 4, saving):
            if record.step == until:
                break
    for one, other in zip(states(*resumed).values(), states(*straight).values(), strict=True):
        assert same(one, other)
