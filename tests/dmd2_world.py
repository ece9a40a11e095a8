"""DMD2 in the Gaussian world of `gaussian_world`, for the tests of the method and its options."""

from __future__ import annotations

from gaussian_world import GaussianField
from torch import Tensor

from turbo_lab.field import Field, frozen
from turbo_lab.methods.dmd2 import DMD2
from turbo_lab.methods.kinds import TrainableField
from turbo_lab.optimisers import Optimiser
from turbo_lab.streams import Draw

TEACHER = frozen(GaussianField().requires_grad_(False))
DRAW = Draw(seed=3, step=5, total=64)
WITH_A_LEARNED_FAKE = {
    "student": Optimiser(lr=0.04, final=0.05),
    "fake": Optimiser(lr=0.05, betas=(0.0, 0.99), final=0.05),
}
"""Rates at which 320 rounds of 64, four for each update of the student, bring it home."""


def build(
    student: TrainableField, *, fake: TrainableField | None = None, **options: object
) -> DMD2:
    """DMD2 in the Gaussian world; the fake is exact for a one-step GaussianMap."""
    if fake is None:
        assert isinstance(student, GaussianField)
        fake = GaussianField(student.mean.item(), student.log_std.exp().item())
    settings = {"teacher": TEACHER, "times": (1.0,), **options}
    return DMD2(student=student, fake=fake, **settings)  # type: ignore[arg-type]


def draw_of_step(k: int, steps: int, total: int = 64) -> Draw:
    """The first draw whose step is k."""
    draws = (Draw(seed=0, step=i, total=total) for i in range(200))
    return next(draw for draw in draws if draw.shared("step", steps) == k)


class Recorded:
    """A field that keeps its calls."""

    def __init__(self, field: Field) -> None:
        self.field = field
        self.calls: list[tuple[Tensor, Tensor]] = []

    def __call__(self, x_t: Tensor, t: Tensor, c: object) -> Tensor:
        self.calls.append((x_t, t))
        return self.field(x_t, t, c)
