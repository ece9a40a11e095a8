"""The only training loop: freezing, optimisers, cadence, clipping, EMA, checkpoints, resume.

`fit` is a generator that yields one `Record` per step, so whoever calls it owns the progress bar,
the plots and the decision to stop. Everything random is keyed by the step, so a resumed run
continues with the same bits.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from types import FrameType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from turbo_lab.checkpoints import Checkpoints
from turbo_lab.errors import BadInput, NonFinite
from turbo_lab.optimisers import Optimiser
from turbo_lab.ranks import ALONE, Ranks
from turbo_lab.streams import Draw

PATIENCE = 3.0
"""Seconds in which a second SIGINT or SIGTERM is the first one's echo: launchers pass it on too."""

Terms = Mapping[str, Tensor]
"""Named, already weighted loss terms, each per sample ``[B]``. A term without a gradient moves
nothing: it is there to be watched."""


class Batch(NamedTuple):
    """What a loss sees: clean data ``x`` (latents ``[B, ...]``) and conditions ``c``.

    ``z`` is the noise that x grew from, where x was sampled from a teacher.
    """

    x: Tensor
    c: Any
    z: Tensor | None = None


class Player(Protocol):
    """Something that learns: an ``nn.Module``, or one adapter of a shared base."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters this player may change, and no others."""

    def state_dict(self) -> Mapping[str, Tensor]:
        """Return what a checkpoint must keep."""

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> Any:
        """Take back what `state_dict` gave."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """This loss moves exactly these players, every ``every`` rounds; ``then`` runs after it."""

    name: str
    loss: Callable[[Batch, Draw], Terms]
    moves: tuple[str, ...]
    every: int = 1
    then: Callable[[], None] | None = None


class Objective(Protocol):
    """A method: its players by name, and the turns they take in a round."""

    @property
    def players(self) -> Mapping[str, Player]:
        """The players by name."""

    def turns(self) -> Sequence[Turn]:
        """The turns of one round, in order."""


@dataclass(frozen=True, kw_only=True)
class Shadow:
    """An exponential moving average of a player, kept in ``average`` (same parameter names).

    The decay rises as (1 + n) / (10 + n) until it reaches ``decay``, so that early weights are
    forgotten.
    """

    of: str
    average: Player
    decay: float


@dataclass(frozen=True, kw_only=True)
class Record:
    """One step: mean of every loss term, gradient norm of every player that moved."""

    step: int
    terms: Mapping[str, float]
    norms: Mapping[str, float]
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Saving:
    """Where and how often to checkpoint (a step count or seconds, whichever comes first)."""

    checkpoints: Checkpoints
    every_steps: int = 10**9
    every_seconds: float = 60.0


@dataclass(kw_only=True)
class _Run:
    """The mutable state behind `fit`: players, what moves them, their averages, the step."""

    players: Mapping[str, Player]
    optimisers: Mapping[str, Optimiser]
    shadows: Sequence[Shadow]
    steps: int
    ranks: Ranks = ALONE
    step: int = 0
    movers: dict[str, dict[str, torch.optim.Optimizer]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.movers = {
            n: plan.over(self.players[n].named_parameters()) for n, plan in self.optimisers.items()
        }

    def freeze_all_but(self, moves: Sequence[str]) -> None:
        """Let exactly the players in ``moves`` learn; nothing else sets ``requires_grad``."""
        for name, player in self.players.items():
            for _, parameter in player.named_parameters():
                parameter.requires_grad_(name in moves)

    def update(self, name: str) -> float:
        """Clip, step and average one player; return its gradient norm before clipping."""
        movers, plan = self.movers[name].values(), self.optimisers[name]
        groups = [group for mover in movers for group in mover.param_groups]
        parameters = [p for group in groups for p in group["params"]]
        self.ranks.add_gradients(parameters)
        norm = float(nn.utils.clip_grad_norm_(parameters, plan.clip))
        for group in groups:
            group["lr"] = plan.rate(self.step, self.steps)
        for mover in movers:
            if math.isfinite(norm):
                mover.step()
            mover.zero_grad(set_to_none=True)
        return norm

    @torch.no_grad()
    def average(self) -> None:
        for shadow in self.shadows:
            decay = min(shadow.decay, (1 + self.step) / (10 + self.step))
            now = [p.detach() for _, p in self.players[shadow.of].named_parameters()]
            then = [p.detach() for _, p in shadow.average.named_parameters()]
            torch._foreach_lerp_(then, now, 1 - decay)

    def tensors(self) -> dict[str, Tensor]:
        """Everything a resumed run needs, flat, under unique names."""
        out: dict[str, Tensor] = {}
        for name, player in self.players.items():
            out |= {f"player/{name}/{k}": v for k, v in player.state_dict().items()}
        for k, shadow in enumerate(self.shadows):
            out |= {f"shadow/{k}/{n}": v for n, v in shadow.average.state_dict().items()}
        for name, kind, mover in self._each_mover():
            for i, moments in mover.state_dict()["state"].items():
                out |= {f"{kind}/{name}/{i}/{key}": v for key, v in moments.items()}
        return out

    def load(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `tensors` gave."""
        self.step = step
        for name, player in self.players.items():
            player.load_state_dict(_under(tensors, f"player/{name}/"))
        for k, shadow in enumerate(self.shadows):
            shadow.average.load_state_dict(_under(tensors, f"shadow/{k}/"))
        for name, kind, mover in self._each_mover():
            moments: dict[int, dict[str, Tensor]] = {}
            for key, value in _under(tensors, f"{kind}/{name}/").items():
                index, moment = key.split("/")
                moments.setdefault(int(index), {})[moment] = value
            mover.load_state_dict({**mover.state_dict(), "state": moments})

    def _each_mover(self) -> Iterator[tuple[str, str, torch.optim.Optimizer]]:
        """Player, kind and optimiser of everything that moves."""
        for name, movers in self.movers.items():
            for kind, mover in movers.items():
                yield name, kind, mover


