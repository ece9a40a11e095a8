"""Students on points: exact paths against 1-D transport, what is cached, and what they cost."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy.stats import norm
from torch import Tensor

from turbo_lab import point_students
from turbo_lab.errors import BadInput, MissingPiece
from turbo_lab.field import counted, mixture
from turbo_lab.point_students import (
    TRAJECTORY,
    PointRecipe,
    base_field,
    base_recipe,
    distilled,
    exact_pairs,
    path_end,
    sampled,
    student_recipe,
    trained,
    workbench,
)
from turbo_lab.recipes import Pairs, Rates, Stage
from turbo_lab.store import Store
from turbo_lab.streams import Draw
from turbo_lab.testbeds.points import points
from turbo_lab.training import Workbench

TWO = mixture(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), 0.2, torch.tensor([0.3, 0.7]))


def transport(z: np.ndarray) -> np.ndarray:
    """The exact map of TWO: in one dimension a flow keeps quantiles, across it scales by s."""
    at = np.linspace(-3, 3, 60_001)
    cdf = 0.3 * norm.cdf((at + 1) / 0.2) + 0.7 * norm.cdf((at - 1) / 0.2)
    return np.stack([np.interp(norm.cdf(z[:, 0]), cdf, at), 0.2 * z[:, 1]], 1)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(cache=tmp_path)


def weights(net: torch.nn.Module) -> Tensor:
    return torch.cat([p.flatten() for p in net.parameters()])


def forbid_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def fit(*_: Any, **__: Any) -> Iterator[None]:
        raise AssertionError("something was trained")

    monkeypatch.setattr(point_students, "fit", fit)


def test_the_end_of_an_exact_path_is_the_transport_map() -> None:
    z = torch.randn(400, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    off = (path_end(TWO, z) - torch.from_numpy(transport(z.numpy()))).norm(dim=1)
    # Where the map jumps, from one mode to the other, its ends are steeper than any solver.
    assert off.quantile(0.95) < 2e-3
    assert (path_end(TWO, z, steps=128) - path_end(TWO, z)).norm(dim=1).quantile(0.95) < 2e-3


def test_pairs_are_exact_and_drawn_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    z, x = exact_pairs("ring8", Pairs(n=32, steps=64), store=store)
    assert torch.allclose(x, path_end(points("ring8").teacher, z), atol=1e-5)
    monkeypatch.setattr(point_students, "path_end", forbid_training)
    again, _ = exact_pairs("ring8", Pairs(n=32, steps=64), store=store)
    assert torch.equal(z, again)


def test_one_euler_step_of_the_exact_field_is_the_mean_of_the_data() -> None:
    for name in ("ring8", "rare"):
        teacher = points(name).teacher
        x = sampled(teacher, steps=1, eta=0, n=16, seed=0)
        mean = (teacher.weights / teacher.weights.sum()) @ teacher.means
        assert torch.allclose(x.double(), mean.expand(16, 2), atol=1e-6)


def test_a_student_is_the_same_from_its_recipe_alone(tmp_path: Path) -> None:
    recipe = student_recipe("consistency", steps=1, profile="smoke", seed=3)
    one = distilled(recipe, store=Store(cache=tmp_path / "a"))
    two = distilled(recipe, store=Store(cache=tmp_path / "b"))
    other = distilled(recipe.model_copy(update={"seed": 4}), store=Store(cache=tmp_path / "a"))
    assert torch.equal(weights(one), weights(two))
    assert not torch.equal(weights(one), weights(other))


def test_what_is_in_the_store_is_not_trained_again(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes = [student_recipe(family, steps=2, profile="smoke") for family in TRAJECTORY]
    first = [weights(distilled(recipe, store=store)) for recipe in recipes]
    forbid_training(monkeypatch)
    for recipe, before in zip(recipes, first, strict=True):
        assert torch.equal(weights(distilled(recipe, store=store)), before)
    base_field(profile="smoke", store=store)


def test_an_artefact_holds_the_average_and_not_the_last_weights(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    benches: list[Workbench] = []

    def kept_bench(*given: Any) -> Workbench:
        benches.append(workbench(*given))
        return benches[-1]

    monkeypatch.setattr(point_students, "workbench", kept_bench)
    kept = trained(base_recipe(profile="smoke"), store=store).tensors()
    average, student = (p.state_dict() for p in (benches[0].average, benches[0].student))
    assert kept.keys() == average.keys()
    assert all(torch.equal(v, average[k].half()) for k, v in kept.items())
    assert any(not torch.equal(v, student[k].half()) for k, v in kept.items())


def test_a_chain_goes_on_from_its_last_stage(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    trained(student_recipe("progressive", steps=8, profile="smoke"), store=store)
    stages = []
    made = point_students._make
    monkeypatch.setattr(
        point_students,
        "_make",
        lambda recipe, *rest: (stages.append(len(recipe.stages)), made(recipe, *rest)),
    )
    trained(student_recipe("progressive", steps=2, profile="smoke"), store=store)
    assert stages == [3, 4]


def test_students_start_as_the_base_and_are_taught_by_the_stage_before(store: Store) -> None:
    chain = student_recipe("progressive", steps=8, profile="smoke")
    with pytest.raises(MissingPiece, match="points/progressive"):
        workbench(chain, store)
    distilled(chain, store=store)
    base = base_field(profile="smoke", store=store)
    first = workbench(chain.before, store)  # type: ignore[arg-type]
    assert torch.equal(weights(first.student), weights(base))  # type: ignore[arg-type]
    second = workbench(chain, store)
    before = distilled(chain.before, store=store)  # type: ignore[arg-type]
    x, t, c = torch.randn(5, 2), torch.rand(5), torch.full((5,), -1)
    assert torch.equal(second.pieces["teacher"](x, t, c), before(x, t, c))  # type: ignore[operator]
    assert torch.equal(first.pieces["teacher"](x, t, c), points("ring8").teacher(x, t, None))  # type: ignore[operator]


@pytest.mark.parametrize(
    ("family", "calls"),
    [("direct", 12), ("progressive", 5), ("consistency", 5), ("continuous", 6)],
)
def test_methods_spend_equal_network_calls(family: str, calls: int, store: Store) -> None:
    recipe = student_recipe(family, steps=4, profile="smoke")
    first = recipe.model_copy(update={"stages": recipe.stages[:1]})
    distilled(recipe.base, store=store)  # type: ignore[arg-type]
    bench, stage = workbench(first, store), first.stages[0]
    spent = 0.0

    def count(net: torch.nn.Module, inputs: tuple[Any, ...], out: Tensor) -> None:
        nonlocal spent
        x = inputs[0]
        tangent = torch._C._functorch.is_functorch_wrapped_tensor(x)
        spent += len(x) * (3 if out.requires_grad else 2 if tangent else 1)

    bench.student.register_forward_hook(count)  # type: ignore[attr-defined]
    teacher = counted(points("ring8").teacher)
    if "teacher" in bench.pieces:
        bench.pieces["teacher"] = teacher  # type: ignore[index]
    draw = Draw(seed=0, step=10_000, total=stage.batch_size)
    bench.objective(stage).turns()[0].loss(bench.batches(draw), draw)
    assert (spent + teacher.images) / stage.batch_size == calls

    quick = student_recipe(family, steps=1, profile="quick")
    one_call = calls / 4 if family == "direct" else calls
    total = sum(s.steps * s.batch_size for s in quick.stages) * one_call
    shared = 4 if family == "direct" else 1  # a student for each number of steps
    assert total * shared == pytest.approx(point_students.CALLS["quick"], rel=0.01)


def test_a_base_comes_near_the_exact_velocity(store: Store) -> None:
    stage = base_recipe().stages[0].model_copy(update={"steps": 120, "batch_size": 64})
    recipe = base_recipe().model_copy(update={"stages": (stage,)})
    net, teacher = distilled(recipe, store=store), points("ring8").teacher
    z = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
    t, c = torch.full((500,), 0.7), torch.full((500,), -1)
    x_t = 0.3 * points("ring8").real(500, seed=1).x + 0.7 * z
    exact = teacher(x_t, t, c)
    error = (net(x_t, t, c) - exact).square().mean() / exact.var()
    untrained = points("ring8").spawn("base")(x_t, t, c)
    assert error < 0.1 * (untrained - exact).square().mean() / exact.var()


def test_any_class_is_minus_one_or_none(store: Store) -> None:
    base = base_field(profile="smoke", store=store)
    x, t, any_class = torch.randn(6, 2), torch.rand(6), torch.full((6,), -1)
    for field in (base, points("ring8").teacher):
        assert torch.equal(field(x, t, None), field(x, t, any_class))


def test_bad_recipes_are_refused_before_anything_runs() -> None:
    with pytest.raises(BadInput, match="family"):
        student_recipe("magic", steps=1)
    with pytest.raises(BadInput, match="steps=3"):
        student_recipe("direct", steps=3)
    with pytest.raises(BadInput, match="steps=5"):
        student_recipe("progressive", steps=5)
    with pytest.raises((BadInput, ValidationError), match="world"):
        base_recipe(world="mars")
    guided = Stage(method="flow", steps=1, rates={"student": Rates(lr=1e-3)}, guidance_scale=4)
    with pytest.raises((BadInput, ValidationError), match="guidance_scale"):
        PointRecipe(name="x", stages=(guided,))
