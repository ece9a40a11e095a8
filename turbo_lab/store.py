"""Artefacts by content: what a recipe makes is made once, kept whole, and found by its key.

The key of an artefact is a hash of its resolved recipe. The store answers from the user's cache,
then from the artefacts shipped with the package (read-only), else it makes the artefact under a
lock. safetensors and JSON only.

Layout of a root: ``<root>/<testbed>/<recipe>-<key>/``; a cache also has ``locks``, ``work`` (see
`turbo_lab.checkpoints`: training in progress) and ``quarantine`` (what was found damaged).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import platformdirs
from filelock import BaseFileLock, FileLock, Timeout

from turbo_lab.atomic import (
    Damaged,
    atomic_folder,
    atomic_write_bytes,
    atomic_write_text,
    discard,
    explained,
    load_tensors,
    quarantine,
    read_folder,
    read_manifest,
    save_tensors,
    sweep,
)
from turbo_lab.checkpoints import Checkpoints
from turbo_lab.errors import BadInput, StoreError, StoreWarning
from turbo_lab.keys import canonical, key_of
from turbo_lab.places import expanded
from turbo_lab.provenance import provenance

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "Artefact",
    "Checkpoints",
    "Damaged",
    "Entry",
    "Store",
    "atomic_folder",
    "atomic_write_bytes",
    "atomic_write_text",
    "canonical",
    "key_of",
    "load_tensors",
    "provenance",
    "quarantine",
    "read_folder",
    "save_tensors",
]

CACHE_VARIABLE = "TURBO_LAB_CACHE"
SHIPPED_VARIABLE = "TURBO_LAB_SHIPPED"
"""``none`` leaves the shipped artefacts out: everything is then trained."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}/[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_ENTRY = re.compile(r"(.+)-([0-9a-f]{12})")
WEIGHTS = "weights.safetensors"
_RESERVED = ("locks", "work", "quarantine")
_VERIFIED: dict[Path, tuple[object, ...]] = {}  # folders whose SHA-256 this process has checked


@dataclass(frozen=True, kw_only=True)
class Artefact:
    """A verified folder of the store and the recipe that made it.

    ``digests`` are the SHA-256 of its files when it was found: a recipe trained again has the same
    key and place, and maybe other weights.
    """

    path: Path
    key: str
    name: str
    spec: Mapping[str, Any]
    digests: Mapping[str, str]

    def file(self, name: str) -> Path:
        """Return the path of a file the manifest lists; BadInput with the choice otherwise."""
        listed = read_manifest(self.path)
        if name not in listed:
            raise BadInput("file", name, f"{self.name} holds {', '.join(sorted(listed))}")
        return self.path / name

    def has(self, name: str) -> bool:
        """Whether the manifest lists a file."""
        return name in read_manifest(self.path)

    @property
    def weights_digest(self) -> str:
        """SHA-256 of its weights; what is made from them goes by it."""
        return self.digests[WEIGHTS]

    def tensors(self, file: str = WEIGHTS) -> dict[str, Tensor]:
        """Read the tensors of a file, on the CPU."""
        self.file(file)
        return load_tensors(self.path, file)

    def json(self, file: str) -> Any:
        """Read a JSON file."""
        return json.loads(self.file(file).read_text("utf-8"))

    @property
    def card(self) -> dict[str, Any]:
        """Who made it: commit, machine, versions, seconds, UTC time."""
        return dict(self.json("card.json"))


