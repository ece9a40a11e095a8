"""Every method of the registry keeps the same promises, in a world where all is closed form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from gaussian_world import (
    GaussianField,
    GaussianMap,
    gaussian_batches,
    gaussian_pairs,
)

from turbo_lab.field import frozen
from turbo_lab.fit import Batch, Objective, fit
from turbo_lab.methods import METHODS
from turbo_lab.methods.consistency import Consistency
from turbo_lab.methods.continuous import ContinuousConsistency
from turbo_lab.methods.direct import Direct
from turbo_lab.methods.dmd2 import DMD2
from turbo_lab.methods.flow import FlowMatching
from turbo_lab.methods.progressive import Progressive
from turbo_lab.methods.tdm import TDM
from turbo_lab.methods.transition import Transition
from turbo_lab.optimisers import Optimiser
from turbo_lab.streams import Draw

TEACHER = frozen(GaussianField().requires_grad_(False))


@dataclass(frozen=True)
class Case:
    """How a method is built in the Gaussian world, and the student that is its exact answer."""

    build: Callable[[GaussianField], Objective]
    student: type[GaussianField] = GaussianField
    batches: Callable[[Draw], Batch] = gaussian_batches


def dmd2(student: GaussianField) -> DMD2:
    """One step, with the fake score that is exact for this student."""
    fake = GaussianField(student.mean.item(), student.log_std.exp().item())
    return DMD2(student=student, teacher=TEACHER, fake=fake, times=(1.0,))


def tdm(student: GaussianField) -> TDM:
    """The same; more steps than one have their own tests."""
    fake = GaussianField(student.mean.item(), student.log_std.exp().item())
    return TDM(student=student, teacher=TEACHER, fake=fake, times=(1.0,))


class OneStepHead(GaussianField):
    """The flow head of N(m, s^2 I) that is exact for a rollout of one step from s = 1.

    The difference has mean v and standard deviation ``s / sigma_t``, so inner noise y_1 leads to
    ``v + s / sigma_t y_1``; the method gives v = m, and ``sqrt(V)`` as the unit of the head.
    """

    def forward(self, y_s: torch.Tensor, s: torch.Tensor, known: object) -> torch.Tensor:
        _, t, _, _ = known  # type: ignore[misc]
        t = t[:, None]
        std = self.log_std.exp()
        spread = std / ((1 - t) ** 2 * std**2 + t**2).sqrt()
        return spread * ((1 - t) ** 2 + t**2).sqrt() * y_s


BUILD: dict[str, Case] = {
    "flow": Case(lambda student: FlowMatching(student=student)),
    # One teacher step per student step: the chord is the teacher's velocity.
    "progressive": Case(
        lambda student: Progressive(student=student, teacher=TEACHER, steps=50, teacher_steps=50)
    ),
    # A fine grid and a second-order solver, so that the solver's own error is out of sight.
    "consistency": Case(
        lambda student: Consistency(
            student=student, teacher=TEACHER, grid_steps=200, solver="heun"
        ),
        GaussianMap,
    ),
    "continuous": Case(
        lambda student: ContinuousConsistency(student=student, teacher=TEACHER), GaussianMap
    ),
    # At t = 1 inner noise read off the state is the noise of the path: the path's own end.
    "transition": Case(
        lambda student: Transition(
            student=student, teacher=TEACHER, head=OneStepHead(), times=(1.0,), inner_steps=1
        ),
        GaussianMap,
    ),
    "dmd2": Case(dmd2, GaussianMap),
    "tdm": Case(tdm, GaussianMap),
    "direct": Case(lambda student: Direct(student=student, steps=1), GaussianMap, gaussian_pairs),
}


def gradient(
    case: Case, student: GaussianField, n: int, seed: int = 0, method: Objective | None = None
) -> torch.Tensor:
    """Per-group gradients ``[50, 2]`` of the student's turns with respect to (mean, log std)."""
    draw = Draw(seed=seed, step=0, total=n)
    parameters = [student.mean, student.log_std]
    rows = []
    for turn in (method or case.build(student)).turns():
        if "student" not in turn.moves:
            continue
        loss = sum(turn.loss(case.batches(draw), draw).values())
        for part in loss.reshape(50, -1).mean(1):  # 50 groups: their spread is the error bar
            grads = torch.autograd.grad(part, parameters, retain_graph=True)
            rows.append(torch.stack(grads))
    return torch.stack(rows)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_built_for_the_gaussian_world(name: str) -> None:
    assert name in BUILD, "give the new method a builder above, so that it is tested"


@pytest.mark.parametrize("name", METHODS)
def test_the_exact_answer_is_stationary(name: str) -> None:
    case = BUILD[name]
    student = case.student()
    groups = gradient(case, student, n=20_000)
    error = groups.std(0) / len(groups) ** 0.5
    # The second bound is for methods whose loss is zero, not only its mean: rounding is left.
    assert bool(((groups.mean(0).abs() < 4 * error) | (groups.mean(0).abs() < 1e-4)).all())


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("mean", "std"), [(1.9, 0.7), (1.1, 0.7), (1.5, 1.0), (1.5, 0.5)])
def test_a_perturbed_student_is_pointed_home(name: str, mean: float, std: float) -> None:
    case = BUILD[name]
    slope = gradient(case, case.student(mean, std), n=20_000).mean(0)
    away = torch.tensor([mean - 1.5, std - 0.7])
    moved = away.abs().argmax()
    assert slope[moved] * away[moved] > 0


@pytest.mark.parametrize("name", METHODS)
def test_losses_are_per_sample_finite_and_the_same_for_any_micro_batch(name: str) -> None:
    case = BUILD[name]
    for turn in case.build(case.student()).turns():
        draw = Draw(seed=0, step=3, total=12)
        whole = turn.loss(case.batches(draw), draw)
        parts = [turn.loss(case.batches(d), d) for d in (draw.rows(0, 5), draw.rows(5, 12))]
        for term, loss in whole.items():
            assert loss.shape == (12,)
            assert bool(loss.isfinite().all())
            torch.testing.assert_close(
                loss, torch.cat([part[term] for part in parts]), rtol=1e-4, atol=1e-6
            )


@pytest.mark.parametrize("name", METHODS)
def test_two_runs_of_one_seed_give_the_same_bits(name: str) -> None:
    case = BUILD[name]
    ends = []
    for _ in range(2):
        student = case.student(0.5, 1.2)
        method = case.build(student)
        plan = {player: Optimiser(lr=0.01) for player in method.players}
        list(fit(method, case.batches, steps=10, batch_size=16, seed=4, optimisers=plan))
        ends.append(torch.stack([student.mean, student.log_std]).detach())
    assert torch.equal(*ends)


def test_flow_drops_conditions_at_its_rate() -> None:
    seen = []

    class Watching(GaussianField):
        def forward(self, x_t: torch.Tensor, t: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
            seen.append(c)
            return super().forward(x_t, t, c)

    null = torch.full((1, 1), 9)
    draw = Draw(seed=0, step=0, total=20_000)
    FlowMatching(student=Watching(), null=null, drop=0.1).loss(gaussian_batches(draw), draw)
    share = float((seen[0] == 9).float().mean())
    assert share == pytest.approx(0.1, abs=4 * (0.1 * 0.9 / 20_000) ** 0.5)
