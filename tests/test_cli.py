"""The command line: help, one sentence for wrong input, nothing written."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import nbformat
import pytest
import tiny_qwen
from typer.testing import CliRunner

from turbo_lab import doctor, runner
from turbo_lab.cli import app
from turbo_lab.errors import BadInput, StoreWarning, TurboLabError
from turbo_lab.notebook_params import checked
from turbo_lab.store import Store


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with one notebook of one parameter."""
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "pyproject.toml").touch()
    nb = nbformat.v4.new_notebook()
    cell = nbformat.v4.new_code_cell("seed: int = 0", metadata={"tags": ["parameters"]})
    nb.cells = [cell]
    nb.metadata = {"kernelspec": {"name": "python3", "language": "python"}}
    nbformat.write(nb, tmp_path / "notebooks" / "01_a.ipynb")
    monkeypatch.setenv("TURBO_LAB_ROOT", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_help_names_every_command() -> None:
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    for command in (
        "figures",
        "refresh",
        "train",
        "sample",
        "doctor",
        "bars",
        "bench",
        "artifacts",
        "export",
        "import",
    ):
        assert command in result.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["figures", "--profile", "fast"], "profile='fast' is not allowed: use one of 'smoke'"),
        (["figures", "--only", "99"], "only='99' is not allowed: begin the name of a notebook"),
        (["figures", "-p", "seed"], "parameter='seed' is not allowed: write name=value"),
        (["figures", "-p", "seed=x"], "seed='x' is not allowed: use an integer of at least 0"),
        (["figures", "-p", "sede=1"], "did you mean seed?"),
        (["figures", "--jobs", "-1"], "jobs=-1 is not allowed: use an integer of at least 0"),
        (["export", "lora", "0123456789ab", "--out", "x.safetensors", "--seed", "5"], "seed='5'"),
        (["train", "teacher", "--profile", "fast"], "profile='fast' is not allowed"),
        (["train", "teacher", "--seed", "-1"], "seed=-1 is not allowed"),
        (["train", "teacher", "--size", "512"], "size='512' is not allowed: it is for qwen_image"),
        (["train", "teacher", "--dry-run"], "it is for qwen_image, not for teacher"),
        (["train", "qwen_image", "--ship"], "ship=True is not allowed"),
        (["train", "qwen_image"], "recipe='' is not allowed: choose one of progressive"),
        (["train", "qwen_image", "--recipe", "dmd2-2"], "prompts=None is not allowed: name a"),
        (["train", "qwen_image", "--recipe", "direct-2", "--size", "5"], "size=5 is not allowed"),
        (["train", "qwen_image", "--recipe", "direct-2", "--size", "0"], "size=0 is not allowed"),
        (["train", "qwen_image", "--recipe", "direct-2", "--rank", "0"], "rank=0 is not allowed"),
        (["doctor", "--size", "64"], "size='64' is not allowed: it is for --testbed qwen_image"),
        (["doctor", "--testbed", "qwen_image", "--batch", "0"], "batch=0 is not allowed"),
        (["sample", "--seed", "-1"], "seed=-1 is not allowed"),
    ],
)
def test_wrong_input_is_one_sentence_and_nothing_is_written(
    empty: Path, arguments: list[str], said: str
) -> None:
    before = sorted(empty.rglob("*"))
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
    assert sorted(empty.rglob("*")) == before


