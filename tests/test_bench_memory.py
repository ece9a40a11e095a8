"""Memory of training steps: peaks, and one shared base against three networks."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from bench_world import BARE, CASES, GRADIENT, WORN, tiny, trainings

from turbo_lab.bench import train
from turbo_lab.bench.passes import Pass
from turbo_lab.bench.report import Holding, Sharing
from turbo_lab.bench.sharing import as_copies, kept, on_shared_base, share, shares
from turbo_lab.bench.steps import Step, example, planted
from turbo_lab.checkpoints import Checkpoints
from turbo_lab.fit import Saving, fit
from turbo_lab.optimisers import Optimiser
from turbo_lab.recipes import Recipe
from turbo_lab.store import Store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return planted(tmp_path_factory.mktemp("store"), CASES["flow"])


@pytest.fixture
def begun(store: Store) -> Iterator[Callable[[Recipe], Step]]:
    with trainings(store) as begin:
        yield begin


# --- peaks ---------------------------------------------------------------------------------------


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
