"""Files of strangers: good ones in every naming scheme, 80 hostile ones, and damaged bits."""

from __future__ import annotations

import os
import random
import tracemalloc
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor
from typer.testing import CliRunner

from turbo_lab import lora_import
from turbo_lab.adapters import QWEN_LINEARS
from turbo_lab.cli import app
from turbo_lab.errors import BadInput
from turbo_lab.lora_files import MAX_HEADER, opened, quoted
from turbo_lab.lora_names import COMFYUI, DIFFUSERS, OURS, Shapes, renamed, scheme_of
from turbo_lab.lora_read import Lora, read_lora
from turbo_lab.recipes import resolve
from turbo_lab.studies import hostile_loras
from turbo_lab.studies.hostile_loras import (
    GOOD,
    HOSTILE,
    LAYER,
    OTHER,
    UNTIMED,
    pair,
    weights,
    write,
)
from turbo_lab.testbeds.linears import postcard_linears, qwen_linears


@pytest.fixture(scope="module")
def shapes() -> Shapes:
    return postcard_linears(resolve("teacher").net)


def changes(lora: Lora) -> dict[str, Tensor]:
    """What the adapter adds to each weight, ``(alpha / rank) B A``."""
    scale = lora.size.alpha / lora.size.rank
    found = {}
    for key in lora.tensors:
        if key.endswith(OURS.down):
            path = key.removesuffix(OURS.down)
            a, b = (lora.tensors[name].double() for name in renamed(path, OURS))
            found[path] = scale * b @ a
    return found


# --- the layout of safetensors ------------------------------------------------------------------


def test_what_safetensors_writes_is_read_bit_for_bit(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(4).bfloat16(),
        "c": torch.tensor(2.5).half(),
        "d": torch.empty(0, 7),
        "e": torch.randn(2, 2, dtype=torch.float64),
    }
    file = opened(write(tmp_path, "good", save(tensors, {"made by": "hand"})))
    assert file.metadata == {"made by": "hand"}
    for name, value in load((tmp_path / "good.safetensors").read_bytes()).items():
        assert torch.equal(file.tensor(name), value) and file.tensor(name).dtype == value.dtype


def test_a_file_that_shrinks_after_it_was_checked_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "good", GOOD)
    file = opened(path)
    path.write_bytes(GOOD[:-8])
    name = max(file.slots, key=lambda name: file.slots[name].stop)
    with pytest.raises(BadInput, match="changed while it was read"):
        file.tensor(name)


def test_text_of_strangers_is_escaped_and_cut() -> None:
    assert quoted("to_q") == "'to_q'"
    assert quoted("\x1b[31m") == r"'\x1b[31m'"
    assert len(quoted("\U000e0001" * 10_000)) < 300
    assert quoted("x" * 100, limit=10) == "'xxxxxxx...'"


# --- names --------------------------------------------------------------------------------------

FLAT, FLAT_OTHER = (layer.replace(".", "_") for layer in (LAYER, OTHER))
NAMED: Mapping[str, tuple[str, str, str, bool]] = {
    "diffusers": ("transformer.{}", ".lora_A.weight", ".lora_B.weight", False),
    "peft": ("base_model.model.{}", ".lora_A.weight", ".lora_B.weight", False),
    "ours": ("{}", ".lora_A.weight", ".lora_B.weight", False),
    "diffsynth": ("{}", ".lora_A.default.weight", ".lora_B.default.weight", False),
    "diffusers of old": ("transformer.{}", ".lora.down.weight", ".lora.up.weight", False),
    "lightning": ("{}", ".lora_down.weight", ".lora_up.weight", True),
    "comfyui": ("diffusion_model.{}", ".lora_down.weight", ".lora_up.weight", True),
    "comfyui with A": ("diffusion_model.{}", ".lora_A.weight", ".lora_B.weight", True),
    "whole checkpoint": ("model.diffusion_model.{}", ".lora_down.weight", ".lora_up.weight", True),
    "kohya": ("lora_unet_{}", ".lora_down.weight", ".lora_up.weight", True),
}


