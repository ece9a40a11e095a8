"""A Qwen-Image pipeline of kilobytes: the very classes of diffusers and transformers, no network.

Its weights are random, and large enough that prompts and times matter.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

WIDTH = 16
"""Of the text encoder's hidden states."""
MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE_WORDS = (
    *("system", "Describe", "user", "assistant", " the", " image", " by", " detailing", " color"),
    *(" shape", " size", " texture", " quantity", " text", " spatial", " relationships", " of"),
    *(" objects", " and", " background"),
)


def write_pipeline(folder: Path, *, seed: int = 0) -> Path:
    """Save a pipeline with ``save_pretrained`` and return its folder."""
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = QwenImageTransformer2DModel(
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            axes_dims_rope=(4, 6, 6),
        )
        vae = AutoencoderKLQwenImage(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
        text_encoder = _text_encoder()
    _enlarge(transformer, 2.0)
    pipeline = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=0.9,
            base_image_seq_len=256,
            max_image_seq_len=8192,
            shift_terminal=0.02,
            time_shift_type="exponential",
        ),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=_tokenizer(folder),
        transformer=transformer,
    )
    pipeline.save_pretrained(folder)
    return folder


def write_prompts(path: Path, *prompts: str) -> Path:
    """Write prompts, one per line."""
    path.write_text("\n".join(prompts) + "\n", encoding="utf-8")
    return path


def write_images(folder: Path, *, n: int, width: int = 80, height: int = 64) -> Path:
    """Write ``n`` PNG files of smooth random colour."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for k in range(n):
        coarse = np.random.default_rng(k).integers(0, 256, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((width, height)).save(folder / f"{k:02d}.png")
    return folder


def _text_encoder() -> nn.Module:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 300,
            "hidden_size": WIDTH,
            "intermediate_size": 2 * WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [1, 1, 2],
            },
            "bos_token_id": 256,
            "eos_token_id": 256,
            "pad_token_id": 256,
        },
        vision_config={
            "depth": 1,
            "hidden_size": WIDTH,
            "intermediate_size": WIDTH,
            "num_heads": 1,
            "out_hidden_size": WIDTH,
            "fullatt_block_indexes": [0],
        },
        image_token_id=259,
        video_token_id=260,
        vision_start_token_id=261,
        vision_end_token_id=262,
    )
    encoder = Qwen2_5_VLForConditionalGeneration(config)
    _enlarge(encoder, 8.0)
    return encoder.eval()


def _tokenizer(folder: Path) -> object:
    """A token for each byte, and one for each word of the template, which then has Qwen's 34."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: k for k, token in enumerate((*sorted(ByteLevel.alphabet()), *MARKS))}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[])
    tokenizer.add_tokens([*MARKS, *TEMPLATE_WORDS], special_tokens=True)
    return tokenizer


@torch.no_grad()
def _enlarge(net: nn.Module, factor: float) -> None:
    """A fresh network hardly depends on its input; larger weights make every path count."""
    for parameter in net.parameters():
        parameter.mul_(factor)
