"""One notebook's run: its process, its environment, and the judgement of how it went."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from turbo_lab import places
from turbo_lab.claims_file import claim_problem
from turbo_lab.notebook_files import (
    Notebook,
    captured_figures,
    code_cells,
    first_error,
    first_unrun,
    read,
)
from turbo_lab.notebook_worker import Plan

#: 2025-01-01: the date that PDF and SVG figures carry, so that a rerun gives equal bytes.
FIGURE_DATE = "1735689600"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How one notebook ended; ``problem`` is empty when it went well."""

    name: str
    seconds: float
    figures: int
    copy: Path
    problem: str = ""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One notebook with its checked parameters and the places of its run."""

    notebook: Notebook
    profile: str
    parameters: Mapping[str, Any]
    work: Path
    cell_seconds: int

    @property
    def name(self) -> str:
        """The notebook's name."""
        return self.notebook.name

    @property
    def figures(self) -> Path:
        """The folder in which this notebook leaves its figures."""
        return places.figure_dir(self.profile, self.parameters.get("out_dir", "")) / self.name

    @property
    def target(self) -> Path:
        """The executed copy while it is being written."""
        return self.work / f"{self.name}.ipynb"

    @property
    def minutes(self) -> float:
        """The expected minutes, 1 where the notebook does not say."""
        return {str(k): v for k, v in self.notebook.declared.minutes.items()}.get(self.profile, 1.0)


@dataclass(kw_only=True)
class Running:
    """A job whose process is at work."""

    job: Job
    process: subprocess.Popen[bytes]
    since: float = field(default_factory=time.time)

    def cells(self) -> int:
        """Count the cells begun so far, from the log."""
        log = _log(self.job)
        return log.read_bytes().count(b"Executing Cell") if log.exists() else 0


def cores() -> int:
    """Return how many CPU cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def environment(threads: int, work: Path) -> dict[str, str]:
    """Return the environment of a worker.

    MPLBACKEND goes, because a backend set from outside silently drops every figure. The kernel is
    that of this interpreter, whatever kernels and IPython start-up files the user has, and nothing
    is written to the home folder.
    """
    env = {key: value for key, value in os.environ.items() if key != "MPLBACKEND"}
    kernels = str(Path(sys.prefix) / "share" / "jupyter")
    threaded = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return {
        "SOURCE_DATE_EPOCH": FIGURE_DATE,
        "PYTHONHASHSEED": "0",
        **env,
        **dict.fromkeys(threaded, str(threads)),
        "JUPYTER_PATH": os.pathsep.join(filter(None, [kernels, env.get("JUPYTER_PATH")])),
        "JUPYTER_PREFER_ENV_PATH": "1",
        "JUPYTER_RUNTIME_DIR": str(work / "jupyter"),
        "IPYTHONDIR": str(work / "ipython"),
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        "TURBO_LAB_PROGRESS": "off",  # the runner shows progress; copies keep no bars
        "TURBO_LAB_ROOT": str(places.root()),
    }


def cell_count(job: Job) -> int:
    """Count the cells a run will go through."""
    return len(read(job.notebook.path).cells) + 1  # papermill adds the injected parameters


def start(job: Job, threads: int) -> Running:
    """Start the process of a job, its log in the run's folder."""
    plan = job.work / f"{job.name}.json"
    Plan(
        source=str(job.notebook.path),
        target=str(job.target),
        cwd=str(places.root()),
        cell_seconds=job.cell_seconds,
        parameters=dict(job.parameters),
    ).write(plan)
    command = [sys.executable, "-m", "turbo_lab.notebook_worker", str(plan)]
    with _log(job).open("wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment(threads, job.work),
            cwd=places.root(),
        )
    return Running(job=job, process=process)


def finish(one: Running) -> Outcome:
    """Judge a run and put its copy in place: ``<name>.ipynb``, or ``<name>.failed.ipynb``."""
    job, folder = one.job, places.run_dir(one.job.profile)
    problem = _problem(one)
    outcome = Outcome(
        name=job.name,
        seconds=time.time() - one.since,
        figures=captured_figures(read(job.target)) if job.target.exists() else 0,
        copy=folder / f"{job.name}{'.failed' if problem else ''}.ipynb",
        problem=problem,
    )
    if not job.target.exists():
        return replace(outcome, copy=_log(job))
    os.replace(job.target, outcome.copy)
    if not problem:
        (folder / f"{job.name}.failed.ipynb").unlink(missing_ok=True)
    return outcome


def _problem(one: Running) -> str:
    """Return what is wrong with a finished run as a sentence without its full stop, or ''."""
    job = one.job
    if not job.target.exists():
        return _outside(job) or f"its process ended with {one.process.returncode} before any cell"
    nb, outside = read(job.target), _outside(job)
    begun = max(1, sum(cell.execution_count is not None for cell in code_cells(nb)))
    if outside.startswith("CellTimeoutError"):  # its interrupt looks like an error of the cell
        return f"code cell {begun} took longer than {job.cell_seconds} s"
    if error := first_error(nb):
        return error
    if one.process.returncode != 0:
        how = outside or f"its process ended with {one.process.returncode}"
        return f"code cell {begun} or the one after it: {how}"
    if unrun := first_unrun(nb):
        return f"code cell {unrun} did not run"
    return _missing_figure(nb, one) or claim_problem(job.figures / "claims.json")


def _missing_figure(nb: Any, one: Running) -> str:
    declared = one.job.notebook.declared.figures
    for name in declared:
        path = one.job.figures / f"{name}.png"
        if not path.exists():
            return f"the declared figure {places.shown(path)} was not written"
        if path.stat().st_mtime < one.since - 2:  # some file systems keep whole seconds
            return f"the declared figure {places.shown(path)} is an old one, not of this run"
    if captured_figures(nb) < len(declared):
        return f"its outputs show {captured_figures(nb)} figures, it declares {len(declared)}"
    return ""


def left_out(job: Job) -> Outcome:
    """Return the outcome of a job that could not start, for want of what it needs."""
    needs = ", ".join(job.notebook.declared.needs)
    problem = f"not started, because a notebook that makes what it needs failed ({needs})"
    return Outcome(name=job.name, seconds=0.0, figures=0, copy=job.notebook.path, problem=problem)


def _outside(job: Job) -> str:
    path = job.work / f"{job.name}.json.error"
    return path.read_text().rstrip(".") if path.exists() else ""


def _log(job: Job) -> Path:
    return places.run_dir(job.profile) / f"{job.name}.log"
