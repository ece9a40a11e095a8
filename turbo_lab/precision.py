"""Training in bfloat16: matrices are multiplied in it, and everything else stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from turbo_lab.fit import Batch, Objective, Player, Terms, Turn
from turbo_lab.streams import Draw

Loss = Callable[[Batch, Draw], Terms]


@contextmanager
def bfloat16(device: torch.device) -> Iterator[None]:
    """Autocast to bfloat16; on a CPU attention alone stays in float32.

    Weights, optimisers and averages are not touched. On processors with AMX a step of the
    miniature is shorter so; with torch's own gradient of attention in bfloat16 it would be longer
    (LOG.md, 2026-11-28).

    Losses call a network with and without gradients in one block. Before torch 2.11 a weight that
    was first cast without gradients had none in the whole block (pytorch#158232).

    Args:
        device: where the tensors of the block are.
    """
    attention = _FloatAttention() if device.type == "cpu" else nullcontext()
    with torch.autocast(device.type, torch.bfloat16), attention:
        yield


@dataclass(frozen=True, kw_only=True)
class InBfloat16:
    """An objective whose losses are computed inside `bfloat16`; its players and turns are kept."""

    objective: Objective

    @property
    def players(self) -> Mapping[str, Player]:
        """The players by name."""
        return self.objective.players

    def turns(self) -> Sequence[Turn]:
        """The turns of one round, in order."""
        return [replace(turn, loss=_inside(turn.loss)) for turn in self.objective.turns()]


def _inside(loss: Loss) -> Loss:
    def inside(batch: Batch, draw: Draw) -> Terms:
        with bfloat16(batch.x.device):
            return loss(batch, draw)

    return inside


class _FloatAttention(TorchFunctionMode):
    """Scaled dot-product attention in float32, whatever autocast says; the answer is cast back."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention:
            return func(*args, **kwargs)
        query = args[0] if args else kwargs["query"]
        first = [tensor.float() for tensor in args[:3]]  # query, key, value
        named = {k: v.float() if k in ("query", "key", "value") else v for k, v in kwargs.items()}
        with torch.autocast("cpu", enabled=False):
            return func(*first, *args[3:], **named).to(query.dtype)
