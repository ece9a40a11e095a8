"""Processes that train together, as ``accelerate launch`` and ``torchrun`` start them.

All of them draw the same numbers and each keeps its own rows of every batch (see
`turbo_lab.streams.Draw`), so that a batch is the same batch on one process or on eight, and its
gradient the same sum up to the order of its terms. One thing is not: the weight of a GAN term that
is balanced (`turbo_lab.methods.gan`) comes from the rows at hand, so with it another number of
processes is another training. Nothing is wrapped: gradients are added up by
hand between backward pass and optimiser, which suits adapters that take turns on one base. A
process that is alone asks no other and does what it did without this module, bit for bit.

What is read is ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK`` and the address of the first process, which
``torchrun`` sets, and ``accelerate launch --multi_gpu --num_processes N`` by way of it; neither
asks for a GPU, so with ``--device cpu`` that starts N processes on a CPU too. With ``--cpu``
accelerate starts one process, whatever N is, unless it has a host file for ``mpirun``; MPI's own
variables are not read here, and a process that finds no ``WORLD_SIZE`` is alone.
"""

from __future__ import annotations

import atexit
import gc
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from turbo_lab.errors import BadInput

PATIENCE = timedelta(hours=12)
"""How long a process waits for the others: caches are filled, and checkpoints written, by one."""

Saved = tuple[int, dict[str, Tensor]]
"""A step, and the tensors of a run that has come so far."""


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """One of ``world`` processes, with the number ``rank`` from 0.

    Attributes:
        rank: the first, 0, alone writes.
        world: how many there are.
        device: where tensors have to be that are sent: cpu (gloo) or cuda (NCCL).
    """

    rank: int = 0
    world: int = 1
    device: str = "cpu"

    @property
    def writes(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def rows(self, total: int) -> tuple[int, int]:
        """First row of a batch of ``total`` that is this process's, and the first that is not."""
        return total * self.rank // self.world, total * (self.rank + 1) // self.world

    def parts(self, total: int, micro_batches: int) -> int:
        """Into how many parts these rows are split, so that none is larger than on one process."""
        start, stop = self.rows(total)
        return min(stop - start, -(-micro_batches // self.world))

    def check(self, total: int) -> None:
        """Refuse a batch that leaves a process without a row.

        Raises:
            BadInput: there are more processes than rows.
        """
        if total < self.world:
            allowed = f"use at least {self.world}, a row for each process"
            raise BadInput("batch_size", total, allowed)

    def added(self, numbers: Mapping[str, float]) -> dict[str, float]:
        """Return every number summed over all processes."""
        if self.world == 1:
            return dict(numbers)
        total = torch.tensor(list(numbers.values()), dtype=torch.float64, device=self.device)
        _dist().all_reduce(total)
        return dict(zip(numbers, total.tolist(), strict=True))

    def add_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sum the gradients of all processes in place; one that nobody has stays None."""
        if self.world == 1:
            return
        has = torch.tensor([p.grad is not None for p in parameters], dtype=torch.float32)
        has = has.to(self.device)
        _dist().all_reduce(has)
        for parameter, somebody in zip(parameters, has.tolist(), strict=True):
            if somebody:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                _dist().all_reduce(parameter.grad)

    def any(self, flag: bool) -> bool:
        """Whether it is true of any process."""
        return self.added({"flag": float(flag)})["flag"] > 0

    def agreed(self, flag: bool) -> bool:
        """What process 0 says; the others' own is not asked."""
        return flag if self.world == 1 else self.any(flag and self.writes)

    def handed(self, saved: Saved | None) -> Saved | None:
        """Return what process 0 has, on every process."""
        if self.world == 1:
            return saved
        step, tensors = saved or (0, {})
        shapes = {name: (tuple(x.shape), x.dtype) for name, x in tensors.items()}
        box: list[Any] = [(saved is not None, step, shapes)]
        _dist().broadcast_object_list(box, src=0, device=torch.device(self.device))
        there, step, shapes = box[0]
        sent = {name: self._sent(tensors.get(name), *kind) for name, kind in shapes.items()}
        return (step, sent) if there else None

    def _sent(self, x: Tensor | None, shape: Iterable[int], dtype: torch.dtype) -> Tensor:
        kept = torch.empty(tuple(shape), dtype=dtype) if x is None or not self.writes else x
        carried = kept.to(self.device).contiguous()
        _dist().broadcast(carried, src=0)
        return carried.cpu()


ALONE = Ranks()


def joined(device: str) -> Ranks:
    """Join the other processes of a launcher, by the variables that it sets; else be alone.

    The process leaves them again (see `leave`) when it ends.

    Args:
        device: cpu, or cuda; then every process takes the GPU of its ``LOCAL_RANK``.

    Raises:
        BadInput: there are more processes than GPUs, or a variable is no such number.
    """
    world = _said("WORLD_SIZE", default=1, least=1)
    if world == 1:
        return ALONE
    place = _said("LOCAL_RANK", default=0, least=0)
    if device == "cuda":
        if place >= torch.cuda.device_count():
            allowed = f"there are {torch.cuda.device_count()} GPUs, and each process needs one"
            raise BadInput("LOCAL_RANK", place, allowed)
        torch.cuda.set_device(place)
    if not _dist().is_initialized():
        # The first optimiser imports this. Imported while there is a group, it keeps the group for
        # ever, and with it the group's threads, which may abort an interpreter that shuts down.
        import_module("torch._dynamo")
        _dist().init_process_group("nccl" if device == "cuda" else "gloo", timeout=PATIENCE)
        atexit.register(leave)
    return Ranks(rank=_dist().get_rank(), world=_dist().get_world_size(), device=device)


def _said(variable: str, *, default: int, least: int) -> int:
    """What a launcher says in a variable."""
    text = os.environ.get(variable, str(default))
    if not text.isdecimal() or int(text) < least:
        allowed = (
            f"a launcher sets it to an integer of at least {least}; unset WORLD_SIZE to be alone"
        )
        raise BadInput(variable, text, allowed)
    return int(text)


def leave() -> None:
    """Leave the other processes and end the threads that spoke with them; alone, do nothing."""
    if _dist().is_initialized():
        _dist().destroy_process_group()
        gc.collect()  # the group is part of a cycle, and its threads end with it


def _dist() -> Any:
    import torch.distributed

    return torch.distributed
