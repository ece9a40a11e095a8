"""The path: identities, finiteness, and the times of diffusers' scheduler."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from turbo_lab.errors import BadInput
from turbo_lab.path import (
    TerminalWarning,
    expand,
    grid_from_times,
    logit_normal_times,
    mix,
    qwen_mu,
    score,
    secant,
    shift_from_mu,
    shift_time,
    split,
    step,
    stretch,
    time_grid,
    velocity,
)

TIMES = torch.tensor([0.0, 0.1, 0.7155, 1.0])


def pair(dtype: torch.dtype = torch.float64, tail: tuple[int, ...] = (3, 4, 4)):
    g = torch.Generator().manual_seed(0)
    x, z = torch.randn(2, len(TIMES), *tail, generator=g, dtype=torch.float64).to(dtype)
    return x, z


# --- the path -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tail", [(), (2,), (3, 4, 4)])
def test_split_inverts_mix(tail: tuple[int, ...]) -> None:
    x, z = pair(tail=tail)
    x_hat, z_hat = split(mix(x, z, TIMES), velocity(x, z), TIMES)
    torch.testing.assert_close(x_hat, x)
    torch.testing.assert_close(z_hat, z)


def test_mix_inverts_split() -> None:
    x_t, v = pair()
    x_hat, z_hat = split(x_t, v, TIMES)
    torch.testing.assert_close(mix(x_hat, z_hat, TIMES), x_t)
    torch.testing.assert_close(velocity(x_hat, z_hat), v)


def test_ends_of_the_path_are_data_and_noise() -> None:
    x, z = pair(torch.float32)
    assert torch.equal(mix(x, z, 0.0), x)
    assert torch.equal(mix(x, z, 1.0), z)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_finite_at_the_ends_in_every_dtype(dtype: torch.dtype, eta: float) -> None:
    x, z = pair(dtype)
    x_t, v = mix(x, z, TIMES), velocity(x, z)
    for u in (0.0, 0.5, 1.0):
        moved = step(x_t, v, TIMES, u, eta, eps=z)
        assert moved.isfinite().all()
        assert moved.dtype == torch.float32


def test_half_precision_does_not_move_times() -> None:
    x = torch.zeros(1, 2, dtype=torch.bfloat16)
    assert expand(0.7155, x).item() == torch.tensor(0.7155).item()


def test_score_of_pure_noise_is_that_of_a_standard_normal() -> None:
    x, z = pair()
    torch.testing.assert_close(score(z, velocity(x, z), 1.0), -z)


def test_step_without_fresh_noise_is_euler_bit_for_bit() -> None:
    x_t, v = pair(torch.float32)
    t, u = torch.tensor(0.9), torch.tensor(0.75)
    assert torch.equal(step(x_t, v, t, u), x_t + (u - t) * v)


def test_step_with_only_fresh_noise_predicts_and_renoises() -> None:
    x_t, v = pair()
    eps = torch.randn_like(x_t)
    x_hat, _ = split(x_t, v, TIMES)
    torch.testing.assert_close(step(x_t, v, TIMES, 0.4, 1.0, eps), 0.6 * x_hat + 0.4 * eps)


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.8, 1.0])
def test_step_keeps_the_marginal_for_every_eta(eta: float) -> None:
    """With the true (x, z), x_u has mean (1-u) x and noise of standard deviation u."""
    g = torch.Generator().manual_seed(1)
    n, t, u = 200_000, 0.8, 0.5
    x = torch.full((n, 1), 2.0)
    z, eps = torch.randn(2, n, 1, generator=g)
    x_u = step(mix(x, z, t), velocity(x, z), t, u, eta, eps)
    assert x_u.mean().item() == pytest.approx((1 - u) * 2, abs=5 * u / math.sqrt(n))
    assert x_u.std().item() == pytest.approx(u, abs=5 * u / math.sqrt(2 * n))


def test_step_to_zero_needs_no_noise_and_lands_on_the_prediction() -> None:
    x_t, v = pair()
    torch.testing.assert_close(step(x_t, v, TIMES, 0.0, 1.0), split(x_t, v, TIMES)[0])


def test_step_refuses_missing_noise_and_wrong_eta() -> None:
    x_t, v = pair()
    with pytest.raises(BadInput, match=r"eps=None .* eta=1"):
        step(x_t, v, 1.0, 0.5, 1.0)
    with pytest.raises(BadInput, match=r"eta=1\.5"):
        step(x_t, v, 1.0, 0.5, 1.5, x_t)


@given(t=st.floats(0.01, 1.0), part=st.floats(0.0, 0.99))
@settings(max_examples=50, deadline=None)
def test_secant_undoes_a_step(t: float, part: float) -> None:
    x_t, v = pair()
    u = part * t
    torch.testing.assert_close(
        secant(x_t, step(x_t, v, t, u), t, u), v, rtol=1e-9, atol=1e-9 / (t - u)
    )


def test_secant_of_two_steps_is_their_weighted_mean() -> None:
    x_t, v1 = pair()
    v2 = v1.flip(0)
    x_s = step(x_t, v1, 1.0, 0.7)
    x_u = step(x_s, v2, 0.7, 0.1)
    torch.testing.assert_close(secant(x_t, x_u, 1.0, 0.1), (0.3 * v1 + 0.6 * v2) / 0.9)


@pytest.mark.parametrize("t", [torch.rand(3), torch.rand(4, 1)])
def test_times_that_do_not_fit_the_batch_are_refused(t: torch.Tensor) -> None:
    with pytest.raises(BadInput, match="B = 4"):
        mix(*pair(), t)


def test_derivative_of_mix_is_the_velocity() -> None:
    x, z = pair()
    t = TIMES.double()
    _, slope = torch.func.jvp(lambda t: mix(x, z, t), (t,), (torch.ones_like(t),))
    torch.testing.assert_close(slope, velocity(x, z))


# --- times --------------------------------------------------------------------------------------


@given(t=st.floats(0.0, 1.0), s=st.floats(0.05, 20.0))
@settings(max_examples=100, deadline=None)
def test_shift_is_a_group(t: float, s: float) -> None:
    assert shift_time(shift_time(t, s), 1 / s) == pytest.approx(t, abs=1e-9)
    assert shift_time(0.0, s) == 0
    assert shift_time(1.0, s) == pytest.approx(1)


def scheduler_times(steps: int, mu: float | None = None, **config: float | bool) -> torch.Tensor:
    """The times of diffusers' scheduler, called as its flow-matching pipelines call it."""
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    return scheduler.sigmas


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 50])
@pytest.mark.parametrize("shift", [1.0, 2.5, 3.0])
def test_same_times_as_diffusers_with_static_shift(steps: int, shift: float) -> None:
    torch.testing.assert_close(time_grid(steps, shift=shift), scheduler_times(steps, shift=shift))


