"""The store keeps what it has, whoever races and whenever it is killed."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from store_world import NAME, SPEC, fill, hidden, never

from turbo_lab import atomic
from turbo_lab.checkpoints import Checkpoints
from turbo_lab.lora_export import write_lora
from turbo_lab.store import Store, read_folder

FORK = multiprocessing.get_context("fork")  # children need no second import


# Two at once


RACER = """
import sys, time
from pathlib import Path
from turbo_lab.store import Store
home, go = Path(sys.argv[1]), Path(sys.argv[1]) / "go"
def make(folder):
    with open(home / "count", "a") as file:
        file.write("made\\n")
    time.sleep(0.4)
    (folder / "a.txt").write_text("raced")
print("ready", flush=True)
while not go.exists():
    time.sleep(0.005)
found = Store(cache=home / "cache").get_or_make("points/teacher", {"steps": 1}, make)
print(found.file("a.txt").read_text(), "torch" in sys.modules)
"""


def test_processes_that_race_make_it_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RACER, str(tmp_path)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    racers = [subprocess.Popen(command, **pipes) for _ in range(3)]
    for racer in racers:
        assert racer.stdout is not None and racer.stdout.readline() == "ready\n"
    (tmp_path / "go").touch()
    results = [racer.communicate(timeout=30) for racer in racers]
    assert [out for out, _ in results] == ["raced False\n"] * 3  # and torch was not imported
    assert (tmp_path / "count").read_text() == "made\n"


def test_who_waits_for_another_maker_is_told_and_gets_its_work(home: Store) -> None:
    holding = threading.Event()

    def first(folder: Path) -> None:
        holding.set()
        time.sleep(0.4)
        fill("first")(folder)

    maker = threading.Thread(target=home.get_or_make, args=(NAME, SPEC, first))
    maker.start()
    assert holding.wait(10)
    with pytest.warns(UserWarning, match="Another process is making points/teacher"):
        found = home.get_or_make(NAME, SPEC, never)
    maker.join()
    assert found.file("b.txt").read_text() == "first"


# Death


def kill_after(act: Callable[[Any], None], seconds: float) -> list[int]:
    """Run in a child, SIGKILL it, and return what it had reported as done."""
    receive, send = FORK.Pipe(duplex=False)
    child = FORK.Process(target=act, args=(send,))
    child.start()
    send.close()
    assert receive.poll(20)  # it is writing
    time.sleep(seconds)
    child.kill()
    child.join()
    done = []
    while receive.poll():
        try:
            done.append(receive.recv())
        except EOFError:
            break
    return done


DISK_CALLS = ("mkdir", "fsync", "rename", "replace", "unlink", "rmdir")


def die_at(act: Callable[[], None], call: int) -> bool:
    """Run in a child that dies just before its nth call to the disk; whether it came so far."""

    def child() -> None:
        left = [call]
        for name in DISK_CALLS:
            real = getattr(os, name)

            def wrapped(*a: Any, real: Any = real, **k: Any) -> Any:
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*a, **k)

            setattr(os, name, wrapped)
        act()

    process = FORK.Process(target=child)
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def write_round(folder: Path, n: int) -> None:
    for name in "abc":
        (folder / name).write_bytes(n.to_bytes(4, "big") * 50_000)


def contents(path: Path) -> set[bytes]:
    """The rounds a verified artefact's files are from."""
    return {read_folder(path)[name].read_bytes()[:4] for name in "abc"}


def test_killed_at_10_random_points_an_artefact_is_whole(tmp_path: Path) -> None:
    home, chance = Store(cache=tmp_path), random.Random(0)

    def loop(pipe: Any) -> None:
        for n in range(1, 10_000):
            home.get_or_make(NAME, SPEC, lambda folder, n=n: write_round(folder, n), fresh=True)
            pipe.send(n)

    for _ in range(10):
        done = kill_after(loop, chance.uniform(0, 0.15))
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # nothing was found damaged
            found = home.find(NAME, SPEC)
        assert found is not None
        (number,) = contents(found.path)  # all files from one round,
        assert int.from_bytes(number, "big") in (done[-1], done[-1] + 1)  # and none was lost


