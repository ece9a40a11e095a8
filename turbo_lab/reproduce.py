"""Train everything again from nothing, run all notebooks on it, and say which claims changed.

Notebooks ask the store for what they need, and it trains what it has not got. So here they run
with an empty store behind which nothing is shipped. A run that was killed goes on where its
checkpoints end, and notebooks may be reproduced one by one, in as many sittings, on what those
before them have trained; one that is asked for again after it has ended begins from nothing. What
takes longest can be kept as it was shipped: the teachers, so that students alone are trained again.
And a notebook can be reproduced alone, what the ones before it have trained kept as shipped: when
each has been, all has been, on whatever machines.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from turbo_lab import places, runner
from turbo_lab.atomic import atomic_write_text, read_manifest
from turbo_lab.errors import BadInput, StoreError
from turbo_lab.history import read_lines, seconds_by_stage
from turbo_lab.keys import key_of
from turbo_lab.notebook_files import discover
from turbo_lab.recipes import Recipe
from turbo_lab.run_one import Outcome
from turbo_lab.store import CACHE_VARIABLE, SHIPPED_VARIABLE, Store, atomic_folder

PROFILES = ("quick", "paper")
CELL_SECONDS = 7 * 24 * 3600
"""One cell may wait for all trainings."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """A claim before and after; None where it was not made."""

    notebook: str
    id: str
    before: Mapping[str, Any] | None
    after: Mapping[str, Any] | None

    @property
    def same(self) -> bool:
        """Whether the verdict is what it was."""
        return bool(self.before and self.after and self.before["verdict"] == self.after["verdict"])

    def __str__(self) -> str:
        mark = " " if self.same else "*"
        return (
            f"{mark} {self.notebook[:2]} {self.id:28s} {_said(self.before)} -> {_said(self.after)}"
        )


@dataclass(frozen=True, kw_only=True)
class Retrained:
    """A file of weights that is shipped and was trained again."""

    artefact: str
    file: str
    same: bool
    """To the bit."""
    before: str
    """The processor that trained the shipped one."""
    after: str

    def __str__(self) -> str:
        return f"* {self.artefact}/{self.file}: {self.before} -> {self.after}"


def reproduce(
    *,
    profile: str = "quick",
    only: Sequence[str] = (),
    kept: Sequence[Path] = (),
    jobs: int = 0,
    device: str = "auto",
) -> tuple[list[Outcome], list[Change]]:
    """Retrain, rerun and compare.

    The store is emptied first if one of the notebooks has ended in it before.

    Args:
        profile: ``quick`` or ``paper``.
        only: beginnings of notebooks' names; empty for all.
        kept: folders of shipped artefacts that are used and not trained again; see
            `kept_as_shipped`.
        jobs: notebooks at a time, at least 1; 0 chooses.
        device: of trainings and samples.

    Returns:
        How each notebook ended, and every claim of those that ended well beside the committed one.

    Raises:
        BadInput: another profile, or a name without a notebook.
        MissingPiece: there is no such device.
        StoreError: another process is reproducing this profile here, or nothing can be written.
    """
    if profile not in PROFILES:
        raise BadInput("profile", profile, f"use {' or '.join(PROFILES)}: others train nothing new")
    folder = places.run_dir("reproduce") / profile
    with _alone(folder):
        return _reproduced(folder, profile, only, kept, jobs, device)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder: a run removes its store, and may not do so under another."""
    lock = FileLock(folder.with_name(f"{folder.name}.lock"))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise StoreError(
            f"Another process is reproducing {folder.name} in {places.shown(folder)}; wait for it."
        ) from None
    except OSError as error:
        raise StoreError(f"{folder.parent} cannot be written: {error.strerror}.") from None
    try:
        yield
    finally:
        lock.release()


def _reproduced(
    folder: Path,
    profile: str,
    only: Sequence[str],
    kept: Sequence[Path],
    jobs: int,
    device: str,
) -> tuple[list[Outcome], list[Change]]:
    """As `reproduce`, for the holder of the lock."""
    asked: dict[str, Any] = {
        "profile": profile,
        "only": only,
        "jobs": jobs,
        "parameters": {"device": device, "out_dir": str(folder / "figures")},
        "cell_seconds": CELL_SECONDS,
    }
    runner.chosen(**asked)  # hours of training are not removed for a run that cannot start
    ended = folder / "ended"
    before = [one.name for one in ended.iterdir()] if ended.is_dir() else []
    if any(name.startswith(tuple(only) or "") for name in before):
        shutil.rmtree(folder)
    for source in kept:
        with atomic_folder(folder / "store" / source.parent.name / source.name) as target:
            shutil.copytree(source, target, dirs_exist_ok=True)
    with _environment({CACHE_VARIABLE: str(folder / "store"), SHIPPED_VARIABLE: "none"}):
        outcomes = runner.run(**asked)
    if all(not one.problem for one in outcomes):
        ended.mkdir(parents=True, exist_ok=True)
        for one in outcomes:
            atomic_write_text(ended / one.name, "")
    names = {one.name for one in outcomes if not one.problem}
    return outcomes, changes(_claims(places.root() / "figures"), _claims(folder / "figures"), names)


