"""Acceptance bars of the factory: computed in two ways, counted, refused and timed anew each time.

``turbo-lab bars --only factory`` prints them. Pictures are of a tiny pipeline of diffusers' own
classes with random weights; counts are of the full size.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

from safetensors.torch import load, save

from turbo_lab.errors import BadInput
from turbo_lab.lora_import import incoming
from turbo_lab.path import TerminalWarning
from turbo_lab.qwen_workshop import Workshop, workshop
from turbo_lab.studies.factory_claims import (
    NOTEBOOK,
    STATED,
    decoding_share,
    measured,
    misprinted,
    network_parameters,
    schedule_error,
)
from turbo_lab.studies.hostile_loras import GOOD, HOSTILE, UNTIMED, Maker, write

Row = tuple[str, float, Literal["at least", "at most"], float]


def factory_bars() -> Iterator[Row]:
    """Yield name, value, "at least" or "at most", and limit of each acceptance figure."""
    shop = workshop(size="64", device="cpu")
    found = measured(shop)
    yield "factory.parameters_off", abs(network_parameters() / 1e9 - STATED), "at most", 0.01
    yield "factory.schedules", schedule_error(), "at most", 1e-6
    yield "factory.schedules_printed", float(misprinted()), "at most", 0.0
    yield "factory.two_steps", found.few, "at most", 1e-4
    yield "factory.guided", found.guided, "at most", 1e-4
    yield "factory.decoding", found.decoding, "at most", 1e-5
    yield "factory.decoding_share", decoding_share(), "at most", 0.5
    yield "factory.passes", found.calls_many / found.calls_few, "at least", 50.0
    yield "factory.loras_misjudged", float(len(misjudged(shop))), "at most", 0.0
    yield "factory.notebook_seconds", notebook_seconds(), "at most", 120.0


# --- files of strangers -------------------------------------------------------------------------


def misjudged(
    shop: Workshop,
    files: Mapping[str, tuple[Maker, str]] = HOSTILE,
    words: Mapping[str, Mapping[str, str]] = UNTIMED,
) -> list[str]:
    """Return the names of files that were not judged as they should be; none is right.

    Every hostile file must be refused by ``import lora`` in one sentence that gives the reason,
    and by an order of Qwen-Image, for whose layers none of them was made, in one sentence. A good
    file must pass the import, and the workshop's own adapter the order. Where their words for
    times cannot be followed, both are read as if they said nothing of times.

    Args:
        shop: the tiny pipeline and its adapter.
        files: name to what makes the bytes, and a part of the sentence.
        words: name to metadata that cannot be followed.
    """
    with tempfile.TemporaryDirectory(prefix="turbo-lab-hostile-") as folder:
        good = write(Path(folder), "good", GOOD)
        wrong = [f"{name}, refused" for name, said in _goods(shop, good).items() if said]
        for name, (make, reason) in files.items():
            file = write(Path(folder), "hostile", make())
            imported, drawn = _imported(file), _ordered(shop, file)
            if reason not in imported or "\n" in imported:
                wrong.append(f"{name}, imported")
            if not drawn or "\n" in drawn:
                wrong.append(f"{name}, drawn with")
        ours = load(shop.lora.read_bytes())
        quiet = _times_of(shop, good, write(Path(folder), "adapter", save(ours)))
        for name, said in words.items():
            good.write_bytes(save(load(GOOD), dict(said)))
            adapter = write(Path(folder), "adapter", save(ours, dict(said)))
            if _times_of(shop, good, adapter) != quiet:
                wrong.append(f"{name}, followed")
    return wrong


def _times_of(shop: Workshop, good: Path, adapter: Path) -> object:
    """At which times a good file is sampled, imported or worn; a sentence where it is refused."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TerminalWarning)  # one of them has the words for it
        try:
            worn = replace(shop, lora=adapter).order(["a cat"], adapter=True).times
            return incoming(good, testbed="postcards").times, worn.grid.tolist(), worn.known
        except BadInput as error:
            return str(error)


def _goods(shop: Workshop, good: Path) -> dict[str, str]:
    return {"a good file": _imported(good), "the adapter": _ordered(shop, shop.lora)}


def _imported(file: Path) -> str:
    """The sentence with which ``import lora`` refuses a file; empty where it does not."""
    try:
        incoming(file, testbed="postcards")
    except BadInput as error:
        return str(error)
    return ""


def _ordered(shop: Workshop, file: Path) -> str:
    """The sentence with which an order of pictures refuses a file; empty where it does not."""
    try:
        replace(shop, lora=file).order(["a cat"], adapter=True)
    except BadInput as error:
        return str(error)
    return ""


# --- the notebook -------------------------------------------------------------------------------


def notebook_seconds() -> float:
    """Seconds of notebook 07 at quick by ``turbo-lab figures``, with an empty cache.

    Start of all processes included; infinite where the run is not whole.
    """
    command = [sys.executable, "-m", "turbo_lab.cli", "figures", "--only", NOTEBOOK]
    with tempfile.TemporaryDirectory(prefix="turbo-lab-notebook-") as folder:
        places = {"TURBO_LAB_CACHE": f"{folder}/cache", "TURBO_LAB_FIGURES": f"{folder}/figures"}
        began = time.perf_counter()
        done = subprocess.run(command, env={**os.environ, **places}, capture_output=True)
        seconds = time.perf_counter() - began
    return seconds if done.returncode == 0 else math.inf
