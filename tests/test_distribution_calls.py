"""Network calls of every variant of DMD2, counted in a world of Gaussians."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from gaussian_world import GaussianField, gaussian_batches
from torch import Tensor, nn

from turbo_lab.field import Field
from turbo_lab.methods.dmd2 import DMD2
from turbo_lab.recipes import student_recipe
from turbo_lab.recipes.distribution import VARIANTS, calls_per_round
from turbo_lab.streams import Draw


class Counted(GaussianField):
    """A field that learns; with a gradient a call counts as three."""

    def __init__(self, tally: list[float]) -> None:
        super().__init__()
        self.tally = tally

    def forward(self, x_t: Tensor, t: Tensor, c: object) -> Tensor:
        self.tally.append(3 if torch.is_grad_enabled() else 1)
        return super().forward(x_t, t, c)


class Ratio(nn.Module):
    """A critic that learns; it is no network call."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.1))

    def forward(self, x_t: Tensor, t: Tensor, c: object) -> Tensor:
        return self.slope * x_t.sum(1)


def asked(tally: list[float], calls: float) -> Field:
    """A frozen field whose call counts as so many."""
    field = GaussianField(1.0).requires_grad_(False)

    def call(x_t: Tensor, t: Tensor, c: object) -> Tensor:
        tally.append(calls)
        with torch.no_grad():
            return field(x_t, t, c)

    return call


def calls(options: Mapping[str, object], monkeypatch: pytest.MonkeyPatch) -> float:
    """Calls per sample for one update of the student, each drawn step as often as the others."""
    tally: list[float] = []
    fields = {
        "student": Counted(tally),
        "fake": Counted(tally),
        "teacher": asked(tally, 2),
        "plain": asked(tally, 1),
        "critic": Ratio(),
    }
    method = DMD2(**fields, **options)  # type: ignore[arg-type]
    draw = Draw(seed=0, step=0, total=4)
    for k in range(method.steps):
        monkeypatch.setattr(Draw, "shared", lambda self, name, n, k=k: k % n)
        for turn in method.turns():
            for _ in range(1 if "student" in turn.moves else method.rival_updates):
                turn.loss(gaussian_batches(draw), draw)
    return sum(tally) / method.steps


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_calls_the_networks_as_often_as_its_budget_says(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = student_recipe(f"dmd2-{name}", steps=2).stages[0].options
    updates = int(str(options["rival_updates"]))
    said = calls_per_round(2, updates) * updates + VARIANTS[name].extra
    assert calls(options, monkeypatch) == said