def kept_as_shipped(
    keep: Sequence[str] = (), *, alone: bool = False, only: Sequence[str] = ()
) -> list[Path]:
    """Folders of the shipped artefacts that a run uses as they are.

    Args:
        keep: ``testbed/recipe``, or a pattern of it or of ``testbed/recipe-key``, as
            ``postcards/dmd2*``.
        alone: add what the figures of the notebooks before the first of `only` were made from.
        only: beginnings of notebooks' names; empty for all.

    Raises:
        BadInput: nothing of such a name is shipped.
    """
    folders = dict(_folders())
    found: set[Path] = set()
    for pattern in keep:
        fits = {
            folder
            for folder, name in folders.items()
            if fnmatchcase(name, pattern) or fnmatchcase(_with_key(folder), pattern)
        }
        if not fits:
            raise BadInput("keep", pattern, "use what turbo-lab artifacts lists as shipped")
        found |= fits
    if alone:
        keys = _used_before(only)
        found |= {folder for folder in folders if folder.name.rpartition("-")[2] in keys}
    return sorted(found)


def _with_key(folder: Path) -> str:
    return f"{folder.parent.name}/{folder.name}"


def _used_before(only: Sequence[str]) -> set[str]:
    """Keys of what the figures of every notebook before the first chosen one were made from."""
    notebooks = [one.name for one in discover(places.notebook_dir())]
    first = discover(places.notebook_dir(), only)[0].name
    figures = places.root() / "figures"
    keys: set[str] = set()
    for name in notebooks[: notebooks.index(first)]:
        for path in (figures / name).glob("*.json"):
            figure = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(figure, dict):  # and not the list of the notebook's claims
                keys.update(figure.get("artefact_keys", ()))
    return keys


def _folders() -> Iterator[tuple[Path, str]]:
    """Folder and name of all that is shipped."""
    for root in Store.default().shipped:
        for entry in Store(cache=root).entries():
            yield root / f"{entry.name}-{entry.key}", entry.name


def changes(
    before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]], notebooks: set[str]
) -> list[Change]:
    """Every claim of some notebooks, those whose verdict changed first.

    Args:
        before: claims as plain JSON.
        after: the same, measured again.
        notebooks: names of those that were run.
    """
    old, new = ({(c["notebook"], c["id"]): c for c in found} for found in (before, after))
    keys = [key for key in {**old, **new} if key[0] in notebooks]
    found = [
        Change(notebook=key[0], id=key[1], before=old.get(key), after=new.get(key)) for key in keys
    ]
    return sorted(found, key=lambda one: one.same)


def retrained(profile: str = "quick") -> list[Retrained]:
    """Every file of weights beside the shipped one, from all runs since the store was emptied.

    What was kept, and so copied with its card, is left out.

    Args:
        profile: of those runs.
    """
    again = places.run_dir("reproduce") / profile / "store"
    pairs = ((old, again / old.parent.name / old.name) for old, _ in _folders())
    return [found for old, new in pairs if new.is_dir() for found in _weights(old, new)]


def _weights(old: Path, new: Path) -> Iterator[Retrained]:
    """The files of weights that two folders of one artefact both have."""
    cards = [_json(folder / "card.json") for folder in (old, new)]
    if cards[0] == cards[1]:
        return
    before, after = (_processor(card["machine"]) for card in cards)
    digests, others = read_manifest(old), read_manifest(new)
    for file in sorted(digests.keys() & others.keys()):
        if file.endswith(".safetensors"):
            yield Retrained(
                artefact=_with_key(old),
                file=file,
                same=digests[file] == others[file],
                before=before,
                after=after,
            )


def training_hours(kept: Sequence[Path] = ()) -> float:
    """Hours that the shipped trainings took, of all notebooks, less those of what is kept.

    A stage counts once, however many go on from it. Histories know all sittings; where there is
    none the card does, of the last.

    Args:
        kept: folders of shipped artefacts.
    """
    seconds: dict[str, float] = {}
    for folder, _ in _folders():
        seconds |= _stages(folder)
    done = {stage for folder in kept for stage in _stages(folder)}
    return sum(taken for stage, taken in seconds.items() if stage not in done) / 3600


def _stages(folder: Path) -> dict[str, float]:
    """Seconds of every stage that led to an artefact, by all that decides its outcome."""
    seconds = seconds_by_stage(read_lines(folder / "history.jsonl"))
    if not seconds:
        return {str(folder): _json(folder / "card.json")["seconds"]}
    spec = _json(folder / "recipe.json")
    if "stages" not in spec:
        return {str(folder): sum(seconds.values())}
    found: dict[str, float] = {}
    recipe: Recipe | None = Recipe.model_validate(spec)
    while recipe is not None:
        found[key_of(recipe.spec())] = seconds.get(recipe.depth, 0.0)
        recipe = recipe.before
    return found


def report(found: Sequence[Change], weights: Sequence[Retrained] = ()) -> str:
    """What a person reads: how many verdicts changed, then each claim before and after.

    Args:
        found: claims.
        weights: trained again; those whose bits differ are named with their processors.
    """
    changed = sum(not one.same for one in found)
    lines = [f"{changed} of {len(found)} verdicts changed (*)", *map(str, found)]
    if weights:
        others = [one for one in weights if not one.same]
        lines.append(f"{len(others)} of {len(weights)} files of weights have other bits (*)")
        lines += map(str, others)
    return "\n".join(lines)


def _claims(figures: Path) -> list[Mapping[str, Any]]:
    path = figures / "claims.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def _json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return found


def _processor(machine: Mapping[str, Any]) -> str:
    """Name and instructions; cards from before 2026-11-30 have the name alone."""
    return ", ".join(filter(None, (machine["cpu"], machine.get("isa"))))


def _said(claim: Mapping[str, Any] | None) -> str:
    if claim is None:
        return "not made"
    value, low, high = (f"{claim[k]:.3g}" for k in ("value", "low", "high"))
    return f"{claim['verdict']} {value} [{low}, {high}]"


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Variables for the processes of the notebooks, and then what was there before."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
