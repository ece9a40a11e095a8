"""Run the notebooks: strict on top of papermill, in processes, in the order of their artefacts.

Nothing starts before every parameter of every chosen notebook has been checked. A notebook counts
as done when its process ends with 0, every code cell has run, no output is an error, and every
declared figure is in the outputs and on disk, written by this run. What papermill says of itself
in the metadata is not trusted: it marks the cells of a dead kernel as completed.
"""

from __future__ import annotations

import graphlib
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from turbo_lab import places
from turbo_lab.atomic import atomic_write_text
from turbo_lab.claims_file import gather
from turbo_lab.errors import BadInput, MissingPiece, StoreError
from turbo_lab.notebook_files import Notebook, cleaned, discover, read
from turbo_lab.notebook_params import PROFILES, checked, plain_value
from turbo_lab.run_one import Job, Outcome, Running, cell_count, cores, finish, left_out, start
from turbo_lab.run_report import Report
from turbo_lab.store import Store

#: The most seconds one cell may take, by profile.
CELL_SECONDS: Mapping[str, int] = {"smoke": 600, "quick": 3600, "paper": 24 * 3600}


def run(
    *,
    profile: str = "quick",
    only: Sequence[str] = (),
    jobs: int = 0,
    parameters: Mapping[str, Any] | None = None,
    folder: Path | None = None,
    cell_seconds: int = 0,
) -> list[Outcome]:
    """Run notebooks and gather their claims; one outcome per notebook, in the order they ended.

    Args:
        profile: ``smoke``, ``quick`` or ``paper``.
        only: beginnings of names, for example ``["01"]``; empty for all.
        jobs: notebooks at a time, at least 1; 0 chooses.
        parameters: further values, given to every chosen notebook.
        folder: where the notebooks are; the checkout's ``notebooks/`` if not given.
        cell_seconds: the most seconds one cell may take; 0 takes the profile's.

    Raises:
        BadInput: a wrong profile, name, parameter or job count, or artefacts that need each other;
            raised before any kernel starts.
        MissingPiece: there are no notebooks, or what a parameter names is nowhere.
        StoreError: a folder of ours cannot be written.
    """
    notebooks, values = chosen(
        profile=profile,
        only=only,
        jobs=jobs,
        parameters=parameters,
        folder=folder,
        cell_seconds=cell_seconds,
    )
    order = ordered(notebooks)
    seconds = cell_seconds or CELL_SECONDS[profile]
    with _workplace(profile) as work:
        todo = {
            one.name: Job(
                notebook=one, profile=profile, parameters=values, work=work, cell_seconds=seconds
            )
            for one in notebooks
        }
        outcomes = _pool(todo, order, jobs or min(cores(), max(1, len(todo)), 4))
    gather(places.figure_dir(profile, values.get("out_dir", "")))
    return outcomes


def chosen(
    *,
    profile: str,
    only: Sequence[str] = (),
    jobs: int = 0,
    parameters: Mapping[str, Any] | None = None,
    folder: Path | None = None,
    cell_seconds: int = 0,
) -> tuple[list[Notebook], dict[str, Any]]:
    """Check what `run` is asked for, without starting anything.

    Returns:
        The notebooks of a run and the parameters that each is given.

    Raises:
        BadInput: a wrong profile, name, parameter or job count.
        MissingPiece: there are no notebooks, or what a parameter names is nowhere.
        StoreError: a folder of ours cannot be written.
    """
    if profile not in PROFILES:
        raise BadInput("profile", profile, "use one of " + ", ".join(map(repr, PROFILES)))
    if isinstance(only, str):
        raise BadInput("only", only, "give a list of beginnings of names")
    for name, value in (("jobs", jobs), ("cell_seconds", cell_seconds)):
        if value < 0:
            raise BadInput(name, value, "use an integer of at least 0")
    values = {key: plain_value(value) for key, value in (parameters or {}).items()}
    if values.setdefault("profile", profile) != profile:
        raise BadInput("profile", values["profile"], "give it once, as the profile of the run")
    notebooks = discover(folder or places.notebook_dir(), only)
    if not notebooks:
        raise MissingPiece(f"There are no notebooks in {folder or places.notebook_dir()}.")
    for notebook in notebooks:
        check_parameters(notebook, values)
    _check_machine(profile, values)
    return notebooks, values


