"""Training in bfloat16: matrices are multiplied in it, under torch's autocast.

So the network's output is bfloat16, and what a loss computes from several outputs (guidance, the
difference of two scores) before it meets a float32 number. Weights and optimisers are float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from turbo_lab.fit import Batch, Objective, Player, Terms, Turn
from turbo_lab.streams import Draw

Loss = Callable[[Batch, Draw], Terms]

PRODUCTS = frozenset(
    {
        *(functional.linear, functional.conv2d),
        *(torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__),
    }
)
"""What the miniature's networks and losses multiply by, and `bfloat16` itself computes on a
processor that has no instructions for it."""


def has_instructions() -> bool:
    """Whether torch multiplies bfloat16 on this CPU by more than loops; up to AVX2 it does not."""
    return torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "NO AVX", "AVX2")


@contextmanager
def bfloat16(device: torch.device) -> Iterator[None]:
    """Autocast to bfloat16; on a CPU attention alone stays in float32.

    Weights, optimisers and averages are not touched. On processors with AMX a step of the
    miniature is shorter so; with torch's own gradient of attention in bfloat16 it would be longer
    (LOG.md, 2026-11-28).

    On a CPU without AVX-512 torch multiplies bfloat16 by loops, over twenty times slower than
    float32. There factors and answers are rounded to bfloat16 and multiplied in float32: products
    of two rounded numbers are exact in it, and other processors add them up in it too, so that
    only the order of the sums is another.

    Losses call a network with and without gradients in one block. Before torch 2.11 a weight that
    was first cast without gradients had none in the whole block (pytorch#158232).

    Args:
        device: where the tensors of the block are.
    """
    kept = nullcontext() if device.type != "cpu" else _OnCPU(rounded=not has_instructions())
    with torch.autocast(device.type, torch.bfloat16), kept:
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


class _OnCPU(TorchFunctionMode):
    """Scaled dot-product attention in float32, whatever autocast says; the answer is cast back.

    Args:
        rounded: compute `PRODUCTS` in float32, of factors rounded to bfloat16.
    """

    def __init__(self, *, rounded: bool) -> None:
        super().__init__()
        self.rounded = rounded

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention:
            query = args[0] if args else kwargs["query"]
            first = [tensor.float() for tensor in args[:3]]  # query, key, value
            named = {
                k: v.float() if k in ("query", "key", "value") else v for k, v in kwargs.items()
            }
            with torch.autocast("cpu", enabled=False):
                return func(*first, *args[3:], **named).to(query.dtype)
        if self.rounded and func in PRODUCTS and torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                named = {name: _rounded(value) for name, value in kwargs.items()}
                return _halved(func(*map(_rounded, args), **named))
        return func(*args, **kwargs)


def _rounded(value: Any) -> Any:
    """What autocast would cast (it leaves doubles), in float32."""
    return _halved(value).float() if _cast(value) else value


def _halved(value: Any) -> Any:
    return value.bfloat16() if _cast(value) else value


def _cast(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype in (torch.float32, torch.bfloat16)
