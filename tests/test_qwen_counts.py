"""Counts from settings against passes that were counted, small ones and the full size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from turbo_lab.errors import BadInput
from turbo_lab.qwen_counts import (
    Work,
    convolutions,
    counted,
    decode_counts,
    table,
    text_counts,
    transformer_counts,
)
from turbo_lab.qwen_sizes import Model, TransformerSize, VaeSize
from turbo_lab.testbeds.qwen_files import located
from turbo_lab.vae_decode import collapsed_net

FULL = Model()
LARGE = Work(height=2048, width=2048)


def passed(call: Callable[[], Any]) -> dict[str, int]:
    """FLOP of what a call executes, by the module that asked."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return {
        module: sum(kinds.values())
        for module, kinds in counter.get_flop_counts().items()
        if "." in module or module == "Global"
    }


def by_name(counts: Any) -> dict[str, int]:
    return {count.component: count.flops for count in counts}


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> tuple[Model, Any]:
    """Its sizes, and the pipeline."""
    from diffusers import QwenImagePipeline

    bundle = located(str(tiny_model))
    configs = {part: bundle.config(part) for part in ("transformer", "vae", "text_encoder")}
    return Model.of(configs), QwenImagePipeline.from_pretrained(tiny_model)


# --- small, executed ----------------------------------------------------------------------------


@pytest.mark.parametrize("text", [5, 64])
def test_a_pass_of_the_transformer_is_counted_exactly(model: Any, text: int) -> None:
    sizes, pipeline = model
    net, work = pipeline.transformer, Work(height=64, width=96, batch=2, text=text)
    found = passed(
        lambda: net(
            hidden_states=torch.zeros(2, work.tokens, 64),
            encoder_hidden_states=torch.zeros(2, text, sizes.transformer.text_width),
            timestep=torch.ones(2),
            img_shapes=[[(1, 4, 6)]] * 2,
            return_dict=False,
        )
    )
    ours = by_name(transformer_counts(sizes.transformer, work))
    assert sum(ours.values()) == found["Global"]
    modulation = sum(f for m, f in found.items() if m.endswith(("mod.1", "_embedder")))
    modulation += sum(f for m, f in found.items() if m.endswith("norm_out.linear"))
    assert ours["modulation"] == modulation
    text_linears = ("txt_in", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "txt_mlp")
    assert ours["text linears"] == sum(f for m, f in found.items() if m.endswith(text_linears))


def test_parameters_are_counted_exactly(model: Any) -> None:
    sizes, pipeline = model
    ours = sizes.transformer.parameters
    assert ours == sum(p.numel() for p in pipeline.transformer.parameters())


def test_decoding_is_counted_exactly(model: Any) -> None:
    sizes, pipeline = model
    work, z = Work(height=64, width=96, batch=2), torch.zeros(2, 16, 8, 12)
    ours = decode_counts(sizes.vae, work)
    assert ours["shipped"].flops == passed(lambda: pipeline.vae.decode(z[:, :, None]))["Global"]
    net = collapsed_net(pipeline.vae)
    assert ours["collapsed"].flops == passed(lambda: net(z))["Global"]
    kernels = sum(p.numel() for name, p in net.named_parameters() if p.ndim == 4 and p.shape[2] > 0
                  and "gamma" not in name)  # fmt: skip
    assert ours["collapsed"].weights == 2 * kernels


def test_encoding_is_counted_exactly(model: Any) -> None:
    sizes, pipeline = model
    work = Work(height=64, width=64, batch=3, text=9)
    tokens = torch.zeros(3, 9 + 34, dtype=torch.long)
    call = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    ours = text_counts(sizes.text, work)
    assert ours["shipped"].flops == passed(lambda: pipeline.text_encoder(**call))["Global"]
    found = passed(lambda: pipeline.text_encoder.model(**call))["Global"]
    assert ours["needed"].flops == found


# --- the full size, on the meta device ----------------------------------------------------------


