"""Run as a script where turbo_lab cannot be imported: what a stock pipeline makes of an export.

``python -I stock_pipeline.py FOLDER``. The folder holds ``transformer`` (save_pretrained),
``inputs.safetensors`` (embeds, latents, noise), and a folder for each export with its LoRA,
``scheduler_config.json`` and ``call.json``. Writes ``latents.safetensors`` into each of these.
"""

from __future__ import annotations

import importlib.abc
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any


class Absent(importlib.abc.MetaPathFinder):
    """turbo_lab, as if it had never been installed."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> None:
        if name.partition(".")[0] == "turbo_lab":
            raise ModuleNotFoundError(name)


def main(folder: Path) -> None:
    import torch
    from diffusers import QwenImagePipeline, QwenImageTransformer2DModel
    from diffusers.schedulers import FlowMatchEulerDiscreteScheduler as Scheduler
    from diffusers.schedulers import scheduling_flow_match_euler_discrete as scheduling
    from safetensors.torch import load_file, save_file

    inputs = load_file(folder / "inputs.safetensors")
    transformer = QwenImageTransformer2DModel.from_pretrained(
        folder / "transformer", use_safetensors=True
    )
    # What a scheduler that renoises would draw: the noise of our sampler, so that images compare.
    scheduling.randn_tensor = lambda *_, **__: inputs["noise"]
    for export in sorted(path for path in folder.iterdir() if (path / "call.json").exists()):
        pipeline: Any = QwenImagePipeline(
            scheduler=Scheduler.from_pretrained(export),
            vae=None,
            text_encoder=None,
            tokenizer=None,
            transformer=transformer,
        )
        pipeline.set_progress_bar_config(disable=True)
        pipeline.load_lora_weights(export / "lora.safetensors", use_safetensors=True)
        latents = pipeline(
            prompt_embeds=inputs["embeds"],
            prompt_embeds_mask=torch.ones(inputs["embeds"].shape[:2], dtype=torch.long),
            latents=inputs["latents"],
            height=128,
            width=128,
            output_type="latent",
            **json.loads((export / "call.json").read_text()),
        ).images
        pipeline.unload_lora_weights()
        save_file(
            {"latents": latents, "sigmas": pipeline.scheduler.sigmas},
            export / "latents.safetensors",
        )


if __name__ == "__main__":
    sys.meta_path.insert(0, Absent())
    try:
        import turbo_lab  # noqa: F401
    except ModuleNotFoundError:
        pass
    else:
        raise AssertionError("turbo_lab must not be importable here")
    warnings.simplefilter("error", RuntimeWarning)  # PEFT's, where keys and settings disagree
    main(Path(sys.argv[1]))
    assert "turbo_lab" not in sys.modules
