"""Adapters: who is worn never changes who learns, nor what the gradients are."""

from __future__ import annotations

import copy
import threading
from contextlib import nullcontext

import peft
import pytest
import torch
from adapters_world import (
    SMALL,
    X,
    base_net,
    close,
    grads,
    learns,
    learnt,
    new_host,
    pair,
    right_grads,
)
from torch import nn
from torch.utils.checkpoint import CheckpointError, checkpoint

from turbo_lab.adapters import AdapterSize

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
    in_b = b(*X)
    with host.wearing("a"):
        in_a = host.net(*X)
        with pytest.raises(RuntimeError), host.wearing("b"):
            raise RuntimeError
        assert torch.equal(host.net(*X), in_a)
        assert torch.equal(b(*X), in_b) and torch.equal(host.net(*X), in_a)
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