def test_the_full_network_has_20_43_billion_parameters_and_423_tflop_at_2048() -> None:
    from accelerate import init_empty_weights
    from diffusers import QwenImageTransformer2DModel

    with init_empty_weights(include_buffers=False):
        net = QwenImageTransformer2DModel(num_layers=1)
    net.to("meta")
    one = TransformerSize(layers=1)
    assert sum(p.numel() for p in net.parameters()) == one.parameters
    found = passed(
        lambda: net(
            hidden_states=torch.empty(1, LARGE.tokens, 64, device="meta"),
            encoder_hidden_states=torch.empty(1, LARGE.text, 3584, device="meta"),
            timestep=torch.ones(1, device="meta"),
            img_shapes=[[(1, 128, 128)]],
            return_dict=False,
        )
    )
    assert found["Global"] == sum(by_name(transformer_counts(one, LARGE)).values())
    # Blocks are alike, so the 60 of the full network follow from one.
    assert FULL.transformer.parameters == 20_430_401_088
    ours = {
        name: f / 1e12 for name, f in by_name(transformer_counts(FULL.transformer, LARGE)).items()
    }
    assert ours["image linears"] == pytest.approx(222.7, abs=0.05)
    assert ours["attention"] == pytest.approx(199.5, abs=0.05)
    assert sum(ours.values()) == pytest.approx(423.0, abs=0.05)


def test_attention_is_198_tflop_between_image_tokens_alone() -> None:
    work = Work(height=2048, width=2048, text=1)
    found = by_name(transformer_counts(FULL.transformer, work))["attention"]
    assert found / 1e12 == pytest.approx(197.9, abs=0.1)


def test_full_decoding_falls_from_51_7_to_23_8_tflop() -> None:
    """17.2 of the 23.8 are convolutions; the attention in the middle stays 6.6."""
    found = decode_counts(FULL.vae, LARGE)
    assert found["shipped"].flops / 1e12 == pytest.approx(51.68, abs=0.01)
    assert found["collapsed"].flops / 1e12 == pytest.approx(23.79, abs=0.01)
    pixels = LARGE.height * LARGE.width // 64
    flat = sum(2 * c.into * c.out * c.side**2 * c.pixels * pixels for c in convolutions(FULL.vae))
    assert flat / 1e12 == pytest.approx(17.19, abs=0.01)


def test_the_full_decoder_is_counted_as_it_runs() -> None:
    from accelerate import init_empty_weights
    from diffusers import AutoencoderKLQwenImage

    with init_empty_weights(include_buffers=True):
        vae = AutoencoderKLQwenImage()
    net, z = collapsed_net(vae.to("meta")), torch.empty(1, 16, 256, 256, device="meta")
    assert passed(lambda: net(z))["Global"] == decode_counts(FULL.vae, LARGE)["collapsed"].flops


# --- how counts grow ----------------------------------------------------------------------------


def test_work_is_proportional_to_pictures_steps_and_passes() -> None:
    once = by_name(counted(FULL, LARGE))
    many = by_name(counted(FULL, Work(height=2048, width=2048, batch=4, steps=2, passes=2)))
    for name in ("image linears", "text linears", "attention", "modulation"):
        assert many[name] == 16 * once[name]
    for name in ("text encoder", "decoding"):
        assert many[name] == 4 * once[name]


def test_weights_are_read_once_per_pass_of_a_batch() -> None:
    for batch in (1, 4):
        work = Work(height=1024, width=1024, batch=batch, steps=2)
        read = sum(count.weights for count in transformer_counts(FULL.transformer, work))
        assert read == pytest.approx(2 * 2 * FULL.transformer.parameters, rel=1e-5)


def test_the_table_has_a_row_per_component() -> None:
    found = table(counted(FULL, LARGE))
    assert list(found.index) == [c.component for c in counted(FULL, LARGE)]
    assert found["TFLOP"].sum() == pytest.approx(423.0 + 23.8 + 1.3, abs=0.3)


@pytest.mark.parametrize(
    "change", [{"height": 1000}, {"width": 5000}, {"batch": 0}, {"steps": 1001}, {"passes": 3}]
)
def test_work_that_cannot_be_is_refused(change: dict[str, int]) -> None:
    with pytest.raises(BadInput, match=next(iter(change))):
        Work(**{"height": 512, "width": 512, **change})


def test_sizes_are_read_from_settings_with_diffusers_defaults() -> None:
    assert TransformerSize.of({}) == FULL.transformer
    assert VaeSize.of({}) == FULL.vae