def test_qwen_image_is_planned_without_a_gpu_and_trained(
    empty: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TURBO_LAB_CACHE", str(empty / "cache"))
    prompts = tiny_qwen.write_prompts(empty / "prompts.txt", "a cat", "a dog")
    command = ["train", "qwen_image", "--recipe", "consistency", "--model", str(tiny_model)]
    command += ["--prompts", str(prompts), "--size", "32", "--profile", "smoke", "--rank", "4"]
    planned = CliRunner().invoke(app, [*command, "--dry-run", "--device", "cuda"])
    assert planned.exit_code == 0, planned.output
    recipe, _, plan = planned.stdout.partition("\n\n")
    assert json.loads(recipe)["stages"][0]["options"]["grid_steps"] == 100
    for word in ("base", "adapters", "gradients", "optimiser", "training", "on cuda", "2 prompts"):
        assert word in plan
    assert not (empty / "cache").exists()
    done = CliRunner().invoke(app, [*command, "--device", "cpu"])
    assert done.exit_code == 0, done.output
    name, key, folder = done.stdout.split()
    assert name == "qwen_image/consistency" and key in folder
    assert {"weights.safetensors", "recipe.json", "history.jsonl", "card.json"} <= {
        path.name for path in Path(folder).iterdir()
    }
    small = CliRunner().invoke(app, [*command, "--storage", "fp8", "--device", "cpu"])
    assert small.exit_code == 0 and "its base in fp8 was off by" in small.stdout
    gone = CliRunner().invoke(app, [*command, "--model", str(empty / "nowhere")])
    assert gone.exit_code == 1
    assert gone.stderr.startswith("turbo-lab: There is no pipeline")
    assert gone.stderr.count("\n") == 1


def test_the_printed_command_is_planned(empty: Path, tiny_model: Path) -> None:
    """What the notebooks print, on prompts and pictures as it asks for, with other numbers."""
    from turbo_lab.studies.factory_recipes import commands

    tiny_qwen.write_prompts(empty / "prompts.txt", "a cat", "a dog")
    tiny_qwen.write_images(empty / "photos", n=2)
    command = [*commands(["turbo"], size=64).split()[1:], "--dry-run", "--model", str(tiny_model)]
    planned = CliRunner().invoke(app, [*command, "--set", "all.options.times=1,0.5"])
    assert planned.exit_code == 0, planned.output
    recipe = json.loads(planned.stdout.partition("\n\n")[0])
    assert recipe["source"] == "images" and recipe["stages"][2]["gan"]["rho"] == 0.5
    assert [stage["options"].get("times") for stage in recipe["stages"]] == [None, *[[1, 0.5]] * 2]
    assert "2 images" in planned.stdout and "samples of the teacher" in planned.stdout
    refused = CliRunner().invoke(app, [*command, "--set", "9.steps=1"])
    assert refused.exit_code == 2
    assert refused.stderr == (
        "turbo-lab: set='9.steps=1' is not allowed: begin with a stage from 1 to 3, or with all.\n"
    )


def test_qwen_image_is_planned_where_it_is_not(
    empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its published sizes, and only to be planned; of other models nothing is known."""
    from turbo_lab.testbeds import qwen_files

    def nowhere(model: str, *_: object, **__: object) -> Path:
        raise qwen_files._nowhere(model, "the hub says nothing")

    monkeypatch.setattr(qwen_files, "_fetched", nowhere)
    monkeypatch.setenv("TURBO_LAB_CACHE", str(empty / "cache"))
    prompts = tiny_qwen.write_prompts(empty / "prompts.txt", "a cat", "a dog")
    command = ["train", "qwen_image", "--recipe", "pcm", "--prompts", str(prompts)]
    command += ["--size", "1024"]
    planned = CliRunner().invoke(app, [*command, "--dry-run", "--device", "cuda"])
    assert planned.exit_code == 0, planned.output
    lines = planned.stdout.splitlines()
    assert sum("is not at hand: sizes are those of Qwen-Image" in line for line in lines) == 1
    assert f"{'base':18s}{'40.87 GB':>12s}" in lines  # 2 x 20,430,401,088, rounded up
    other = CliRunner().invoke(app, [*command, "--dry-run", "--model", "some/other"])
    assert other.exit_code == 1 and other.stderr.startswith("turbo-lab: There is no pipeline")
    trained = CliRunner().invoke(app, [*command, "--device", "cpu"])
    assert trained.exit_code == 1 and trained.stderr.startswith("turbo-lab: There is no pipeline")
    assert not (empty / "cache").exists()


def test_usage_errors_end_with_2() -> None:
    assert CliRunner().invoke(app, ["figures", "--prfile", "quick"]).exit_code == 2
    assert CliRunner().invoke(app, ["paint"]).exit_code == 2


def test_a_size_is_told_how_it_is_written() -> None:
    with pytest.raises(BadInput, match="size='abc' is not allowed: write it as 1024 or 1024x768"):
        checked("07_factory", {"size": "abc"})


def test_what_notebook_07_cannot_draw_is_refused_before_a_kernel_starts() -> None:
    asked = partial(runner.chosen, profile="smoke", only=["07"])
    with pytest.raises(BadInput, match="height=63 is not allowed"):
        asked(parameters={"size": "63"})
    for given, missing in (({"model": "a/b"}, "lora"), ({"lora": "x.safetensors"}, "model")):
        with pytest.raises(BadInput, match=f"{missing}='' is not allowed"):
            asked(parameters=given)
    with pytest.raises(BadInput, match=r"nowhere\.safetensors"):
        asked(parameters={"model": "a/b", "lora": "nowhere.safetensors"})


def test_a_variable_that_names_no_folder_is_one_sentence(
    empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for wrong, why in (("~nosuchuser/x", "no such user"), ("a" * 300, "no folder can be there")):
        monkeypatch.setenv("TURBO_LAB_CACHE", wrong)
        result = CliRunner().invoke(app, ["artifacts"])
        assert result.exit_code == 2 and why in result.stderr
        assert result.stderr.startswith("turbo-lab: TURBO_LAB_CACHE=")


def test_a_cache_in_a_closed_folder_is_as_none_and_the_doctor_names_it(
    empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = empty / "closed" / "cache"
    monkeypatch.setenv("TURBO_LAB_CACHE", str(closed))
    for method in ("exists", "is_dir"):
        honest = getattr(Path, method)

        def asked(path: Path, honest: Any = honest) -> bool:
            if path.is_relative_to(closed):  # as for whom a folder above it may not be searched
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return bool(honest(path))

        monkeypatch.setattr(Path, method, asked)
    assert CliRunner().invoke(app, ["artifacts"]).exit_code == 0
    result = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "400"})
    assert result.exit_code == 1 and "not writable (Permission denied)" in result.stdout


def test_a_stopped_training_says_what_is_kept(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt("Stopped at step 6: a checkpoint was written; run again.")

    monkeypatch.setattr("turbo_lab.runner.run", stopped)
    result = CliRunner().invoke(app, ["figures"])
    assert result.exit_code == 130
    assert result.stderr == "turbo-lab: Stopped at step 6: a checkpoint was written; run again.\n"


def test_what_the_store_found_is_said_without_a_line_of_code(
    empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(*_: object, **__: object) -> None:
        warnings.warn("Another process is making it; waiting.", StoreWarning, stacklevel=2)
        raise TurboLabError("It ends here.")

    monkeypatch.setattr("turbo_lab.runner.run", found)
    result = CliRunner().invoke(app, ["figures"])
    said = ["turbo-lab: Another process is making it; waiting.", "turbo-lab: It ends here."]
    assert result.stderr.splitlines() == said


def test_what_is_missing_ends_with_1(empty: Path) -> None:
    (empty / "notebooks" / "01_a.ipynb").unlink()
    result = CliRunner().invoke(app, ["figures"])
    assert result.exit_code == 1
    assert result.stderr.startswith("turbo-lab: There are no notebooks in ")


def test_artifacts_lists_what_the_store_has(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TURBO_LAB_CACHE", str(empty / "cache"))

    def make(folder: Path) -> None:
        (folder / "note.txt").write_text("hello")

    made = Store.default().get_or_make("points/note", {"seed": 0}, make)
    result = CliRunner().invoke(app, ["artifacts"])
    assert result.exit_code == 0
    assert f"points/note  {made.key}" in result.output


def test_doctor_works_offline(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("TURBO_LAB_CACHE", str(empty / "cache"))
    monkeypatch.setenv("MPLBACKEND", "Agg")
    began = time.monotonic()
    found = {one.name: one for one in doctor.findings()}
    assert time.monotonic() - began < 30
    assert "out of reach" in found["hub"].note
    assert "drop every figure" in found["MPLBACKEND"].note
    assert not found["cache"].broken
    assert not (empty / "cache").exists()
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0
    assert "out of reach" in " ".join(result.output.split())


@pytest.mark.parametrize(("capability", "noted"), [("AVX2", True), ("AVX512", False)])
def test_doctor_says_where_bfloat16_is_not_fast(
    capability: str, noted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    (found,) = doctor._processor()
    assert capability in found.value and ("bfloat16" in found.note) == noted


def test_doctor_names_a_cache_that_cannot_be_written(
    empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (empty / "file").touch()
    monkeypatch.setenv("TURBO_LAB_CACHE", str(empty / "file"))  # a file in the folder's place
    cache = next(one for one in doctor._folders() if one.name == "cache")
    assert cache.broken
    assert "TURBO_LAB_CACHE" in cache.note


def test_the_command_line_starts_without_the_heavy_packages() -> None:
    code = (
        "import sys, turbo_lab.cli\n"
        "print([m for m in ('torch', 'diffusers', 'matplotlib', 'papermill') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("size", [512, 1024, 1328])
def test_the_whole_way_to_two_steps_is_planned(empty: Path, tiny_model: Path, size: int) -> None:
    """PCM, then DMD2, then DMD2 and a critic, at every size that batches were chosen for."""
    prompts = tiny_qwen.write_prompts(empty / "prompts.txt", "a cat", "a dog")
    command = ["train", "qwen_image", "--recipe", "turbo", "--model", str(tiny_model), "--dry-run"]
    command += ["--prompts", str(prompts), "--size", str(size), "--device", "cuda"]
    planned = CliRunner().invoke(app, command)
    assert planned.exit_code == 0, planned.output
    text, _, plan = planned.stdout.partition("\n\n")
    recipe = json.loads(text)
    assert recipe["adapter"]["rank"] == 64 and "img_mod.1" in recipe["adapter"]["targets"]
    assert [stage["method"] for stage in recipe["stages"]] == ["consistency", "dmd2", "dmd2"]
    assert ["gan" in stage for stage in recipe["stages"]] == [False, False, True]
    assert recipe["stages"][0]["options"]["edges"] == [0.7155]
    assert all(stage["options"]["times"] == [1.0, 0.7155] for stage in recipe["stages"][1:])
    assert "critic" in plan
