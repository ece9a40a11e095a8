"""Adapters on one tiny postcard network, for the tests of `turbo_lab.adapters`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import cache

import torch
from torch import Tensor

from turbo_lab.adapters import AdapterSize, Host, Worn
from turbo_lab.streams import generator
from turbo_lab.testbeds.postcards import NetSize, PostcardNet, spawn_net

SMALL = AdapterSize(rank=4, alpha=8)
Grads = dict[str, Tensor | None]


@cache
def base_net() -> PostcardNet:
    return spawn_net(NetSize(layers=2, heads=2, head_width=16), seed=0)


def new_host() -> Host:
    return Host(copy.deepcopy(base_net()), part="transformer")


def inputs(rows: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    numbers = generator(0, "inputs")
    x_t = torch.randn(rows, 12, 16, 16, generator=numbers)
    return x_t, torch.rand(rows, generator=numbers), torch.randint(0, 9, (rows, 5))


X = inputs()


def learnt(worn: Worn, seed: int = 1) -> Worn:
    """Give an adapter values in B too, as if it had learnt."""
    numbers = generator(seed, "learnt")
    state = {
        key: 0.1 * torch.randn(value.shape, generator=numbers)
        for key, value in worn.state_dict().items()
    }
    worn.load_state_dict(state)
    return worn


def pair(*, checkpointed: bool = False) -> tuple[Host, Worn, Worn]:
    host = new_host()
    a, b = (learnt(host.add(name, SMALL, seed=0), seed=ord(name)) for name in "ab")
    if checkpointed:
        host.checkpointing()
    return host, a, b


def learns(worn: Worn, learn: bool = True) -> None:
    for _, parameter in worn.named_parameters():
        parameter.requires_grad_(learn)


def grads(worn: Worn, loss: Tensor, between: Callable[[], object] = lambda: None) -> Grads:
    """Gradients of the adapter for a loss of it, after something happened in between."""
    between()
    loss.backward()
    return {key: parameter.grad for key, parameter in worn.named_parameters()}


def close(one: Grads, other: Grads) -> bool:
    return one.keys() == other.keys() and all(
        (p is None and q is None) or (p is not None and q is not None and torch.allclose(p, q))
        for p, q in zip(one.values(), other.values(), strict=True)
    )


def right_grads() -> Grads:
    """Gradients of adapter a with nothing else around: no second adapter, no checkpointing."""
    host = new_host()
    a = learnt(host.add("a", SMALL, seed=0), seed=ord("a"))
    learns(a)
    return grads(a, a(*X).square().mean())


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
