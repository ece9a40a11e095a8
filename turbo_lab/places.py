"""Where things lie on disk: the one place that knows the folders of a checkout.

``TURBO_LAB_ROOT`` names another checkout, ``TURBO_LAB_FIGURES`` another folder for figures (the
tests use it, so that they never overwrite the real ones).
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from turbo_lab.errors import BadInput

#: The profile whose figures are the ones a reader sees.
SHOWN_PROFILE = "quick"


def root() -> Path:
    """Return the checkout: the folder that holds ``notebooks/``.

    Looked for in ``TURBO_LAB_ROOT``, around the package, then upwards from the current folder.
    An installed package used outside of any checkout works in the current folder.

    Raises:
        BadInput: ``TURBO_LAB_ROOT`` names no folder.
    """
    named = os.environ.get("TURBO_LAB_ROOT")
    if named:
        if not Path(named).is_dir():
            raise BadInput("TURBO_LAB_ROOT", named, "name an existing folder, or unset it")
        return Path(named).resolve()
    here = Path.cwd()
    candidates = [Path(__file__).resolve().parents[1], here, *here.parents]
    return next((folder for folder in candidates if _is_checkout(folder)), here)


def notebook_dir() -> Path:
    """Return the folder of the notebooks."""
    return root() / "notebooks"


def run_dir(profile: str) -> Path:
    """Return the folder of executed copies and logs of a profile."""
    return root() / "runs" / profile


def figure_dir(profile: str, out_dir: str = "") -> Path:
    """Return the folder that holds one folder of figures per notebook.

    ``out_dir`` wins, then ``TURBO_LAB_FIGURES``, then ``figures/`` for the shown profile and
    ``runs/<profile>/figures`` for the others, so that a smoke run never overwrites real figures.
    Relative paths count from the checkout, whatever the current folder.
    """
    chosen = out_dir or os.environ.get("TURBO_LAB_FIGURES", "")
    if chosen:
        return root() / expanded(chosen, "out_dir" if out_dir else "TURBO_LAB_FIGURES")
    return root() / "figures" if profile == SHOWN_PROFILE else run_dir(profile) / "figures"


def expanded(path: str | Path, name: str) -> Path:
    """Return a path with ``~`` and ``~user`` replaced.

    Raises:
        BadInput: naming the parameter or variable: there is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise BadInput(name, str(path), "there is no such user's folder") from None


def nearest(folder: Path) -> Path:
    """Return a folder, or of those above it the first that exists."""
    return next(place for place in (folder, *folder.parents) if place.exists())


def closed(folder: Path) -> str:
    """Return why nothing can be written in a folder, or in the nearest above it; empty if it can.

    It is tried: a file without a name is opened there.
    """
    try:
        with tempfile.TemporaryFile(dir=nearest(folder)):
            return ""
    except OSError as error:
        return error.strerror or str(error)


def shown(path: Path) -> str:
    """Return a path as a person reads it: relative to the checkout where it lies inside."""
    return str(path.relative_to(root())) if path.is_relative_to(root()) else str(path)


def _is_checkout(folder: Path) -> bool:
    return (folder / "notebooks").is_dir() and (folder / "pyproject.toml").is_file()