def _check_machine(profile: str, values: Mapping[str, Any]) -> None:
    """Refuse what this machine has not got, before a kernel finds out."""
    Store.default()
    out_dir = values.get("out_dir", "")
    folder = places.figure_dir(profile, out_dir)
    if why := places.closed(folder):
        if out_dir:
            raise BadInput("out_dir", out_dir, f"figures cannot be written to {folder} ({why})")
        raise StoreError(f"{folder} cannot be written: {why}.")
    if values.get("device") == "cuda":
        from turbo_lab.lab import chosen_device

        chosen_device("cuda")


def refresh(only: Sequence[str] = (), jobs: int = 0) -> list[Outcome]:
    """Run notebooks at the shown profile and write cleaned executed copies back over them."""
    outcomes = run(profile=places.SHOWN_PROFILE, only=only, jobs=jobs)
    for outcome in outcomes:
        if not outcome.problem:
            atomic_write_text(
                places.notebook_dir() / f"{outcome.name}.ipynb",
                notebook_text(cleaned(read(outcome.copy), hide=places.root())),
            )
    return outcomes


def notebook_text(nb: Any) -> str:
    """Return the text of a notebook file."""
    import nbformat

    return nbformat.writes(nb) + "\n"


def check_parameters(notebook: Notebook, values: Mapping[str, Any]) -> None:
    """Refuse names and values the notebook does not take.

    Raises:
        BadInput: the name is neither in the model nor in the parameters cell, or a wrong value.
        MissingPiece: what a value names is nowhere.
    """
    import papermill

    checked(notebook.name, values).check()
    path = str(notebook.path).replace("{", "{{").replace("}", "}}")
    defined = papermill.inspect_notebook(path)
    for key in values:
        if key not in defined:
            have = ", ".join(defined) or "nothing"
            cell = f"the parameters cell of {notebook.name} defines {have}"
            raise BadInput(key, values[key], cell)


def ordered(notebooks: Sequence[Notebook]) -> graphlib.TopologicalSorter[str]:
    """Return the prepared order: who makes an artefact runs before those that need it.

    Raises:
        BadInput: two notebooks wait for each other.
    """
    maker = {made: notebook.name for notebook in notebooks for made in notebook.declared.makes}
    sorter = graphlib.TopologicalSorter(
        {
            notebook.name: {maker[need] for need in notebook.declared.needs if need in maker}
            - {notebook.name}
            for notebook in notebooks
        }
    )
    try:
        sorter.prepare()
    except graphlib.CycleError as error:
        circle = " → ".join(error.args[1])
        raise BadInput("needs", circle, "notebooks may not wait for each other") from None
    return sorter


def _pool(
    todo: Mapping[str, Job], order: graphlib.TopologicalSorter[str], jobs: int
) -> list[Outcome]:
    threads = max(1, cores() // max(1, min(jobs, len(todo))))
    ready: list[Job] = []
    running: list[Running] = []
    outcomes: list[Outcome] = []
    with ExitStack() as stack:
        report = stack.enter_context(Report())
        stack.callback(_stop, running)
        while order.is_active():
            ready = sorted([*ready, *(todo[name] for name in order.get_ready())], key=_longest)
            while ready and len(running) < jobs:
                running.append(start(ready.pop(0), threads))
                report.started(running[-1].job.name, cell_count(running[-1].job))
            if not running:
                break  # what is left waits for a notebook that failed
            time.sleep(0.1)
            for one in [one for one in running if one.process.poll() is not None]:
                running.remove(one)
                outcomes.append(finish(one))
                report.ended(outcomes[-1])
                if not outcomes[-1].problem:
                    order.done(one.job.name)
            for one in running:
                report.moved(one.job.name, one.cells(), time.time() - one.since)
        ran = {outcome.name for outcome in outcomes}
        for job in (job for name, job in todo.items() if name not in ran):
            outcomes.append(left_out(job))
            report.ended(outcomes[-1])
    return outcomes


def _longest(job: Job) -> tuple[float, str]:
    return -job.minutes, job.name


def _stop(running: Sequence[Running]) -> None:
    for one in running:
        one.process.terminate()
    for one in running:
        one.process.wait()


@contextmanager
def _workplace(profile: str) -> Iterator[Path]:
    """Lend a temporary folder beside the copies; those of runs that were killed go first."""
    folder = places.run_dir(profile)
    work = folder / f".work-{os.getpid()}"
    for left in folder.glob(".work-*"):
        if not _alive(left.name.removeprefix(".work-")):
            shutil.rmtree(left, ignore_errors=True)
    try:
        for part in ("jupyter", "ipython"):
            (work / part).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"{folder} cannot be written: {error.strerror}.") from None
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return int(pid) != os.getpid()
