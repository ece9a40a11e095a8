"""The benchmark of training steps: what it counts, how it pairs, and what it writes."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from turbo_lab import bars
from turbo_lab.adapters import Worn
from turbo_lab.bench import report as reports
from turbo_lab.bench import train
from turbo_lab.bench.passes import Pass, counted_passes, probes
from turbo_lab.bench.report import Holding, Report, Sharing, compared
from turbo_lab.bench.sharing import as_copies, kept, on_shared_base, share, shares
from turbo_lab.bench.steps import Step, at_work, cases, example, planted
from turbo_lab.bench.train import interleaved, measure
from turbo_lab.claims import Interval
from turbo_lab.cli import app
from turbo_lab.errors import BadInput, StoreError
from turbo_lab.fit import Optimiser, Saving, Turn, fit
from turbo_lab.methods.flow import FlowMatching
from turbo_lab.recipes import Recipe
from turbo_lab.store import Checkpoints, Store
from turbo_lab.streams import Draw
from turbo_lab.testbeds.postcards import NetSize
from turbo_lab.training import workbench

SMALL = NetSize(layers=1, heads=1, head_width=16, text_width=16)
BARE, WORN = Pass("forward", False), Pass("forward", True)
GRADIENT, TANGENT = Pass("gradient", True), Pass("tangent", True)

HANDLER = signal.getsignal(signal.SIGINT)


def tiny(case: Recipe, **options: float | int | str) -> Recipe:
    """The same recipe on a network of one head, with other options of its method."""
    assert case.teacher is not None
    (stage,) = case.stages
    stage = stage.model_copy(update={"options": {**stage.options, **options}})
    teacher = case.teacher.model_copy(update={"net": SMALL})
    return case.model_copy(update={"net": SMALL, "teacher": teacher, "stages": (stage,)})


CASES = {case.name: tiny(case) for case in cases(batch_size=2)}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return planted(tmp_path_factory.mktemp("store"), CASES["flow"])


@pytest.fixture
def begun(store: Store) -> Iterator[Callable[[Recipe], Step]]:
    """Begin trainings; at the end of the test they are closed, the last one first."""
    steps: list[Step] = []

    def begin(case: Recipe) -> Step:
        steps.append(at_work(case, store, example(case, "cpu"), "cpu"))
        return steps[-1]

    yield begin
    for step in reversed(steps):
        step.close()


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


def test_the_bar_is_the_ratio_of_a_consistency_step_to_its_passes(
    measured: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "measure", lambda of, **_: measured)
    found = list(bars.BARS["bench"]())
    assert [bar.name for bar in found] == ["bench.consistency_step", "bench.dmd2_step"]
    for bar in found:
        assert (bar.value, bar.limit, bar.ok) == (0.25, 1.10, True)
        assert bar.interval is not None


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_a_peak_is_what_some_work_held_at_most() -> None:
    """In a process of its own, as in the benchmark: this one may hold what was freed before."""
    done = subprocess.run(
        [sys.executable, "-c", PEAKS], capture_output=True, text=True, check=True, timeout=120
    )
    peak, later = (int(line) / 2**20 for line in done.stdout.split())
    assert 90 < peak < 140
    assert later < 60  # an earlier, higher peak is forgotten


PEAKS = """
import torch
from turbo_lab.bench.memory import peak_above

def work():
    for megabytes in (96, 32):
        torch.ones(megabytes * 2**18)  # float32: 4 bytes each

print(peak_above(work))
print(peak_above(lambda: torch.ones(16 * 2**18)))
"""


@pytest.mark.slow
def test_memory_is_measured_in_processes_of_their_own() -> None:
    wide = [case for name, case in CASES.items() if name in ("direct-1", "direct-8")]
    found = train.peaks(wide)
    most, least = found["direct-8"], found["direct-1"]
    assert most is not None and least is not None
    assert most > least > 0  # eight unrolled graphs against one


# --- one shared base against three networks -----------------------------------------------------


@pytest.mark.parametrize("form", [on_shared_base, as_copies])
def test_what_is_kept_is_what_the_training_keeps(
    form: Callable[..., Step], store: Store, tmp_path: Path
) -> None:
    """Counted by a played loss; against the optimisers' states in a checkpoint of `fit`."""
    case = tiny(CASES["dmd2-2"])
    batch = example(case, "cpu")
    step = form(case, store, batch, "cpu")
    weights, gradients, optimiser = kept(step, batch)
    tensors = {t for net in step.networks for t in (*net.parameters(), *net.buffers())}
    assert weights == sum(t.nbytes for t in tensors)
    plan = {name: Optimiser(lr=1e-3) for name in step.objective.players}
    saving = Saving(checkpoints=Checkpoints(folder=tmp_path), every_steps=1)
    run = fit(
        step.objective, lambda draw: batch, steps=1, batch_size=2, seed=0, optimisers=plan,
        saving=saving,
    )  # fmt: skip
    list(run)
    newest = saving.checkpoints.latest()
    assert newest is not None
    states = {k: v for k, v in newest[1].items() if k.startswith("adam/")}
    assert optimiser == sum(v.nbytes for v in states.values())
    firsts = {k: v.nbytes for k, v in states.items() if k.endswith("/exp_avg")}
    assert gradients == max(
        sum(n for k, n in firsts.items() if k.startswith(f"adam/{name}/")) for name in plan
    )


def test_copies_take_the_steps_that_adapters_take(
    begun: Callable[[Recipe], Step], store: Store
) -> None:
    case = tiny(CASES["dmd2-2"], rival_updates=2)
    worn = begun(case)()
    step = as_copies(case, store, example(case, "cpu"), "cpu")
    bare = step()
    step.close()
    assert len(step.networks) == 3
    assert bare == {
        Pass("gradient", False): worn[GRADIENT],
        BARE: worn[BARE] + worn[WORN],
    }


def test_only_methods_with_a_fake_score_are_compared_with_copies() -> None:
    assert shares([CASES["flow"], CASES["consistency"]]) == ()


def test_shares_say_what_they_compare() -> None:
    adapters = Holding(weights=100, gradients=1, optimiser=4, peak=120)
    copies = Holding(weights=300, gradients=100, optimiser=600, peak=None)
    found = Sharing(name="m", parameters=10**6, batch_size=1, shared=adapters, copies=copies)
    assert found.exact == pytest.approx(0.105) and found.peak is None
    assert "1.0M parameters" in str(found) and "(10%)" in str(found) and "unknown" in str(found)
    assert found.record()["exact_share"] == found.exact


@pytest.mark.slow
def test_sharing_is_measured_in_processes_of_their_own() -> None:
    wide = tiny(CASES["dmd2-2"])
    found = share(wide)
    assert found.exact < 1 and found.shared.weights < found.copies.weights
    assert found.shared.peak is not None and found.shared.peak > 0
