"""The runner, on notebooks of a few cells that need no torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest

from turbo_lab import figures, notebook_files, places, run_one, runner
from turbo_lab.errors import BadInput, MissingPiece, StoreError

PARAMETERS = """
profile: str = "quick"  # smoke, quick or paper
seed: int = 0  # base seed
out_dir: str = ""  # where figures go
"""
# One pixel is enough for an image in the outputs and a file on disk.
PIXEL = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJ"
    "AAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
FIGURE = f"""
import base64
from IPython.display import Image, display
from turbo_lab.places import figure_dir
data = base64.b64decode("{PIXEL}")
folder = figure_dir(profile, out_dir) / NAME
folder.mkdir(parents=True, exist_ok=True)
_ = (folder / "dot.png").write_bytes(data)
display(Image(data))
"""


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "pyproject.toml").touch()
    monkeypatch.setenv("TURBO_LAB_ROOT", str(tmp_path))
    monkeypatch.delenv("TURBO_LAB_FIGURES", raising=False)
    return tmp_path


def write(checkout: Path, name: str, *cells: str, **declared: Any) -> Path:
    nb = nbformat.v4.new_notebook()
    nb.metadata = {
        "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
        "turbo_lab": declared,
    }
    first = nbformat.v4.new_code_cell(PARAMETERS.strip(), metadata={"tags": ["parameters"]})
    nb.cells = [first, *map(nbformat.v4.new_code_cell, cells)]
    path = checkout / "notebooks" / f"{name}.ipynb"
    nbformat.write(nb, path)
    return path


def started(checkout: Path) -> bool:
    return (checkout / "runs").exists()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"sed": 1}, "sed=1 is not allowed: 01_a has no such parameter (did you mean seed?)"),
        ({"seed": "one"}, "seed='one' is not allowed: use an integer of at least 0"),
        ({"seed": True}, "seed=True is not allowed: use an integer of at least 0"),
        ({"seed": -1}, "seed=-1 is not allowed: use an integer of at least 0"),
        ({"fresh": True}, "fresh=True is not allowed: the parameters cell of 01_a defines"),
        ({"profile": "paper"}, "profile='paper' is not allowed: give it once"),
    ],
)
def test_wrong_parameters_are_refused_before_anything_starts(
    checkout: Path, values: dict[str, Any], said: str
) -> None:
    write(checkout, "01_a", "1 + 1")
    with pytest.raises(BadInput) as caught:
        runner.run(profile="smoke", parameters=values)
    assert str(caught.value).startswith(said)
    assert not started(checkout)


def test_wrong_choices_are_refused_before_anything_starts(checkout: Path) -> None:
    write(checkout, "01_a", "1 + 1")
    for wrong in ({"profile": "fast"}, {"only": ["02"]}, {"jobs": -1}):
        with pytest.raises(BadInput):
            runner.run(**{"profile": "smoke", **wrong})  # type: ignore[arg-type]
    with pytest.raises(MissingPiece, match="no notebooks"):
        runner.run(folder=checkout)
    assert not started(checkout)


def test_a_folder_that_figures_cannot_be_written_to_is_refused_before_anything_starts(
    checkout: Path,
) -> None:
    write(checkout, "01_a", "1 + 1")
    (checkout / "note").write_text("a file")
    with pytest.raises(BadInput, match=r"out_dir='note/x' is not allowed: figures cannot be"):
        runner.run(profile="smoke", parameters={"out_dir": "note/x"})
    assert not started(checkout)


def test_a_declaration_nobody_understands_is_refused(checkout: Path) -> None:
    write(checkout, "01_a", "1 + 1", figure=["steps"])
    with pytest.raises(BadInput, match=r"metadata\.turbo_lab\.figure.*01_a"):
        runner.run(profile="smoke")


def test_notebooks_that_wait_for_each_other_are_refused(checkout: Path) -> None:
    write(checkout, "01_a", needs=["b"], makes=["a"])
    write(checkout, "02_b", needs=["a"], makes=["b"])
    with pytest.raises(BadInput, match="may not wait for each other"):
        runner.run(profile="smoke")
    assert not started(checkout)


@pytest.mark.slow
def test_success_leaves_a_copy_figures_and_gathered_claims(checkout: Path) -> None:
    claim = dict.fromkeys(
        ("statistic", "value", "low", "high", "seeds", "profile", "verdict", "artefact_keys"), 0
    )
    write(
        checkout,
        "01_a",
        "NAME = '01_a'" + FIGURE,
        "import json\n"
        f"claims = [{{'id': 'C1', 'notebook': NAME, **{claim}}}]\n"
        "_ = (folder / 'claims.json').write_text(json.dumps(claims))",
        "print(seed)",
        figures=["dot"],
    )
    dead = checkout / "runs" / "smoke" / ".work-999999999"
    dead.mkdir(parents=True)
    os.environ["MPLBACKEND"] = "Agg"
    try:
        (outcome,) = runner.run(profile="smoke", parameters={"seed": np.int64(3)})
    finally:
        del os.environ["MPLBACKEND"]
    assert outcome.problem == ""
    assert outcome.figures == 1
    copy = nbformat.read(checkout / "runs" / "smoke" / "01_a.ipynb", as_version=4)
    assert copy.cells[-1].outputs[0].text == "3\n"
    folder = checkout / "runs" / "smoke" / "figures"
    assert (folder / "01_a" / "dot.png").exists()
    (gathered,) = json.loads((folder / "claims.json").read_text())
    assert gathered == {"id": "C1", "notebook": "01_a", **claim}
    assert not list((checkout / "runs" / "smoke").glob(".work-*"))
    assert not (checkout / "figures").exists()


@pytest.mark.slow
def test_a_failing_cell_is_named_and_its_dependants_do_not_start(checkout: Path) -> None:
    write(checkout, "01_a", "1 + 1", "raise ValueError('no such colour')", makes=["a"])
    write(checkout, "02_b", "1 + 1", needs=["a"])
    write(checkout, "03_c", "1 + 1")
    outcomes = {one.name: one for one in runner.run(profile="smoke", jobs=2)}
    assert outcomes["01_a"].problem == "code cell 4: ValueError: no such colour"
    assert outcomes["01_a"].copy == checkout / "runs" / "smoke" / "01_a.failed.ipynb"
    assert outcomes["01_a"].copy.exists()
    assert not (checkout / "runs" / "smoke" / "01_a.ipynb").exists()
    assert "not started" in outcomes["02_b"].problem
    assert outcomes["03_c"].problem == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cell", "declared", "said"),
    [
        ("import os\nos._exit(0)", {}, "DeadKernelError"),
        ("import sys\nsys.exit(0)", {}, "SystemExit"),
        ("import time\ntime.sleep(60)", {}, "code cell 3 took longer than 5 s"),
        ("print('no figure')", {"figures": ["dot"]}, "dot.png was not written"),
        ("NAME = 'x'" + FIGURE, {"figures": ["dot"]}, "01_a/dot.png was not written"),
        (
            "NAME = '01_a'" + FIGURE.replace("display(Image(data))", ""),
            {"figures": ["dot"]},
            "its outputs show 0 figures, it declares 1",
        ),
    ],
    ids=["dead kernel", "exit 0", "too long", "no figure", "wrong folder", "not shown"],
)
def test_what_papermill_may_call_a_success_is_a_failure(
    checkout: Path, cell: str, declared: dict[str, Any], said: str
) -> None:
    write(checkout, "01_a", cell, "print('after')", **declared)
    (outcome,) = runner.run(profile="smoke", cell_seconds=5)
    assert said in outcome.problem
    assert outcome.copy.name == "01_a.failed.ipynb"


@pytest.mark.slow
def test_an_old_figure_does_not_stand_in_for_a_new_one(checkout: Path) -> None:
    write(checkout, "01_a", f"NAME = '01_a'\n{FIGURE}".replace("_ = (", "0 and ("), figures=["dot"])
    old = checkout / "runs" / "smoke" / "figures" / "01_a" / "dot.png"
    old.parent.mkdir(parents=True)
    old.touch()
    os.utime(old, (1e9, 1e9))
    (outcome,) = runner.run(profile="smoke")
    assert "is an old one" in outcome.problem


@pytest.mark.slow
def test_who_makes_runs_before_who_needs(checkout: Path) -> None:
    say = "from turbo_lab.places import root\nlog = root() / 'log'\n"
    text = "(log.read_text() if log.exists() else '')"
    for name, declared in (("01_a", {"needs": ["x"]}), ("02_b", {"makes": ["x"]})):
        write(checkout, name, f"{say}_ = log.write_text({text} + '{name} ')", **declared)
    outcomes = runner.run(profile="smoke", jobs=2)
    assert [one.name for one in outcomes] == ["02_b", "01_a"]
    assert (checkout / "log").read_text() == "02_b 01_a "


@pytest.mark.slow
def test_refresh_writes_back_a_clean_notebook_with_outputs(checkout: Path) -> None:
    path = write(checkout, "01_a", "from pathlib import Path\nPath.cwd() / 'x'", "seed")
    before = nbformat.read(path, as_version=4)
    (outcome,) = runner.refresh()
    assert outcome.problem == ""
    after = nbformat.read(path, as_version=4)
    assert [cell.id for cell in after.cells] == [cell.id for cell in before.cells]
    assert [cell.execution_count for cell in after.cells] == [1, 2, 3]
    assert after.cells[2].outputs[0].execution_count == 3
    assert str(checkout) not in path.read_text()
    assert set(after.metadata) == {"kernelspec", "language_info", "turbo_lab"}
    assert not any("papermill" in cell.metadata for cell in after.cells)


@pytest.mark.slow
def test_a_killed_run_takes_its_kernels_with_it_and_can_be_repeated(checkout: Path) -> None:
    import time

    beat = "from turbo_lab.places import root\nimport time\nfor i in range(600):\n"
    beat += "    _ = (root() / 'beat').write_text(str(i))\n    time.sleep(0.1)"
    path = write(checkout, "01_a", beat)
    code = "from turbo_lab import runner; runner.run(profile='smoke')"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=checkout)
    deadline = time.monotonic() + 60
    while not (checkout / "beat").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.kill()
    process.wait()
    time.sleep(5)  # the worker looks once a second, the kernel too
    last = (checkout / "beat").read_text()
    time.sleep(1)
    assert (checkout / "beat").read_text() == last
    path.unlink()
    write(checkout, "01_a", "1 + 1")
    (outcome,) = runner.run(profile="smoke")
    assert outcome.problem == ""
    assert not list((checkout / "runs" / "smoke").glob(".work-*"))


def test_a_folder_that_cannot_be_written_is_named(checkout: Path) -> None:
    write(checkout, "01_a", "1 + 1")
    (checkout / "runs").touch()  # a file where the folder should be
    for profile in ("smoke", "quick"):  # figures are in there, or copies only
        with pytest.raises(StoreError, match="cannot be written"):
            runner.run(profile=profile)


def test_figures_of_other_profiles_stay_away_from_the_shown_ones(checkout: Path) -> None:
    assert places.figure_dir("quick") == checkout / "figures"
    assert places.figure_dir("smoke") == checkout / "runs" / "smoke" / "figures"
    assert places.figure_dir("smoke", "here") == checkout / "here"


def test_the_environment_of_a_worker(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    env = run_one.environment(1, checkout)
    assert "MPLBACKEND" not in env
    assert env["OMP_NUM_THREADS"] == "1"
    assert env["JUPYTER_PATH"].startswith(sys.prefix)
    assert env["SOURCE_DATE_EPOCH"] == figures.FIXED_DATE  # a run and a session: equal bytes


def test_cleaning_twice_is_cleaning_once(checkout: Path) -> None:
    path = write(checkout, "01_a", "1 + 1")
    nb = notebook_files.read(path)
    nb.metadata["widgets"] = {"state": {}}
    nb.cells[1].metadata["execution"] = {"iopub.execute_input": "now"}
    once = runner.notebook_text(notebook_files.cleaned(nb))
    assert "widgets" not in once
    assert "iopub" not in once
    assert runner.notebook_text(notebook_files.cleaned(nbformat.reads(once, as_version=4))) == once
