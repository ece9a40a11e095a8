"""A Qwen-Image pipeline of kilobytes: the very classes of diffusers and transformers, no weights.

Its numbers are random, and large enough that prompts and times matter. It shows that everything
runs and what it computes; its pictures are noise.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from torch import nn

from turbo_lab.adapters import QWEN_LINEARS, AdapterSize, Host
from turbo_lab.progress import library_bars
from turbo_lab.testbeds.qwen_files import load_transformer, located

WIDTH = 16
"""Of the text encoder's hidden states."""
MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE_WORDS = (
    *("system", "Describe", "user", "assistant", " the", " image", " by", " detailing", " color"),
    *(" shape", " size", " texture", " quantity", " text", " spatial", " relationships", " of"),
    *(" objects", " and", " background"),
)


def tiny_pipeline(folder: Path, *, seed: int = 0) -> Path:
    """Save a pipeline with ``save_pretrained`` and return its folder.

    Args:
        folder: made if missing.
        seed: of the weights.
    """
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
    with library_bars():
        pipeline.save_pretrained(folder)
    return folder


def tiny_adapter(
    model: Path,
    file: Path,
    *,
    size: AdapterSize = AdapterSize(rank=4, alpha=8.0),  # noqa: B008 (frozen)
    seed: int = 0,
    says: Mapping[str, object] = MappingProxyType({}),
) -> Path:
    """Write a random adapter on every linear layer of the blocks, as diffusers writes adapters.

    Args:
        model: folder of a pipeline.
        file: to write, ``.safetensors``.
        size: of the adapter.
        seed: of its weights.
        says: metadata beside diffusers' own, written as JSON: ``scheduler`` and ``steps``.
    """
    from diffusers import QwenImagePipeline
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    state = Host(load_transformer(located(str(model)), "cpu")).add("one", size, seed=seed)
    numbers, tensors = torch.Generator().manual_seed(seed), state.state_dict()
    for key, value in tensors.items():
        if "lora_B" in key:  # zero at the start of a training
            value.copy_(0.3 * torch.randn(value.shape, generator=numbers))
    settings = {"r": size.rank, "lora_alpha": size.alpha, "target_modules": list(QWEN_LINEARS)}
    QwenImagePipeline.save_lora_weights(
        file.parent, tensors, weight_name=file.name, transformer_lora_adapter_metadata=settings
    )
    with safe_open(file, framework="pt") as written:
        known = written.metadata()
    save_file(load_file(file), file, {**known, **{k: json.dumps(v) for k, v in says.items()}})
    return file


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
