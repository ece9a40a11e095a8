"""Pictures of the tiny pipeline against a stock one with the same adapters, times and noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sample_world import WULI, SampleWorld, call, close, no_garbage, stock
from torch import nn

from turbo_lab import qwen_fast, qwen_sample
from turbo_lab.adapters import AdapterSize
from turbo_lab.errors import BadInput, MissingPiece
from turbo_lab.qwen_fast import (
    FP8_LINEARS,
    Fp8Linear,
    quantised,
    relative_error,
    simulated,
    to_fp8,
)
from turbo_lab.qwen_order import STOCK, Fast, Order
from turbo_lab.qwen_sample import Drawn, drawn, opened
from turbo_lab.schedules import published, scheduler_config
from turbo_lab.store import Store
from turbo_lab.testbeds.postcards import pack
from turbo_lab.testbeds.qwen_files import load_transformer, located


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with no_garbage():
        yield


@pytest.fixture(scope="module")
def store(sample_world: SampleWorld) -> Store:
    return sample_world.store


@pytest.fixture(scope="module")
def loras(sample_world: SampleWorld) -> tuple[Path, Path]:
    return sample_world.loras


@pytest.fixture(scope="module")
def ask(sample_world: SampleWorld) -> Callable[..., Order]:
    return sample_world.ask


@pytest.fixture(scope="module")
def two(sample_world: SampleWorld) -> Callable[..., Order]:
    return sample_world.two


@pytest.fixture(scope="module")
def plain(sample_world: SampleWorld) -> Drawn:
    return sample_world.plain


# --- the stock pipeline -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def theirs(tiny_model: Path, loras: tuple[Path, Path]) -> Any:
    """A stock pipeline in the first adapter, with Wuli's scheduler."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipeline = stock(tiny_model)
    pipeline.load_lora_weights(str(loras[0].parent), weight_name=loras[0].name)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(**scheduler_config(WULI))
    return pipeline


@pytest.mark.parametrize("fast", [STOCK, Fast()], ids=["stock", "fast"])
def test_two_steps_are_those_of_a_stock_pipeline(
    two: Callable[..., Order], store: Store, theirs: Any, fast: Fast
) -> None:
    order = two(fast=fast)
    assert order.guidance_scale == 1
    ours = drawn(order, store)
    close(pack(ours.latents), theirs(**call(order), output_type="latent").images)
    pictures = theirs(**call(order), output_type="pt").images.permute(0, 2, 3, 1)
    assert (ours.pixels.float() / 255 - pictures).abs().max() < 0.6 / 255
    assert pictures.std() > 0.02


def test_pictures_need_not_be_square_nor_come_in_the_same_batch(
    two: Callable[..., Order], store: Store, theirs: Any
) -> None:
    order = two(width=96, height=64, fast=Fast())
    ready = opened(order, store)
    one = ready.latents(at_once=1)
    close(pack(one), theirs(**call(order), output_type="latent").images)
    close(ready.latents(at_once=2), one)
    assert not torch.equal(ready.latents(seed=1), one)


@pytest.mark.parametrize("fast", [STOCK, Fast()], ids=["stock", "fast"])
def test_guidance_is_that_of_a_stock_pipeline(
    ask: Callable[..., Order], store: Store, tiny_model: Path, fast: Fast
) -> None:
    order = ask(steps=10, fast=fast)
    assert order.guidance_scale == 4
    ours = drawn(order, store)
    close(pack(ours.latents), stock(tiny_model)(**call(order), output_type="latent").images)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_several_adapters_add_up_as_in_a_stock_pipeline(
    ask: Callable[..., Order], store: Store, tiny_model: Path, loras: tuple[Path, Path]
) -> None:
    weights = (0.8, -0.5)
    pipeline = stock(tiny_model)
    names = []
    for k, file in enumerate(loras):
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=f"a{k}")
        names.append(f"a{k}")
    pipeline.set_adapters(names, list(weights))
    order = ask(loras=loras, weights=weights, schedule="lightning-4")
    request = {**call(order), "sigmas": None}
    pipeline.scheduler = pipeline.scheduler.from_config(
        {**pipeline.scheduler.config, **scheduler_config(published("lightning-4").schedule)}
    )
    expected = pipeline(**request, output_type="latent").images
    for fast in (Fast(), replace(STOCK, decoder="collapsed")):
        close(pack(drawn(replace(order, fast=fast), store).latents), expected)


