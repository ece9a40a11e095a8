"""Notebook files: finding them, what they declare, whether a run of one went well, cleaning.

A notebook declares itself in its metadata, under ``turbo_lab``::

    {"figures": ["steps"], "needs": ["teacher"], "makes": [], "minutes": {"quick": 1.5}}

``figures`` are saved as ``<figures>/<notebook>/<name>.png``; ``needs`` and ``makes`` name artefacts
and give the order of the notebooks; ``minutes`` are expected ones, by profile.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
from pydantic import BaseModel, ConfigDict, ValidationError

from turbo_lab.errors import BadInput
from turbo_lab.notebook_params import Profile

_NAME = re.compile(r"\d\d_[a-z0-9_]+")
_SKIP = "skip-execution"
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


class Declared(BaseModel):
    """What a notebook says of itself in ``metadata.turbo_lab``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    figures: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    makes: tuple[str, ...] = ()
    minutes: dict[Profile, float] = {}


@dataclass(frozen=True, kw_only=True)
class Notebook:
    """One notebook file and what it declares."""

    path: Path
    declared: Declared

    @property
    def name(self) -> str:
        """The file's name without its ending, for example ``01_teacher``."""
        return self.path.stem


def discover(folder: Path, only: Sequence[str] = ()) -> list[Notebook]:
    """Return the notebooks ``NN_name.ipynb`` of a folder in order, or those ``only`` begins.

    Raises:
        BadInput: ``only`` fits no notebook, or a file is not a notebook that can be read.
    """
    paths = sorted(path for path in folder.glob("*.ipynb") if _NAME.fullmatch(path.stem))
    names = ", ".join(path.stem for path in paths) or f"there are none in {folder}"
    for start in only:
        if not start or not any(path.stem.startswith(start) for path in paths):
            raise BadInput("only", start, f"begin the name of a notebook: {names}")
    return [_opened(path) for path in paths if not only or path.stem.startswith(tuple(only))]


def read(path: Path) -> Any:
    """Read a notebook as version 4.

    Raises:
        BadInput: the file is not a notebook.
    """
    try:
        return nbformat.read(path, as_version=4)
    except Exception as error:  # whatever a damaged file makes the parser raise
        raise BadInput("notebook", path.name, f"it cannot be read ({_line(error)})") from None


def code_cells(nb: Any) -> list[Any]:
    """Return the code cells of a notebook."""
    return [cell for cell in nb.cells if cell.cell_type == "code"]


def tags(cell: Any) -> list[str]:
    """Return the tags of a cell."""
    return list(cell.metadata.get("tags", []))


def runs(cell: Any) -> bool:
    """Say whether a run executes this cell: it is code, not blank, not tagged to be skipped."""
    return cell.cell_type == "code" and bool(cell.source.strip()) and _SKIP not in tags(cell)


def first_error(nb: Any) -> str | None:
    """Return where and how an executed notebook failed, as one sentence, or None."""
    for number, cell in enumerate(code_cells(nb), start=1):
        for output in cell.outputs:
            if output.output_type == "error":
                sentence = _line(_ANSI.sub("", output.evalue))
                return f"code cell {number}: {output.ename}: {sentence}".rstrip(": ")
    return None


def first_unrun(nb: Any) -> int | None:
    """Return the number of the first code cell that should have run and did not, or None."""
    for number, cell in enumerate(code_cells(nb), start=1):
        if runs(cell) and cell.execution_count is None:
            return number
    return None


def captured_figures(nb: Any) -> int:
    """Count the PNG images among the outputs of an executed notebook."""
    return sum("image/png" in output.get("data", {}) for output in _outputs(nb))


def cleaned(nb: Any, *, hide: Path | None = None) -> Any:
    """Strip from an executed notebook what differs on every run; ids, tags and outputs stay.

    Widget state, papermill's and nbclient's timings, injected parameters, error marks and the
    exact Python go; execution counts are numbered afresh; the folder ``hide`` is cut from texts.
    """
    nb.cells = [cell for cell in nb.cells if not _added_by_papermill(cell)]
    declared = {key: nb.metadata[key] for key in ("turbo_lab",) if key in nb.metadata}
    kernel = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    language = {"file_extension": ".py", "mimetype": "text/x-python", "name": "python"}
    nb.metadata = nbformat.from_dict({"kernelspec": kernel, "language_info": language, **declared})
    for cell in nb.cells:
        for key in ("papermill", "execution", "widgets", "collapsed"):
            cell.metadata.pop(key, None)
        if not cell.metadata.get("tags", True):
            del cell.metadata["tags"]  # papermill leaves an empty list on every cell
    _number(nb)
    if hide is not None:
        _cut_folder(nb, f"{hide}/")
    return nb


def _opened(path: Path) -> Notebook:
    said = read(path).metadata.get("turbo_lab", {})
    try:
        return Notebook(path=path, declared=Declared.model_validate(said))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, ("metadata.turbo_lab", *first["loc"])))
        raise BadInput(where, first["input"], f"{path.name}: {first['msg']}") from None


def _outputs(nb: Any) -> Iterator[Any]:
    return (output for cell in code_cells(nb) for output in cell.outputs)


def _added_by_papermill(cell: Any) -> bool:
    return bool({"injected-parameters", "papermill-error-cell-tag"} & set(tags(cell)))


def _number(nb: Any) -> None:
    count = 0
    for cell in code_cells(nb):
        if cell.execution_count is None:
            continue
        count += 1
        cell.execution_count = count
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = count


def _cut_folder(nb: Any, folder: str) -> None:
    for output in _outputs(nb):
        if output.output_type == "stream":
            output.text = output.text.replace(folder, "")
        for mime, text in output.get("data", {}).items():
            if isinstance(text, str) and mime.startswith("text/"):
                output.data[mime] = text.replace(folder, "")


def _line(error: object) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), "").strip()
