"""The factory's own bars: strangers' files are really judged, and a notebook that fails is long."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from safetensors.torch import load, save

from turbo_lab.qwen_workshop import Workshop, workshop
from turbo_lab.studies import factory_bars
from turbo_lab.studies.hostile_loras import GOOD, HOSTILE


@pytest.fixture(scope="module")
def shop() -> Workshop:
    return workshop(size="64", device="cpu")


def test_hostile_files_are_refused_for_their_reason_and_good_ones_are_not(shop: Workshop) -> None:
    some = {name: HOSTILE[name] for name in ("pickle", "body-cut", "nan", "lokr", "path-like")}
    assert factory_bars.misjudged(shop, some) == []


def test_what_slips_through_or_is_refused_for_something_else_is_counted(shop: Workshop) -> None:
    mine = save(load(shop.lora.read_bytes()))
    files = {
        "harmless": (lambda: GOOD, "not finite"),
        "fitting": (lambda: mine, "no linear layer"),
        "nan": (HOSTILE["nan"][0], "it is empty"),
    }
    words = {"silly": {"sigmas": "[2]"}, "plain": {"sigmas": "[1.0, 0.5]"}}
    found = factory_bars.misjudged(shop, files, words)
    assert found == [
        "harmless, imported",
        "fitting, imported",
        "fitting, drawn with",
        "nan, imported",
        "plain, followed",
    ]


def test_a_notebook_that_is_not_there_takes_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TURBO_LAB_ROOT", str(tmp_path))
    assert factory_bars.notebook_seconds() == math.inf
