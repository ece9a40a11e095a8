"""Orders of pictures from the tiny pipeline: refused or filled, as files and by the command."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from sample_world import (
    SIZE,
    TEXTS,
    WULI,
    SampleWorld,
    close,
    no_garbage,
    with_times,
)
from typer.testing import CliRunner

from turbo_lab import qwen_sample
from turbo_lab.cli import app, main
from turbo_lab.errors import BadInput, MissingPiece
from turbo_lab.path import TerminalWarning
from turbo_lab.qwen_draw import draw, names
from turbo_lab.qwen_fast import know_times, relative_error
from turbo_lab.qwen_order import PARTS, STOCK, Fast, Order, checked_order, times_for, without
from turbo_lab.qwen_sample import Drawn, kept_bytes, loaded_bytes, opened
from turbo_lab.schedules import scheduler_config
from turbo_lab.store import Store
from turbo_lab.studies.hostile_loras import UNTIMED
from turbo_lab.testbeds.qwen_files import load_transformer


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with no_garbage():
        yield


@pytest.fixture(scope="module")
def store(sample_world: SampleWorld) -> Store:
    return sample_world.store


@pytest.fixture(scope="module")
def loras(sample_world: SampleWorld) -> tuple[Path, Path]:
    return sample_world.loras


@pytest.fixture(scope="module")
def ask(sample_world: SampleWorld) -> Callable[..., Order]:
    return sample_world.ask


@pytest.fixture(scope="module")
def two(sample_world: SampleWorld) -> Callable[..., Order]:
    return sample_world.two


@pytest.fixture(scope="module")
def plain(sample_world: SampleWorld) -> Drawn:
    return sample_world.plain


# --- orders -------------------------------------------------------------------------------------


def test_times_come_from_the_file_first(
    ask: Callable[..., Order], loras: tuple[Path, Path], tmp_path: Path
) -> None:
    said = with_times(loras[0], tmp_path / "a.safetensors", sigmas=[1.0, 0.6], eta=1)
    order = ask(loras=[said])
    assert order.times.grid.tolist() == pytest.approx([1.0, 0.6, 0.0])
    assert order.times.eta == 1
    with pytest.raises(BadInput, match="is for 2"):
        ask(loras=[said], steps=4)
    settings = with_times(loras[0], tmp_path / "b.safetensors", scheduler=scheduler_config(WULI))
    assert ask(loras=[settings], steps=2).times.grid[1] == pytest.approx(0.7155)
    said = {"scheduler": scheduler_config(WULI), "steps": 2}
    other = ask(loras=[with_times(loras[0], tmp_path / "c.safetensors", **said)], steps=3)
    assert other.times.steps == 3 and other.times.known == "c.safetensors says, but for 2 steps"


def test_times_come_from_the_table_by_the_files_name(
    ask: Callable[..., Order], loras: tuple[Path, Path], tmp_path: Path
) -> None:
    file = tmp_path / "Wuli-Qwen-Image-2512-Turbo-LoRA-2steps-V1.0-bf16.safetensors"
    file.write_bytes(loras[0].read_bytes())
    times = ask(loras=[file]).times
    assert times.grid.tolist() == pytest.approx([1.0, 0.7155, 0.0])
    assert "wuli-2" in times.known and "for 2" not in times.known
    assert ask(loras=[file], steps=3).times.known == "published as wuli-2, for 2 steps"


@pytest.mark.parametrize("name", UNTIMED)
def test_words_of_another_tool_are_as_if_not_said(
    ask: Callable[..., Order], loras: tuple[Path, Path], tmp_path: Path, name: str
) -> None:
    """As `turbo_lab.lora_import` has it; the table, the model and a schedule still say."""
    words = {key: json.loads(text) for key, text in UNTIMED[name].items()}
    foreign = with_times(loras[0], tmp_path / "a.safetensors", **words)
    times = ask(loras=[foreign]).times
    assert (times.steps, times.known) == (50, "the model's own scheduler")
    known = with_times(foreign, tmp_path / "Qwen-Image-Lightning-4steps-V2.0.safetensors")
    assert "lightning-4" in ask(loras=[known]).times.known
    assert ask(loras=[foreign], schedule="wuli-2").times.steps == 2


def test_few_steps_at_the_models_own_times_warn(
    ask: Callable[..., Order], loras: tuple[Path, Path]
) -> None:
    with pytest.warns(TerminalWarning):
        order = ask(loras=loras[:1], steps=2)
    assert order.times.known == "the model's own scheduler"
    assert times_for(order.bundle, (), schedule="", steps=None, tokens=16).steps == 50


@pytest.mark.parametrize("schedule", ["", "wuli-2"])
def test_one_step_can_be_asked_for(ask: Callable[..., Order], schedule: str) -> None:
    assert ask(steps=1, schedule=schedule).times.grid.tolist() == [1.0, 0.0]


def test_pictures_are_shared_out_over_prompts(ask: Callable[..., Order]) -> None:
    order = ask(batch=4)
    assert order.prompts == (TEXTS[0], TEXTS[0], TEXTS[1], TEXTS[1])
    assert (order.texts, order.numbers) == (TEXTS, (0, 0, 1, 1))


def test_a_prompt_is_embedded_once_and_drawn_with_noise_of_its_own_each_time(
    two: Callable[..., Order], store: Store, plain: Drawn
) -> None:
    ready = opened(two(batch=4), store)
    assert ready.prompts.n == 2
    latents = ready.latents()
    close(latents[0], plain.latents[0])
    assert relative_error(latents[1], latents[0]) > 0.1
    assert relative_error(latents[1], plain.latents[1]) > 0.01  # the same noise, another prompt


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"prompts": []}, "prompt"),
        ({"prompts": [" "]}, "prompt"),
        ({"batch": 3}, "multiple of the 2"),
        ({"batch": -2}, "multiple"),
        ({"width": 100}, "width"),
        ({"height": 8192}, "height"),
        ({"seed": -1}, "seed"),
        ({"steps": 0}, "from 1 to 1000"),
        ({"steps": 1001}, "from 1 to 1000"),
        ({"batch": 0}, "batch"),
        ({"guidance_scale": 0.5}, "guidance"),
        ({"weights": [1.0]}, "one for each of 0"),
        ({"schedule": "turbo"}, "choose one of"),
    ],
    ids=str,
)
def test_orders_that_cannot_be_are_refused(
    ask: Callable[..., Order], change: dict[str, Any], word: str
) -> None:
    with pytest.raises(BadInput, match=word):
        ask(**change)


@pytest.mark.parametrize(
    "change",
    [
        {"adapters": "merged"},
        {"precision": "int4"},
        {"attention": "sage"},
        {"decoder": "tiny"},
        {"precision": "fp8", "adapters": "attached"},
        {"compiled": True, "offload": True},
        {"keep": ("proj_out",)},
        {"keep": ("img_mlp",)},
    ],
    ids=str,
)
def test_parts_that_cannot_be_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(BadInput):
        Fast(**change)


def test_each_part_can_be_left_out_by_name() -> None:
    left = [without(Fast(), [name]) for name in PARTS]
    assert len({*left, Fast()}) == 1 + len(PARTS)
    assert without(Fast(), list(PARTS)) == without(Fast(), ["all"]) == STOCK
    with pytest.raises(BadInput, match="need them fused"):
        without(Fast(precision="fp8"), ["fused"])


def test_an_adapter_for_another_model_is_refused(ask: Callable[..., Order], tmp_path: Path) -> None:
    file = tmp_path / "other.safetensors"
    pair = {f"transformer.transformer_blocks.0.attn.to_q.lora_{h}.weight": torch.ones(2, 2)
            for h in "AB"}  # fmt: skip
    save_file(pair, file)
    with pytest.raises(BadInput, match="file="):
        ask(loras=[file])


def test_memory_is_counted_before_weights_are_loaded(
    two: Callable[..., Order], tiny_model: Path, monkeypatch: pytest.MonkeyPatch, store: Store
) -> None:
    order = two()
    net = load_transformer(order.bundle, "cpu")
    count = 4 * sum(p.numel() for p in net.parameters())
    assert loaded_bytes(order) == count
    know_times(lambda *_: torch.zeros(1), net, [1.0, 0.7155])
    tensors = [*net.parameters(), *net.buffers()]
    assert kept_bytes(order) == 4 * sum(t.numel() for t in tensors)
    opened(order, store)  # embeds the prompts
    monkeypatch.setattr(qwen_sample, "free_memory", lambda device: 100_000)
    with pytest.raises(
        MissingPiece, match=r"needs .* GB on cpu .* are free: choose a smaller size"
    ):
        opened(order, store)


# --- files --------------------------------------------------------------------------------------


def test_pictures_become_files_that_say_how_they_were_made(
    tiny_model: Path, loras: tuple[Path, Path], store: Store, plain: Drawn, tmp_path: Path
) -> None:
    from PIL import Image

    told = draw(
        TEXTS,
        tmp_path / "x.png",
        model=str(tiny_model),
        loras=loras[:1],
        schedule="wuli-2",
        size=f"{SIZE}x{SIZE}",
        fast=Fast(precision="fp8"),
        device="cpu",
        store=store,
    )
    assert told[0] == "2 steps at 1, 0.7155 (schedule wuli-2)"
    assert "off by" in told[2]
    for k in range(2):
        with Image.open(tmp_path / f"x-{k}.png") as image:
            assert image.size == (SIZE, SIZE)
            said = image.info
        assert said["prompt"] == TEXTS[k]
        assert json.loads(said["sigmas"]) == pytest.approx([1, 0.7155, 0], abs=1e-6)
        assert "off by" in said["fp8"]
    assert names(tmp_path / "x.png", 1) == [tmp_path / "x.png"]


def test_a_file_that_cannot_be_written_is_refused_before_anything_else(tmp_path: Path) -> None:
    for out in (tmp_path / "x.jpg", tmp_path / "nowhere" / "x.png"):
        with pytest.raises(BadInput, match="out="):
            draw(["a cat"], out, model="nowhere")


def test_weights_that_do_not_fit_are_prepared_on_the_processor(
    two: Callable[..., Order], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a GPU has room for them only after they became smaller, and where it has none."""
    order = replace(two(), device="cuda")  # nothing is computed on it here
    whole, small = loaded_bytes(order), kept_bytes(order)
    assert small < 0.8 * whole
    room = 10 * whole  # of activations

    def place(gpu: int, host: int = 10**12, fast: Fast | None = None) -> str:
        free = {"cuda": gpu, "cpu": host}
        monkeypatch.setattr(qwen_sample, "free_memory", free.__getitem__)
        monkeypatch.setattr(qwen_sample, "activation_bytes", lambda *_, each: room)
        return qwen_sample._loading_place(replace(order, fast=fast or order.fast))

    assert place(whole + room) == "cuda"
    assert place(small + room) == "cpu"
    for gpu, host in ((small + room - 1, 10**12), (small + room, whole - 1)):
        with pytest.raises(MissingPiece, match="The transformer needs"):
            place(gpu, host)
    assert place(small + room - 1, fast=Fast(precision="fp8")) == "cpu"
    assert place(room + small, fast=Fast(offload=True)) == "cpu"