class Entry(NamedTuple):
    """One artefact on disk: kind of root (``cache`` or ``shipped``), name, key, bytes."""

    root: str
    name: str
    key: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Store:
    """Artefacts in a writable cache, with read-only shipped folders behind it."""

    cache: Path
    shipped: tuple[Path, ...] = ()

    @staticmethod
    def default() -> Store:
        """Return the store of this user: ``TURBO_LAB_CACHE`` or the platform's cache folder.

        Raises:
            BadInput: ``TURBO_LAB_SHIPPED`` is set to something else than ``none``, or
                ``TURBO_LAB_CACHE`` to what can be no folder.
        """
        left_out = os.environ.get(SHIPPED_VARIABLE, "")
        if left_out not in ("", "none"):
            raise BadInput(SHIPPED_VARIABLE, left_out, "set it to none, or leave it unset")
        chosen = os.environ.get(CACHE_VARIABLE)
        cache = chosen or platformdirs.user_cache_dir("turbo-lab", appauthor=False)
        shipped = Path(str(resources.files("turbo_lab") / "artifacts"))
        folder = expanded(cache, CACHE_VARIABLE).absolute()
        try:
            folder.exists()
        except PermissionError:
            pass  # who may not look into the cache has none
        except OSError as error:
            why = f"no folder can be there ({error.strerror})"
            raise BadInput(CACHE_VARIABLE, cache, why) from None
        return Store(cache=folder, shipped=() if left_out else (shipped,))

    def find(self, name: str, spec: Mapping[str, Any]) -> Artefact | None:
        """Return the verified artefact of a spec, from the cache or shipped, or None.

        A damaged folder gives a warning and counts as missing; in the cache it is moved to
        quarantine, a shipped one is left alone.
        """
        place = _place(self.cache, name, spec)
        sweep(place.parent)
        try:
            found = _verified(place, name, spec)
        except Damaged:
            found = self._second_look(name, spec)
        return found or self._find_shipped(name, spec)

    def get_or_make(
        self,
        name: str,
        spec: Mapping[str, Any],
        make: Callable[[Path], None],
        *,
        fresh: bool = False,
    ) -> Artefact:
        """Return the artefact of a spec; if there is none, make it, once among all processes.

        Args:
            name: ``testbed/recipe``.
            spec: the resolved recipe; its hash is the key.
            make: fills the folder it is given. ``recipe.json`` and ``card.json`` are written by
                the store; a ``card.json`` from ``make`` keeps its additional fields.
            fresh: make it again, from the first step, and replace the one in the cache.

        Raises:
            StoreError: the cache cannot be written; nothing half written remains.
        """
        if not fresh and (found := self.find(name, spec)):
            return found
        with self._with_way_out(), self._lock(name, spec):
            place = _place(self.cache, name, spec)
            if not fresh and (found := self._settled(name, spec)):
                return found
            if fresh:
                discard(self._work(name, spec))
            started = time.perf_counter()
            with atomic_folder(place, replace=True) as folder:
                make(folder)
                _describe(folder, spec, time.perf_counter() - started)
            discard(self._work(name, spec))  # only now: killed before, the checkpoints are there
            made = _verified(place, name, spec)
        if made is None:
            raise StoreError(f"{place} vanished just after it was written.")
        return made

    def workdir(self, name: str, spec: Mapping[str, Any]) -> Path:
        """Return the folder for checkpoints of this recipe, the same after a crash.

        ``get_or_make`` removes it when the artefact is in place.
        """
        work = self._work(name, spec)
        with self._with_way_out(), explained(work.parent):
            work.mkdir(parents=True, exist_ok=True)
        return work

    def entries(self) -> list[Entry]:
        """Return every artefact on disk (unverified), sorted by name."""
        roots = [("cache", self.cache), *(("shipped", root) for root in self.shipped)]
        return sorted((e for kind, root in roots for e in _entries(kind, root)), key=lambda e: e[1])

    def fits(self, artefact: Artefact, on: Artefact) -> bool:
        """Whether a shipped artefact was made from the weights that the other one has.

        A recipe trained again takes the shipped one's place, and what was shipped beside that one
        was made from other weights, unless the same machine has given the same bits.
        """
        if not self._is_shipped(artefact) or self._is_shipped(on):
            return True
        own = self._find_shipped(on.name, on.spec)
        return own is None or own.digests.get(WEIGHTS) == on.digests.get(WEIGHTS)

    def _is_shipped(self, artefact: Artefact) -> bool:
        return any(artefact.path.is_relative_to(root) for root in self.shipped)

    def ship(self, artefact: Artefact) -> Path:
        """Copy a verified artefact into the shipped folder of a source checkout.

        Args:
            artefact: from the cache.

        Raises:
            StoreError: the package is installed, not a checkout, or cannot be written.
        """
        if not self.shipped or not (self.shipped[0].parent.parent / "pyproject.toml").is_file():
            raise StoreError("Artefacts can be shipped from a source checkout only.")
        target = _place(self.shipped[0], artefact.name, artefact.spec)
        if target == artefact.path:
            return target
        files = read_folder(artefact.path)
        with atomic_folder(target, replace=True) as folder:
            for name in files:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(files[name], folder / name)
        read_folder(target)
        return target

    def _work(self, name: str, spec: Mapping[str, Any]) -> Path:
        return _place(self.cache / "work", name, spec)

    def _find_shipped(self, name: str, spec: Mapping[str, Any]) -> Artefact | None:
        for root in self.shipped:
            try:
                if found := _verified(_place(root, name, spec), name, spec):
                    return found
            except Damaged as error:
                _warn(f"{error} The shipped {name} is not used.")
        return None

    def _second_look(self, name: str, spec: Mapping[str, Any]) -> Artefact | None:
        """Look again at a damaged cache entry under the lock: it may be just being replaced."""
        try:
            with self._lock(name, spec, wait=False) as held:
                # whoever else holds the lock is making it anew
                return self._settled(name, spec) if held else None
        except StoreError as error:
            _warn(f"{name} in the cache is damaged and not used. {error}")
            return None

    def _settled(self, name: str, spec: Mapping[str, Any]) -> Artefact | None:
        """Find in the cache; quarantine what is damaged. For the holder of the lock."""
        place = _place(self.cache, name, spec)
        try:
            return _verified(place, name, spec)
        except Damaged as error:
            moved = quarantine(place, self.cache)
            _warn(f"{error} It was moved to {moved}.")
            return None

    @contextmanager
    def _lock(self, name: str, spec: Mapping[str, Any], *, wait: bool = True) -> Iterator[bool]:
        """Hold the lock of a key; without ``wait``, say whether it was free."""
        path = _place(self.cache / "locks", name, spec)
        with explained(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(path.with_name(f"{path.name}.lock"))
            held = _acquired(lock, seconds=0.2 if wait else 0)
            if wait and not held:
                _warn(f"Another process is making {name}; waiting for it.")
                held = _acquired(lock, seconds=-1)
        try:
            yield held
        finally:
            lock.release()

    @contextmanager
    def _with_way_out(self) -> Iterator[None]:
        """Add to a sentence about the cache what its owner can do."""
        try:
            yield
        except Damaged:
            raise
        except StoreError as error:
            text = str(error).rstrip(".")
            if str(self.cache) not in text or CACHE_VARIABLE in text:
                raise
            way_out = f"set {CACHE_VARIABLE} to a folder with free space that you can write in"
            raise StoreError(f"{text}; mend that, or {way_out}.") from error.__cause__


def _place(root: Path, name: str, spec: Mapping[str, Any]) -> Path:
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name.split("/")[0] in _RESERVED:
        allowed = "use testbed/recipe of letters, digits, '_', '-' and '.', like postcards/teacher"
        raise BadInput("name", name, f"{allowed}; {', '.join(_RESERVED)} are taken")
    return root / f"{name}-{key_of(spec)}"


def _verified(place: Path, name: str, spec: Mapping[str, Any]) -> Artefact | None:
    """Check a folder against its manifest and its recipe, once per process and change."""
    try:
        if not place.is_dir():
            return None
        stamp = _stamp(place)
        if _VERIFIED.get(place) != stamp:
            files = read_folder(place)
            if canonical(json.loads(files["recipe.json"].read_text("utf-8"))) != canonical(spec):
                raise Damaged(f"{place} holds another recipe than its name says.")
            _VERIFIED[place] = stamp
        digests = {file: sha256 for file, (_, sha256) in read_manifest(place).items()}
    except PermissionError:
        return None  # who may not look into the cache has none
    except (FileNotFoundError, KeyError, ValueError) as error:
        raise Damaged(f"{place} is not complete ({error}).") from error
    return Artefact(path=place, key=key_of(spec), name=name, spec=dict(spec), digests=digests)


def _stamp(place: Path) -> tuple[object, ...]:
    seen = ((path, path.stat()) for path in sorted(place.rglob("*")))
    return tuple((path, s.st_size, s.st_mtime_ns, s.st_ino) for path, s in seen)


def _describe(folder: Path, spec: Mapping[str, Any], seconds: float) -> None:
    """Write recipe and card beside what was made."""
    card = folder / "card.json"
    extra = json.loads(card.read_text("utf-8")) if card.is_file() else {}
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    facts = {**extra, **provenance(), "seconds": round(seconds, 3), "created": created}
    atomic_write_text(card, json.dumps(facts, indent=1, sort_keys=True) + "\n")
    recipe = json.dumps(json.loads(canonical(spec)), indent=1, sort_keys=True)
    atomic_write_text(folder / "recipe.json", recipe + "\n")


def _entries(kind: str, root: Path) -> Iterator[Entry]:
    try:
        paths = list(root.glob("*/*")) if root.is_dir() else []
    except PermissionError:
        return
    for path in paths:
        match = _ENTRY.fullmatch(path.name)
        if match and path.parent.name not in _RESERVED and not path.name.startswith("."):
            size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            yield Entry(kind, f"{path.parent.name}/{match[1]}", match[2], size)


def _acquired(lock: BaseFileLock, seconds: float) -> bool:
    try:
        lock.acquire(timeout=seconds)
    except Timeout:
        return False
    return True


def _warn(text: str) -> None:
    warnings.warn(text, StoreWarning, stacklevel=3)
