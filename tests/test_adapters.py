"""Adapters on a shared base: what they are, their files, and closed forms."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path

import peft
import pytest
import torch
from adapters_world import SMALL, X, base_net, learns, learnt, new_host, pair, same
from pydantic import ValidationError
from torch import Tensor, nn

from turbo_lab.adapters import QWEN_LINEARS, AdapterSize, Host
from turbo_lab.errors import BadInput
from turbo_lab.field import counted
from turbo_lab.store import load_tensors, save_tensors

# One base, several fields


def test_a_fresh_adapter_is_the_base_bit_for_bit_and_nobody_sees_another() -> None:
    base = base_net()(*X).detach()
    host = new_host()
    a, b = host.add("a", SMALL, seed=0), host.add("b", AdapterSize(rank=2), seed=0)
    assert torch.equal(a(*X), base) and torch.equal(b(*X), base)
    learnt(a)
    changed = a(*X)
    assert not torch.allclose(changed, base, atol=1e-3)
    assert torch.equal(b(*X), base) and torch.equal(host.bare(*X), base)
    learnt(b, seed=2)
    assert torch.equal(a(*X), changed) and torch.equal(host.bare(*X), base)
    later = host.add("later", AdapterSize(rank=3, targets=("proj_out",)), seed=0)
    assert torch.equal(later(*X), base) and torch.equal(a(*X), changed)


def test_a_call_in_an_adapter_is_one_forward() -> None:
    host, a, _ = pair()
    calls: list[int] = []
    host.net.register_forward_hook(lambda *_: calls.append(1))
    counter = counted(a)
    counter(*X)
    assert counter.per_image(len(X[0])) == 1 and len(calls) == 1


def test_an_adapter_starts_from_its_named_stream_and_leaves_the_global_one_alone() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    host, again = new_host(), new_host()
    a, b = host.add("a", SMALL, seed=0), host.add("b", SMALL, seed=0)
    assert torch.equal(torch.random.get_rng_state(), before)
    same = again.add("a", SMALL, seed=0).state_dict()
    differs = b.state_dict()
    assert len(same) == 2 * 14 * 2
    for key, value in a.state_dict().items():
        assert torch.equal(value, same[key])
        if "lora_A" in key:
            bound = value.shape[1] ** -0.5
            assert 0.8 * bound < value.abs().max() <= bound
            assert not torch.equal(value, differs[key])
        else:
            assert not value.any()


def test_on_a_bfloat16_base_an_adapter_is_float32_and_starts_as_the_base() -> None:
    net = copy.deepcopy(base_net()).to(torch.bfloat16)
    x_t, t, c = X[0].bfloat16(), X[1], X[2]
    expected = net(x_t, t, c)
    a = Host(net, part="transformer").add("a", SMALL, seed=0)
    assert {p.dtype for _, p in a.named_parameters()} == {torch.float32}
    assert torch.equal(a(x_t, t, c), expected)


def test_a_copy_is_equal_and_independent() -> None:
    host, a, _ = pair()
    twin = host.copy(a, "twin")
    expected = a(*X).clone()
    assert torch.equal(twin(*X), expected)
    learnt(twin, seed=9)
    assert torch.equal(a(*X), expected) and not torch.equal(twin(*X), expected)
    with pytest.raises(BadInput, match="bare base"):
        host.copy(host.bare, "other")


@pytest.mark.parametrize(
    ("name", "targets", "sentence"),
    [
        ("a", ("to_q",), "the adapters are already a"),
        ("a.b", ("to_q",), "use a word of letters"),
        ("keys", ("to_q",), "use a word of letters"),
        ("new", ("to_q", "to_x"), "targets='to_x' is not allowed.*this is nothing"),
        ("new", ("norm_q",), "this is RMSNorm"),
        ("new", ("a",), "this is nothing"),
    ],
)
def test_a_wrong_adapter_is_refused_before_anything_is_injected(
    name: str, targets: tuple[str, ...], sentence: str
) -> None:
    host = new_host()
    a = learnt(host.add("a", SMALL, seed=0))
    expected, keys = a(*X), set(host.net.state_dict())
    with pytest.raises(BadInput, match=sentence):
        host.add(name, AdapterSize(targets=targets), seed=0)
    assert set(host.net.state_dict()) == keys and torch.equal(a(*X), expected)


def test_a_wrong_host_or_size_is_one_sentence() -> None:
    with pytest.raises(BadInput, match=r"part='core' is not allowed.*'captions', 'transformer'"):
        Host(copy.deepcopy(base_net()), part="core")
    host = new_host()
    host.add("a", SMALL, seed=0)
    with pytest.raises(BadInput, match="one Host"):
        Host(host.net)
    with pytest.raises(BadInput, match="one of the adapters: a"), host.wearing("b"):
        pass
    with pytest.raises(BadInput, match="no gradient checkpointing"):
        Host(nn.Linear(2, 2)).checkpointing()
    for wrong in ({"rank": 0}, {"alpha": 0.0}, {"targets": ()}, {"dropout": 0.1}):
        with pytest.raises(ValidationError):
            AdapterSize(**wrong)


# Files


def test_the_state_is_what_peft_would_save_and_survives_a_file(tmp_path: Path) -> None:
    host = new_host()
    a, b = learnt(host.add("student", SMALL, seed=0)), learnt(host.add("fake", SMALL, seed=0), 2)
    part = host.net.get_submodule("transformer")
    for worn in (a, b):  # PEFT 0.18 takes every key that has the name anywhere: "a"
        theirs = peft.get_peft_model_state_dict(part, adapter_name=str(worn.name))
        assert same(worn.state_dict(), theirs)
        assert [key for key, _ in worn.named_parameters()] == list(worn.state_dict())
    assert "transformer_blocks.0.attn.to_q.lora_A.weight" in a.state_dict()
    save_tensors(tmp_path, "adapter.safetensors", a.state_dict())
    other = new_host().add("another_name", SMALL, seed=7)
    other.load_state_dict(load_tensors(tmp_path, "adapter.safetensors"))
    assert torch.equal(other(*X), a(*X))
    host.bare.load_state_dict({})
    assert host.bare.state_dict() == {} and not list(host.bare.named_parameters())


shared_pair = cache(pair)


def hostile(kind: str, state: dict[str, Tensor], key: str) -> dict[str, Tensor]:
    if kind == "missing":
        return {k: v for k, v in state.items() if k != key}
    if kind == "unknown":
        return {**state, key + ".alpha": torch.ones(())}
    value = state[key]
    wrong = {
        "shape": value.T,
        "flat": value.flatten(),
        "nan": value.clone().fill_(float("nan")),
        "too large": torch.full_like(value, 1e300, dtype=torch.float64),
        "integers": value.to(torch.int64),
        "text": "weights",
    }
    return {**state, key: wrong[kind]}  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("missing", "'missing' is not allowed: adapter 'a' needs finite numbers of shape"),
        ("unknown", "has no tensor of this name"),
        ("shape", r"=\[\d+, \d+\] is not allowed: adapter 'a' needs"),
        ("flat", r"=\[\d+\] is not allowed"),
        ("nan", "not finite"),
        ("too large", "not finite"),
        ("integers", "torch.int64"),
        ("text", "str"),
    ],
)
def test_a_hostile_state_is_refused_whole(kind: str, says: str) -> None:
    _, a, b = shared_pair()
    before = {k: v.clone() for k, v in a.state_dict().items()}
    key = "transformer_blocks.1.txt_mlp.net.2.lora_B.weight"  # the last: all before it are good
    assert key == list(before)[-1]
    with pytest.raises(BadInput, match=says) as refused:
        a.load_state_dict(hostile(kind, b.state_dict(), key))
    assert str(refused.value).startswith(key) and "\n" not in str(refused.value)
    assert same(a.state_dict(), before)


# Closed forms


class Straight(nn.Module):
    """The field W x + b, on which an adapter can do what a full copy does."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 7)

    def forward(self, x_t: Tensor, t: Tensor, c: object) -> Tensor:
        return self.linear(x_t)


