"""How far phased consistency alone comes, and which of its phases loses the signs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from turbo_lab.errors import BadInput
from turbo_lab.field import Condition
from turbo_lab.lab import open_lab
from turbo_lab.recipes import EARLY, resolve
from turbo_lab.recipes.distribution import CALLS, SECOND
from turbo_lab.recipes.warm import pcm
from turbo_lab.stages import check_stages
from turbo_lab.studies import pcm_length


def test_a_longer_student_is_that_of_the_notebook_but_for_length_rank_and_rates() -> None:
    long, short = pcm_length.longer(4 * CALLS["quick"], rank=32), pcm("quick", 0)
    assert long.teacher == short.teacher and long.times == short.times
    (now,), (then,) = long.stages, short.stages
    changed = {k for k, v in now.options.items() if then.options.get(k, "euler") != v}
    assert not changed and now.steps == pytest.approx(4 * then.steps, abs=4)
    assert long.adapter is not None and (long.adapter.rank, long.adapter.alpha) == (32, 32)


def test_it_follows_the_teacher_that_is_named() -> None:
    early, late = (pcm_length.longer(1000, rank=8, teacher=name) for name in (EARLY, "teacher"))
    assert early.teacher == pcm("quick", 0).teacher == resolve(EARLY)
    assert late.teacher == resolve("teacher") != early.teacher
    with pytest.raises(BadInput, match="nobody"):
        pcm_length.longer(1000, rank=8, teacher="nobody")


def test_heun_is_paid_from_the_same_calls() -> None:
    euler, heun = (
        pcm_length.longer(100_000, rank=8, solver=name, grid_steps=8) for name in ("euler", "heun")
    )
    assert heun.stages[0].steps * 8 == pytest.approx(euler.stages[0].steps * 6, rel=0.02)
    assert {s.options["grid_steps"] for s in (*euler.stages, *heun.stages)} == {8}


def test_a_critic_is_paid_from_the_same_calls() -> None:
    plain = pcm_length.longer(100_000, rank=8)
    judged = pcm_length.longer(100_000, rank=8, adversarial=0.1)
    check_stages(judged)
    assert judged.stages[0].steps * 15 == pytest.approx(plain.stages[0].steps * 6, rel=0.02)
    assert set(judged.stages[0].rates) == {"student", "critic"}


def test_a_critic_may_come_later_and_judge_the_first_phase_alone() -> None:
    plain = pcm_length.longer(50_000, rank=8)
    both = pcm_length.longer(50_000, rank=8, adversarial=0.1, judged=20_000)
    check_stages(both)
    first, second = both.stages
    assert first == plain.stages[0]
    assert second.options["adversarial_above"] == both.times[1] == SECOND
    assert second.steps == int(20_000 / (15 * second.batch_size))
    rate = first.rates["student"].lr
    assert (second.rates["student"].lr, second.rates["critic"].lr) == (rate / 2, rate)
    with pytest.raises(BadInput, match="judged=20000"):
        pcm_length.longer(50_000, rank=8, judged=20_000)


@pytest.mark.parametrize("calls", [0, -5.0, float("inf")])
def test_calls_that_are_none_are_refused(calls: float) -> None:
    with pytest.raises(BadInput, match="calls="):
        pcm_length.longer(calls, rank=8)


def _ends(x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
    """Straight to zero: x = z t, the exact path of postcards that are all grey."""
    del c
    return x_t / t.view(-1, 1, 1, 1)


def test_on_a_straight_path_it_does_not_matter_where_it_is_cut() -> None:
    z = torch.randn(5, 12, 16, 16, generator=torch.Generator().manual_seed(0))
    tokens = torch.zeros(5, 5, dtype=torch.long)
    half = pcm_length.walked(_ends, torch.tensor([1.0, SECOND]), z, tokens, batch=2)
    assert torch.allclose(half, SECOND * z, atol=1e-6)
    done = pcm_length.walked(_ends, torch.tensor([SECOND, 0.3, 0.0]), half, tokens, batch=3)
    assert torch.allclose(done, torch.zeros_like(z), atol=1e-6)


@pytest.mark.slow
def test_bodies_are_lost_by_who_takes_the_last_phase_in_one_step() -> None:
    """The plain teacher has learnt no jump; small steps mend a bad first one, nothing a last."""
    lab = open_lab(device="cpu", teacher=EARLY)
    found = pcm_length.by_phase(lab, lab.testbed.net, captions=48, steps=8)
    bodies = found["whole_body"]
    mended = min(bodies["teacher", "teacher"], bodies["student", "teacher"])
    assert mended > bodies["teacher", "student"] + 0.3
    assert bodies["teacher", "student"] > bodies["student", "student"]
