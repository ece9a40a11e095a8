"""Files beside a tiny Qwen-Image pipeline: prompts and pictures to train on."""

from __future__ import annotations

from pathlib import Path

from turbo_lab.testbeds.tiny_qwen import tiny_pipeline as write_pipeline

__all__ = ["write_images", "write_pipeline", "write_prompts"]


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
