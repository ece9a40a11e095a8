"""Networks of Qwen-Image with random weights, made where they are used and nowhere else.

Speed and memory do not depend on the values, as long as they are not zeros: a GPU that multiplies
zeros draws less power and runs faster.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from turbo_lab.adapters import QWEN_LINEARS, AdapterSize
from turbo_lab.qwen_fast import Weighted
from turbo_lab.qwen_sizes import Model
from turbo_lab.testbeds.qwen_data import Prompts, Rows


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Of the three networks, in the words of their classes; the defaults are the full size.

    Attributes:
        name: full or tiny.
        transformer: of ``QwenImageTransformer2DModel``.
        vae: of ``AutoencoderKLQwenImage``.
        text: of the language model in ``Qwen2_5_VLForConditionalGeneration``.
        vision: of its vision tower.
    """

    name: str = "full"
    transformer: Mapping[str, Any] = field(default_factory=dict)
    vae: Mapping[str, Any] = field(default_factory=dict)
    text: Mapping[str, Any] = field(
        default_factory=lambda: {
            "vocab_size": 152_064,
            "hidden_size": 3584,
            "intermediate_size": 18_944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
        }
    )
    vision: Mapping[str, Any] = field(
        default_factory=lambda: {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 3584,
        }
    )

    @property
    def model(self) -> Model:
        """Their sizes, for counts."""
        parts = {"transformer": self.transformer, "vae": self.vae, "text_encoder": self.text}
        return Model.of(parts)


FULL = Settings()
TINY = Settings(
    name="tiny",
    transformer={
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "axes_dims_rope": (4, 6, 6),
    },
    vae={"base_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1},
    text={
        "vocab_size": 300,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]
        },
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    },
    vision={
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 1,
        "out_hidden_size": 16,
        "fullatt_block_indexes": [0],
    },
)  # fmt: skip
"""Kilobytes, to see that everything runs; its seconds mean nothing."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where and how numbers are kept."""

    device: str
    dtype: torch.dtype

    @staticmethod
    def on(device: str) -> Place:
        """bfloat16 on a GPU, float32 on a CPU."""
        return Place(device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)


@torch.no_grad()
def random_net(build: Callable[[], nn.Module], place: Place, *, seed: int = 0) -> Any:
    """Build a network without memory, then draw its weights on their device.

    Matrices and kernels are normal with variance 1 / inputs, so that activations keep their size;
    scales of norms are 1 and the rest is 0.

    Args:
        build: makes it.
        place: where its weights shall be.
        seed: of the device's generator.
    """
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        net = build()
    numbers = torch.Generator(place.device).manual_seed(seed)
    for module in net.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            made = torch.empty(parameter.shape, device=place.device, dtype=place.dtype)
            if "gamma" in name or (made.ndim == 1 and name == "weight"):
                made.fill_(1.0)
            elif made.ndim == 1:
                made.zero_()
            else:
                made.normal_(0, 1 / math.sqrt(math.prod(made.shape[1:])), generator=numbers)
            module.register_parameter(name, nn.Parameter(made, requires_grad=False))
    return net.to(place.device).eval()


def transformer(settings: Settings, place: Place, *, seed: int = 0) -> Any:
    """Return the transformer."""
    from diffusers import QwenImageTransformer2DModel

    return random_net(lambda: QwenImageTransformer2DModel(**settings.transformer), place, seed=seed)


def vae(settings: Settings, place: Place, *, seed: int = 0) -> Any:
    """Return the VAE."""
    from diffusers import AutoencoderKLQwenImage

    return random_net(lambda: AutoencoderKLQwenImage(**settings.vae), place, seed=seed)


def text_encoder(settings: Settings, place: Place, *, seed: int = 0) -> Any:
    """Return the text encoder, vision tower and head included, as pipelines load it."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig(
        text_config=dict(settings.text),
        vision_config=dict(settings.vision),
        tie_word_embeddings=False,
        image_token_id=1,
        video_token_id=2,
        vision_start_token_id=3,
        vision_end_token_id=4,
    )
    return random_net(lambda: Qwen2_5_VLForConditionalGeneration(config), place, seed=seed)


def random_adapter(net: nn.Module, place: Place, *, rank: int, seed: int = 0) -> Weighted:
    """Return an adapter on all 14 linear layers of every block, large enough to matter."""
    numbers = torch.Generator(place.device).manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for path, layer in net.named_modules():
        if isinstance(layer, nn.Linear) and path.endswith(tuple(f".{t}" for t in QWEN_LINEARS)):
            for half, shape in (
                ("A", (rank, layer.in_features)),
                ("B", (layer.out_features, rank)),
            ):
                drawn = torch.empty(shape, device=place.device, dtype=place.dtype)
                scale = 0.3 / math.sqrt(shape[1])
                tensors[f"{path}.lora_{half}.weight"] = drawn.normal_(0, scale, generator=numbers)
    return Weighted(size=AdapterSize(rank=rank, alpha=rank), tensors=tensors)


def random_prompts(settings: Settings, place: Place, *, n: int, tokens: int) -> Prompts:
    """Return embeddings of n prompts of one length, and of a short negative one."""
    width = settings.model.transformer.text_width
    numbers = torch.Generator().manual_seed(0)
    rows = [torch.randn(tokens, width, generator=numbers).to(place.dtype) for _ in range(n)]
    null = torch.randn(min(tokens, 6), width, generator=numbers).to(place.dtype)
    return Prompts(rows=cast(Rows, dict(enumerate(rows))), null=null, n=n)
