"""What this machine can do: versions, processor, GPU, memory, folders, hub, what will be slow."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from turbo_lab import __version__, places
from turbo_lab.provenance import machine
from turbo_lab.run_one import cores
from turbo_lab.store import Store

if TYPE_CHECKING:
    from turbo_lab.qwen_plan import Device

_PACKAGES = ("torch", "torchvision", "diffusers", "peft", "transformers", "timm", "papermill")
_GIB = 2**30
#: Seconds after which a hub counts as out of reach.
HUB_SECONDS = 3.0


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report; ``broken`` means the package cannot work like this."""

    name: str
    value: str
    note: str = ""
    broken: bool = False


def findings() -> list[Finding]:
    """Examine the machine; takes a few seconds, most of it importing torch."""
    checks: tuple[Callable[[], list[Finding]], ...] = (
        _versions,
        _imports,
        _processor,
        _cores,
        _memory,
        _gpu,
        _folders,
        _surroundings,
        _hub,
    )
    return [finding for check in checks for finding in check()]


def qwen_plan(size: str, *, batch: int = 4, steps: int = 2) -> list[str]:
    """Plan memory and time of Qwen-Image on known devices, from counts alone; lines of text.

    Args:
        size: of the pictures, as WIDTHxHEIGHT.
        batch: pictures.
        steps: network steps without guidance.

    Raises:
        BadInput: a number is not allowed.
    """
    from turbo_lab import qwen_counts, qwen_plan
    from turbo_lab.qwen_sizes import Model

    width, height = qwen_plan.parsed_size(size)
    work = qwen_counts.Work(height=height, width=width, batch=batch, steps=steps)
    counts = qwen_counts.table(qwen_counts.counted(Model(), work))
    shown = {
        f"{batch} pictures of {width} x {height}, {steps} steps, no guidance": counts,
        "memory, one picture at a time": qwen_plan.need_table(work),
        "devices, by their vendors' figures; least seconds are reached by none": (
            qwen_plan.device_table(work, [*qwen_plan.DEVICES, *_own_gpu()])
        ),
    }
    lines = []
    for title, table in shown.items():
        lines += [title, *table.to_string(float_format="{:,.2f}".format, na_rep="").splitlines()]
        lines.append("")
    lines += [f"{name}: {what}" for name, what in qwen_plan.WAYS.items()]
    return lines


def _own_gpu() -> list[Device]:
    """This machine's GPU with its own memory, where its rates are known."""
    import torch

    from turbo_lab.qwen_plan import known_device

    if not torch.cuda.is_available():
        return []
    card = torch.cuda.get_device_properties(0)
    known = known_device(card.name)
    if known is None:
        return []
    return [replace(known, name=f"this {known.name}", memory=card.total_memory)]


def _versions() -> list[Finding]:
    python = Finding(name="python", value=platform.python_version())
    mine = Finding(name="turbo-lab", value=__version__)
    return [mine, python, *(_version(name) for name in _PACKAGES)]


def _version(name: str) -> Finding:
    try:
        return Finding(name=name, value=importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        note = "pip install -c constraints.txt -e .[dev]"
        return Finding(name=name, value="missing", note=note, broken=True)


def _imports() -> list[Finding]:
    """Import what only fails when two packages are of different releases."""
    try:
        importlib.import_module("torchvision")
    except Exception as error:  # a mismatch raises RuntimeError, OSError or ImportError
        note = f"torch and torchvision do not fit each other ({str(error).splitlines()[0]})"
        return [Finding(name="torchvision", value="does not import", note=note, broken=True)]
    return []


def _processor() -> list[Finding]:
    from turbo_lab.precision import has_instructions  # and torch, which `machine` asks

    known = machine()
    note = "" if has_instructions() else "recipes in bfloat16 train no faster than in float32"
    return [Finding(name="processor", value=f"{known['cpu']}, {known['isa']}", note=note)]


def _cores() -> list[Finding]:
    count = cores()
    note = "one core: the quick profile takes about twice its minutes" if count < 2 else ""
    threads = os.environ.get("OMP_NUM_THREADS")
    limited = f"OMP_NUM_THREADS={threads} limits torch" if threads else ""
    return [Finding(name="cores", value=str(count), note="; ".join(filter(None, [note, limited])))]


def _memory() -> list[Finding]:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GIB
    except (ValueError, OSError, AttributeError):
        return [Finding(name="memory", value="unknown")]
    note = "under 4 GiB: run notebooks one at a time (--jobs 1)" if total < 4 else ""
    return [Finding(name="memory", value=f"{total:.1f} GiB", note=note)]


def _gpu() -> list[Finding]:
    import torch

    if not torch.cuda.is_available():
        note = "everything runs; Qwen-Image at full size and the paper profile will be slow"
        return [Finding(name="CUDA", value="none", note=note)]
    found = []
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        value = f"{card.name}, {card.total_memory / _GIB:.0f} GiB"
        found.append(Finding(name=f"CUDA {index}", value=value, note=_driver()))
    return found


def _driver() -> str:
    if importlib.util.find_spec("pynvml") is None:
        return ""
    import pynvml

    try:
        pynvml.nvmlInit()
        return f"driver {pynvml.nvmlSystemGetDriverVersion()}"
    except pynvml.NVMLError:
        return ""


def _folders() -> list[Finding]:
    cache = _folder("cache", Store.default().cache, "TURBO_LAB_CACHE names another one")
    checkout = _folder("checkout", places.root(), "figures and copies cannot be written")
    return [cache, checkout]


def _folder(name: str, folder: Path, otherwise: str) -> Finding:
    if why := places.closed(folder):
        note = f"not writable ({why}): {otherwise}"
        return Finding(name=name, value=str(folder), note=note, broken=True)
    free = shutil.disk_usage(places.nearest(folder)).free / _GIB
    note = f"{free:.0f} GiB free" if free >= 2 else f"only {free:.1f} GiB free"
    return Finding(name=name, value=str(folder), note=note)


def _surroundings() -> list[Finding]:
    backend = os.environ.get("MPLBACKEND")
    if not backend:
        return []
    note = "the runner unsets it: it would silently drop every figure of a notebook"
    return [Finding(name="MPLBACKEND", value=backend, note=note)]


def _hub() -> list[Finding]:
    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        return [Finding(name="hub", value="switched off", note="HF_HUB_OFFLINE is set")]
    answer: list[str] = []
    thread = threading.Thread(target=_ask, args=(address, answer), daemon=True)
    began = time.monotonic()
    thread.start()  # in a thread, because a name look-up does not know of timeouts
    thread.join(HUB_SECONDS)
    if answer and not answer[0]:
        took = f"{time.monotonic() - began:.1f} s"
        return [Finding(name="hub", value=address, note=f"reachable, {took}")]
    note = f"out of reach ({answer[0] if answer else 'no answer'}): only Qwen-Image weights need it"
    return [Finding(name="hub", value=address, note=note)]


def _ask(address: str, answer: list[str]) -> None:
    try:
        request = urllib.request.Request(address, method="HEAD")
        with urllib.request.urlopen(request, timeout=HUB_SECONDS):
            answer.append("")
    except urllib.error.HTTPError:
        answer.append("")  # it answers, if only to refuse
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        answer.append(str(getattr(reason, "strerror", None) or reason))
