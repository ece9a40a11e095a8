"""The store keeps what it has, whatever dies, fills up, flips or races."""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import random
import resource
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
from hypothesis import given, settings
from hypothesis import strategies as st

from turbo_lab import atomic, provenance, store
from turbo_lab.errors import BadInput, StoreError
from turbo_lab.store import (
    Checkpoints,
    Damaged,
    Store,
    atomic_folder,
    atomic_write_text,
    canonical,
    key_of,
    read_folder,
    save_tensors,
)

NAME, SPEC = "points/teacher", {"recipe": "teacher", "steps": 10, "lr": 1e-3}
FORK = multiprocessing.get_context("fork")  # children need no second import


def fill(text: str = "content") -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / "part").mkdir()
        (folder / "part" / "a.txt").write_text(text)
        (folder / "b.txt").write_text(text)

    return make


def never(folder: Path) -> None:
    raise AssertionError("must not be made")


@pytest.fixture
def home(tmp_path: Path) -> Store:
    shipped = tmp_path / "checkout" / "turbo_lab" / "artifacts"
    return Store(cache=tmp_path / "cache", shipped=(shipped,))


def hidden(folder: Path) -> list[str]:
    """Temporary entries anywhere below a folder."""
    return [path.name for path in folder.rglob(".*-*~*")]


def checkout(home: Store) -> None:
    root = home.shipped[0].parents[1]
    root.mkdir(parents=True)
    (root / "pyproject.toml").touch()


# Keys


def test_the_key_is_the_sha256_of_the_canonical_text() -> None:
    spec = {"b": (0.1, None, True), "a": {"z": 1, "y": "é"}}
    text = '{"a":{"y":"\\u00e9","z":1},"b":[0.1,null,true]}'
    assert canonical(spec) == text
    assert key_of(spec) == hashlib.sha256(text.encode()).hexdigest()[:12]
    assert key_of({}) == "44136fa355b3"  # sha256 of "{}", as sha256sum prints it


def test_order_does_not_matter_and_types_do() -> None:
    assert key_of({"a": 1, "b": {"c": 2, "d": 3}}) == key_of({"b": {"d": 3, "c": 2}, "a": 1})
    assert len({key_of({"a": value}) for value in (1, 1.0, "1", True, None, [1])}) == 6


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.text(), plain))
def test_a_spec_written_and_read_keeps_its_key(spec: dict[str, Any]) -> None:
    assert key_of(json.loads(canonical(spec))) == key_of(spec)


@pytest.mark.parametrize(
    ("spec", "word"),
    [
        ({"lr": float("nan")}, "spec.lr=nan"),
        ({"a": [1, {"b": float("inf")}]}, "spec.a[1].b=inf"),
        ({"a": Path("x")}, "spec.a="),
        ({"a": {1: 2}}, "spec.a key=1"),
        ([1], "spec=[1]"),
    ],
)
def test_a_spec_that_is_not_plain_is_refused_by_name(spec: Any, word: str) -> None:
    with pytest.raises(BadInput) as caught:
        key_of(spec)
    assert str(caught.value).startswith(word)


@pytest.mark.parametrize("name", ["teacher", "../x/y", "a/../b", "work/x", "a/b/c", "/a", "a/.b"])
def test_a_name_cannot_leave_the_store(home: Store, name: str) -> None:
    with pytest.raises(BadInput, match="testbed/recipe"):
        home.get_or_make(name, SPEC, never)
    assert not home.cache.exists()


# Making and finding


def test_made_once_then_found_with_recipe_and_card(home: Store) -> None:
    assert home.find(NAME, SPEC) is None
    made = home.get_or_make(NAME, SPEC, fill())
    again = home.get_or_make(NAME, SPEC, never)
    assert again == made
    assert made.path == home.cache / f"points/teacher-{key_of(SPEC)}"
    assert made.json("recipe.json") == SPEC
    assert {"commit", "dirty", "machine", "versions", "seconds", "created"} <= made.card.keys()
    assert made.file("part/a.txt").read_text() == "content"
    with pytest.raises(BadInput, match=r"part/a\.txt"):
        made.file("weights.safetensors")
    assert not hidden(home.cache)
    assert [entry[:3] for entry in home.entries()] == [("cache", NAME, made.key)]


def test_a_card_from_the_maker_is_kept_and_cannot_change_the_facts(home: Store) -> None:
    def make(folder: Path) -> None:
        (folder / "card.json").write_text('{"bars": {"signs": 0.99}, "seconds": -1}')

    card = home.get_or_make(NAME, SPEC, make).card
    assert card["bars"] == {"signs": 0.99}
    assert card["seconds"] >= 0


def test_fresh_replaces_and_starts_without_old_checkpoints(home: Store) -> None:
    home.get_or_make(NAME, SPEC, fill("old"))
    (home.workdir(NAME, SPEC) / "step").touch()

    def make(folder: Path) -> None:
        assert not list(home.workdir(NAME, SPEC).iterdir())
        fill("new")(folder)

    made = home.get_or_make(NAME, SPEC, make, fresh=True)
    assert made.file("b.txt").read_text() == "new"
    assert not hidden(home.cache)
    assert not (home.cache / "quarantine").exists()


