"""Small trainings by two processes; it imports little, as each of them does so again."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from turbo_lab.fit import Batch, Player, Record, Saving, Shadow, Terms, Turn, fit
from turbo_lab.optimisers import Optimiser
from turbo_lab.ranks import Ranks, joined, leave
from turbo_lab.store import Checkpoints
from turbo_lab.streams import Draw

TOTAL, STEPS = 6, 8


class Toy:
    """Regression by a linear map, at a time that every row shares; ``asleep`` moves in no loss."""

    def __init__(self) -> None:
        self.net = nn.Linear(3, 1)
        self.asleep = nn.Parameter(torch.ones(2))
        self.net.asleep = self.asleep
        with torch.no_grad():
            self.net.weight.fill_(0.1)
            self.net.bias.fill_(0.0)
        self.seen: list[int] = []

    @property
    def players(self) -> dict[str, Player]:
        return {"student": self.net}

    def turns(self) -> Sequence[Turn]:
        return [Turn(name="student", loss=self.loss, moves=("student",))]

    def loss(self, batch: Batch, draw: Draw) -> Terms:
        k = draw.shared("step", 1000)
        self.seen.append(k)
        x = batch.x + 0.1 * draw.normal("n", (3,))
        return {"fit": (self.net(x)[:, 0] - (1 + k / 1000) * x.sum(1)) ** 2}


def batches(draw: Draw) -> Batch:
    return Batch(draw.sub("data").normal("x", (3,)), None)


def toy_run(ranks: Ranks, folder: Path | None, steps: int = STEPS) -> dict[str, Any]:
    toy, average = Toy(), Toy().net
    records: list[Record] = []
    for record in fit(
        toy,
        batches,
        steps=STEPS,
        batch_size=TOTAL,
        micro_batches=2,
        seed=4,
        optimisers={"student": Optimiser(lr=0.05, weight_decay=0.1, warmup=2)},
        shadows=(Shadow(of="student", average=average, decay=0.9),),
        saving=folder and Saving(checkpoints=Checkpoints(folder=folder), every_steps=1),
        ranks=ranks,
    ):
        records.append(record)
        if record.step == steps:
            break
    return {
        "weights": {k: v.detach().clone() for k, v in toy.net.state_dict().items()},
        "average": average.weight.detach().clone(),
        "terms": [record.terms["student/fit"] for record in records],
        "norms": [record.norms["student"] for record in records],
        "steps": [record.step for record in records],
        "seen": toy.seen,
    }


def _in_rank(rank: int, port: int, work: Callable[..., Any], out: Path, *rest: Any) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = joined("cpu")
    torch.save(work(ranks, *rest), out / f"{rank}.pt")
    leave()
    # Threads of gloo that outlive the group abort some of the processes that end.
    alive = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").glob("*")]
    assert not [name for name in alive if "gloo" in name], alive


def two_processes(work: Callable[..., Any], out: Path, *rest: Any) -> list[Any]:
    """What the work returns in each of two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_in_rank, args=(rank, port, work, out, *rest)) for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
        if process.is_alive():
            process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    return [torch.load(out / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


def interrupted(ranks: Ranks, folder: Path) -> int:
    """The step after which a run ends when the second process alone is told to."""
    toy, steps = Toy(), 0
    run = fit(
        toy,
        batches,
        steps=STEPS,
        batch_size=TOTAL,
        seed=4,
        optimisers={"student": Optimiser(lr=0.05)},
        saving=Saving(checkpoints=Checkpoints(folder=folder)),
        ranks=ranks,
    )
    with pytest.raises(SystemExit):
        for record in run:
            steps = record.step
            if steps == 3 and ranks.rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
    return steps + 1


def toys(ranks: Ranks, folder: Path) -> dict[str, Any]:
    """A run, one that stops half way, and one that goes on from what process 0 left."""
    mine = folder / str(ranks.rank)
    whole = toy_run(ranks, mine / "whole")
    toy_run(ranks, mine / "half", steps=5)
    resumed = toy_run(ranks, mine / "half")
    return {
        "whole": whole,
        "resumed": resumed,
        "wrote": sorted(path.name for path in folder.glob(f"{ranks.rank}/*")),
        "agreed": [ranks.agreed(ranks.rank == 0), ranks.agreed(ranks.rank == 1)],
        "left": interrupted(ranks, mine / "left"),
        "any": [ranks.any(ranks.rank == 1), ranks.any(False)],
    }
