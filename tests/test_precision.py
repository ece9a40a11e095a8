"""Losses in bfloat16 against losses in float32, and what must stay in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention as attention
from torch.overrides import TorchFunctionMode

from turbo_lab import precision, recipes
from turbo_lab.methods.flow import FlowMatching
from turbo_lab.precision import InBfloat16, bfloat16
from turbo_lab.recipes import Stage
from turbo_lab.store import Store
from turbo_lab.streams import Draw
from turbo_lab.testbeds.postcards import NetSize, spawn_net, train_batch
from turbo_lab.training import replay, trained, workbench

CPU = torch.device("cpu")
SMALL = NetSize(layers=1, heads=1, head_width=16, text_width=16)


def test_losses_are_near_those_in_float32_and_gradients_stay_in_it() -> None:
    draw = Draw(seed=0, step=0, total=8)
    batch = train_batch(draw, seed=0)
    plain = FlowMatching(student=spawn_net(NetSize(), 0))
    (turn,), (half,) = plain.turns(), InBfloat16(objective=plain).turns()
    assert (half.name, half.moves, half.every) == (turn.name, turn.moves, turn.every)
    exact, near = (t.loss(batch, draw)["velocity"] for t in (turn, half))
    assert near.dtype == torch.float32
    assert 0 < float((near / exact - 1).detach().abs().max()) < 0.01
    near.sum().backward()
    gradients = [p.grad for p in plain.student.parameters() if p.grad is not None]
    assert gradients and all(g.dtype == torch.float32 for g in gradients)


@pytest.mark.parametrize(
    "call",
    [
        lambda q, k, v: attention(q, k, v),
        lambda q, k, v: attention(query=q, key=k, value=v, is_causal=False),
    ],
    ids=["by place", "by name"],
)
def test_attention_alone_is_computed_in_float32(call: Callable[..., Tensor]) -> None:
    q, k, v = torch.randn(3, 2, 4, 16, 8, generator=torch.Generator().manual_seed(0))
    with bfloat16(CPU):
        inside, halves = call(q, k, v), call(q.bfloat16(), k.bfloat16(), v.bfloat16())
        product = q @ k.transpose(-1, -2)
    assert torch.equal(inside, attention(q, k, v))  # to the bit
    assert halves.dtype == product.dtype == torch.bfloat16
    exact = attention(*(x.bfloat16().float() for x in (q, k, v)))
    assert torch.equal(halves, exact.bfloat16())  # rounded once, at the end


def test_a_call_without_gradients_leaves_the_next_one_its_own() -> None:
    """Weights are cast once and kept; torch below the bound in pyproject.toml kept them without."""
    layer, x = torch.nn.Linear(4, 4), torch.ones(2, 4)
    with bfloat16(CPU):
        with torch.no_grad():
            layer(x)
        layer(x).float().sum().backward()
    assert layer.weight.grad is not None and bool(layer.weight.grad.any())


def test_a_stage_says_so_and_another_precision_is_another_artefact(tmp_path: Path) -> None:
    whole = recipes.resolve("teacher", profile="smoke")
    stage = whole.stages[0]
    assert "precision" not in whole.model_copy(update={"stages": (stage,)}).spec()["stages"][0]
    half = Stage(**{**stage.model_dump(), "precision": "bf16"})
    plain, recipe = (
        whole.model_copy(update={"net": SMALL, "stages": (one,)}) for one in (stage, half)
    )
    store = Store(cache=tmp_path)
    assert isinstance(workbench(recipe, store).objective(half), InBfloat16)
    first, second = trained(plain, store=store), trained(recipe, store=store)
    assert first.key != second.key
    assert replay(recipe, second, store).first != replay(plain, first, store).first


CALLS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "linear": lambda x, w, b: functional.linear(x, w, b),
    "linear by name": lambda x, w, b: functional.linear(input=x, weight=w, bias=b),
    "@": lambda x, w, b: x @ w.T + b.bfloat16(),
    "torch.matmul": lambda x, w, b: torch.matmul(x, w.T) + b.bfloat16(),
    "Tensor.matmul": lambda x, w, b: x.matmul(w.T) + b.bfloat16(),
    "conv": lambda x, w, b: functional.conv2d(x[:, :, None, None], w[:, :, None, None], b).flatten(
        1
    ),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_rounded_factors_in_float32_are_bfloat16(
    call: Callable[[Tensor, Tensor, Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward, against torch's own loops or instructions."""
    found = []
    for instructions in (True, False):
        monkeypatch.setattr(precision, "has_instructions", lambda own=instructions: own)
        generator = torch.Generator().manual_seed(0)
        x, w, b = (
            torch.randn(shape, generator=generator).requires_grad_()
            for shape in ((24, 64), (16, 64), (16,))
        )
        with bfloat16(CPU):
            y = call(x, w, b)
        assert y.dtype == torch.bfloat16
        y.float().square().mean().backward()
        found.append([y.detach(), *(one.grad for one in (x, w, b) if one.grad is not None)])
        assert [one.dtype for one in found[-1][1:]] == 3 * [torch.float32]
    for own, ours in zip(*found, strict=True):
        # Sums in another order may round to the neighbour, which is 2**-8 away.
        assert torch.allclose(own, ours, rtol=2**-7, atol=2**-8 * float(own.abs().max()))


class Products(TorchFunctionMode):
    """Keeps the tensors that are multiplied by what it is entered before."""

    def __init__(self) -> None:
        super().__init__()
        self.factors: list[Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        named = kwargs or {}
        if func in precision.PRODUCTS:
            self.factors += [x for x in (*args, *named.values()) if isinstance(x, Tensor)]
        return func(*args, **named)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize("instructions", [True, False])
def test_without_instructions_what_is_multiplied_is_rounded_and_in_float32(
    call: Callable[[Tensor, Tensor, Tensor], Tensor],
    instructions: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(precision, "has_instructions", lambda: instructions)
    generator = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(shape, generator=generator) for shape in ((24, 64), (16, 64), (16,)))
    with Products() as heard, bfloat16(CPU):
        call(x, w, b)
    assert len(heard.factors) >= 2
    assert all(one.dtype == torch.float32 for one in heard.factors)  # autocast acts below
    rounded = [torch.equal(one, one.bfloat16().float()) for one in heard.factors]
    assert not any(rounded) if instructions else all(rounded)


def test_doubles_are_left_as_autocast_leaves_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "has_instructions", lambda: False)
    x, w = torch.randn(2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with bfloat16(CPU):
        assert torch.equal(x @ w, functional.linear(x, w.T)) and (x @ w).dtype == torch.float64
