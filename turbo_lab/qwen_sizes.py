"""Sizes of Qwen-Image's three networks, by default the published ones, or read from settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from turbo_lab.testbeds.qwen_files import CHANNELS


@dataclass(frozen=True, kw_only=True)
class TransformerSize:
    """Of a ``QwenImageTransformer2DModel``; the defaults are Qwen-Image's."""

    layers: int = 60
    heads: int = 24
    head_width: int = 128
    text_width: int = 3584
    channels_in: int = 64
    channels_out: int = 64

    @staticmethod
    def of(config: Mapping[str, Any]) -> TransformerSize:
        """Read it from a network's settings."""
        patch = config.get("patch_size", 2) ** 2
        channels = config.get("in_channels", 64)
        out = config.get("out_channels", 16) or channels
        return TransformerSize(
            layers=config.get("num_layers", 60),
            heads=config.get("num_attention_heads", 24),
            head_width=config.get("attention_head_dim", 128),
            text_width=config.get("joint_attention_dim", 3584),
            channels_in=channels,
            channels_out=patch * out,
        )

    @property
    def width(self) -> int:
        """Numbers per token, d."""
        return self.heads * self.head_width

    @property
    def stream(self) -> int:
        """Parameters of the linear layers of one stream in one block."""
        d = self.width
        return 4 * (d * d + d) + (8 * d * d + 5 * d)

    @property
    def blocks_weights(self) -> int:
        """Numbers of all matrices of the blocks' two streams, their modulation left out."""
        return 24 * self.width**2 * self.layers

    @property
    def blocks_rows(self) -> int:
        """Rows of all of them."""
        return 18 * self.width * self.layers

    @property
    def modulation(self) -> int:
        """Parameters of the modulation of one stream in one block."""
        d = self.width
        return 6 * (d * d + d)

    @property
    def parameters(self) -> int:
        """Of the whole network."""
        d = self.width
        block = 2 * self.stream + 2 * self.modulation + 4 * self.head_width
        inputs = (self.channels_in + self.text_width) * d + 2 * d + self.text_width
        time = 256 * d + d + d * d + d
        return self.layers * block + inputs + time + 2 * (d * d + d) + (d + 1) * self.channels_out


@dataclass(frozen=True, kw_only=True)
class VaeSize:
    """Of the decoder of an ``AutoencoderKLQwenImage``; the defaults are Qwen-Image's."""

    base: int = 96
    latent: int = CHANNELS
    multiples: tuple[int, ...] = (1, 2, 4, 4)
    residuals: int = 2

    @staticmethod
    def of(config: Mapping[str, Any]) -> VaeSize:
        """Read it from a network's settings."""
        return VaeSize(
            base=config.get("base_dim", 96),
            latent=config.get("z_dim", CHANNELS),
            multiples=tuple(config.get("dim_mult", (1, 2, 4, 4))),
            residuals=config.get("num_res_blocks", 2),
        )


@dataclass(frozen=True, kw_only=True)
class TextSize:
    """Of the language model in the text encoder; the defaults are Qwen2.5-VL-7B's."""

    width: int = 3584
    inner: int = 18944
    layers: int = 28
    heads: int = 28
    key_heads: int = 4
    vocabulary: int = 152_064

    @staticmethod
    def of(config: Mapping[str, Any]) -> TextSize:
        """Read it from a network's settings, those of text in a part of their own or not."""
        text = config.get("text_config", config)
        return TextSize(
            width=text["hidden_size"],
            inner=text["intermediate_size"],
            layers=text["num_hidden_layers"],
            heads=text["num_attention_heads"],
            key_heads=text["num_key_value_heads"],
            vocabulary=text["vocab_size"],
        )

    @property
    def layer(self) -> int:
        """Weights of the matrices of one layer."""
        keys = self.width // self.heads * self.key_heads
        return 2 * self.width**2 + 2 * self.width * keys + 3 * self.width * self.inner


@dataclass(frozen=True, kw_only=True)
class Model:
    """Sizes of the three networks; the defaults are Qwen-Image's and Qwen-Image-2512's."""

    transformer: TransformerSize = TransformerSize()
    vae: VaeSize = VaeSize()
    text: TextSize = TextSize()

    @staticmethod
    def of(configs: Mapping[str, Mapping[str, Any]]) -> Model:
        """Read them from the settings of ``transformer``, ``vae`` and ``text_encoder``."""
        return Model(
            transformer=TransformerSize.of(configs["transformer"]),
            vae=VaeSize.of(configs["vae"]),
            text=TextSize.of(configs["text_encoder"]),
        )
