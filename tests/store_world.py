"""An artefact of two files, and what its making may leave behind, for the tests of the store."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

NAME, SPEC = "points/teacher", {"recipe": "teacher", "steps": 10, "lr": 1e-3}


def fill(text: str = "content") -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / "part").mkdir()
        (folder / "part" / "a.txt").write_text(text)
        (folder / "b.txt").write_text(text)

    return make


def never(folder: Path) -> None:
    raise AssertionError("must not be made")


def hidden(folder: Path) -> list[str]:
    """Temporary entries anywhere below a folder."""
    return [path.name for path in folder.rglob(".*-*~*")]
