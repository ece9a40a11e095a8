"""The factory's command under accelerate's own launcher: one process, and two without a GPU."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from factory_world import job

from turbo_lab import factory
from turbo_lab.errors import BadInput
from turbo_lab.features import RANDOM
from turbo_lab.ranks import ALONE, joined
from turbo_lab.store import Artefact, Store

ALWAYS = ("--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no")


def launched(world: Path, cache: Path, recipe: str, *how: str) -> str:
    """What the command says, started by ``accelerate launch`` as ``how`` says."""
    options = {"model": world / "model", "prompts": world / "prompts.txt"}
    options |= {"size": 32, "profile": "smoke", "rank": 4, "device": "cpu", "recipe": recipe}
    command = ["train", "qwen_image", *(f"--{name}={value}" for name, value in options.items())]
    command += [f"--vit={RANDOM}"] if recipe == "turbo" else []
    gone = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
    here = {name: value for name, value in os.environ.items() if name not in gone}
    here |= {"TURBO_LAB_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    run = [sys.executable, "-m", "accelerate.commands.launch", *ALWAYS, *how, *command]
    done = subprocess.run(run, capture_output=True, text=True, env=here, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def assert_same(theirs: Artefact, ours: Artefact, rate: float) -> None:
    """AdamW divides by the size of a gradient, so rounding shows at the size of a step."""
    a, b = theirs.tensors(), ours.tensors()
    assert theirs.key == ours.key and a.keys() == b.keys()
    for name, weights in a.items():
        torch.testing.assert_close(weights, b[name], rtol=1e-6, atol=0.02 * rate)


@pytest.mark.slow
def test_the_whole_recipe_runs_under_accelerate(
    factory_world: Path, factory_caches: Store, tmp_path: Path
) -> None:
    """``--cpu`` starts one process, whatever number is asked for: more need MPI's host file."""
    work = job(factory_world, "turbo", vit=RANDOM)
    alone = factory.trained(work, store=factory_caches)
    for number in (1, 2):
        how = ("--cpu", f"--num_processes={number}", "-m", "turbo_lab.cli")
        said = launched(factory_world, tmp_path / str(number), "turbo", *how)
        assert said.split()[:2] == ["qwen_image/turbo", alone.key]
        found = Store(cache=tmp_path / str(number)).find(work.artefact, work.specs()[-1])
        assert found is not None
        assert_same(found, alone, 1e-5)


@pytest.mark.slow
def test_accelerate_starts_two_processes_without_a_gpu(
    factory_world: Path, factory_caches: Store, tmp_path: Path
) -> None:
    """``--multi_gpu`` asks for no GPU: it starts PyTorch's launcher, and the device is ours."""
    work = job(factory_world, "pcm-dmd2-2")
    how = ("--multi_gpu", "--num_processes=2", "--main_process_port=0", __file__)
    said = launched(factory_world, tmp_path, "pcm-dmd2-2", *how).splitlines()
    alone = factory.trained(work, store=factory_caches)
    assert sorted(line for line in said if line.startswith("rank")) == [
        "rank 0 of 2",
        "rank 1 of 2",
    ]
    assert sum(line.startswith(f"{work.artefact}  {alone.key}") for line in said) == 1
    found = Store(cache=tmp_path).find(work.artefact, work.specs()[-1])
    assert found is not None
    assert_same(found, alone, max(s.rates["student"].lr for s in work.recipe.stages))


def test_what_accelerate_sets_for_one_process_means_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """With ``--cpu --num_processes 2`` it names a port, as for MPI, and starts one process."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    assert joined("cpu") is ALONE and not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE='x' is not allowed: a launcher sets it"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0'"),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "-1"}, "LOCAL_RANK='-1'"),
    ],
    ids=str,
)
def test_variables_that_no_launcher_sets_are_one_sentence(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], said: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BadInput, match=said):
        joined("cpu")


if __name__ == "__main__":  # the command itself, by one of several processes that then says which
    with pytest.raises(SystemExit) as end:
        runpy.run_module("turbo_lab.cli", run_name="__main__", alter_sys=True)
    ranks = joined("cpu")
    sys.stdout.write(f"rank {ranks.rank} of {ranks.world}\n")
    raise end.value
