"""Students as files for others: a LoRA with its metadata, and the scheduler that samples it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import turbo_lab
from turbo_lab.adapters import AdapterSize
from turbo_lab.atomic import atomic_file, atomic_write_text, save_tensors
from turbo_lab.delivery import Delivery
from turbo_lab.errors import BadInput, NonFinite
from turbo_lab.lora_names import ALPHA, COMFYUI, OURS, PEFT_KEY, SCHEMES, renamed
from turbo_lab.places import closed
from turbo_lab.stock_times import settings_for, stock_config

SCHEDULER_FILE = "scheduler_config.json"
DTYPES: Mapping[str, torch.dtype | None] = {
    "stored": None,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What `export_lora` wrote.

    Attributes:
        lora: the safetensors file.
        scheduler: the settings beside it.
        call: how a pipeline is called with them.
    """

    lora: Path
    scheduler: Path
    call: str


def export_lora(
    student: Delivery, out: str | Path, *, format: str = "diffusers", dtype: str = "stored"
) -> Exported:
    """Write a student as LoRA file, and ``scheduler_config.json`` beside it.

    Args:
        student: from `delivery`.
        out: the .safetensors file; an older one is replaced.
        format: key names: ``diffusers``, which its pipelines load, or ``comfyui``.
        dtype: ``stored``, ``float32``, ``float16`` or ``bfloat16``; only the first keeps every bit.

    Raises:
        BadInput: a name is not allowed, there is another scheduler's file, or times are not known.
        NonFinite: a value is too large for the dtype.
        StoreError: the folder cannot be written in.
    """
    out = check_out(out, ".safetensors")
    if format not in SCHEMES:
        raise BadInput("format", format, f"choose one of {', '.join(SCHEMES)}")
    if dtype not in DTYPES:
        raise BadInput("dtype", dtype, f"choose one of {', '.join(DTYPES)}")
    if not student.times:
        why = "its file did not say at which times it is sampled, so no scheduler can be written"
        raise BadInput("student", student.artefact.key, why)
    config = json.dumps(stock_config(student.times, student.eta), indent=2) + "\n"
    beside = out.with_name(SCHEDULER_FILE)
    if os.path.lexists(beside) and not _says(beside, config):
        raise BadInput("out", str(out), f"another {SCHEDULER_FILE} is there; choose a new folder")
    tensors, size = student.tensors(), student.size
    if (chosen := DTYPES[dtype]) is not None:
        tensors = {key: _cast(key, value, chosen) for key, value in tensors.items()}
    metadata = {**metadata_of(student), **(peft_settings(size) if format == "diffusers" else {})}
    atomic_write_text(beside, config)  # first: a LoRA without it would be sampled wrongly
    write_lora(out, in_scheme(tensors, size, format), metadata)
    return Exported(lora=out, scheduler=beside, call=call_of(student))


def in_scheme(tensors: Mapping[str, Tensor], size: AdapterSize, format: str) -> dict[str, Tensor]:
    """Rename an adapter's tensors for others; ComfyUI's names have an alpha for each layer.

    diffusers, when it reads these, multiplies A by alpha / rank in the dtype of the file: exact
    where that is a power of two, as in every recipe of this package.
    """
    scheme, named = SCHEMES[format], {}
    for key in tensors:
        if key.endswith(OURS.down):
            path = key.removesuffix(OURS.down)
            ours, theirs = renamed(path, OURS), renamed(path, scheme)
            named.update({new: tensors[old] for old, new in zip(ours, theirs, strict=True)})
            if scheme == COMFYUI:
                named[scheme.prefix + path + ALPHA] = torch.tensor(size.alpha)
    return named


def metadata_of(student: Delivery) -> dict[str, str]:
    """Text by name, for the header of a file: where a student comes from and how it is sampled.

    ``sigmas``, ``shift`` and ``terminal`` are JSON; shift is null where no setting of a stock
    scheduler gives the times.
    """
    settings = settings_for(student.times)
    card = student.artefact.card
    return {
        "format": "pt",
        "made_by": f"turbo-lab {turbo_lab.__version__}",
        "recipe": student.recipe,
        "artefact": student.artefact.key,
        "testbed": student.testbed,
        "base": student.base,
        "commit": str(card.get("commit") or ""),
        "steps": str(len(student.times)),
        "sigmas": json.dumps([round(t, 7) for t in student.times]),
        "shift": json.dumps(settings and round(math.exp(settings.base_shift), 7)),
        "terminal": json.dumps(settings and settings.terminal and round(settings.terminal, 7)),
        "eta": f"{student.eta:g}",
        "guidance_scale": "1",
        "lora_rank": str(student.size.rank),
        "lora_alpha": f"{student.size.alpha:g}",
        "usage": call_of(student),
    }


def peft_settings(size: AdapterSize) -> dict[str, str]:
    """The metadata from which diffusers takes alpha, which its key names have no place for.

    Only for these names: with ComfyUI's, diffusers scales by the alpha of each layer already.
    """
    settings = {"r": size.rank, "lora_alpha": size.alpha, "target_modules": list(size.targets)}
    return {PEFT_KEY: json.dumps({f"transformer.{name}": v for name, v in settings.items()})}


def call_of(student: Delivery) -> str:
    """How a stock pipeline is called with the exported scheduler."""
    n = len(student.times)
    if settings_for(student.times) is None:
        times = ", ".join(f"{t:.7g}" for t in student.times)
        return f"pipeline(..., sigmas=[{times}], num_inference_steps={n}, true_cfg_scale=1.0)"
    return f"pipeline(..., num_inference_steps={n}, true_cfg_scale=1.0)"


def write_lora(out: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file so that readers see all of it or none.

    Raises:
        StoreError: the folder cannot be written in.
    """
    with atomic_file(out) as temp:
        temp.touch()
        usual = temp.stat().st_mode
        save_tensors(temp.parent, temp.name, tensors, metadata)
        temp.chmod(usual)  # safetensors makes files that nobody else may read


def _says(path: Path, text: str) -> bool:
    try:
        return path.is_file() and path.read_bytes() == text.encode()
    except OSError:
        return False


def check_out(out: str | Path, suffix: str) -> Path:
    """Return a file name as path, or refuse one that nothing can be written to.

    Raises:
        BadInput: another suffix, a folder, or a folder that does not exist or is closed.
    """
    out = Path(out)
    if out.suffix.lower() != suffix:
        raise BadInput("out", str(out), f"name a {suffix} file")
    try:
        folder, parent = out.is_dir(), out.absolute().parent.is_dir()
    except OSError as error:
        why = error.strerror
    else:
        if folder:
            raise BadInput("out", str(out), "it is a folder; name a file")
        if not parent:
            raise BadInput("out", str(out), "its folder must exist")
        why = closed(out.absolute().parent)
    if why:
        raise BadInput("out", str(out), f"nothing can be written there ({why})")
    return out


def _cast(key: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    cast = value.to(dtype)
    if not bool(cast.isfinite().all()):
        raise NonFinite(f"{key} has values too large for {str(dtype).removeprefix('torch.')}.")
    return cast