def fit(
    objective: Objective,
    batches: Callable[[Draw], Batch],
    *,
    steps: int,
    batch_size: int,
    seed: int,
    optimisers: Mapping[str, Optimiser],
    shadows: Sequence[Shadow] = (),
    micro_batches: int = 1,
    saving: Saving | None = None,
    ranks: Ranks = ALONE,
) -> Iterator[Record]:
    """Train, yielding one `Record` per step; resume from the newest valid checkpoint.

    Args:
        objective: the method; its turns say which loss moves which players.
        batches: data for the rows of a `Draw` (a function of the step: nothing to store).
        steps: rounds in all, at least 1; each turn acts when the round is a multiple of
            its ``every``.
        batch_size: samples per turn over all processes, at least 1 for each.
        seed: base seed of everything drawn.
        optimisers: one per player that moves.
        shadows: averages to keep.
        micro_batches: parts a batch is split into (gradients are accumulated).
        saving: checkpoints; without it a killed run starts again. Of several processes the first
            one's counts, and what it resumes from is handed to the others.
        ranks: the processes that share every batch.

    Raises:
        BadInput: a number is out of range, a moving player has no optimiser, a shadow is of nobody,
            or the checkpoint is of another seed.
        NonFinite: a loss or gradient is not finite; names step, term and last good checkpoint.
        KeyboardInterrupt, SystemExit: on SIGINT or SIGTERM, after a checkpoint was written (a
            second signal, `PATIENCE` seconds later, does not wait for it).
    """
    turns = objective.turns()
    _check(turns, objective, steps, batch_size, optimisers, micro_batches)
    for shadow in shadows:
        if shadow.of not in objective.players:
            raise BadInput("shadows", shadow.of, f"the players are {', '.join(objective.players)}")
    ranks.check(batch_size)
    run = _Run(
        players=objective.players,
        optimisers=optimisers,
        shadows=tuple(shadows),
        steps=steps,
        ranks=ranks,
    )
    saving = saving if ranks.writes else None
    newest = saving.checkpoints.latest() if saving else None
    if newest is not None and newest[2]["seed"] != seed:
        raise BadInput("seed", seed, f"the checkpoint to go on from has seed {newest[2]['seed']}")
    resumed = ranks.handed(None if newest is None else newest[:2])
    if resumed is not None:
        run.load(*resumed)
    saved_step, saved_at = run.step, time.monotonic()
    with _signals() as signalled:
        while run.step < steps:
            began = time.monotonic()
            terms, norms = _round(run, turns, batches, batch_size, seed, micro_batches, saved_step)
            run.step += 1
            now = time.monotonic()
            due = saving is not None and (
                run.step == steps
                or run.step % saving.every_steps == 0
                or now - saved_at >= saving.every_seconds
            )
            stopped = ranks.any(bool(signalled))  # all of them, after the same step
            if saving is not None and (due or stopped):
                saving.checkpoints.save(run.step, run.tensors(), {"steps": steps, "seed": seed})
                saved_step, saved_at = run.step, time.monotonic()
            if stopped:
                _leave(signalled, run.step, saving is not None)
            yield Record(step=run.step, terms=terms, norms=norms, seconds=now - began)
        if ranks.any(bool(signalled)):  # while the last record was looked at
            _leave(signalled, run.step, saving is not None)


