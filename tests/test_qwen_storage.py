"""A training's frozen base in fp8: what rounding may do, and what gradients it gives."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from factory_world import SMALL, changed, history, job, student_gradient
from torch import Tensor, nn

from turbo_lab import factory
from turbo_lab.errors import BadInput
from turbo_lab.factory_memory import memory_plan
from turbo_lab.factory_plan import Job
from turbo_lab.fit import Record
from turbo_lab.qwen_fast import FP8_LINEARS, quantised
from turbo_lab.qwen_storage import StoredLinear, store_in_fp8
from turbo_lab.store import Store


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def widened(layer: StoredLinear) -> Tensor:
    """The weight that a stored layer stands for."""
    return layer.weight.float() * layer.scale[:, None]


def layer_of(out: int, into: int, dtype: torch.dtype = torch.float32) -> nn.Linear:
    """A layer with rows of very different sizes, and entries in them."""
    linear = nn.Linear(into, out).to(dtype)
    with torch.no_grad():
        sizes = torch.logspace(-4, 4, out)[:, None] * torch.logspace(0, -5, into)
        linear.weight.copy_(normal(0, out, into) * sizes)
    return linear.requires_grad_(False)


# --- rounding -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_error_is_what_three_bits_of_mantissa_allow(dtype: torch.dtype) -> None:
    """Half a unit in the last place: ``|W|/16``, and ``s/1024`` below the smallest normal number.

    e4m3 has 3 bits, its smallest normal number is 2^-6, and its steps below that are 2^-9.
    """
    linear = layer_of(24, 40, dtype)
    stored, w = StoredLinear(linear), linear.weight.double()
    assert stored.weight.element_size() == 1 and stored.scale.shape == (24,)
    scale = w.abs().amax(1, keepdim=True) / 448
    bound = torch.maximum(w.abs() / 16, scale / 1024)
    error = (widened(stored).double() - w).abs()
    assert bool((error <= bound * (1 + 1e-6)).all())
    assert float((error / bound).max()) > 0.9  # and not much less
    x = normal(1, 7, 40).to(dtype)
    y, exact = stored(x), x.double() @ w.T + linear.bias.double()
    assert y.dtype == dtype
    rounds = 2**-8 if dtype == torch.bfloat16 else 1e-5
    allowed = x.double().abs() @ bound.T + rounds * (exact.abs() + x.double().abs() @ w.abs().T)
    assert bool(((y.double() - exact).abs() <= allowed).all())


def test_an_input_gets_the_gradient_of_the_rounded_layer_and_the_weight_none() -> None:
    linear = layer_of(5, 8)
    stored = StoredLinear(linear)
    assert not any(p.requires_grad for p in stored.parameters())
    assert {name for name, _ in stored.named_buffers()} == {"weight", "scale"}
    x, g = normal(2, 3, 8).requires_grad_(), normal(3, 3, 5)
    (slope,) = torch.autograd.grad(stored(x), x, g)
    torch.testing.assert_close(slope, g @ widened(stored), rtol=1e-6, atol=1e-6)


# --- in the factory -----------------------------------------------------------------------------


def stored_job(world: Path, recipe: str = "dmd2-2", **options: Any) -> Job:
    return changed(job(world, recipe, storage="fp8", **options), adapter=SMALL)


def dequantise(transformer: Any) -> int:
    """Put the weights that stored layers stand for into ordinary ones."""
    done = 0
    for block in transformer.transformer_blocks:
        for path, layer in list(block.named_modules()):
            if isinstance(layer, StoredLinear):
                plain = nn.Linear(layer.in_features, layer.out_features).requires_grad_(False)
                with torch.no_grad():
                    plain.weight.copy_(widened(layer))
                plain.bias = layer.bias
                block.set_submodule(path, plain)
                done += 1
    return done


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name", ["consistency", "continuous", "dmd2-2"])
def test_adapters_get_the_gradients_of_the_network_that_fp8_stands_for(
    factory_world: Path, factory_caches: Store, name: str, keep: bool
) -> None:
    work = dataclasses.replace(stored_job(factory_world, name), keep_activations=keep)
    ours = student_gradient(factory._bench(work, factory_caches), work)
    plain = factory._bench(work, factory_caches)
    host: Any = plain.testbed.host
    assert dequantise(host.net.transformer) == 2 * len(FP8_LINEARS)
    theirs = student_gradient(plain, work)
    assert ours.keys() == theirs.keys() and ours
    largest = max(float(g.abs().max()) for g in theirs.values())
    for key, gradient in theirs.items():
        torch.testing.assert_close(ours[key], gradient, rtol=1e-4, atol=1e-5 * largest)
    base = {n: p for n, p in host.net.named_parameters() if "lora_" not in n}
    assert not any(p.requires_grad or p.grad is not None for p in base.values())


def test_recomputation_keeps_no_wide_weight(factory_world: Path, factory_caches: Store) -> None:
    kept: dict[bool, int] = {}
    for keep in (True, False):
        work = dataclasses.replace(stored_job(factory_world), keep_activations=keep)
        bench = factory._bench(work, factory_caches)
        transformer: Any = bench.testbed.host.net.transformer
        wide = [m.weight.float() for m in transformer.modules() if isinstance(m, StoredLinear)]
        saved: list[Tensor] = []

        def note(x: Tensor, saved: list[Tensor] = saved) -> Tensor:
            saved.append(x)
            return x

        for _, parameter in bench.players["student"].named_parameters():
            parameter.requires_grad_(True)
        student: Any = bench.players["student"]
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            student(normal(0, 1, *bench.testbed.shape), torch.tensor([0.5]), torch.tensor([0]))
        kept[keep] = sum(any(torch.equal(w, x) or torch.equal(w.T, x) for x in saved) for w in wide)
    assert kept[True] > len(FP8_LINEARS) and kept[False] == 0


def test_a_training_on_a_stored_base_runs_resumes_and_says_its_error(
    factory_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = stored_job(factory_world)
    straight = factory.trained(work, store=Store(cache=tmp_path / "a"))
    assert all(norm > 0 for line in history(straight) for norm in line["norms"].values())
    assert 0.001 < straight.card["base_error"] < 0.2

    def trip(record: Record, done: int) -> None:
        if done == 3 and not list((tmp_path / "b").rglob("tripped")):
            (tmp_path / "b" / "tripped").touch()
            raise RuntimeError("the power went out")

    monkeypatch.setattr(factory, "SAVE_SECONDS", 0.0)
    store = Store(cache=tmp_path / "b")
    with pytest.raises(RuntimeError, match="power"):
        factory.trained(work, store=store, watch=trip)
    resumed = factory.trained(work, store=store, watch=trip)
    a, b = straight.tensors(), resumed.tensors()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert resumed.card["base_error"] == straight.card["base_error"]
    other = factory.trained(changed(work, storage=None), store=store)
    assert "base_error" not in other.card
    assert any(not torch.equal(a[k], v) for k, v in other.tensors().items())


def test_the_error_is_that_of_the_velocity(factory_world: Path, factory_caches: Store) -> None:
    bench = factory._bench(stored_job(factory_world), factory_caches)
    plain = factory._bench(changed(stored_job(factory_world), storage=None), factory_caches)
    x_t = factory.noise(bench.testbed.shape, seed=0, stream="storage", indices=range(2))
    t, c = torch.full((2,), 0.5), torch.arange(2)
    ours, theirs = (b.testbed.plain(x_t, t, c) for b in (bench, plain))
    assert plain.base_error is None
    assert bench.base_error == pytest.approx(float((ours - theirs).norm() / theirs.norm()))


def test_storage_is_in_the_key_only_where_it_is_asked_for(factory_world: Path) -> None:
    plain, stored = job(factory_world, "dmd2-2"), job(factory_world, "dmd2-2", storage="fp8")
    assert [s["recipe"] | {"storage": "fp8"} for s in plain.specs()] == [
        s["recipe"] for s in stored.specs()
    ]
    assert all("storage" not in spec["recipe"] for spec in plain.specs())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"storage": "int8"}, "storage='int8' is not allowed: use fp8, or leave it out"),
        ({"storage": "fp8", "keep_activations": True}, "keep_activations=True is not allowed"),
    ],
)
def test_storages_that_are_none_are_one_sentence(
    factory_world: Path, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(BadInput) as error:
        job(factory_world, "dmd2-2", **options)
    assert str(error.value).startswith(said)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_memory_plan_counts_the_bytes_that_are_stored(
    factory_world: Path, factory_caches: Store, device: str
) -> None:
    work = dataclasses.replace(stored_job(factory_world), device=device)
    bench = factory._bench(dataclasses.replace(work, device="cpu"), factory_caches)
    transformer: Any = bench.testbed.host.net.transformer
    wide = 2 if device == "cuda" else 4
    numbers = [p.numel() * wide for n, p in transformer.named_parameters() if "lora_" not in n]
    rounded = [b.numel() * b.element_size() for m in transformer.modules()
               if isinstance(m, StoredLinear) for b in m.buffers()]  # fmt: skip
    plan = memory_plan(work)
    assert plan.base == sum(numbers) + sum(rounded)
    whole = memory_plan(changed(work, storage=None))
    assert plan.loading == whole.base and plan.phases["loading"] == whole.base + plan.adapters
    assert whole.phases["training"] - plan.phases["training"] == whole.base - plan.base > 0
    assert "loading" not in whole.phases
    lines = "\n".join(plan.lines())
    assert lines.count("loading") == 1


def test_a_bare_layer_is_stored_too(factory_world: Path) -> None:
    from turbo_lab.testbeds.qwen_files import load_transformer, located

    net: Any = load_transformer(located(str(factory_world / "model")), "cpu")
    before = net.transformer_blocks[1].attn.to_q.weight.clone()
    assert store_in_fp8(net) == 2 * len(FP8_LINEARS)
    stored = net.transformer_blocks[1].attn.to_q
    weight, scale = quantised(before)
    assert torch.equal(stored.weight.float(), weight.float())
    assert torch.equal(stored.scale, scale[:, 0])
    assert isinstance(net.transformer_blocks[1].img_mod[1], nn.Linear)