@pytest.mark.parametrize("terminal", [None, 0.02, 0.7155])
@pytest.mark.parametrize("steps", [2, 4, 8, 50])
@pytest.mark.parametrize("mu", [math.log(2.5), math.log(3), 0.6935])
@pytest.mark.filterwarnings("ignore::turbo_lab.path.TerminalWarning")
def test_same_times_as_diffusers_with_dynamic_shift(
    mu: float, steps: int, terminal: float | None
) -> None:
    theirs = scheduler_times(steps, mu, use_dynamic_shifting=True, shift_terminal=terminal)
    ours = time_grid(steps, shift=shift_from_mu(mu), terminal=terminal)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=3e-7)


@pytest.mark.parametrize(
    ("steps", "shift", "terminal", "times"),
    [
        (2, 2.5, None, [1, 0.7143]),
        (2, 2.5, 0.7155, [1, 0.7155]),  # Wuli 2-step
        (4, 3.0, None, [1, 0.9, 0.75, 0.5]),  # Lightning 4-step
        (8, 3.0, None, [1, 0.955, 0.9, 0.833, 0.75, 0.643, 0.5, 0.3]),  # Lightning 8-step
        (2, 2.0, 0.02, [1, 0.02]),  # Qwen's default stretch, left on
        (4, 2.0, 0.02, [1, 0.767, 0.456, 0.02]),
    ],
)
@pytest.mark.filterwarnings("ignore::turbo_lab.path.TerminalWarning")
def test_published_schedules(
    steps: int, shift: float, terminal: float | None, times: list[float]
) -> None:
    assert time_grid(steps, shift=shift, terminal=terminal).tolist() == pytest.approx(
        [*times, 0], abs=6e-4
    )