def test_an_adapter_of_full_rank_is_a_copy_and_its_first_gradient_is_the_copys() -> None:
    net = Straight()
    full = copy.deepcopy(net)
    size = AdapterSize(rank=5, alpha=15, targets=("linear",))
    x, t, weights = torch.randn(4, 5), torch.zeros(4), torch.randn(4, 7)
    worn = Host(net).add("a", size, seed=0)
    learns(worn)
    (worn(x, t, None) * weights).sin().sum().backward()
    (full(x, t, None) * weights).sin().sum().backward()
    a, b = (p for _, p in worn.named_parameters())
    assert full.linear.weight.grad is not None
    # d/dB L(W + (alpha/r) B A) = (alpha/r) dL/dW Aᵀ; at B = 0 nothing reaches A
    torch.testing.assert_close(b.grad, 3 * full.linear.weight.grad @ a.detach().T)
    assert a.grad is not None and not a.grad.any()

    change = torch.randn(7, 5)
    full.linear.weight.data += change
    worn.load_state_dict({"linear.lora_A.weight": torch.eye(5), "linear.lora_B.weight": change / 3})
    torch.testing.assert_close(worn(x, t, None), full(x, t, None))


def test_the_targets_are_every_linear_layer_of_a_block() -> None:
    block = base_net().transformer.transformer_blocks[0]
    linears = {name for name, m in block.named_modules() if isinstance(m, nn.Linear)}
    assert {name.removeprefix("attn.") for name in linears} == set(QWEN_LINEARS)
    assert len(QWEN_LINEARS) == 14
