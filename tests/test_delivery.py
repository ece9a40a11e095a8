"""Students handed on and taken back: bit for bit, with what a file says, and refused politely."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from delivery_world import SIZE, World, lively_net, make_world
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from turbo_lab.adapters import Host
from turbo_lab.atomic import atomic_write_text, save_tensors
from turbo_lab.cli import app
from turbo_lab.delivery import delivery
from turbo_lab.errors import BadInput, MissingPiece, NonFinite
from turbo_lab.factory_plan import check
from turbo_lab.lora_export import export_lora
from turbo_lab.lora_files import opened
from turbo_lab.lora_import import described, incoming, kept, write_ours
from turbo_lab.lora_names import Shapes
from turbo_lab.lora_read import read_lora
from turbo_lab.schedules import wanted_by
from turbo_lab.store import Artefact, Store
from turbo_lab.testbeds.linears import linear_shapes


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("delivery"))


@pytest.fixture(scope="module")
def shapes() -> Shapes:
    return linear_shapes(lively_net().transformer)


# --- and back -----------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["diffusers", "comfyui"])
def test_an_export_comes_back_bit_for_bit(
    world: World, shapes: Shapes, format: str, tmp_path: Path
) -> None:
    student = world.students["published times"]
    file = opened(world.lora("published times", format))
    lora = read_lora(file, shapes, "tiny")
    assert lora.size == SIZE
    stored = student.tensors()
    assert lora.tensors.keys() == stored.keys()
    for key, value in stored.items():
        assert torch.equal(lora.tensors[key], value) and lora.tensors[key].dtype == value.dtype


def test_an_import_is_an_artefact_that_can_be_exported_again(
    world: World, shapes: Shapes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("turbo_lab.lora_import.postcard_linears", lambda _: shapes)
    source = world.lora("second time moved", "comfyui")
    found = incoming(source, testbed="postcards")
    artefact = kept(found, world.store)
    assert kept(found, world.store).path == artefact.path
    again = delivery(artefact.key, store=world.store)
    assert again.times == (1.0, 0.5) and again.eta == 0 and again.size == SIZE
    assert again.recipe == "warm-second-0.5"
    export_lora(again, str(tmp_path / "x.safetensors"), format="comfyui")  # paths may be text
    first, second = load_file(source), load_file(tmp_path / "x.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    write_ours(found, str(tmp_path / "ours.safetensors"))
    assert load_file(tmp_path / "ours.safetensors").keys() == artefact.tensors().keys()
    mine = incoming(str(tmp_path / "ours.safetensors"), testbed="postcards")
    assert mine.lora.size == SIZE and mine.times == (1.0, 0.5)
    text = described(mine)
    for said in ("PEFT", "alpha 6 at rank 3", "float16", "2 at sigmas 1, 0.5, Euler"):
        assert said in text


@pytest.mark.parametrize(("name", "eta"), [("renoising", 1.0), ("published times", 0.0)])
def test_who_renoises_still_does_when_taken_back(
    world: World, shapes: Shapes, name: str, eta: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("turbo_lab.lora_import.postcard_linears", lambda _: shapes)
    assert world.students[name].eta == eta
    assert incoming(world.lora(name, "diffusers"), testbed="postcards").eta == eta


def test_times_of_published_files_are_known_by_their_names(
    shapes: Shapes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("turbo_lab.lora_import.postcard_linears", lambda _: shapes)
    layer = "transformer_blocks.0.attn.to_q"
    pair = {
        f"{layer}.lora_down.weight": torch.ones(2, 32),
        f"{layer}.lora_up.weight": torch.ones(32, 2),
    }
    path = tmp_path / "Wuli-Qwen-Image-2512-Turbo-LoRA-2steps-V1.0-bf16.safetensors"
    save_file(pair, path, {"steps": "20000"})  # of a training: no reason to refuse the file
    assert incoming(path, testbed="postcards").times == (1.0, 0.7155)
    path = tmp_path / "x.safetensors"
    save_file(pair, path, {"steps": "20000"})
    unknown = incoming(path, testbed="postcards")
    assert unknown.times == () and "not known" in described(unknown)
    store = Store(cache=tmp_path / "cache")
    nameless = delivery(kept(unknown, store).key, store=store)
    with pytest.raises(BadInput, match="at which times it is sampled"):
        export_lora(nameless, tmp_path / "y.safetensors")


def test_names_are_those_that_diffusers_writes_and_that_lightning_has(
    world: World, shapes: Shapes, tmp_path: Path
) -> None:
    from diffusers import QwenImagePipeline

    student = world.students["published times"]
    QwenImagePipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=student.tensors(),
        transformer_lora_adapter_metadata={"r": 3, "lora_alpha": 6.0, "target_modules": ["to_q"]},
    )
    (path,) = tmp_path.iterdir()
    theirs = load_file(path)
    ours = load_file(world.lora("published times", "diffusers"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert read_lora(opened(path), shapes, "tiny").size == SIZE
    lightning = load_file(world.lora("published times", "comfyui"))
    layer = "transformer_blocks.0.attn.to_q"
    assert {f"{layer}.lora_down.weight", f"{layer}.lora_up.weight", f"{layer}.alpha"} == {
        key for key in lightning if key.startswith(layer)
    }


# --- metadata -----------------------------------------------------------------------------------


def test_the_header_says_what_it_is_and_how_to_sample_it(world: World) -> None:
    student = world.students["published times"]
    said = opened(world.lora("published times", "diffusers")).metadata
    assert said["recipe"] == "warm" and said["artefact"] == student.artefact.key
    assert said["base"].startswith("postcards/teacher ") and said["guidance_scale"] == "1"
    assert (said["steps"], said["sigmas"], said["terminal"]) == ("2", "[1.0, 0.7155]", "0.7155")
    assert (said["lora_rank"], said["lora_alpha"]) == ("3", "6")
    assert said["commit"] == (student.artefact.card["commit"] or "")
    assert wanted_by(said).sigmas == (1.0, 0.7155)
    beside = world.place("published times", "diffusers") / "scheduler_config.json"
    config = json.loads(beside.read_text("utf-8"))
    shift = math.exp(config["base_shift"])
    assert json.loads(said["shift"]) == pytest.approx(shift) == pytest.approx(0.7155 / 0.2845)
    explicit = opened(world.lora("explicit sigmas", "diffusers")).metadata
    assert explicit["shift"] == explicit["terminal"] == "null"
    assert "sigmas=[1, 0.8824, 0.7143, 0.4545]" in explicit["usage"]


def test_other_dtypes_round_and_never_overflow(world: World, tmp_path: Path) -> None:
    student = world.students["published times"]
    export_lora(student, tmp_path / "x.safetensors", dtype="bfloat16")
    assert {v.dtype for v in load_file(tmp_path / "x.safetensors").values()} == {torch.bfloat16}
    key, value = next(iter(student.tensors().items()))
    huge = _Changed(student.artefact, {key: value.float() * 1e6})
    with pytest.raises(NonFinite, match="too large for float16"):
        export_lora(replace(student, artefact=huge), tmp_path / "y.safetensors", dtype="float16")  # type: ignore[arg-type]
    assert not (tmp_path / "y.safetensors").exists()


class _Changed:
    """An artefact with other tensors."""

    def __init__(self, artefact: Artefact, tensors: dict[str, Tensor]) -> None:
        self.name, self.key, self.card = artefact.name, artefact.key, artefact.card
        self.tensors = lambda: tensors


# --- the factory --------------------------------------------------------------------------------


def test_a_student_of_the_factory_is_delivered_by_its_key(tiny_model: Path, tmp_path: Path) -> None:
    """Its artefact is made by hand here; tests of the factory train one."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n")
    job = check(
        recipe="dmd2-2", model=str(tiny_model), prompts=prompts, size=64, rank=4, profile="smoke"
    )
    from diffusers import QwenImageTransformer2DModel

    net = QwenImageTransformer2DModel.from_pretrained(tiny_model / "transformer")
    host = Host(net, part="")
    adapter = host.add("student", job.recipe.adapter, seed=0)

    def make(folder: Path) -> None:
        save_tensors(folder, "weights.safetensors", adapter.state_dict())
        atomic_write_text(folder / "card.json", json.dumps({"model": job.bundle.model}))

    store = Store(cache=tmp_path / "cache")
    artefact = store.get_or_make(job.artefact, job.specs()[-1], make)
    student = delivery(artefact.key, store=store)
    assert student.times == (1.0, 0.7155) and student.base.startswith(f"{tiny_model.name} sha256 ")
    out = tmp_path / "x.safetensors"
    export_lora(student, out)
    found = incoming(out, testbed="qwen_image", model=str(tiny_model))
    assert found.lora.size == job.recipe.adapter
    assert all(torch.equal(found.lora.tensors[k], v) for k, v in adapter.state_dict().items())
    with pytest.raises(BadInput, match=r"and not \[rank, 3072\]"):
        incoming(out)


