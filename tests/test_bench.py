"""The benchmark of training steps: what it counts, how it pairs, and what it writes."""

from __future__ import annotations

import errno
import json
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from bench_world import BARE, CASES, GRADIENT, TANGENT, WORN, tiny, trainings
from typer.testing import CliRunner

from turbo_lab import bars
from turbo_lab.adapters import Worn
from turbo_lab.bench import report as reports
from turbo_lab.bench import train
from turbo_lab.bench.passes import Pass, counted_passes, probes
from turbo_lab.bench.report import Report, compared
from turbo_lab.bench.steps import Step, cases, example, planted
from turbo_lab.bench.train import interleaved, measure
from turbo_lab.claims import Interval
from turbo_lab.cli import app
from turbo_lab.errors import BadInput, StoreError
from turbo_lab.fit import Turn
from turbo_lab.methods.flow import FlowMatching
from turbo_lab.recipes import Recipe
from turbo_lab.store import Store
from turbo_lab.streams import Draw
from turbo_lab.training import workbench

HANDLER = signal.getsignal(signal.SIGINT)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return planted(tmp_path_factory.mktemp("store"), CASES["flow"])


@pytest.fixture
def begun(store: Store) -> Iterator[Callable[[Recipe], Step]]:
    with trainings(store) as begin:
        yield begin


def test_every_kind_of_stage_of_every_student_is_a_case() -> None:
    assert next(iter(CASES)) == "flow"
    assert {"progressive.guided", "progressive.before", "consistency", "continuous"} <= set(CASES)
    assert {f"direct-{n}" for n in (8, 4, 2, 1)} <= set(CASES)
    assert [case.name for case in cases("progressive")] == [
        "flow",
        "progressive.guided",
        "progressive.before",
    ]
    assert [case.name for case in cases("flow")] == ["flow"]
    assert {s.batch_size for c in cases(batch_size=5) for s in c.stages} == {5}
    assert [case.name for case in cases("dmd2")] == ["flow", "dmd2-8", "dmd2-4", "dmd2-2"]
    assert not any(name.startswith("dmd2-2-") for name in CASES)  # variants cost the same
    assert [case.name for case in cases("dmd2-2-sec")][1] == "dmd2-2-second-0.5"
    # What is timed is trained as the recipe says: the methods' options are the recipes' own.
    assert cases("consistency")[1].stages[0].options["grid_steps"] == 40


@pytest.mark.parametrize(
    ("case", "passes"),
    [
        (CASES["flow"], {GRADIENT: 1}),
        # Two guided steps of the teacher are four passes, two of a student before are two.
        (CASES["progressive.guided"], {BARE: 4, GRADIENT: 1}),
        (CASES["progressive.before"], {WORN: 2, GRADIENT: 1}),
        (CASES["consistency"], {BARE: 2, WORN: 1, GRADIENT: 1}),
        (tiny(CASES["consistency"], solver="heun"), {BARE: 4, WORN: 1, GRADIENT: 1}),
        (CASES["continuous"], {BARE: 2, TANGENT: 1, GRADIENT: 1}),
        (tiny(CASES["continuous"], derivative="difference"), {BARE: 2, WORN: 3, GRADIENT: 1}),
        (CASES["direct-2"], {GRADIENT: 2}),
    ],
    ids=lambda value: value.name if isinstance(value, Recipe) else "",
)
def test_passes_are_those_of_the_method(
    begun: Callable[[Recipe], Step], case: Recipe, passes: dict[Pass, int]
) -> None:
    step = begun(case)
    step()  # continuous consistency has no tangent in its first step
    assert step() == passes