def test_a_failed_making_leaves_nothing_but_its_checkpoints(home: Store) -> None:
    def make(folder: Path) -> None:
        (home.workdir(NAME, SPEC) / "step").touch()
        fill()(folder)
        raise ConnectionError("hub not reached")

    with pytest.raises(ConnectionError, match="hub not reached"):
        home.get_or_make(NAME, SPEC, make)
    assert home.find(NAME, SPEC) is None
    assert not hidden(home.cache)
    assert (home.workdir(NAME, SPEC) / "step").exists()
    home.get_or_make(NAME, SPEC, fill())
    assert not list((home.cache / "work" / "points").iterdir())


def test_a_link_is_no_artefact(home: Store, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"link\.txt .* is not a plain file"):
        home.get_or_make(NAME, SPEC, lambda folder: (folder / "link.txt").symlink_to(tmp_path))
    assert home.find(NAME, SPEC) is None


# Damage


def truncate(folder: Path) -> None:
    os.truncate(folder / "b.txt", 3)


def flip(folder: Path) -> None:
    data = bytearray((folder / "part/a.txt").read_bytes())
    data[2] ^= 1
    (folder / "part/a.txt").write_bytes(data)


def lose_file(folder: Path) -> None:
    (folder / "b.txt").unlink()


def lose_manifest(folder: Path) -> None:
    (folder / "MANIFEST.json").unlink()


def cut_manifest(folder: Path) -> None:
    os.truncate(folder / "MANIFEST.json", 40)


def point_outside(folder: Path) -> None:
    manifest = folder / "MANIFEST.json"
    manifest.write_text(manifest.read_text().replace("b.txt", "../b.txt"))


def other_recipe(folder: Path) -> None:
    (folder / "recipe.json").write_text("{}")
    (folder / "MANIFEST.json").unlink()
    atomic._write_manifest(folder)


DAMAGE = [
    (truncate, "b.txt is damaged: it has 3 bytes instead of 7"),
    (flip, "a.txt is damaged: its SHA-256"),
    (lose_file, "b.txt is missing"),
    (lose_manifest, "MANIFEST.json is missing"),
    (cut_manifest, "MANIFEST.json is damaged"),
    (point_outside, "outside its own folder"),
    (other_recipe, "another recipe"),
]


@pytest.mark.parametrize(("damage", "words"), DAMAGE)
def test_damage_in_the_cache_is_quarantined_and_made_again(
    home: Store, damage: Callable[[Path], None], words: str
) -> None:
    damage(home.get_or_make(NAME, SPEC, fill()).path)
    with pytest.warns(UserWarning, match="was moved to") as caught:
        made = home.get_or_make(NAME, SPEC, fill("second"))
    assert words in str(caught[0].message)
    assert made.file("b.txt").read_text() == "second"
    (moved,) = (home.cache / "quarantine").iterdir()
    assert moved.name.startswith(made.path.name)


def test_every_single_flipped_byte_is_noticed(tmp_path: Path) -> None:
    target = tmp_path / "whole"
    with atomic_folder(target) as folder:
        fill("ab")(folder)
    want = {name: path.read_bytes() for name, path in read_folder(target).items()}
    for path in [target / "MANIFEST.json", *read_folder(target).values()]:
        good = path.read_bytes()
        for i in range(len(good)):
            path.write_bytes(good[:i] + bytes([good[i] ^ 1]) + good[i + 1 :])
            try:  # a flip may change a blank of the manifest to no effect, never what is read
                got = {name: file.read_bytes() for name, file in read_folder(target).items()}
            except Damaged:
                continue
            assert path.name == "MANIFEST.json"
            assert got == want
        path.write_bytes(good)


def test_what_another_process_is_replacing_is_not_quarantined(home: Store) -> None:
    truncate(home.get_or_make(NAME, SPEC, fill()).path)
    with home._lock(NAME, SPEC):
        assert home.find(NAME, SPEC) is None
    assert not (home.cache / "quarantine").exists()


# Shipped artefacts


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def test_shipped_is_used_and_never_changed(home: Store, tmp_path: Path) -> None:
    checkout(home)
    target = home.ship(home.get_or_make(NAME, SPEC, fill("shipped")))
    before = snapshot(home.shipped[0])
    reader = Store(cache=tmp_path / "other", shipped=home.shipped)
    assert reader.get_or_make(NAME, SPEC, never).path == target
    assert not reader.cache.exists()  # a reader with a read-only home is served too
    made = reader.get_or_make(NAME, SPEC, fill("mine"), fresh=True)
    assert made.path.is_relative_to(reader.cache)
    assert snapshot(home.shipped[0]) == before
    found = reader.find(NAME, SPEC)
    assert found is not None and found.path == made.path  # the user's cache goes first
    assert {entry.root for entry in reader.entries()} == {"cache", "shipped"}


def test_damaged_shipped_warns_stays_and_is_made_in_the_cache(home: Store, tmp_path: Path) -> None:
    checkout(home)
    flip(home.ship(home.get_or_make(NAME, SPEC, fill())))
    before = snapshot(home.shipped[0])
    reader = Store(cache=tmp_path / "other", shipped=home.shipped)
    with pytest.warns(UserWarning, match="shipped points/teacher is not used"):
        made = reader.get_or_make(NAME, SPEC, fill())
    assert made.path.is_relative_to(reader.cache)
    assert snapshot(home.shipped[0]) == before


def test_shipping_needs_a_checkout_and_a_valid_artefact(home: Store) -> None:
    made = home.get_or_make(NAME, SPEC, fill())
    with pytest.raises(StoreError, match="source checkout"):
        home.ship(made)
    checkout(home)
    flip(made.path)
    with pytest.raises(Damaged):
        home.ship(made)
    assert not home.shipped[0].exists()


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
