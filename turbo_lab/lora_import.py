"""Somebody's LoRA in this package: read, checked, described, and kept as an artefact."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from turbo_lab.atomic import atomic_write_text, save_tensors
from turbo_lab.delivery import IMPORTED
from turbo_lab.errors import BadInput
from turbo_lab.lora_export import check_out, peft_settings, write_lora
from turbo_lab.lora_files import opened, quoted
from turbo_lab.lora_names import Shapes
from turbo_lab.lora_read import Lora, read_lora
from turbo_lab.recipes import resolve
from turbo_lab.schedules import Schedule, of_file, wanted_by
from turbo_lab.store import Artefact, Store
from turbo_lab.testbeds.linears import postcard_linears, qwen_linears
from turbo_lab.testbeds.qwen_files import located

TESTBEDS = ("postcards", "qwen_image")
PUBLISHED_BASE = "Qwen-Image"
SHOWN = 12
"""Lines of metadata that a summary shows."""
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,47}")
_NOT_PLAIN = re.compile(r"[^A-Za-z0-9_.-]+")


@dataclass(frozen=True, kw_only=True)
class Incoming:
    """A checked LoRA and what is known about it.

    Attributes:
        lora: read from the file.
        testbed: whose transformer it fits.
        base: name of that transformer.
        recipe: what made it, as far as the file says; else its name.
        times: of its sampler, without the closing 0; empty where they are not known.
        eta: of its sampler.
        known: who says the times.
    """

    lora: Lora
    testbed: str
    base: str
    recipe: str
    times: tuple[float, ...]
    eta: float
    known: str


def incoming(path: str | Path, *, testbed: str = "qwen_image", model: str = "") -> Incoming:
    """Read a LoRA file and check it against a testbed's transformer; nothing is written.

    Args:
        path: a safetensors file.
        testbed: ``postcards`` or ``qwen_image``.
        model: folder or id of the pipeline it is for; empty for the published Qwen-Image, whose
            sizes are known offline.

    Raises:
        BadInput: the file is not what it should be, in one sentence.
        MissingPiece: there is no such pipeline.
    """
    file = opened(path)
    shapes, base = _base(testbed, model)
    lora = read_lora(file, shapes, base)
    times, known = _times(lora)
    said = lora.file.metadata.get("recipe", "")
    return Incoming(
        lora=lora,
        testbed=testbed,
        base=base,
        recipe=said if _PLAIN.fullmatch(said) else _slug(file.path),
        times=times,
        eta=1.0 if lora.file.metadata.get("eta") == "1" else 0.0,
        known=known,
    )


def kept(found: Incoming, store: Store | None = None) -> Artefact:
    """Keep a LoRA as an artefact, once; `turbo_lab.delivery.delivery` finds it by its key.

    It has ``weights.safetensors`` as every student, and ``lora.json`` with what the file said.

    Raises:
        StoreError: the cache cannot be written in.
    """
    store = store or Store.default()
    spec = {
        "kind": IMPORTED,
        "version": 1,
        "sha256": _digest(found.lora),
        "testbed": found.testbed,
        "base": found.base,
        "recipe": found.recipe,
        "adapter": found.lora.size.model_dump(mode="json"),
        "times": list(found.times),
        "eta": found.eta,
    }
    name = f"{found.testbed}/imported-{found.recipe}"
    return store.get_or_make(name, spec, partial(_fill, found))


def write_ours(found: Incoming, out: str | Path) -> None:
    """Write a LoRA with the key names of this package to a file.

    Raises:
        BadInput: the file cannot have this name.
        StoreError: the folder cannot be written in.
    """
    out = check_out(out, ".safetensors")
    times = {"sigmas": json.dumps(found.times)} if found.times else {}
    metadata = {"format": "pt", "recipe": found.recipe, "eta": f"{found.eta:g}", **times}
    write_lora(out, found.lora.tensors, {**metadata, **peft_settings(found.lora.size)})


def described(found: Incoming) -> str:
    """What a person should know about a LoRA, one fact per line; texts of the file are escaped."""
    lora = found.lora
    ranks = ", ".join(map(str, lora.ranks))
    facts = {
        "names": lora.scheme.title,
        "base": f"{found.base}: {lora.layers[0]} of {lora.layers[1]} linear layers",
        "rank": f"{ranks}; alpha {lora.size.alpha:g} at rank {lora.size.rank}",
        "parameters": f"{lora.parameters:,}",
        "dtype": lora.dtypes,
        "steps": _steps(found),
    }
    lines = [f"{name:12s}{text}" for name, text in facts.items()]
    return "\n".join(lines + _metadata_lines(lora))


def _metadata_lines(lora: Lora) -> list[str]:
    pairs = sorted(lora.file.metadata.items())
    lines = [f"{'metadata':12s}{quoted(k, 40)}: {quoted(v, 80)}" for k, v in pairs[:SHOWN]]
    more = len(pairs) - SHOWN
    return [*lines, f"{'':12s}and {more} more"] if more > 0 else lines


def _steps(found: Incoming) -> str:
    if not found.times:
        return "not known"
    times = ", ".join(f"{t:.5g}" for t in found.times)
    how = "renoising" if found.eta else "Euler"
    return f"{len(found.times)} at sigmas {times}, {how} ({found.known})"


def _base(testbed: str, model: str) -> tuple[Shapes, str]:
    if testbed == "postcards":
        if model:
            raise BadInput("model", model, "it is for qwen_image; postcards have one network")
        return postcard_linears(resolve("teacher").net), "the postcards' transformer"
    if testbed != "qwen_image":
        raise BadInput("testbed", testbed, f"choose one of {', '.join(TESTBEDS)}")
    if not model:
        return qwen_linears(), PUBLISHED_BASE
    bundle = located(model)
    return qwen_linears(bundle), model if bundle.commit else bundle.folder.resolve().name


def _times(lora: Lora) -> tuple[tuple[float, ...], str]:
    """Times of the sampler, and who says so: the file, or the table of published adapters."""
    try:
        said = _said(lora.file.metadata)
    except BadInput:  # of another tool, with words of its own by the same names
        said = ()
    if said:
        return said, "the file says"
    row = of_file(lora.file.path.name)
    return (row.sigmas, f"{row.known}: {row.source}") if row else ((), "")


def _said(metadata: Mapping[str, str]) -> tuple[float, ...]:
    """Times that a file says, the same for every size of a picture; empty where there are none.

    Raises:
        BadInput: they are none that a sampler could visit.
    """
    wanted = wanted_by(metadata)
    if wanted.sigmas:
        return wanted.sigmas
    if wanted.schedule is None or wanted.steps is None or not _is_fixed(wanted.schedule):
        return ()
    grid = wanted.schedule.grid(wanted.steps, wanted.schedule.base_tokens)
    return tuple(grid[:-1].tolist())


def _is_fixed(schedule: Schedule) -> bool:
    return schedule.base_shift == schedule.max_shift


def _slug(path: Path) -> str:
    return _NOT_PLAIN.sub("-", path.stem).strip("-._")[:48] or "lora"


def _digest(lora: Lora) -> str:
    """SHA-256 of the tensors as they are kept: safetensors writes metadata in any order."""
    digest = hashlib.sha256()
    for key, value in sorted(lora.tensors.items()):
        digest.update(f"{key} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _fill(found: Incoming, folder: Path) -> None:
    lora = found.lora
    save_tensors(folder, "weights.safetensors", lora.tensors)
    said: dict[str, Any] = {
        "file": lora.file.path.name,
        "names": lora.scheme.title,
        "ranks": list(lora.ranks),
        "parameters": lora.parameters,
        "dtype": lora.dtypes,
        "metadata": dict(lora.file.metadata),
    }
    atomic_write_text(folder / "lora.json", json.dumps(said, indent=1, sort_keys=True) + "\n")