def test_a_step_of_dmd2_is_one_of_the_student_and_those_of_its_rival(
    begun: Callable[[Recipe], Step],
) -> None:
    """How far each turn samples is drawn, so the passes of two steps differ."""
    k = 3
    step = begun(tiny(CASES["dmd2-4"], rival_updates=k))
    seen = []
    for first in (0, k, 2 * k):
        draws = [Draw(seed=0, step=first + i, total=2, stream="fake") for i in range(k)]
        fake = sum(draw.shared("step", 4) + 1 for draw in draws)
        before = Draw(seed=0, step=first, total=2, stream="student").shared("step", 4)
        # The fake is asked for its velocity in the student's turn, the guided teacher twice.
        seen.append({WORN: fake + before + 1, BARE: 2, GRADIENT: k + 1})
        assert step() == seen[-1]
    assert step.rounds == k and len({tally[WORN] for tally in seen}) > 1


def test_a_probe_is_one_pass_of_its_kind(store: Store) -> None:
    case = CASES["flow"]
    student = workbench(case, store).student
    assert isinstance(student, Worn)
    kinds = [Pass(mode, adapter) for mode in reports.MODES for adapter in (False, True)]
    for kind, probe in probes(kinds, student, example(case, "cpu")).items():
        with counted_passes(2, [student.host.net]) as tally:
            probe()
        assert tally == {kind: 1}


def test_a_step_plays_every_turn_of_slower_players(
    begun: Callable[[Recipe], Step], monkeypatch: pytest.MonkeyPatch
) -> None:
    def turns(self: FlowMatching) -> tuple[Turn, ...]:
        def turn(every: int) -> Turn:
            return Turn(name=f"{every}", loss=self.loss, moves=("student",), every=every)

        return (turn(2), turn(3))

    monkeypatch.setattr(FlowMatching, "turns", turns)
    step = begun(CASES["flow"])
    assert step() == {GRADIENT: 3 + 2}
    assert step.rounds == 6


