"""Times of students as settings of diffusers' own scheduler, which is asked what it visits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from turbo_lab.errors import BadInput
from turbo_lab.methods.progressive import Progressive
from turbo_lab.path import grid_from_times, time_grid
from turbo_lab.recipes import FAMILIES, student_recipe
from turbo_lab.recipes.qwen_image import QWEN_RECIPES, resolve_qwen
from turbo_lab.schedules import PUBLISHED
from turbo_lab.stock_times import settings_for, stock_config, student_eta, student_times


def stock_sigmas(config: dict[str, Any], steps: int, sigmas: list[float] | None = None) -> Tensor:
    """Times of diffusers' own scheduler, called as QwenImagePipeline calls it."""
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift

    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    c = scheduler.config
    names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    mu = calculate_shift(4096, *(c[name] for name in names))
    given = np.linspace(1.0, 1 / steps, steps) if sigmas is None else sigmas
    scheduler.set_timesteps(sigmas=given, mu=mu)
    return scheduler.sigmas


@settings(max_examples=60)
@given(st.integers(1, 12), st.floats(0.8, 8.0), st.one_of(st.none(), st.floats(0.06, 0.8)))
def test_every_shifted_and_stretched_grid_is_found(
    steps: int, shift: float, terminal: float | None
) -> None:
    grid = time_grid(steps, shift=shift, terminal=terminal if steps > 1 else None)
    times = grid[:-1].tolist()
    assert settings_for(times) is not None
    torch.testing.assert_close(
        stock_sigmas(stock_config(times, 0.0), steps), grid, rtol=0, atol=2e-6
    )


@given(st.floats(0.06, 0.99))
def test_any_second_time_has_its_settings(second: float) -> None:
    sigmas = stock_sigmas(stock_config((1.0, second), 0.0), 2)
    torch.testing.assert_close(sigmas, torch.tensor([1.0, second, 0.0]), rtol=0, atol=2e-6)


@given(st.floats(0.06, 0.98), st.floats(0.06, 0.98))
def test_three_steps_have_settings_within_a_range(a: float, b: float) -> None:
    low, high = sorted((a, b))
    if high - low < 0.01:
        return
    found = settings_for((1.0, high, low))
    ratio = (1 - high) / (1 - low)
    if abs(ratio - 0.25) > 1e-2:
        assert (found is not None) == (ratio > 0.25)


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: row.name)
def test_published_times_have_settings_as_far_as_their_digits_go(row: Any) -> None:
    """Four digits of a shifted grid are no shifted grid; then times are handed over as sigmas."""
    exact = row.schedule.grid(row.steps, 1024)[:-1].tolist()
    assert settings_for(exact) is not None
    config = stock_config(row.sigmas, 0.0)
    given = None if settings_for(row.sigmas) else list(row.sigmas)
    sigmas = stock_sigmas(config, row.steps, given)
    torch.testing.assert_close(sigmas, grid_from_times(row.sigmas), rtol=0, atol=1e-6)


def test_no_setting_gives_these_times_and_then_the_scheduler_keeps_what_it_is_given() -> None:
    for times in ((1.0, 0.9, 0.2, 0.1), (1.0, 0.99, 0.5), (0.9, 0.5), (1.0, 1e-20)):
        assert settings_for(times) is None
        sigmas = stock_sigmas(stock_config(times, 0.0), len(times), list(times))
        torch.testing.assert_close(sigmas, grid_from_times(times), rtol=0, atol=1e-6)
    with pytest.raises(BadInput, match="eta"):
        stock_config((1.0, 0.5), 0.5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stage_tells_how_the_lab_samples_its_family(family: str) -> None:
    steps = 4 if family == "dmd2-long" else 2  # the one that has no student of two
    stage = student_recipe(family, steps=steps).stages[-1]
    recipe = student_recipe(family, steps=steps)
    assert student_eta(stage) == FAMILIES[family].eta
    expected = recipe.times or tuple(time_grid(steps)[:-1].tolist())
    assert student_times(stage, steps) == pytest.approx(expected)
    if family.removesuffix("-more") not in ("consistency", "continuous"):
        assert student_times(stage) == student_times(stage, steps)
        with pytest.raises(BadInput, match="steps"):
            student_times(stage, 3)


@pytest.mark.parametrize("name", QWEN_RECIPES)
def test_the_recipes_of_the_factory_tell_their_times(name: str) -> None:
    stage = resolve_qwen(name, size=1024).stages[-1]
    steps = None if name not in ("consistency", "continuous") else 4
    times = student_times(stage, steps)
    grid_from_times(times)
    if name == "progressive":
        options: dict[str, Any] = dict(stage.options)
        method = Progressive(student=None, teacher=None, **options)  # type: ignore[arg-type]
        grid = time_grid(options["teacher_steps"], shift=options["shift"])
        assert times == pytest.approx(grid[method.edges[:-1]].tolist())
    if name == "pcm-dmd2-2":
        assert times == (1.0, 0.7155)
