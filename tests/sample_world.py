"""Orders of pictures from the tiny pipeline, in random adapters or in none."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from turbo_lab import qwen_sample
from turbo_lab.adapters import QWEN_LINEARS, AdapterSize, Host
from turbo_lab.qwen_order import STOCK, Order, checked_order
from turbo_lab.qwen_sample import Drawn, drawn
from turbo_lab.schedules import fixed
from turbo_lab.store import Store
from turbo_lab.streams import noise
from turbo_lab.testbeds import qwen_data
from turbo_lab.testbeds.postcards import pack
from turbo_lab.testbeds.qwen_files import load_transformer, located

TEXTS = ("a cat", "two dogs on the moss, the sign reads 42")
SIZE = 64
WULI = fixed(2.5, terminal=0.7155)


@contextmanager
def no_garbage() -> Iterator[None]:
    """Collecting it takes most of the time of a tiny picture."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (qwen_data, qwen_sample):
            patch.setattr(module, "release", lambda: None)
        yield


@dataclass(frozen=True, kw_only=True)
class SampleWorld:
    """A tiny pipeline, two adapters for it, and what is drawn with them."""

    model: Path
    loras: tuple[Path, Path]
    store: Store

    def ask(self, **change: Any) -> Order:
        """An order of both texts, without an adapter."""
        asked = {"prompts": TEXTS, "model": str(self.model), "width": SIZE, "height": SIZE}
        return checked_order(**{**asked, **change})

    def two(self, **change: Any) -> Order:
        """An order of a 2-step adapter."""
        return self.ask(**{"loras": self.loras[:1], "schedule": "wuli-2", **change})

    @cached_property
    def plain(self) -> Drawn:
        """What the order of two steps is without any part of the fast path."""
        return drawn(self.two(fast=STOCK), self.store)


def write_loras(model: Path, folder: Path) -> tuple[Path, Path]:
    """Two random adapters on all layers of all blocks, as diffusers writes them."""
    from diffusers import QwenImagePipeline

    made = []
    for k, (rank, alpha) in enumerate([(4, 8.0), (2, 2.0)]):
        host = Host(load_transformer(located(str(model)), "cpu"))
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
