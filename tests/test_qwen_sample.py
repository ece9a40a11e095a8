"""Pictures of the tiny pipeline against a stock one with the same adapters, times and noise."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from turbo_lab import qwen_fast, qwen_sample
from turbo_lab.adapters import QWEN_LINEARS, AdapterSize, Host
from turbo_lab.cli import app, main
from turbo_lab.errors import BadInput, MissingPiece
from turbo_lab.path import TerminalWarning
from turbo_lab.qwen_draw import draw, names
from turbo_lab.qwen_fast import (
    FP8_LINEARS,
    Fp8Linear,
    know_times,
    quantised,
    relative_error,
    simulated,
    to_fp8,
)
from turbo_lab.qwen_order import PARTS, STOCK, Fast, Order, checked_order, times_for, without
from turbo_lab.qwen_sample import Drawn, drawn, kept_bytes, loaded_bytes, opened
from turbo_lab.schedules import fixed, published, scheduler_config
from turbo_lab.store import Store
from turbo_lab.streams import noise
from turbo_lab.testbeds import qwen_data
from turbo_lab.testbeds.postcards import pack
from turbo_lab.testbeds.qwen_files import load_transformer, located

TEXTS = ("a cat", "two dogs on the moss, the sign reads 42")
SIZE = 64
WULI = fixed(2.5, terminal=0.7155)


@pytest.fixture(scope="module", autouse=True)
def no_garbage() -> Iterator[None]:
    """Collecting it takes most of the time of a tiny picture."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (qwen_data, qwen_sample):
            patch.setattr(module, "release", lambda: None)
        yield


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(cache=tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def loras(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two random adapters on all layers of all blocks, as diffusers writes them."""
    from diffusers import QwenImagePipeline

    folder = tmp_path_factory.mktemp("loras")
    made = []
    for k, (rank, alpha) in enumerate([(4, 8.0), (2, 2.0)]):
        host = Host(load_transformer(located(str(tiny_model)), "cpu"))
        worn = host.add("one", AdapterSize(rank=rank, alpha=alpha), seed=k)
        numbers = torch.Generator().manual_seed(k)
        state = worn.state_dict()
        for key, value in state.items():
            if "lora_B" in key:
                value.copy_(0.3 * torch.randn(value.shape, generator=numbers))
        settings = {"r": rank, "lora_alpha": alpha, "target_modules": list(QWEN_LINEARS)}
        name = f"lora_{k}.safetensors"
        QwenImagePipeline.save_lora_weights(
            folder, state, weight_name=name, transformer_lora_adapter_metadata=settings
        )
        made.append(folder / name)
    return made[0], made[1]


def with_times(source: Path, target: Path, **said: Any) -> Path:
    """The same file, saying how it is sampled."""
    from safetensors import safe_open

    with safe_open(source, framework="pt") as file:
        known = file.metadata()
    metadata = {**known, **{key: json.dumps(value) for key, value in said.items()}}
    save_file(load_file(source), target, metadata)
    return target


def stock(model: Path) -> Any:
    from diffusers import QwenImagePipeline

    pipeline = QwenImagePipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def call(order: Order) -> dict[str, Any]:
    z = noise(order.shape, seed=order.seed, stream="z", indices=range(len(order.prompts)))
    return {
        "prompt": list(order.prompts),
        "negative_prompt": [" "] * len(order.prompts),
        "true_cfg_scale": order.guidance_scale,
        "num_inference_steps": order.times.steps,
        "height": order.height,
        "width": order.width,
        "latents": pack(z),
    }


def close(ours: Tensor, theirs: Tensor, atol: float = 1e-4) -> None:
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)


@pytest.fixture(scope="module")
def ask(tiny_model: Path) -> Callable[..., Order]:
    def order(**change: Any) -> Order:
        asked = {"prompts": TEXTS, "model": str(tiny_model), "width": SIZE, "height": SIZE}
        return checked_order(**{**asked, **change})

    return order


@pytest.fixture(scope="module")
def two(ask: Callable[..., Order], loras: tuple[Path, Path]) -> Callable[..., Order]:
    """Orders of a 2-step adapter."""
    return lambda **change: ask(**{"loras": loras[:1], "schedule": "wuli-2", **change})


@pytest.fixture(scope="module")
def plain(two: Callable[..., Order], store: Store) -> Drawn:
    """What the order is without any part of the fast path."""
    return drawn(two(fast=STOCK), store)


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


# --- orders -------------------------------------------------------------------------------------


def test_times_come_from_the_file_first(
    ask: Callable[..., Order], loras: tuple[Path, Path], tmp_path: Path
) -> None:
    said = with_times(loras[0], tmp_path / "a.safetensors", sigmas=[1.0, 0.6], eta=1)
    order = ask(loras=[said])
    assert order.times.grid.tolist() == pytest.approx([1.0, 0.6, 0.0])
    assert order.times.eta == 1
    with pytest.raises(BadInput, match="is for 2"):
        ask(loras=[said], steps=4)
    settings = with_times(loras[0], tmp_path / "b.safetensors", scheduler=scheduler_config(WULI))
    assert ask(loras=[settings], steps=2).times.grid[1] == pytest.approx(0.7155)
    said = {"scheduler": scheduler_config(WULI), "steps": 2}
    other = ask(loras=[with_times(loras[0], tmp_path / "c.safetensors", **said)], steps=3)
    assert other.times.steps == 3 and other.times.known == "c.safetensors says, but for 2 steps"


def test_times_come_from_the_table_by_the_files_name(
    ask: Callable[..., Order], loras: tuple[Path, Path], tmp_path: Path
) -> None:
    file = tmp_path / "Wuli-Qwen-Image-2512-Turbo-LoRA-2steps-V1.0-bf16.safetensors"
    file.write_bytes(loras[0].read_bytes())
    times = ask(loras=[file]).times
    assert times.grid.tolist() == pytest.approx([1.0, 0.7155, 0.0])
    assert "wuli-2" in times.known and "for 2" not in times.known
    assert ask(loras=[file], steps=3).times.known == "published as wuli-2, for 2 steps"


def test_few_steps_at_the_models_own_times_warn(
    ask: Callable[..., Order], loras: tuple[Path, Path]
) -> None:
    with pytest.warns(TerminalWarning):
        order = ask(loras=loras[:1], steps=2)
    assert order.times.known == "the model's own scheduler"
    assert times_for(order.bundle, (), schedule="", steps=None, tokens=16).steps == 50


def test_pictures_are_shared_out_over_prompts(ask: Callable[..., Order]) -> None:
    order = ask(batch=4)
    assert order.prompts == (TEXTS[0], TEXTS[0], TEXTS[1], TEXTS[1])
    assert (order.texts, order.numbers) == (TEXTS, (0, 0, 1, 1))


def test_a_prompt_is_embedded_once_and_drawn_with_noise_of_its_own_each_time(
    two: Callable[..., Order], store: Store, plain: Drawn
) -> None:
    ready = opened(two(batch=4), store)
    assert ready.prompts.n == 2
    latents = ready.latents()
    close(latents[0], plain.latents[0])
    assert relative_error(latents[1], latents[0]) > 0.1
    assert relative_error(latents[1], plain.latents[1]) > 0.01  # the same noise, another prompt


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"prompts": []}, "prompt"),
        ({"prompts": [" "]}, "prompt"),
        ({"batch": 3}, "multiple of the 2"),
        ({"batch": -2}, "multiple"),
        ({"width": 100}, "width"),
        ({"height": 8192}, "height"),
        ({"seed": -1}, "seed"),
        ({"steps": 0}, "from 1 to 1000"),
        ({"steps": 1001}, "from 1 to 1000"),
        ({"batch": 0}, "batch"),
        ({"guidance_scale": 0.5}, "guidance"),
        ({"weights": [1.0]}, "one for each of 0"),
        ({"schedule": "turbo"}, "choose one of"),
    ],
    ids=str,
)
def test_orders_that_cannot_be_are_refused(
    ask: Callable[..., Order], change: dict[str, Any], word: str
) -> None:
    with pytest.raises(BadInput, match=word):
        ask(**change)


@pytest.mark.parametrize(
    "change",
    [
        {"adapters": "merged"},
        {"precision": "int4"},
        {"attention": "sage"},
        {"decoder": "tiny"},
        {"precision": "fp8", "adapters": "attached"},
        {"compiled": True, "offload": True},
        {"keep": ("proj_out",)},
        {"keep": ("img_mlp",)},
    ],
    ids=str,
)
def test_parts_that_cannot_be_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(BadInput):
        Fast(**change)


def test_each_part_can_be_left_out_by_name() -> None:
    left = [without(Fast(), [name]) for name in PARTS]
    assert len({*left, Fast()}) == 1 + len(PARTS)
    assert without(Fast(), list(PARTS)) == without(Fast(), ["all"]) == STOCK
    with pytest.raises(BadInput, match="need them fused"):
        without(Fast(precision="fp8"), ["fused"])


def test_an_adapter_for_another_model_is_refused(ask: Callable[..., Order], tmp_path: Path) -> None:
    file = tmp_path / "other.safetensors"
    pair = {f"transformer.transformer_blocks.0.attn.to_q.lora_{h}.weight": torch.ones(2, 2)
            for h in "AB"}  # fmt: skip
    save_file(pair, file)
    with pytest.raises(BadInput, match="file="):
        ask(loras=[file])


def test_memory_is_counted_before_weights_are_loaded(
    two: Callable[..., Order], tiny_model: Path, monkeypatch: pytest.MonkeyPatch, store: Store
) -> None:
    order = two()
    net = load_transformer(order.bundle, "cpu")
    count = 4 * sum(p.numel() for p in net.parameters())
    assert loaded_bytes(order) == count
    know_times(lambda *_: torch.zeros(1), net, [1.0, 0.7155])
    tensors = [*net.parameters(), *net.buffers()]
    assert kept_bytes(order) == 4 * sum(t.numel() for t in tensors)
    opened(order, store)  # embeds the prompts
    monkeypatch.setattr(qwen_sample, "free_memory", lambda device: 100_000)
    with pytest.raises(
        MissingPiece, match=r"needs .* GB on cpu .* are free: choose a smaller size"
    ):
        opened(order, store)


# --- files --------------------------------------------------------------------------------------


def test_pictures_become_files_that_say_how_they_were_made(
    tiny_model: Path, loras: tuple[Path, Path], store: Store, plain: Drawn, tmp_path: Path
) -> None:
    from PIL import Image

    told = draw(
        TEXTS,
        tmp_path / "x.png",
        model=str(tiny_model),
        loras=loras[:1],
        schedule="wuli-2",
        size=f"{SIZE}x{SIZE}",
        fast=Fast(precision="fp8"),
        device="cpu",
        store=store,
    )
    assert told[0] == "2 steps at 1, 0.7155 (schedule wuli-2)"
    assert "off by" in told[2]
    for k in range(2):
        with Image.open(tmp_path / f"x-{k}.png") as image:
            assert image.size == (SIZE, SIZE)
            said = image.info
        assert said["prompt"] == TEXTS[k]
        assert json.loads(said["sigmas"]) == pytest.approx([1, 0.7155, 0], abs=1e-6)
        assert "off by" in said["fp8"]
    assert names(tmp_path / "x.png", 1) == [tmp_path / "x.png"]


def test_a_file_that_cannot_be_written_is_refused_before_anything_else(tmp_path: Path) -> None:
    for out in (tmp_path / "x.jpg", tmp_path / "nowhere" / "x.png"):
        with pytest.raises(BadInput, match="out="):
            draw(["a cat"], out, model="nowhere")


def test_weights_that_do_not_fit_are_prepared_on_the_processor(
    two: Callable[..., Order], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a GPU has room for them only after they became smaller, and where it has none."""
    order = replace(two(), device="cuda")  # nothing is computed on it here
    whole, small = loaded_bytes(order), kept_bytes(order)
    assert small < 0.8 * whole
    room = 10 * whole  # of activations

    def place(gpu: int, host: int = 10**12, fast: Fast | None = None) -> str:
        free = {"cuda": gpu, "cpu": host}
        monkeypatch.setattr(qwen_sample, "free_memory", free.__getitem__)
        monkeypatch.setattr(qwen_sample, "activation_bytes", lambda *_, each: room)
        return qwen_sample._loading_place(replace(order, fast=fast or order.fast))

    assert place(whole + room) == "cuda"
    assert place(small + room) == "cpu"
    for gpu, host in ((small + room - 1, 10**12), (small + room, whole - 1)):
        with pytest.raises(MissingPiece, match="The transformer needs"):
            place(gpu, host)
    assert place(small + room - 1, fast=Fast(precision="fp8")) == "cpu"
    assert place(room + small, fast=Fast(offload=True)) == "cpu"


# --- the command --------------------------------------------------------------------------------


def test_the_command_draws_pictures(
    tiny_model: Path, loras: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TURBO_LAB_CACHE", str(tmp_path / "cache"))
    options = {
        "--testbed": "qwen_image",
        "--model": tiny_model,
        "--lora": loras[0],
        "--weight": 0.5,
        "--schedule": "wuli-2",
        "--size": "64x96",
        "--batch": 2,
        "--precision": "fp8",
        "--device": "cpu",
        "--out": tmp_path / "x.png",
    }
    arguments = [str(word) for pair in options.items() for word in pair]
    result = CliRunner().invoke(app, ["sample", "a cat", *arguments])
    assert result.exit_code == 0, result.output
    for word in ("2 steps at 1, 0.7155", "off by", "x-0.png", "x-1.png"):
        assert word in result.output
    assert (tmp_path / "x-1.png").is_file()


def test_the_trap_of_few_steps_is_a_sentence_and_no_line_of_code(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TURBO_LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TURBO_LAB_PROGRESS", "off")
    order = ["--testbed", "qwen_image", "--model", str(tiny_model), "--size", "32", "--steps", "2"]
    result = CliRunner().invoke(app, ["sample", "a cat", *order, "--out", str(tmp_path / "x.png")])
    assert result.exit_code == 0, result.output
    (said,) = (line for line in result.stderr.splitlines() if "terminal" in line)
    assert said.startswith("turbo-lab: terminal=0.02 with steps=2 spends the last")
    assert "time_grid(" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--testbed", "qwen_image", "--grid", "2x2"], "it is for postcards, not for qwen_image"),
        (["--lora", "x.safetensors"], "lora='x.safetensors' is not allowed: it is for qwen_image"),
        (["--testbed", "qwen_image", "--attention", "sage"], "choose one of auto, cudnn"),
        (["--testbed", "qwen_image", "--size", "tall"], "write WIDTHxHEIGHT"),
        (["--testbed", "qwen_image", "--without", "speed"], "choose among fused, known-times"),
        (["--batch", "0"], "batch='0' is not allowed: it is for qwen_image"),
    ],
)
def test_the_command_refuses_in_one_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["sample", "a cat", *arguments])
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err


def test_what_needs_no_model_is_refused_before_one_is_looked_for(tmp_path: Path) -> None:
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"steps": 0}, "steps=0"),
        ({"schedule": "quickest"}, "schedule='quickest'"),
        ({"loras": [tmp_path / "gone.safetensors"]}, "gone.safetensors"),
    )
    for values, said in wrong:
        with pytest.raises(BadInput, match=said):
            checked_order(prompts=["a cat"], model=str(tmp_path / "nowhere"), **values)
