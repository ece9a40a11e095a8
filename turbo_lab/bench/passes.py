"""Passes through a network: counted while something runs, and made one at a time to be timed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from types import MappingProxyType
from typing import Literal, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.autograd import forward_ad

from turbo_lab.adapters import Worn
from turbo_lab.errors import BadInput
from turbo_lab.field import Condition, Field
from turbo_lab.fit import Batch
from turbo_lab.methods.continuous import forward_mode
from turbo_lab.path import mix

Mode = Literal["forward", "gradient", "tangent"]
MODES: tuple[Mode, ...] = ("forward", "gradient", "tangent")


class Pass(NamedTuple):
    """A kind of network pass: what is computed, and whether in an adapter or bare.

    ``forward`` is a velocity without a graph; ``gradient`` one with a graph, its backward pass
    included; ``tangent`` one with a forward-mode derivative.
    """

    mode: Mode
    adapter: bool

    def __str__(self) -> str:
        return f"{'adapter' if self.adapter else 'bare'} {self.mode}"


@contextmanager
def counted_passes(
    batch_size: int, networks: Iterable[nn.Module]
) -> Iterator[Mapping[Pass, float]]:
    """Count passes per sample through networks while the context is open.

    Whoever calls: a hook on each network sees it below guidance and adapters, and costs a step
    next to nothing. A call of 2B
    rows is two passes of a batch of B, so guidance counts twice. A ``gradient`` pass is one whose
    velocity has a graph; its backward pass belongs to it and is not counted again.
    """
    tally: dict[Pass, float] = defaultdict(float)

    def note(module: nn.Module, _: object, velocity: Tensor) -> None:
        tally[_kind(module, velocity)] += len(velocity) / batch_size

    with ExitStack() as hooks:
        for network in networks:
            hooks.callback(network.register_forward_hook(note).remove)
        yield tally


def _kind(network: nn.Module, velocity: Tensor) -> Pass:
    layers = (m for m in network.modules() if isinstance(m, BaseTunerLayer))
    adapter = any(not layer.disable_adapters for layer in layers)
    if forward_ad.unpack_dual(velocity).tangent is not None:
        return Pass("tangent", adapter)
    return Pass("gradient" if velocity.requires_grad else "forward", adapter)


def probes(kinds: Sequence[Pass], student: Worn, batch: Batch) -> dict[Pass, Callable[[], object]]:
    """Return a call for each kind that makes one such pass over the batch.

    Args:
        kinds: what is wanted.
        student: the adapter; its parameters are set to require gradients. The bare network is
            that of its host, and a ``gradient`` through it is that of its input.
        batch: with noise; the pass is at t = 1/2.

    Raises:
        BadInput: the batch has no noise.
    """
    if batch.z is None:
        raise BadInput("batch.z", None, "give a batch with noise")
    t = torch.full((len(batch.x),), 0.5, device=batch.x.device)
    x_t = mix(batch.x, batch.z, t)
    learns: list[Tensor] = [p.requires_grad_() for _, p in student.named_parameters()]
    sides: dict[bool, tuple[Field, list[Tensor]]] = {
        True: (student, learns),
        False: (student.host.bare, []),
    }
    return {
        kind: partial(_PROBES[kind.mode], *sides[kind.adapter], x_t, t, batch.c) for kind in kinds
    }


@torch.no_grad()
def _forward(field: Field, _: list[Tensor], x_t: Tensor, t: Tensor, c: Condition) -> None:
    field(x_t, t, c)


def _gradient(field: Field, learns: list[Tensor], x_t: Tensor, t: Tensor, c: Condition) -> None:
    if not learns:
        x_t = x_t.detach().requires_grad_()
        learns = [x_t]
    loss = field(x_t, t, c).square().mean()
    # Qwen's last block ends with a text stream that nobody reads: its parameters stay unused.
    torch.autograd.grad(loss, learns, allow_unused=True)


def _tangent(field: Field, _: list[Tensor], x_t: Tensor, t: Tensor, c: Condition) -> None:
    forward_mode(field, x_t, t, c, x_t)


_PROBES: Mapping[Mode, Callable[..., None]] = MappingProxyType(
    {"forward": _forward, "gradient": _gradient, "tangent": _tangent}
)