def test_an_adapter_matters_here(plain: Drawn, ask: Callable[..., Order], store: Store) -> None:
    bare = drawn(ask(schedule="wuli-2", guidance_scale=1.0), store)
    assert relative_error(bare.latents, plain.latents) > 0.1


# --- parts of the fast path ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "part",
    [
        {"adapters": "fused"},
        {"known_times": True},
        {"by_length": True},
        {"attention": "math"},
        {"decoder": "collapsed"},
        {"decoder": "collapsed", "channels_last": True},
        {"offload": True},
    ],
    ids=str,
)
def test_each_part_alone_changes_nothing(
    two: Callable[..., Order], store: Store, plain: Drawn, part: dict[str, Any]
) -> None:
    ours = drawn(two(fast=replace(STOCK, **part)), store)
    close(ours.latents, plain.latents)
    assert (ours.pixels.int() - plain.pixels.int()).abs().max() <= 1


@pytest.mark.slow
def test_compiled_blocks_change_nothing(
    two: Callable[..., Order], store: Store, plain: Drawn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the compiler's front end, which is what could fail; its machine code takes too long."""
    from turbo_lab import vae_decode

    blocks, decoder = qwen_fast.compile_blocks, vae_decode.compiled
    monkeypatch.setattr(qwen_sample, "compile_blocks", lambda net: blocks(net, backend="eager"))
    monkeypatch.setattr(qwen_sample, "compiled", lambda made: decoder(made, backend="eager"))
    close(drawn(two(fast=Fast(compiled=True)), store).latents, plain.latents)


def test_real_rotations_are_the_complex_ones(
    two: Callable[..., Order], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of two lengths, so that masks are met; and attached adapters."""
    for fast in (Fast(), STOCK):
        ready = opened(two(fast=fast), store)
        expected = ready.latents(at_once=2)
        monkeypatch.setattr(
            type(ready.transformer), "compile_repeated_blocks", lambda *_, **__: None
        )
        qwen_fast.compile_blocks(ready.transformer)
        close(ready.latents(at_once=2), expected, atol=2e-5)


def test_adapters_are_fused_in_float32_and_rounded_once() -> None:
    layer = nn.Module()
    layer.linear = nn.Linear(8, 8, bias=False, dtype=torch.bfloat16)
    before = layer.linear.weight.float()
    numbers = torch.Generator().manual_seed(0)
    worn, total = [], before.double()
    for weight in (1.0, -0.3):
        a, b = (torch.randn(s, generator=numbers) for s in ((2, 8), (8, 2)))
        size = AdapterSize(rank=2, alpha=3, targets=("linear",))
        tensors = {"linear.lora_A.weight": a, "linear.lora_B.weight": b}
        worn.append(qwen_fast.Weighted(size=size, tensors=tensors, weight=weight))
        total += weight * 1.5 * (b.double() @ a.double())
    qwen_fast.fuse(layer, worn)
    assert torch.equal(layer.linear.weight, total.float().bfloat16())
    strange = replace(worn[0], tensors={"nowhere.lora_A.weight": a, "nowhere.lora_B.weight": b})
    with pytest.raises(BadInput, match="no such layer"):
        qwen_fast.fuse(layer, [strange])


def test_known_times_are_the_only_ones(two: Callable[..., Order], store: Store) -> None:
    ready = opened(two(), store)
    names = [name for name, _ in ready.transformer.named_parameters() if "_mod." in name]
    assert not names
    with pytest.raises(BadInput, match="known at"):
        ready.field(torch.zeros(1, 16, 8, 8), torch.tensor([0.5]), torch.tensor([0]))


def test_prompts_of_one_length_share_a_call_and_no_mask_is_met(
    ask: Callable[..., Order], store: Store
) -> None:
    seen: list[tuple[int, bool]] = []
    for fast in (Fast(), Fast(by_length=False)):
        ready = opened(ask(schedule="wuli-2", fast=fast), store)
        ready.transformer.register_forward_pre_hook(
            lambda _, inputs, named: seen.append(
                (len(named["hidden_states"]), named["encoder_hidden_states_mask"] is None)
            ),
            with_kwargs=True,
        )
        ready.latents(at_once=2)
    # Two steps of two prompts and of twice the negative one.
    assert seen == [(2, True), (1, True), (1, True)] * 2 + [(4, False)] * 2


def test_a_kernel_that_cannot_be_used_is_named(two: Callable[..., Order], store: Store) -> None:
    with pytest.raises(MissingPiece, match="cudnn cannot be used"):
        drawn(two(fast=Fast(attention="cudnn")), store)


# --- fp8 ----------------------------------------------------------------------------------------


def test_rows_are_rounded_to_within_a_sixteenth() -> None:
    """e4m3 has 3 bits of mantissa: a number of normal size is off by at most 2^-4 of itself."""
    x = (
        torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
        * torch.logspace(-3, 3, 64)[:, None]
    )
    small, scale = quantised(x)
    back = small.float() * scale
    large = x.abs() > scale * 2**-6
    assert ((back - x).abs()[large] <= x.abs()[large] / 16 * (1 + 1e-6)).all()
    torch.testing.assert_close(back.abs().amax(1), x.abs().amax(1))
    assert torch.equal(quantised(torch.zeros(2, 4))[0].float(), torch.zeros(2, 4))


def test_a_layer_is_off_by_the_noise_of_rounding() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        linear, x = nn.Linear(512, 256), torch.randn(2, 128, 512)
    linear.requires_grad_(False)
    found = relative_error(Fp8Linear(linear)(x), linear(x))
    # Two roundings, each of relative size uniform within 1/16 at most: between 2% and 5%.
    assert 0.02 < found < 0.05
    assert Fp8Linear(linear)(x[:1]).shape == (1, 128, 256)


def test_the_simulation_computes_what_pytorchs_kernel_does() -> None:
    numbers = torch.Generator().manual_seed(0)
    x, sx = quantised(torch.randn(32, 64, generator=numbers))
    w, sw = quantised(torch.randn(48, 64, generator=numbers))
    bias = torch.randn(48, generator=numbers).bfloat16()
    try:
        theirs = torch._scaled_mm(
            x, w.t(), scale_a=sx, scale_b=sw.T.contiguous(), bias=bias, out_dtype=torch.bfloat16
        )
    except (RuntimeError, ValueError) as error:
        pytest.skip(f"this PyTorch has no such kernel on a CPU ({str(error)[:60]})")
    ours = simulated(x, sx, w, sw.T, bias, torch.bfloat16)
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=2**-7, atol=2**-6)


def test_fp8_is_measured_and_never_silent(
    two: Callable[..., Order], store: Store, plain: Drawn
) -> None:
    ours = drawn(two(fast=Fast(precision="fp8")), store)
    assert ours.guard is not None
    error = relative_error(ours.latents[:1], plain.latents[:1])
    assert ours.guard.latents == pytest.approx(error, rel=0.02)
    assert 0.001 < ours.guard.velocity < 0.3
    assert ours.guard.layers == 2 * len(FP8_LINEARS)
    assert "off by" in str(ours.guard)


def test_some_layers_can_stay_in_full_precision(tiny_model: Path) -> None:
    net: Any = load_transformer(located(str(tiny_model)), "cpu")
    assert to_fp8(net, keep=("img_mlp",)) == 2 * (len(FP8_LINEARS) - 2)
    block = net.transformer_blocks[0]
    assert isinstance(block.img_mlp.net[2], nn.Linear)
    assert isinstance(block.attn.to_out[0], Fp8Linear)
    with pytest.raises(BadInput, match="begin one of"):
        to_fp8(net, keep=("proj_out",))