def test_qwen_mu_at_published_sizes() -> None:
    assert qwen_mu(256) == 0.5
    assert qwen_mu(8192) == pytest.approx(0.9)
    assert qwen_mu(4096) == pytest.approx(0.6935, abs=1e-4)
    assert shift_from_mu(qwen_mu(6889)) == pytest.approx(2.30, abs=5e-3)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 40, 1000])
def test_grids_fall_from_exactly_one_to_exactly_zero(steps: int) -> None:
    grid = time_grid(steps, shift=2.3)
    assert grid.shape == (steps + 1,)
    assert grid[0] == 1
    assert grid[-1] == 0
    assert (grid.diff() < 0).all()


def test_stretch_moves_the_end_and_keeps_noise() -> None:
    times = stretch(torch.tensor([1.0, 0.6, 0.3]), 0.1)
    assert times[0] == 1
    assert times[-1].item() == pytest.approx(0.1)


def test_many_step_terminal_on_few_steps_warns_in_one_sentence() -> None:
    with pytest.warns(TerminalWarning, match=r"terminal=0\.02 with steps=2") as caught:
        time_grid(2, shift=2.3, terminal=0.02)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        time_grid(40, shift=2.3, terminal=0.02)
        time_grid(2, shift=2.5, terminal=0.7155)


@pytest.mark.parametrize(
    ("parameter", "call"),
    [
        ("steps", lambda: time_grid(0)),
        ("steps", lambda: time_grid(2.0)),
        ("steps", lambda: time_grid(True)),
        ("steps", lambda: time_grid(1001)),
        ("shift", lambda: time_grid(2, shift=0.0)),
        ("shift", lambda: time_grid(2, shift=math.nan)),
        ("terminal", lambda: time_grid(2, terminal=1.0)),
        ("terminal", lambda: time_grid(1, terminal=0.5)),
        ("times", lambda: grid_from_times([])),
        ("times", lambda: grid_from_times([0.0])),
        ("times", lambda: grid_from_times([1.2, 0.5])),
        ("times", lambda: grid_from_times([0.5, 0.5])),
        ("times", lambda: grid_from_times([0.5, 0.7])),
        ("times", lambda: grid_from_times([1.0, math.nan])),
        ("std", lambda: logit_normal_times(torch.zeros(1), std=0.0)),
    ],
)
def test_wrong_times_are_refused_by_name(parameter: str, call) -> None:
    with pytest.raises(BadInput, match=rf"^{parameter}=.* is not allowed: "):
        call()


def test_explicit_times_get_their_zero() -> None:
    assert torch.equal(grid_from_times([1, 0.7155]), torch.tensor([1, 0.7155, 0]))
    assert torch.equal(grid_from_times([0.6, 0.3, 0]), torch.tensor([0.6, 0.3, 0]))


def test_logit_normal_times_have_the_named_quantiles() -> None:
    """The median of t is σ(mean) and the upper 84% point σ(mean + std), then shifted."""
    g = torch.Generator().manual_seed(0)
    t = logit_normal_times(torch.randn(100_000, generator=g), mean=0.4, std=0.7, shift=2.5)
    want = [shift_time(1 / (1 + math.exp(-a)), 2.5) for a in (0.4, 1.1)]
    assert torch.quantile(t, torch.tensor([0.5, 0.84134])).tolist() == pytest.approx(want, abs=5e-3)
    assert ((t > 0) & (t < 1)).all()