@pytest.mark.parametrize("name", NAMED)
def test_every_scheme_is_told_and_translated(name: str, tmp_path: Path, shapes: Shapes) -> None:
    form, down, up, alphas = NAMED[name]
    tensors: dict[str, Tensor] = {}
    for layer in (LAYER, OTHER):
        a, b = weights(layer)
        stem = form.format(layer.replace(".", "_") if name == "kohya" else layer)
        tensors |= {stem + down: a, stem + up: b}
        tensors |= {f"{stem}.alpha": torch.tensor(1.0)} if alphas else {}
    lora = read_lora(opened(write(tmp_path, "x", save(tensors))), shapes, "postcards")
    assert lora.scheme.prefix == form.format("") and lora.scheme.down == down
    assert lora.size.rank == 2 and lora.size.alpha == (1.0 if alphas else 2.0)
    assert lora.layers == (2, len(shapes)) and lora.parameters == 2 * (128 + 128 + 512 + 128)
    for layer in (LAYER, OTHER):
        for key, value in zip(renamed(layer, OURS), weights(layer), strict=True):
            assert torch.equal(lora.tensors[key], value)


def test_the_schemes_that_are_written_are_told_from_each_other(tmp_path: Path) -> None:
    for scheme in (DIFFUSERS, COMFYUI, OURS):
        names = renamed(LAYER, scheme)
        file = opened(write(tmp_path, "x", save(dict(zip(names, weights(), strict=True)))))
        assert scheme_of(file) == scheme


def test_layers_are_named_in_short_where_that_says_it(tmp_path: Path, shapes: Shapes) -> None:
    everywhere = [f"transformer_blocks.{k}.attn.to_k" for k in range(4)]
    lone = "time_text_embed.timestep_embedder.linear_1"
    tensors: dict[str, Tensor] = pair(LAYER)
    for layer in (*everywhere, lone):
        rows, columns = shapes[layer]
        tensors[f"transformer.{layer}.lora_A.weight"] = torch.ones(2, columns)
        tensors[f"transformer.{layer}.lora_B.weight"] = torch.ones(rows, 2)
    lora = read_lora(opened(write(tmp_path, "x", save(tensors))), shapes, "postcards")
    assert lora.size.targets == ("to_k", lone, LAYER)


def test_the_published_transformer_is_known_without_its_weights() -> None:
    shapes = qwen_linears()
    in_blocks = [path for path in shapes if path.endswith(QWEN_LINEARS)]
    assert len(in_blocks) == 60 * len(QWEN_LINEARS)
    # methods: Wuli's file of 1.18 GB in bfloat16 is rank 64 on all 14 modules, 18.43 MB per rank.
    per_rank = sum(sum(shapes[path]) for path in in_blocks)
    assert 2 * per_rank / 1e6 == pytest.approx(18.43, abs=0.01)
    assert 2 * 64 * per_rank / 1e9 == pytest.approx(1.18, abs=0.005)


# --- scale --------------------------------------------------------------------------------------


def lightning(layers: Mapping[str, tuple[int, float]]) -> bytes:
    """Layers by (rank, alpha), in Lightning's names."""
    tensors: dict[str, Tensor] = {}
    for k, (layer, (rank, value)) in enumerate(layers.items()):
        a, b = weights(layer, rank, k)
        tensors |= {f"{layer}.lora_down.weight": a.half(), f"{layer}.lora_up.weight": b.half()}
        tensors[f"{layer}.alpha"] = torch.tensor(value).half()
    return save(tensors)


@pytest.mark.parametrize(
    ("layers", "rank", "alpha", "dtype"),
    [
        ({LAYER: (4, 8.0), OTHER: (4, 8.0)}, 4, 8.0, torch.float16),
        ({LAYER: (3, 1.0)}, 3, 1.0, torch.float16),
        ({LAYER: (2, 1.0), OTHER: (4, 2.0)}, 4, 2.0, torch.float16),
        ({LAYER: (4, 2.0), OTHER: (4, 8.0)}, 4, 4.0, torch.float32),
        ({LAYER: (1, 5.0), OTHER: (3, 0.5)}, 3, 3.0, torch.float32),
    ],
)
def test_alpha_over_rank_is_honoured_in_every_layer(
    layers: Mapping[str, tuple[int, float]],
    rank: int,
    alpha: float,
    dtype: torch.dtype,
    tmp_path: Path,
    shapes: Shapes,
) -> None:
    lora = read_lora(opened(write(tmp_path, "x", lightning(layers))), shapes, "postcards")
    assert (lora.size.rank, lora.size.alpha) == (rank, alpha)
    assert {lora.tensors[renamed(layer, OURS)[1]].dtype for layer in layers} <= {
        dtype,
        torch.float16,
    }
    for k, (layer, (own, value)) in enumerate(layers.items()):
        a, b = (half.half().double() for half in weights(layer, own, k))
        torch.testing.assert_close(changes(lora)[layer], value / own * b @ a, rtol=1e-6, atol=1e-6)


