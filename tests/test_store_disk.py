"""The store on a disk that fails; checkpoints, tensors and where the store is."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from store_world import NAME, SPEC, fill, hidden, never

from turbo_lab import provenance, store
from turbo_lab.checkpoints import Checkpoints
from turbo_lab.errors import BadInput, StoreError
from turbo_lab.store import Damaged, Store, atomic_write_text, key_of, save_tensors

# A disk that does not take it


def failing(number: int) -> Callable[..., Any]:
    def call(*_: object, **__: object) -> Any:
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "the disk quota is used up"),
        (errno.EROFS, "the file system is read-only"),
        (errno.EACCES, "there is no permission"),
        (errno.EIO, "input/output error"),
    ],
)
@pytest.mark.parametrize("call", ["mkdir", "fsync", "rename"])
def test_a_disk_error_is_one_sentence_with_a_way_out(
    home: Store, monkeypatch: pytest.MonkeyPatch, call: str, number: int, words: str
) -> None:
    home.get_or_make(NAME, SPEC, fill("old"))
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing(number))
        with pytest.raises(StoreError) as caught:
            home.get_or_make(NAME, {**SPEC, "steps": 11}, fill())
    text = str(caught.value)
    assert words in text and str(home.cache) in text and "TURBO_LAB_CACHE" in text
    assert text.count(". ") == 0 and text.endswith(".")
    assert not hidden(home.cache)
    assert [entry.key for entry in home.entries()] == [key_of(SPEC)]
    assert home.get_or_make(NAME, SPEC, never).file("b.txt").read_text() == "old"


def test_a_replacement_that_fails_at_the_last_rename_gives_the_old_one_back(
    home: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = home.get_or_make(NAME, SPEC, fill("old")).path
    real = os.rename

    def rename(source: Path, target: Path) -> None:
        if target == place and source.name.startswith(".tmp"):
            failing(errno.EIO)()
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename)
        with pytest.raises(StoreError):
            home.get_or_make(NAME, SPEC, fill("new"), fresh=True)
    assert (place / "b.txt").read_text() == "old"
    assert not hidden(home.cache)


def test_a_disk_that_fills_up_while_something_is_made(home: Store) -> None:
    def make(folder: Path) -> None:
        (folder / "a.txt").write_text("half")
        failing(errno.ENOSPC)()

    with pytest.raises(StoreError, match=r"disk is full.*TURBO_LAB_CACHE"):
        home.get_or_make(NAME, SPEC, make)
    assert not hidden(home.cache)
    assert not home.entries()


def test_tensors_that_do_not_fit_are_one_sentence_and_no_file(tmp_path: Path) -> None:
    """A real limit of the system, met inside the safetensors library."""
    import torch

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    saved = Checkpoints(folder=tmp_path / "work")
    saved.save(1, {"w": torch.ones(10)}, {})
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(StoreError, match="larger than allowed"):
            saved.save(2, {"w": torch.ones(10_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["step-0000001"]


@pytest.mark.parametrize("place", ["file", "proc"])
def test_a_cache_that_cannot_be_a_folder(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    cache = tmp_path / "file" if place == "file" else Path("/proc/turbo-lab")
    home = Store(cache=cache)
    assert home.find(NAME, SPEC) is None
    for act in (
        lambda: home.get_or_make(NAME, SPEC, never),
        lambda: home.workdir(NAME, SPEC),
    ):
        with pytest.raises(StoreError, match="TURBO_LAB_CACHE"):
            act()


def test_text_is_replaced_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "new" / "a.json"
    atomic_write_text(path, "old\n")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing(errno.ENOSPC))
        with pytest.raises(StoreError, match="disk is full"):
            atomic_write_text(path, "new\n")
    assert path.read_bytes() == b"old\n"
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


# Checkpoints and tensors


def test_checkpoints_keep_the_last_two_and_survive_damage(tmp_path: Path) -> None:
    import torch

    saved = Checkpoints(folder=tmp_path / "run")
    assert saved.latest() is None
    for step in (2, 10, 9_999_999, 10_000_000):
        saved.save(step, {"w": torch.full((3,), float(step))}, {"lr": 0.1, "step": step})
    names = sorted(path.name for path in saved.folder.iterdir())
    assert names == ["step-10000000", "step-9999999"]
    os.truncate(saved.folder / "step-10000000" / "tensors.safetensors", 20)
    with pytest.warns(UserWarning, match="moved to"):
        latest = saved.latest()
    assert latest is not None
    step, tensors, state = latest
    assert (step, state) == (9_999_999, {"lr": 0.1, "step": 9_999_999})
    assert torch.equal(tensors["w"], torch.full((3,), 9_999_999.0))
    saved.clear()
    assert saved.latest() is None


def test_a_checkpoint_refuses_what_json_would_change(tmp_path: Path) -> None:
    saved = Checkpoints(folder=tmp_path)
    for state in ({"loss": float("nan")}, {"cadence": {1: 2}}):
        with pytest.raises(BadInput):
            saved.save(1, {}, state)
    with pytest.raises(BadInput, match="step=-1"):
        saved.save(-1, {}, {})
    assert not list(tmp_path.iterdir())


def test_tensors_come_back_bit_for_bit(home: Store) -> None:
    import torch

    base = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    tensors = {
        "base": base,
        "view": base[1],
        "turned": base.T,
        "tied": base,
        "grad": base.clone().requires_grad_(),
        "bf16": base.bfloat16(),
        "odd": torch.tensor([float("nan"), float("inf"), -0.0]),
        "steps": torch.tensor(7),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "empty": torch.empty(0, 3),
    }

    def make(folder: Path) -> None:
        save_tensors(folder, "weights.safetensors", tensors, {"of": "a test"})

    back = home.get_or_make(NAME, SPEC, make).tensors()
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype and back[name].shape == tensor.shape
        assert torch.equal(back[name].nan_to_num(), tensor.detach().nan_to_num())


def test_a_file_of_another_kind_is_refused_not_unpickled(home: Store) -> None:
    import torch

    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(home.cache / "owned"),))

    made = home.get_or_make(
        NAME, SPEC, lambda folder: torch.save(Hostile(), folder / "weights.safetensors")
    )
    with pytest.raises(Damaged, match="no valid safetensors file"):
        made.tensors()
    assert not (home.cache / "owned").exists()
    with pytest.raises(BadInput, match="use a torch tensor"):
        save_tensors(home.cache, "x.safetensors", {"w": 1.0})  # type: ignore[dict-item]


# Surroundings


def test_the_cache_folder_comes_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TURBO_LAB_CACHE", str(tmp_path))
    assert Store.default().cache == tmp_path
    assert [path.parts[-2:] for path in Store.default().shipped] == [("turbo_lab", "artifacts")]
    monkeypatch.setenv("TURBO_LAB_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    if sys.platform == "linux":
        assert Store.default().cache == tmp_path / "xdg" / "turbo-lab"


def git(folder: Path, *arguments: str) -> None:
    who = ["-c", "user.name=n", "-c", "user.email=e"]
    subprocess.run(["git", "-C", str(folder), *who, *arguments], check=True, capture_output=True)


def test_the_commit_is_the_package_s_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "turbo_lab"
    package.mkdir()
    (package / "__init__.py").touch()
    assert provenance.git_state(package) == (None, None)
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "somebody's project")
    assert provenance.git_state(package) == (None, None)  # in a repository that is not ours
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "package")
    commit, dirty = provenance.git_state(package)
    assert commit is not None and len(commit) == 40 and dirty is False
    (tmp_path / "figure.png").touch()
    (package / "artifacts").mkdir()
    (package / "artifacts" / "new").touch()
    assert provenance.git_state(package) == (commit, False)
    (package / "__init__.py").write_text("x = 1\n")
    assert provenance.git_state(package) == (commit, True)
    monkeypatch.setenv("PATH", "")
    assert provenance.git_state(package) == (None, None)


def test_provenance_is_plain_and_the_same_twice() -> None:
    found = store.provenance()
    assert json.loads(json.dumps(found)) == found == store.provenance()
    assert found["versions"]["python"].startswith("3.")
    assert found["versions"]["turbo-lab"]
    assert found["machine"]["threads"] >= 1


def test_provenance_tells_processors_of_one_name_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "cpuinfo"
    both = "".join(
        f"processor\t: {k}\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n\n"
        for k in range(2)
    )
    info.write_text(both)
    monkeypatch.setattr(provenance, "_CPUINFO", info)
    assert provenance.machine()["cpu"] == "AMD EPYC, family 25 model 17"
    info.write_text("processor\t: 0\nCPU part\t: 0xd0c\n")  # of an ARM, which says no name
    elsewhere = provenance.machine()["cpu"]
    monkeypatch.setattr(provenance, "_CPUINFO", tmp_path / "none")
    assert elsewhere == provenance.machine()["cpu"] != ""


def test_provenance_says_what_torch_uses_of_the_processor_and_never_loads_it() -> None:
    code = (
        "import sys, turbo_lab.provenance as p; print(p.machine()['isa'], 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["None", "False"]
    import torch

    assert provenance.machine()["isa"] == torch.backends.cpu.get_cpu_capability()
