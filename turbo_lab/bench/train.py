r"""What a training step costs, and what it would cost if it were only its network passes.

Everything is paired: in each round every method takes one step and every kind of network pass is
timed once, all on the same batch and the same network; ratios are formed within a round, and the
next round goes through them in the opposite order. Weights are random, since speed does not depend
on them. With n_k passes of kind k per sample, counted while a step runs, a step is compared with

.. math:: \hat s = \sum_k n_k\, p_k

where p_k is the time of one pass of that kind over the batch; n_k are counted in the very step that
is timed, since DMD2 draws how far it samples. What a step spends beyond that is
its loss, optimiser, average and critic; the batch is given, so data are in neither.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from turbo_lab.adapters import Worn
from turbo_lab.bench.memory import peak_above
from turbo_lab.bench.passes import Pass, probes
from turbo_lab.bench.processes import apart
from turbo_lab.bench.report import Report, Seconds, compared, save, table
from turbo_lab.bench.sharing import shares
from turbo_lab.bench.steps import BATCH_SIZE, Step, at_work, cases, example, planted
from turbo_lab.cpu import tune_allocator
from turbo_lab.errors import BadInput
from turbo_lab.lab import chosen_device
from turbo_lab.progress import progress
from turbo_lab.recipes import Recipe
from turbo_lab.training import workbench

REPEATS = 8
"""Rounds: with `BATCH_SIZE`, all methods and their memory take a minute or so on two cores."""

Clock = Callable[[], float]


def measure(
    of: Sequence[Recipe],
    *,
    repeats: int = REPEATS,
    device: str = "cpu",
    clock: Clock | None = None,
) -> Report:
    """Time steps and passes in interleaved rounds; the first recipe is the unit.

    Args:
        of: one-stage recipes of one teacher and one batch size, as from `cases`.
        repeats: rounds, 3 to 1000.
        device: cpu or cuda.
        clock: gives seconds; the machine's own by default.

    Raises:
        BadInput: repeats are out of range.
    """
    _check_repeats(repeats)
    tune_allocator()
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder, ExitStack() as opened:
        store, batch = planted(Path(folder), of[0]), example(of[0], device)
        tasks: dict[str | Pass, Callable[[], object]] = {}
        steps: dict[str, Step] = {}
        passes: dict[str, list[Mapping[Pass, float]]] = {}
        kinds: set[Pass] = set()
        for case in of:
            steps[case.name] = step = at_work(case, store, batch, device)
            opened.callback(step.close)
            step()  # makes the optimiser's state; some methods also begin with another loss
            kinds.update(step())
            passes[case.name] = []
            tasks[case.name] = partial(_counted, step, passes[case.name])
        student = workbench(of[0], store, device).student
        assert isinstance(student, Worn)
        for kind, probe in probes(sorted(kinds), student, batch).items():
            tasks[kind] = probe
            probe()  # once unmeasured, as the steps
        with progress(repeats, f"timing {len(of)} methods") as tick:
            rounds = []
            for seconds in interleaved(tasks, repeats, clock or _clock(device)):
                rounds.append(seconds)
                tick(len(rounds), "")
    rows = tuple(
        compared(name, rounds, passes[name], unit=of[0].name, played=steps[name].rounds)
        for name in steps
    )
    prices = {kind: statistics.median(r[kind] for r in rounds) for kind in sorted(kinds)}
    return Report(batch_size=len(batch.x), repeats=repeats, device=device, prices=prices, rows=rows)


def _counted(step: Step, passes: list[Mapping[Pass, float]]) -> None:
    passes.append(step())


def interleaved(
    tasks: Mapping[str | Pass, Callable[[], object]], repeats: int, clock: Clock
) -> Iterator[Seconds]:
    """Run all tasks once per round, every other round backwards; yield the seconds of each."""
    for repeat in range(repeats):
        seconds: dict[str | Pass, float] = {}
        for key in list(tasks)[:: -1 if repeat % 2 else 1]:
            began = clock()
            tasks[key]()
            seconds[key] = clock() - began
        yield seconds


def _clock(device: str) -> Clock:
    """Wall-clock seconds, on a GPU of work that is done."""
    if device == "cpu":
        return time.perf_counter

    def now() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return now


# --- memory -------------------------------------------------------------------------------------


def peaks(of: Sequence[Recipe], *, device: str = "cpu") -> dict[str, int | None]:
    """Peak memory of a step of each recipe, each in a fresh process, in bytes.

    Raises:
        TurboLabError: a process died.
    """
    found: dict[str, int | None] = {}
    with progress(len(of), "measuring memory") as tick:
        for case in of:
            found[case.name] = apart(step_peak, case, device, what=case.name, device=device)
            tick(len(found), case.name)
    return found


def step_peak(case: Recipe, device: str) -> int | None:
    """Peak memory of two steps above what was there before them; for a process of its own."""
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        step = at_work(case, planted(Path(folder), case), example(case, device), device)
        gc.collect()
        tune_allocator()  # only now: what building has freed went back to the system

        try:
            return peak_above(lambda: (step(), step()), device)
        finally:
            step.close()


# --- the command --------------------------------------------------------------------------------


def main(
    *,
    only: str = "",
    batch_size: int = BATCH_SIZE,
    repeats: int = REPEATS,
    device: str = "cpu",
    path: Path | None = None,
) -> Report:
    """Measure, print the table, and write it as JSON where a path is given.

    Raises:
        BadInput: a parameter is not allowed; before anything is measured.
    """
    from rich.console import Console

    of = cases(only, batch_size=batch_size)
    _check_repeats(repeats)
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise BadInput("json", str(path), "name a file in a folder that exists")
    place = chosen_device(device)
    report = measure(of, repeats=repeats, device=place)
    most = peaks(of, device=place)
    rows = tuple(replace(row, peak_bytes=most[row.name]) for row in report.rows)
    report = replace(report, rows=rows, sharing=shares(of, device=place))
    console = Console()
    console.print(table(report))
    for sharing in report.sharing:
        console.print(str(sharing))
    if path is not None:
        save(report, path)
    return report


def _check_repeats(repeats: int) -> None:
    if not 3 <= repeats <= 1000:
        raise BadInput("repeats", repeats, "use an integer from 3 to 1000")