def test_diffusers_settings_give_alpha_where_names_cannot(tmp_path: Path, shapes: Shapes) -> None:
    said = hostile_loras.with_settings('{"transformer.r": 2, "transformer.lora_alpha": 7}')
    assert read_lora(opened(write(tmp_path, "x", said)), shapes, "postcards").size.alpha == 7.0


# --- hostile files ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_one_sentence_and_nothing_is_written(
    name: str, tmp_path: Path, shapes: Shapes, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, said = HOSTILE[name]
    path = write(tmp_path, "hostile", make())
    monkeypatch.setenv("TURBO_LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(lora_import, "postcard_linears", lambda _: shapes)  # built once
    command = ["import", "lora", str(path), "--testbed", "postcards"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit)
    assert result.stderr.startswith("turbo-lab: file='hostile.safetensors' is not allowed: ")
    assert said in result.stderr
    assert result.stderr.count("\n") == 1 and len(result.stderr) < 500
    assert result.stderr.isascii() and result.stdout == ""
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", UNTIMED)
def test_words_for_times_that_no_sampler_can_follow_are_as_if_not_said(
    name: str, tmp_path: Path, shapes: Shapes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lora_import, "postcard_linears", lambda _: shapes)
    path = write(tmp_path, "x", save(pair(), dict(UNTIMED[name])))
    found = lora_import.incoming(path, testbed="postcards")
    assert found.times == () and "steps       not known" in lora_import.described(found)


@pytest.mark.parametrize("name", ["header-huge", "header-million", "shape-bomb", "offsets-beyond"])
def test_no_memory_is_taken_on_the_word_of_a_header(
    name: str, tmp_path: Path, shapes: Shapes
) -> None:
    path = write(tmp_path, "hostile", HOSTILE[name][0]())
    tracemalloc.start()
    with pytest.raises(BadInput):
        read_lora(opened(path), shapes, "postcards")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 * MAX_HEADER


@pytest.mark.parametrize("name", ["folder", "loop", "pipe", "nowhere", "zero byte", "secret"])
def test_what_is_no_file_is_one_sentence(name: str, tmp_path: Path, shapes: Shapes) -> None:
    path = tmp_path / "x.safetensors"
    if name == "folder":
        path.mkdir()
    elif name == "loop":
        path.symlink_to(path)
    elif name == "pipe":
        os.mkfifo(path)
    elif name == "zero byte":
        path = Path("x\0.safetensors")
    elif name == "secret":
        path.write_bytes(GOOD)
        path.chmod(0)
        if os.access(path, os.R_OK):
            pytest.skip("this user may read everything")
    with pytest.raises(BadInput) as said:
        read_lora(opened(path), shapes, "postcards")
    assert "\n" not in str(said.value) and "\0" not in str(said.value)


def test_flipped_bytes_are_read_or_refused_and_never_crash(tmp_path: Path, shapes: Shapes) -> None:
    numbers = random.Random(0)
    refused = 0
    header = 8 + int.from_bytes(GOOD[:8], "little")
    for _ in range(400):
        data = bytearray(GOOD)
        for _ in range(numbers.randint(1, 3)):
            data[numbers.randrange(header)] = numbers.randrange(256)
        path = write(tmp_path, "x", bytes(data[: numbers.choice([len(data), header, 100])]))
        try:
            lora = read_lora(opened(path), shapes, "postcards")
        except BadInput as error:
            refused += "\n" not in str(error)
        else:
            assert all(bool(value.isfinite().all()) for value in lora.tensors.values())
    assert refused > 300
