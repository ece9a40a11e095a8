"""Exports in a stock QwenImagePipeline, in a process that cannot import turbo_lab."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from delivery_world import EXPORTS, SIZE, World, lively_net, make_world
from safetensors.torch import load_file, save_file
from test_testbed import TINY
from torch import Tensor

from turbo_lab.adapters import Host
from turbo_lab.delivery import Delivery
from turbo_lab.lora_files import opened
from turbo_lab.path import grid_from_times
from turbo_lab.postcards import draw_scenes
from turbo_lab.sample import final, sample
from turbo_lab.streams import noise
from turbo_lab.testbeds.postcards import LATENT_SHAPE, PostcardNet, pack, spawn_net, unpack

ROWS = range(2)


@pytest.fixture(scope="module")
def net() -> PostcardNet:
    return lively_net()


@pytest.fixture(scope="module")
def world(net: PostcardNet, tmp_path_factory: pytest.TempPathFactory) -> World:
    """Exports, and beside each what the stock pipeline drew."""
    world = make_world(tmp_path_factory.mktemp("delivery"))
    for name, format in EXPORTS:
        usage = opened(world.lora(name, format)).metadata["usage"]
        call = world.place(name, format) / "call.json"
        call.write_text(json.dumps(call_arguments(usage)))
    run_stock(world.folder, net)
    return world


def call_arguments(usage: str) -> dict[str, Any]:
    """What a person types who follows the "usage" of a file."""
    call = ast.parse(usage, mode="eval").body
    assert isinstance(call, ast.Call)
    return {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}


def start() -> Tensor:
    return noise(LATENT_SHAPE, seed=0, stream="z", indices=ROWS)


def again() -> Tensor:
    return noise(LATENT_SHAPE, seed=0, stream="renoise/0", indices=ROWS)


def captions() -> Tensor:
    return draw_scenes("eval", ROWS).tokens


def run_stock(folder: Path, net: PostcardNet) -> None:
    """Run the script that knows nothing of us over every export of a folder."""
    with torch.no_grad():
        inputs: Mapping[str, Tensor] = {
            "embeds": net.captions(captions()),
            "latents": pack(start()),
            "noise": pack(again()),
        }
    net.transformer.save_pretrained(folder / "transformer")
    save_file({k: v.contiguous() for k, v in inputs.items()}, folder / "inputs.safetensors")
    script = Path(__file__).with_name("stock_pipeline.py")
    command = [sys.executable, "-I", str(script), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def ours(net: PostcardNet, student: Delivery) -> Tensor:
    """Latents by our own sampler."""
    host = Host(spawn_net(TINY, 0), part="transformer")
    host.net.load_state_dict(net.state_dict())
    worn = host.add("student", student.size, seed=0)
    worn.load_state_dict({k: v.float() for k, v in student.tensors().items()})
    grid = grid_from_times(student.times)
    with torch.no_grad():
        walk = sample(worn, grid, start(), captions(), eta=student.eta, renoise=lambda _: again())
        return final(walk)


@pytest.mark.parametrize(("name", "format"), EXPORTS)
def test_a_stock_pipeline_without_turbo_lab_makes_the_same_images(
    world: World, net: PostcardNet, name: str, format: str
) -> None:
    student = world.students[name]
    theirs = load_file(world.place(name, format) / "latents.safetensors")
    mine = ours(net, student)
    torch.testing.assert_close(theirs["sigmas"], grid_from_times(student.times), rtol=0, atol=1e-6)
    # 1e-5 of the images' size: one float32 rounding in x = Σ v Δt is 6e-8 of it.
    assert (unpack(theirs["latents"]) - mine).abs().max() <= 1e-5 * max(
        1.0, float(mine.abs().max())
    )


def test_the_adapter_and_its_alpha_matter_here(world: World, net: PostcardNet) -> None:
    student = world.students["published times"]
    mine = ours(net, student)
    plain = replace(student, size=SIZE.model_copy(update={"alpha": 3.0}))
    assert (ours(net, plain) - mine).abs().max() > 0.05
