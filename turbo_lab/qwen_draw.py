"""``turbo-lab sample --testbed qwen_image``: pictures as PNG files that say how they were made."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

import turbo_lab
from turbo_lab.atomic import atomic_write_bytes
from turbo_lab.lab import chosen_device
from turbo_lab.lora_export import check_out
from turbo_lab.qwen_order import Fast, Order, checked_order
from turbo_lab.qwen_plan import parsed_size
from turbo_lab.qwen_sample import Drawn, drawn
from turbo_lab.store import Store
from turbo_lab.testbeds.qwen_files import DEFAULT_MODEL

COMPRESSION = 1
"""Of PNG files: level 1 takes well under half the time of the default for a little more space."""


def draw(
    prompts: Sequence[str],
    out: str | Path,
    *,
    model: str = "",
    loras: Sequence[str | Path] = (),
    weights: Sequence[float] = (),
    schedule: str = "",
    steps: int | None = None,
    size: str = "",
    batch: int | None = None,
    seed: int = 0,
    guidance_scale: float | None = None,
    fast: Fast | None = None,
    device: str = "auto",
    store: Store | None = None,
) -> list[str]:
    """Draw pictures and write them; return lines that say what was done.

    Args:
        prompts: texts, each drawn equally often.
        out: PNG file of one picture; of several, ``-0``, ``-1`` ... are put before its suffix.
        model: folder of a pipeline, or its id; empty for Qwen-Image-2512.
        loras: see `turbo_lab.qwen_order.checked_order`, as for all that follows.
        weights: of the adapters.
        schedule: a published one, by name.
        steps: of the network.
        size: WIDTHxHEIGHT in pixels; empty for 1024x1024.
        batch: pictures in all; None for one of each prompt.
        seed: of the noise.
        guidance_scale: of guidance.
        fast: parts of the fast path.
        device: auto, cpu or cuda.
        store: where embeddings live.

    Raises:
        BadInput: a value is not allowed.
        MissingPiece: weights, memory or a GPU are missing.
    """
    out = check_out(out, ".png")
    width, height = parsed_size(size or "1024x1024")
    order = checked_order(
        prompts=prompts,
        model=model or DEFAULT_MODEL,
        loras=loras,
        weights=weights,
        schedule=schedule,
        steps=steps,
        width=width,
        height=height,
        batch=batch,
        seed=seed,
        guidance_scale=guidance_scale,
        fast=fast,
        device=chosen_device(device),
    )
    done = drawn(order, store)
    files = names(out, len(order.prompts))
    with ThreadPoolExecutor(min(8, len(files))) as pool:
        list(pool.map(lambda k: _write(files[k], done.pixels[k], said(order, done, k)),
                      range(len(files))))  # fmt: skip
    return [*lines(order, done), *map(str, files)]


def names(out: Path, n: int) -> list[Path]:
    """Return the files of n pictures."""
    if n == 1:
        return [out]
    return [out.with_name(f"{out.stem}-{k}{out.suffix}") for k in range(n)]


def lines(order: Order, done: Drawn) -> list[str]:
    """Return what a person should know: times, who says them, seconds, and how far fp8 is off."""
    times = ", ".join(f"{t:.4g}" for t in order.times.grid[:-1].tolist())
    found = [f"{order.times.steps} steps at {times} ({order.times.known})"]
    found.append(", ".join(f"{phase} {took:.2f} s" for phase, took in done.seconds.items()))
    return found if done.guard is None else [*found, str(done.guard)]


def said(order: Order, done: Drawn, k: int) -> dict[str, str]:
    """Return text by name for the PNG of a picture: all it takes to draw it again."""
    loras = [[lora.file.path.name, weight] for lora, weight in order.loras]
    texts = {
        "prompt": order.prompts[k],
        "model": order.bundle.model,
        "loras": json.dumps(loras),
        "sigmas": json.dumps([round(t, 7) for t in order.times.grid.tolist()]),
        "eta": f"{order.times.eta:g}",
        "guidance_scale": f"{order.guidance_scale:g}",
        "negative": order.negative,
        "size": f"{order.width}x{order.height}",
        "seed": str(order.seed),
        "number": str(k),
        "precision": order.fast.precision,
        "Software": f"turbo-lab {turbo_lab.__version__}",
    }
    return texts if done.guard is None else {**texts, "fp8": str(done.guard)}


def _write(file: Path, pixels: Tensor, texts: dict[str, str]) -> None:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for name, text in texts.items():
        info.add_itxt(name, text)
    buffer = io.BytesIO()
    image = Image.fromarray(pixels.numpy())
    image.save(buffer, "PNG", pnginfo=info, compress_level=COMPRESSION)
    atomic_write_bytes(file.absolute(), buffer.getvalue())