# --- the command --------------------------------------------------------------------------------


def test_the_command_draws_pictures(
    tiny_model: Path, loras: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TURBO_LAB_CACHE", str(tmp_path / "cache"))
    options = {
        "--testbed": "qwen_image",
        "--model": tiny_model,
        "--lora": loras[0],
        "--weight": 0.5,
        "--schedule": "wuli-2",
        "--size": "64x96",
        "--batch": 2,
        "--precision": "fp8",
        "--device": "cpu",
        "--out": tmp_path / "x.png",
    }
    arguments = [str(word) for pair in options.items() for word in pair]
    result = CliRunner().invoke(app, ["sample", "a cat", *arguments])
    assert result.exit_code == 0, result.output
    for word in ("2 steps at 1, 0.7155", "off by", "x-0.png", "x-1.png"):
        assert word in result.output
    assert (tmp_path / "x-1.png").is_file()


def test_the_trap_of_few_steps_is_a_sentence_and_no_line_of_code(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TURBO_LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TURBO_LAB_PROGRESS", "off")
    order = ["--testbed", "qwen_image", "--model", str(tiny_model), "--size", "32", "--steps", "2"]
    result = CliRunner().invoke(app, ["sample", "a cat", *order, "--out", str(tmp_path / "x.png")])
    assert result.exit_code == 0, result.output
    (said,) = (line for line in result.stderr.splitlines() if "terminal" in line)
    assert said.startswith("turbo-lab: terminal=0.02 with steps=2 spends the last")
    assert "time_grid(" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--testbed", "qwen_image", "--grid", "2x2"], "it is for postcards, not for qwen_image"),
        (["--lora", "x.safetensors"], "lora='x.safetensors' is not allowed: it is for qwen_image"),
        (["--testbed", "qwen_image", "--attention", "sage"], "choose one of auto, cudnn"),
        (["--testbed", "qwen_image", "--size", "tall"], "write WIDTHxHEIGHT"),
        (["--testbed", "qwen_image", "--without", "speed"], "choose among fused, known-times"),
        (["--batch", "0"], "batch='0' is not allowed: it is for qwen_image"),
    ],
)
def test_the_command_refuses_in_one_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["sample", "a cat", *arguments])
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err


def test_what_needs_no_model_is_refused_before_one_is_looked_for(tmp_path: Path) -> None:
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"steps": 0}, "steps=0"),
        ({"schedule": "quickest"}, "schedule='quickest'"),
        ({"loras": [tmp_path / "gone.safetensors"]}, "gone.safetensors"),
    )
    for values, said in wrong:
        with pytest.raises(BadInput, match=said):
            checked_order(prompts=["a cat"], model=str(tmp_path / "nowhere"), **values)
