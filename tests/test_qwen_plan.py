"""Plans from counts: floors against arithmetic by hand, memory against parameters."""

from __future__ import annotations

from dataclasses import replace

import pytest
from typer.testing import CliRunner

from turbo_lab.cli import app
from turbo_lab.errors import BadInput
from turbo_lab.qwen_counts import LINEARS, Work, counted
from turbo_lab.qwen_plan import (
    DEVICES,
    ENCODER,
    RESERVE,
    VAE,
    WAYS,
    device_table,
    floor_seconds,
    floors,
    known_device,
    need,
    parsed_size,
    ways,
)
from turbo_lab.qwen_sizes import Model

WORK = Work(height=2048, width=2048, batch=4, steps=2)
H100 = next(device for device in DEVICES if device.name == "H100")
COUNTS = counted(Model(), WORK)


def dit(seconds: dict[str, float]) -> float:
    return sum(seconds[name] for name in (*LINEARS, "attention", "modulation"))


def test_the_floor_at_a_measured_rate_is_the_one_computed_by_hand() -> None:
    """3384 TFLOP at 790 TFLOP/s: 4.28 s of matrix products for four pictures in two steps."""
    measured = replace(H100, bf16=790e12)
    assert dit(floor_seconds(COUNTS, measured)) == pytest.approx(3384 / 790, rel=0.005)


def test_fp8_halves_the_linear_layers_and_nothing_else() -> None:
    slow, fast = (floor_seconds(COUNTS, H100, p) for p in ("bf16", "fp8"))
    for name in slow:
        ratio = 2 if name == "image linears" else 1
        if name != "text linears":  # bound by the reading of their weights
            assert slow[name] == pytest.approx(ratio * fast[name], rel=1e-3)
    a100 = next(device for device in DEVICES if device.fp8 is None)
    assert floor_seconds(COUNTS, a100, "fp8") == floor_seconds(COUNTS, a100, "bf16")


def test_bandwidth_bounds_what_has_few_products() -> None:
    seconds = floor_seconds(COUNTS, H100)
    (modulation,) = (count for count in COUNTS if count.component == "modulation")
    assert seconds["modulation"] == pytest.approx(modulation.bytes / H100.bandwidth)


def test_the_floors_of_all_devices_are_sorted_as_their_rates() -> None:
    found = floors(WORK)["bf16, s"]
    assert found["B200"] < found["H200"] <= found["H100"] < found["A100"] < found["RTX 3090"]


# --- memory -------------------------------------------------------------------------------------


def test_parameters_of_the_encoder_and_vae_are_those_of_their_classes() -> None:
    from accelerate import init_empty_weights
    from diffusers import AutoencoderKLQwenImage
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = Model().text
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": text.width,
            "intermediate_size": text.inner,
            "num_hidden_layers": text.layers,
            "num_attention_heads": text.heads,
            "num_key_value_heads": text.key_heads,
            "vocab_size": text.vocabulary,
        },
        vision_config={
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": text.width,
        },
        tie_word_embeddings=False,
    )
    with init_empty_weights():
        encoder, vae = Qwen2_5_VLForConditionalGeneration(config), AutoencoderKLQwenImage()
    assert sum(p.numel() for p in encoder.parameters()) == ENCODER
    assert sum(p.numel() for p in vae.parameters()) == VAE


def test_the_modulation_is_a_third_of_the_weights() -> None:
    whole, times, fp8 = (
        need(WORK),
        need(WORK, known_times=True),
        need(WORK, "fp8", known_times=True),
    )
    assert whole.transformer == pytest.approx(40.86e9, rel=1e-3)
    assert times.transformer == pytest.approx(2 / 3 * whole.transformer, rel=0.01)
    assert fp8.transformer == pytest.approx(1 / 3 * whole.transformer, rel=0.01)


def test_an_attached_adapter_of_rank_64_has_the_size_of_the_published_file() -> None:
    """Wuli's file has 1.18 GB, at rank 64 on all 14 linear layers of a block."""
    adapter = need(WORK, rank=64).transformer - need(WORK).transformer
    assert adapter == pytest.approx(1.18e9, rel=0.005)


@pytest.mark.parametrize(
    ("device", "simplest"),
    [("H200", "resident"), ("H100", "resident"), ("L40S", "freed"), ("RTX 5090", "known times"),
     ("RTX 4090", "fp8"), ("RTX 3090", "offload")],
)  # fmt: skip
def test_each_device_is_told_the_simplest_way_that_fits(device: str, simplest: str) -> None:
    found = ways(WORK, next(d for d in DEVICES if d.name == device))
    assert found[0].name == simplest
    assert all(way.bytes <= H100.memory - RESERVE for way in found)
    assert [way.name for way in found] == [name for name in WAYS if name in {w.name for w in found}]


def test_less_memory_never_has_more_ways() -> None:
    sizes = [8, 16, 24, 40, 64, 100]
    counts = [len(ways(WORK, replace(H100, memory=int(g * 1e9)))) for g in sizes]
    assert counts == sorted(counts)
    assert ways(WORK, replace(H100, memory=int(3e9))) == ()
    assert device_table(WORK, [replace(H100, memory=int(3e9))])["simplest"].tolist() == [
        "none fits"
    ]


def test_a_small_card_decodes_in_tiles() -> None:
    way = ways(WORK, replace(H100, memory=int(6e9)))[0]
    assert way.name == "offload"
    assert way.tiles is not None


# --- text ---------------------------------------------------------------------------------------


def test_tables_say_how_many_pictures_their_seconds_are_of() -> None:
    """Twice the pictures take twice the products, and the header counts them."""
    eight = replace(WORK, batch=8)
    table = device_table(WORK)
    assert floors(eight).index.name == "at least, for 8 pictures of 2048 × 2048, 2 steps"
    assert "least s for 4" in table and "its least s for 4" in table
    assert table["least s for 4"]["H100"] == pytest.approx(floors(WORK)["bf16, s"]["H100"])
    assert table["decodes"]["L40S"] == "in tiles of 1024 px" and table["decodes"]["H100"] == "whole"


def test_a_driver_names_its_device_at_length() -> None:
    found = known_device("NVIDIA H100 80GB HBM3")
    assert found is not None
    assert found.name == "H100"
    assert known_device("AMD Instinct MI300X") is None


@pytest.mark.parametrize(("text", "size"), [("2048x1152", (2048, 1152)), ("512", (512, 512))])
def test_sizes_are_parsed(text: str, size: tuple[int, int]) -> None:
    assert parsed_size(text) == size


@pytest.mark.parametrize("text", ["", "x", "2048x", "2k", "1x2x3", "-512x512", "1000x1000", "0x0"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(BadInput):
        parsed_size(text)


def test_the_doctor_prints_a_plan() -> None:
    result = CliRunner().invoke(app, ["doctor", "--testbed", "qwen_image", "--size", "2048x2048"])
    assert result.exit_code == 0, result.output
    for word in ("image linears", "RTX 4090", "known times", "4 pictures of 2048 x 2048"):
        assert word in result.output


def test_the_doctor_refuses_what_it_cannot_plan() -> None:
    from turbo_lab.cli import main

    for arguments in (["--testbed", "postcards"], ["--testbed", "qwen_image", "--size", "tall"]):
        with pytest.raises(SystemExit) as stopped:
            main(["doctor", *arguments])
        assert stopped.value.code == 2
