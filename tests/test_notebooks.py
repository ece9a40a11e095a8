"""Every committed notebook: its form, its parameters, its outputs, and a run at smoke."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import nbformat
import papermill
import pytest
from papermill.translators import PythonTranslator

from turbo_lab import runner
from turbo_lab.notebook_files import (
    captured_figures,
    cleaned,
    code_cells,
    discover,
    first_error,
    first_unrun,
    read,
    tags,
)
from turbo_lab.notebook_params import model_for

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)

MAX_LINES = 25
MAX_BYTES = 3_000_000


def parameters_cell(nb: Any) -> Any:
    (cell,) = [cell for cell in code_cells(nb) if "parameters" in tags(cell)]
    return cell


def test_the_first_notebook_is_there() -> None:
    assert (FOLDER / "01_teacher.ipynb").is_file()


def test_every_notebook_is_named_so_that_the_runner_finds_it() -> None:
    assert [one.path for one in discover(FOLDER)] == NOTEBOOKS


@each
def test_form(path: Path) -> None:
    nb = read(path)
    nbformat.validate(nb)
    assert (nb.nbformat, nb.nbformat_minor) >= (4, 5)
    ids = [cell.id for cell in nb.cells]
    assert len(set(ids)) == len(ids)
    assert nb.metadata.kernelspec.name == "python3"
    assert path.stat().st_size < MAX_BYTES


@each
def test_clean(path: Path) -> None:
    """No widget state, no timings, no injected cell: cleaning changes nothing."""
    nb = read(path)
    assert runner.notebook_text(cleaned(nb)) == path.read_text(encoding="utf-8")


@each
def test_parameters_cell_is_what_papermill_and_the_model_read(path: Path) -> None:
    cell = parameters_cell(read(path))
    pattern = PythonTranslator.PARAMETER_PATTERN
    lines = [line for line in cell.source.splitlines() if line.strip() and line[0] != "#"]
    for line in lines:
        match = pattern.match(line)
        assert match and match["annotation"], f"not 'name: type = value  # help': {line}"
        assert line.count("=") == 1, f"papermill cannot read a line with two '=': {line}"
        assert match["help"], f"say what it is: {line}"
    model = model_for(path.stem)
    defaults = {name: field.default for name, field in model.model_fields.items()}
    seen = papermill.inspect_notebook(str(path))
    assert {name: ast.literal_eval(one["default"]) for name, one in seen.items()} == defaults
    assert len(lines) == len(defaults)


@each
def test_parameters_are_checked_in_the_next_code_cell(path: Path) -> None:
    cells = code_cells(read(path))
    following = cells[cells.index(parameters_cell(read(path))) + 1]
    assert f'validated("{path.stem}", globals())' in following.source


@each
def test_cells_are_short_and_define_nothing(path: Path) -> None:
    for number, cell in enumerate(code_cells(read(path)), start=1):
        lines = cell.source.splitlines()
        assert len(lines) <= MAX_LINES, f"code cell {number} has {len(lines)} lines"
        found = re.search(r"^\s*(async\s+def|def|class)\s", cell.source, re.MULTILINE)
        assert not found, f"code cell {number} defines something: it belongs into the package"


@each
def test_no_absolute_paths(path: Path) -> None:
    found = re.findall(r"(?<![\w./:])/(?:home|root|work|Users|tmp|mnt)/\w+", path.read_text())
    assert found == []


@each
def test_outputs_are_there(path: Path) -> None:
    nb = read(path)
    (notebook,) = [one for one in discover(FOLDER) if one.path == path]
    assert first_error(nb) is None
    assert first_unrun(nb) is None
    assert captured_figures(nb) >= len(notebook.declared.figures) > 0
    streams = [out for cell in code_cells(nb) for out in cell.outputs if "name" in out]
    assert [out.text for out in streams if out.name == "stderr"] == []


@each
def test_tables_are_shown_whole(path: Path) -> None:
    """pandas ends a text that it cuts with three dots, and puts them for lines it leaves out."""
    outputs = [out for cell in code_cells(read(path)) for out in cell.outputs if "data" in out]
    pages = [html for out in outputs if "<table" in (html := out.data.get("text/html", ""))]
    cells = [text for page in pages for text in re.findall(r"<t[dh][^>]*>([^<]*)</t[dh]>", page)]
    assert [text for text in cells if text.endswith("...")] == []


@pytest.mark.notebook
@each
def test_a_smoke_run_goes_through(path: Path) -> None:
    (outcome,) = runner.run(profile="smoke", only=[path.stem])
    assert outcome.problem == ""