# --- wrong input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["dmd9", "--out", "x.safetensors"], "student='dmd9' is not allowed: choose one of"),
        (["dmd2", "--steps", "3", "--out", "x.safetensors"], "steps=3 is not allowed"),
        (["dmd2", "--out", "x.bin"], "name a .safetensors file"),
        (["dmd2", "--out", "nowhere/x.safetensors"], "its folder must exist"),
        (["dmd2", "--out", "x.safetensors", "--format", "onnx"], "choose one of diffusers"),
        (["dmd2", "--out", "x.safetensors", "--dtype", "int8"], "dtype='int8' is not allowed"),
        (["dmd2", "--out", "x.safetensors", "--seed", "-1"], "seed=-1 is not allowed"),
        (["0123456789ab", "--out", "x.safetensors"], "no artefact has this key"),
        (["77b68707efec", "--out", "x.safetensors"], "is a whole network, no adapter"),
    ],
)
def test_wrong_input_is_one_sentence_and_nothing_is_written(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TURBO_LAB_CACHE", str(tmp_path / "cache"))
    result = CliRunner().invoke(app, ["export", "lora", *arguments])
    assert result.exit_code == 2 and said in result.stderr
    assert result.stderr.count("\n") == 1 and result.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_an_untrained_student_says_how_it_is_trained(home: Store) -> None:
    with pytest.raises(MissingPiece, match="run turbo-lab train dmd2-4 --profile paper --seed 3"):
        delivery("dmd2", steps=4, profile="paper", seed=3, store=home)


def test_a_scheduler_of_another_export_is_not_overwritten(world: World, tmp_path: Path) -> None:
    export_lora(world.students["published times"], tmp_path / "x.safetensors")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(BadInput, match=r"another scheduler_config\.json is there"):
        export_lora(world.students["second time moved"], tmp_path / "y.safetensors")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    export_lora(world.students["published times"], tmp_path / "x.safetensors")
    (tmp_path / "scheduler_config.json").unlink()
    (tmp_path / "scheduler_config.json").mkdir()
    with pytest.raises(BadInput, match="is there; choose a new folder"):
        export_lora(world.students["published times"], tmp_path / "x.safetensors")


def test_the_shipped_students_are_delivered_by_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TURBO_LAB_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "x.safetensors"
    done = CliRunner().invoke(app, ["export", "lora", "warm-second-0.5", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[-1] == (
        "pipeline(..., num_inference_steps=2, true_cfg_scale=1.0)"
    )
    back = CliRunner().invoke(app, ["import", "lora", str(out), "--testbed", "postcards"])
    assert back.exit_code == 0, back.output
    key = back.stdout.splitlines()[-1].split()[1]
    theirs, mine = delivery(key), delivery("warm-second-0.5")
    assert theirs.size == mine.size and theirs.times == mine.times
    assert theirs.tensors().keys() == mine.tensors().keys()
    assert all(torch.equal(theirs.tensors()[k], v) for k, v in mine.tensors().items())
