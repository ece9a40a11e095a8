"""The store: keys, making and finding, damage, and what is shipped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_world import NAME, SPEC, fill, hidden, never

from turbo_lab import atomic
from turbo_lab.errors import BadInput, StoreError
from turbo_lab.store import Damaged, Store, atomic_folder, canonical, key_of, read_folder


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