class FakeClock:
    """Time passes only when a task says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_rounds_alternate_their_order_and_time_every_task() -> None:
    clock, order = FakeClock(), []

    def task(name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            order.append(name)
            clock.now += seconds

        return run

    tasks = {"a": task("a", 1.0), "b": task("b", 2.0), BARE: task("bare", 0.5)}
    rounds = list(interleaved(tasks, 3, clock))
    assert order == ["a", "b", "bare", "bare", "b", "a", "a", "b", "bare"]
    assert rounds == [{"a": 1.0, "b": 2.0, BARE: 0.5}] * 3


def test_ratios_are_formed_within_rounds() -> None:
    # The machine is 1, 10 and 100 times slower: within a round, nothing changes but 3.3 to 3.5.
    rounds = [
        {"flow": 1.0 * k, "m": m * k, BARE: 0.5 * k, GRADIENT: 1.0 * k}
        for k, m in ((1, 3.3), (10, 3.0), (100, 3.5))
    ]
    row = compared("m", rounds, [{BARE: 4.0, GRADIENT: 1.0}] * 3, unit="flow", played=2)
    assert row.to_flow.value == pytest.approx(3.3)
    assert (row.to_flow.low, row.to_flow.high) == pytest.approx((3.0, 3.5))
    assert row.to_passes.value == pytest.approx(1.1)
    assert row.overhead == pytest.approx(0.1)
    assert (row.seconds, row.expected) == pytest.approx((30.0, 30.0))
    assert row.total("forward") == 4 and row.total("tangent") == 0


def test_a_step_is_compared_with_its_own_passes() -> None:
    rounds = [{"m": 3.3, BARE: 1.0}, {"m": 6.6, BARE: 1.0}, {"m": 1.1, BARE: 1.0}]
    row = compared("m", rounds, [{BARE: 3.0}, {BARE: 6.0}, {BARE: 1.0}], unit="m")
    assert (row.to_passes.low, row.to_passes.high) == pytest.approx((1.1, 1.1))
    assert row.passes == {BARE: pytest.approx(10 / 3)}


@pytest.fixture(scope="module")
def measured() -> Report:
    ticking = FakeClock()

    def clock() -> float:  # every other call ends a task: each takes one second
        ticking.now += 1
        return ticking.now

    return measure([CASES["flow"], CASES["consistency"]], repeats=3, clock=clock)


def test_measuring_puts_counts_prices_and_times_together(measured: Report) -> None:
    flow, consistency = measured.rows
    assert measured.prices == {BARE: 1, WORN: 1, GRADIENT: 1}
    assert flow.to_passes == Interval(value=1, low=1, high=1)
    assert consistency.passes == {BARE: 2, WORN: 1, GRADIENT: 1}
    assert (consistency.seconds, consistency.expected) == (1, 4)
    assert consistency.to_flow.value == 1 and consistency.to_passes.value == 0.25


def test_the_signal_handlers_are_as_before(measured: Report) -> None:
    assert signal.getsignal(signal.SIGINT) is HANDLER


def test_a_report_is_valid_json_and_never_half_written(
    measured: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "bench.json"
    reports.save(measured, path)
    read = json.loads(path.read_text())
    assert read["rows"][1]["passes"] == {
        "bare forward": 2,
        "adapter forward": 1,
        "adapter gradient": 1,
    }
    assert read["rows"][1]["to_passes"] == {"value": 0.25, "low": 0.25, "high": 0.25}
    assert {"commit", "machine", "versions"} <= read["provenance"].keys()
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(StoreError):
        reports.save(measured, path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["bench.json"]


def test_the_command_prints_a_table_and_writes_json(
    measured: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "measure", lambda of, **_: measured)
    monkeypatch.setattr(train, "peaks", lambda of, **_: {"flow": 10**8, "consistency": None})
    monkeypatch.setenv("COLUMNS", "80")
    path = tmp_path / "rows.json"
    result = CliRunner().invoke(app, ["bench", "train", "--only", "cons", "--json", str(path)])
    assert result.exit_code == 0
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["flow", "0", "1", "0", "1000", *["1.00", "1.00-1.00"] * 2, "100"] in lines
    assert ["consistency", "3", "1", "0", "1000"] in [line[:5] for line in lines]
    rows = json.loads(path.read_text())["rows"]
    assert [row["peak_bytes"] for row in rows] == [10**8, None]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "magic"], "only='magic' is not allowed: begin one of flow, progressive.guided"),
        (["--batch-size", "0"], "batch_size=0 is not allowed: use an integer from 1 to 1024"),
        (["--repeats", "2"], "repeats=2 is not allowed: use an integer from 3 to 1000"),
        (["--device", "abacus"], "device='abacus' is not allowed: choose auto, cpu or cuda"),
        (["--json", "nowhere/rows.json"], "json='nowhere/rows.json' is not allowed: name a file"),
    ],
)
def test_wrong_input_is_one_sentence(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["bench", "train", *arguments])
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == "" and not list(tmp_path.iterdir())


def test_repeats_are_checked_before_anything_is_built() -> None:
    with pytest.raises(BadInput, match="repeats=0"):
        measure([CASES["flow"]], repeats=0)


def test_the_bars_are_the_ratios_of_their_own_last_stages_to_their_passes(
    measured: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    ratios = {
        "consistency": Interval(value=0.25, low=0.2, high=0.3),
        "dmd2-2": Interval(value=1.2, low=1.1, high=1.3),
    }

    def of_the_last(of: Sequence[Recipe], **_: object) -> Report:
        row = replace(measured.rows[-1], name=of[-1].name, to_passes=ratios[of[-1].name])
        return replace(measured, rows=(measured.rows[0], row))

    monkeypatch.setattr(train, "measure", of_the_last)
    found = list(bars.BARS["bench"]())
    assert [bar.name for bar in found] == ["bench.consistency_step", "bench.dmd2_step"]
    assert [bar.interval for bar in found] == list(ratios.values())
    assert [(bar.value, bar.limit, bar.ok) for bar in found] == [
        (0.25, 1.10, True),
        (1.2, 1.10, False),
    ]