def _round(
    run: _Run,
    turns: Sequence[Turn],
    batches: Callable[[Draw], Batch],
    batch_size: int,
    seed: int,
    micro_batches: int,
    saved_step: int,
) -> tuple[dict[str, float], dict[str, float]]:
    """Play every turn that is due in this round."""
    terms: dict[str, float] = {}
    norms: dict[str, float] = {}
    for turn in turns:
        if run.step % turn.every:
            continue
        run.freeze_all_but(turn.moves)
        draw = Draw(seed=seed, step=run.step, total=batch_size, stream=turn.name)
        own: dict[str, float] = {}
        for rows in _split(draw, micro_batches, run.ranks):
            losses = turn.loss(batches(rows), rows)
            for name, loss in losses.items():
                key = f"{turn.name}/{name}"
                own[key] = own.get(key, 0.0) + float(loss.detach().sum()) / batch_size
            total = torch.stack([loss.sum() for loss in losses.values()]).sum()
            (total / batch_size).backward()
        for key, value in run.ranks.added(own).items():  # one that fails alone would leave the rest
            terms[key] = value
            _finite(value, f"loss term {key!r}", run.step, saved_step)
        for name in turn.moves:
            norms[name] = run.update(name)
            _finite(norms[name], f"gradient norm of {name!r}", run.step, saved_step)
        if turn.then is not None:
            turn.then()
    run.average()
    return terms, norms


def _split(draw: Draw, micro_batches: int, ranks: Ranks) -> Iterator[Draw]:
    """The rows of this process, in parts."""
    first, last = ranks.rows(draw.total)
    parts = ranks.parts(draw.total, micro_batches)
    for start, stop in pairwise((last - first) * k // parts for k in range(parts + 1)):
        yield draw.rows(first + start, first + stop)


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _finite(value: float, what: str, step: int, saved_step: int) -> None:
    if not math.isfinite(value):
        good = f"the last good checkpoint is step {saved_step}" if saved_step else "none is saved"
        raise NonFinite(f"The {what} became {value} at step {step + 1}; {good}.")


def _check(
    turns: Sequence[Turn],
    objective: Objective,
    steps: int,
    batch_size: int,
    optimisers: Mapping[str, Optimiser],
    micro_batches: int,
) -> None:
    for name, value in (("steps", steps), ("batch_size", batch_size)):
        if value < 1:
            raise BadInput(name, value, "use an integer of at least 1")
    if not 1 <= micro_batches <= batch_size:
        raise BadInput("micro_batches", micro_batches, f"use 1 to batch_size ({batch_size})")
    known = ", ".join(objective.players)
    for name in optimisers:
        if name not in objective.players:
            raise BadInput("optimisers", name, f"the players are {known}")
    for turn in turns:
        for name in turn.moves:
            if name not in objective.players:
                raise BadInput(f"moves of turn {turn.name}", name, f"the players are {known}")
            if name not in optimisers:
                raise BadInput("optimisers", sorted(optimisers), f"player {name!r} needs one")


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM until the step is over (main thread only).

    A second one, `PATIENCE` seconds after the first or later, does not wait. It also gets those out
    who left a loop over `fit` by an error whose traceback is kept, as a notebook's is: that keeps
    the generator, and with it the handlers.
    """
    got: list[int] = []
    first = 0.0
    if threading.current_thread() is not threading.main_thread():
        yield got
        return

    def restore() -> None:
        for number, handler in old.items():
            signal.signal(number, handler)

    def note(number: int, _: FrameType | None) -> None:
        nonlocal first
        if got and time.monotonic() - first >= PATIENCE:
            restore()
            signal.raise_signal(number)
        first = first if got else time.monotonic()
        got.append(number)

    old = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield got
    finally:
        restore()


def _leave(signalled: Sequence[int], step: int, saved: bool) -> None:
    number = signalled[0] if signalled else signal.SIGTERM  # another process's
    kept = "a checkpoint was written; run again to continue" if saved else "nothing was saved"
    if number == signal.SIGINT:
        raise KeyboardInterrupt(f"Stopped at step {step}: {kept}.")
    raise SystemExit(128 + number)