def test_killed_at_every_disk_call_an_artefact_is_old_or_new(tmp_path: Path) -> None:
    home, seen = Store(cache=tmp_path), set()
    home.get_or_make(NAME, SPEC, lambda folder: write_round(folder, 0))

    def remake() -> None:
        home.get_or_make(NAME, SPEC, lambda folder: write_round(folder, 1), fresh=True)

    calls = 0
    while die_at(remake, calls):
        calls += 1
        found = home.find(NAME, SPEC)
        assert found is not None
        (number,) = contents(found.path)
        seen.add(number)
        assert not hidden(home.cache)
        if number != bytes(4):
            home.get_or_make(NAME, SPEC, lambda folder: write_round(folder, 0), fresh=True)
    assert calls > 15
    assert seen == {bytes(4), b"\0\0\0\1"}


def test_killed_at_every_disk_call_a_lora_is_old_or_new(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    file, seen, calls = tmp_path / "x.safetensors", set(), 0

    def write(n: int) -> None:
        write_lora(file, {"w": torch.full((20_000,), float(n))}, {})

    write(0)
    while die_at(lambda: write(1), calls):
        calls += 1
        (number,) = load_file(file)["w"].unique().tolist()
        seen.add(number)
        write(0)
        assert list(tmp_path.iterdir()) == [file]  # what the dead left is gone
    assert seen == {0.0, 1.0}


def test_a_lora_is_on_the_disk_before_it_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    done: list[str] = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, n=name, r=real: (done.append(n), r(*a))[1])
    write_lora(tmp_path / "x.safetensors", {"w": torch.zeros(1)}, {})
    assert done == ["fsync", "replace", "fsync"]  # the file, its name, the folder


def test_killed_at_10_random_points_the_newest_checkpoint_is_whole(tmp_path: Path) -> None:
    import torch

    chance, last = random.Random(1), 0

    def loop(pipe: Any) -> None:
        saved, start = Checkpoints(folder=tmp_path), last
        for step in range(start + 1, start + 10_000):
            saved.save(step, {"w": torch.full((20_000,), float(step))}, {"step": step})
            pipe.send(step)

    for _ in range(10):
        done = kill_after(loop, chance.uniform(0, 0.15))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            latest = Checkpoints(folder=tmp_path).latest()
        assert latest is not None
        last, tensors, state = latest
        assert last in (done[-1], done[-1] + 1)  # what was reported as saved is there
        assert state == {"step": last}
        assert torch.equal(tensors["w"], torch.full((20_000,), float(last)))
        assert not hidden(tmp_path)


def test_killed_at_every_disk_call_a_checkpoint_is_the_last_or_the_next(tmp_path: Path) -> None:
    import torch

    saved = Checkpoints(folder=tmp_path)
    calls = 0
    for step in (1, 2):
        saved.save(step, {"w": torch.tensor([1.0])}, {})
    while die_at(lambda: saved.save(3, {"w": torch.tensor([1.0])}, {}) and None, calls):
        calls += 1
        for path in tmp_path.glob("step-*"):
            read_folder(path)  # whole, also while the oldest is being dropped
        latest = saved.latest()
        assert latest is not None and latest[0] in (2, 3)
        atomic.discard(tmp_path / "step-0000003")
        for step in (1, 2):
            saved.save(step, {"w": torch.tensor([1.0])}, {})
    assert calls > 10
    assert not (tmp_path / "quarantine").exists()


def test_leftovers_of_the_living_and_of_other_machines_stay(tmp_path: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    ours, tail = atomic._machine(), "0123456789ab~teacher"
    mine = tmp_path / f".tmp-{ours}-{os.getpid()}-{tail}"
    lost = tmp_path / f".tmp-{ours}-{dead.pid}-{tail}"
    away = tmp_path / f".tmp-deadbeef-{dead.pid}-{tail}"
    stranger = tmp_path / ".tmp-notes"
    for folder in (mine, lost, away, stranger):
        folder.mkdir()
    atomic.sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {mine.name, away.name, stranger.name}
    os.utime(away, (0, 0))
    atomic.sweep(tmp_path)
    assert not away.exists()
