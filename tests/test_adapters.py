"""Adapters on a shared base: who is worn never changes who learns, nor what the gradients are."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import peft
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError, checkpoint

from turbo_lab.adapters import QWEN_LINEARS, AdapterSize, Host, Worn
from turbo_lab.errors import BadInput
from turbo_lab.field import counted
from turbo_lab.fit import Batch, Optimiser, Record, Saving, Shadow, Turn, fit
from turbo_lab.store import Checkpoints, load_tensors, save_tensors
from turbo_lab.streams import Draw, generator
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


# Trap 1: who is worn is not who learns


def test_wearing_never_changes_who_learns() -> None:
    host, a, b = pair()
    learns(a)
    flags = {name: p.requires_grad for name, p in host.net.named_parameters()}
    assert {name.split(".lora_")[0] for name, on in flags.items() if on} == {
        f"transformer.{key.split('.lora_')[0]}" for key in a.state_dict()
    }
    with host.wearing("a"), host.wearing("b"), host.wearing(None):
        a(*X), b(*X), host.bare(*X)
        assert {n: p.requires_grad for n, p in host.net.named_parameters()} == flags
    host.add("late", SMALL, seed=0)
    now = {n: p.requires_grad for n, p in host.net.named_parameters()}
    assert {n: on for n, on in now.items() if ".late." not in n} == flags
    assert not any(on for n, on in now.items() if ".late." in n)


def test_what_was_worn_is_restored_also_after_an_error() -> None:
    host, a, b = pair()
    with host.wearing("a"):
        in_a = host.net(*X)
        with pytest.raises(RuntimeError), host.wearing("b"):
            raise RuntimeError
        assert torch.equal(host.net(*X), in_a)
        assert torch.equal(b(*X), b(*X)) and torch.equal(host.net(*X), in_a)
    assert torch.equal(host.net(*X), base_net()(*X))
    assert torch.equal(a(*X), in_a)


def test_gradients_are_right_when_another_adapter_is_worn_before_the_backward_pass() -> None:
    host, a, b = pair()
    learns(a)
    loss = a(*X).square().mean()
    b(*X)
    with host.wearing("b"):
        found = grads(a, loss)
    assert close(found, right_grads())
    reached = {key for key, grad in found.items() if grad is not None}
    # The text stream ends with the last block: what only feeds its end has no gradient.
    ends = ("to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")
    last = {k for k in found if k.startswith("transformer_blocks.1.") and any(e in k for e in ends)}
    assert reached == found.keys() - last
    assert all(p.grad is None for _, p in b.named_parameters())


def test_plain_peft_drops_the_gradients_then() -> None:
    """The reason for `Host`: should this fail one day, PEFT has mended it."""
    config = peft.LoraConfig(r=4, target_modules=["to_q"])
    net = copy.deepcopy(base_net())
    for name in "ab":
        with pytest.warns() if name == "b" else nullcontext():
            peft.inject_adapter_in_model(config, net.transformer, adapter_name=name)
    layers = [m for m in net.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    for switched in (False, True):
        for layer in layers:
            layer.set_adapter("a")
        loss = net(*X).square().mean()
        for layer in layers if switched else ():
            layer.set_adapter("b")
        net.zero_grad()
        if switched:
            loss.backward()
            assert all(layer.lora_B["a"].weight.grad is None for layer in layers)
        else:
            loss.backward()
            assert all(layer.lora_B["a"].weight.grad is not None for layer in layers)


# Trap 2: checkpointing


def test_checkpointed_gradients_are_right_whatever_is_worn_and_on_any_thread() -> None:
    host, a, b = pair(checkpointed=True)
    learns(a)
    for between in (lambda: None, lambda: b(*X), lambda: host.bare(*X)):
        host.net.zero_grad()
        assert close(grads(a, a(*X).square().mean(), between), right_grads())
    host.net.zero_grad()
    loss = a(*X).square().mean()
    with host.wearing("b"):
        in_b = host.net(*X)
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
        assert torch.equal(host.net(*X), in_b)
    assert close({k: p.grad for k, p in a.named_parameters()}, right_grads())


def test_a_retained_graph_is_recomputed_twice() -> None:
    """Gradient norms of two terms, as DMD2 + GAN measures them, go back through one graph."""
    host, a, _ = pair(checkpointed=True)
    learns(a)
    loss, right = a(*X).square().mean(), right_grads()
    reached = {k: p for k, p in a.named_parameters() if right[k] is not None}
    with host.wearing("b"):
        for _ in range(2):
            found = torch.autograd.grad(loss, list(reached.values()), retain_graph=True)
            for key, value in zip(reached, found, strict=True):
                torch.testing.assert_close(value, right[key])


def test_an_adapter_with_other_targets_may_come_between_forward_and_backward() -> None:
    host = new_host()
    host.checkpointing()
    a = learnt(host.add("a", AdapterSize(rank=4, targets=("to_q",)), seed=0))
    learns(a)
    right = grads(a, a(*X).square().mean())
    host.net.zero_grad()
    loss = a(*X).square().mean()
    wide = learnt(host.add("wide", SMALL, seed=0))
    with host.wearing("wide"):
        assert close(grads(a, loss), right)
    learns(a, False)
    learns(wide)
    loss = wide(*X).square().mean()
    with host.wearing("a"):
        found = grads(wide, loss)
    alone = new_host()
    only = learnt(alone.add("wide", SMALL, seed=0))
    learns(only)
    assert close(found, grads(only, only(*X).square().mean()))


def test_blocks_are_recomputed_exactly_when_a_gradient_needs_them() -> None:
    host, a, _ = pair(checkpointed=True)
    learns(a)
    calls: list[int] = []
    blocks = host.net.get_submodule("transformer.transformer_blocks").children()
    for block in blocks:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        a(*X)
    assert len(calls) == 2
    host.bare(*X)  # nothing learns there: nothing to keep
    assert len(calls) == 4
    a(*X).square().mean().backward()
    assert len(calls) == 8


def test_a_plain_checkpoint_gives_other_gradients_then() -> None:
    """The tests above can fail: without the context of `Host` gradients are wrong, in silence."""
    host, a, b = pair()
    host.net.get_submodule("transformer").enable_gradient_checkpointing(  # type: ignore[operator]
        lambda block, *args: checkpoint(block, *args, use_reentrant=False)
    )
    learns(a)
    learns(b)
    right = right_grads()
    with host.wearing("a"):
        assert close(grads(a, a(*X).square().mean()), right)
    host.net.zero_grad()
    loss = a(*X).square().mean()
    with host.wearing("b"):
        wrong = grads(a, loss)
    both = [(p, q) for p, q in zip(wrong.values(), right.values(), strict=True) if q is not None]
    assert max(float((p - q).norm() / q.norm()) for p, q in both if p is not None) > 0.1
    # Only when the bare base is worn by then, does PyTorch notice.
    loss = a(*X).square().mean()
    with host.wearing(None), pytest.raises(CheckpointError, match="number of tensors"):
        loss.backward()


# Trap 3: per-sample routing


def test_peft_refuses_names_per_sample_in_training() -> None:
    """Hence one forward per adapter, with `wearing`."""
    config = peft.LoraConfig(r=2, target_modules=["0"])
    model = peft.get_peft_model(nn.Sequential(nn.Linear(3, 3)), config)
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        model(torch.ones(1, 3), adapter_names=["default"])


# Trap 4: compiled blocks


@pytest.mark.slow
def test_switching_compiled_blocks_compiles_nothing_more() -> None:
    from torch._dynamo.testing import CompileCounter

    host, a, b = pair()
    fields = (a, b, host.bare)
    expected = [worn(*X) for worn in fields]
    torch._dynamo.reset()
    counter = CompileCounter()
    for block in host.net.get_submodule("transformer.transformer_blocks").children():
        block.compile(backend=counter)
    for worn in fields:
        worn(*X)
    # One variant for each that is worn; the blocks share them.
    assert counter.frame_count == 3
    for _ in range(3):
        for worn, value in zip(fields, expected, strict=True):
            torch.testing.assert_close(worn(*X), value)
    assert counter.frame_count == 3
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_game_of_two_adapters_needs_more_variants_than_pytorch_allows() -> None:
    """Also requires_grad of weights and input, and grad mode, make variants of a compiled block.

    Above ``recompile_limit`` (8 unless told) PyTorch goes on without compiling, with one warning.
    """
    from torch._dynamo.testing import CompileCounter

    host, a, b = pair(checkpointed=True)
    torch._dynamo.reset()
    counter, counts = CompileCounter(), []
    for block in host.net.get_submodule("transformer.transformer_blocks").children():
        block.compile(backend=counter)
    with torch._dynamo.config.patch(recompile_limit=32, fail_on_recompile_limit_hit=True):
        for _ in range(3):
            for learner, other in ((a, b), (b, a)):
                learns(learner)
                learns(other, False)
                with torch.no_grad():
                    learner(*X), other(*X), host.bare(*X)
                learner(*X).square().mean().backward()
            counts.append(counter.frame_count)
    assert 8 < counts[0] <= 16 and counts == counts[:1] * 3
    torch._dynamo.reset()


# Players of fit


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


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


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
