"""Sampling: the exact flow, diffusers' sampler, and noise that no batch size changes."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from turbo_lab.errors import BadInput
from turbo_lab.field import counted, guided, mixture
from turbo_lab.path import grid_from_times, time_grid
from turbo_lab.sample import draw_samples, final, sample
from turbo_lab.testbeds.points import MIXTURES

RING = MIXTURES["ring8"]()


def noise(n: int = 64, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- against the exact flow ---------------------------------------------------------------------


def test_euler_converges_at_first_order_to_the_exact_flow() -> None:
    """The flow of N(m, s²) carries z at t = 1 to m + s z at t = 0."""
    m, s = torch.tensor([[0.7, -1.2]], dtype=torch.float64), 0.4
    field, z = mixture(m, s), noise(dtype=torch.float64)
    steps = [32, 64, 128, 256]
    errors = [(final(sample(field, time_grid(n), z)) - (m + s * z)).abs().mean() for n in steps]
    slope = np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert slope == pytest.approx(-1, abs=0.05)


def test_euler_follows_the_exact_flow_in_between() -> None:
    """At time t the flow of N(m, s²) is at (1 - t) m + sqrt((1 - t)² s² + t²) z."""
    m, s = torch.tensor([[0.7, -1.2]], dtype=torch.float64), 0.4
    z = noise(dtype=torch.float64)
    for state in sample(mixture(m, s), time_grid(500), z):
        exact = (1 - state.u) * m + math.sqrt((1 - state.u) ** 2 * s**2 + state.u**2) * z
        torch.testing.assert_close(state.x, exact, rtol=0, atol=0.01)


def test_one_step_gives_the_mean_of_the_data() -> None:
    """From pure noise the best guess of x is E[x]: the blur of too few steps, in one line."""
    field = MIXTURES["rare"]()
    mean = (field.weights[:, None] * field.means).sum(0).float()
    x = final(sample(field, time_grid(1), noise()))
    torch.testing.assert_close(x, mean.expand_as(x), rtol=0, atol=1e-5)


def test_many_steps_give_the_weights_of_the_mixture() -> None:
    field, n = MIXTURES["rare"](), 4000
    x = draw_samples(field, time_grid(100), (2,), seed=1, indices=range(n), batch=n)
    shares = field.responsibilities(x).mean(0)
    for share, w in zip(shares.tolist(), field.weights.tolist(), strict=True):
        assert share == pytest.approx(w, abs=5 * math.sqrt(w * (1 - w) / n) + 0.005)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_variance_after_renoised_steps_is_that_of_the_recursion(eta: float) -> None:
    """For N(0, s²): x̂ = a x_t and ẑ = b x_t with a = (1-t) s² / V, b = t / V, so

    var_u = ((1-u) a + u √(1-η²) b)² var_t + u² η².
    """
    s, n, grid = 0.8, 20_000, time_grid(6)
    want = 1.0
    for t, u in pairwise(grid.tolist()):
        total = (1 - t) ** 2 * s**2 + t**2
        keep = ((1 - u) * (1 - t) * s**2 + u * math.sqrt(1 - eta**2) * t) / total
        want = keep**2 * want + (u * eta) ** 2
    fresh = torch.randn(6, n, 2, generator=torch.Generator().manual_seed(9))
    x = final(
        sample(mixture(torch.zeros(1, 2), s), grid, noise(n), eta=eta, renoise=fresh.__getitem__)
    )
    assert x.var().item() == pytest.approx(want, rel=5 * math.sqrt(2 / (2 * n)))


# --- against diffusers --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "mu", "terminal", "stochastic"),
    [
        (2, math.log(2.5), 0.7155, False),
        (4, math.log(3), None, False),
        (4, math.log(3), None, True),
        (50, 0.834, 0.02, False),
    ],
)
def test_same_samples_as_diffusers(
    steps: int, mu: float, terminal: float | None, stochastic: bool
) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, shift_terminal=terminal, stochastic_sampling=stochastic
    )
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    g = torch.Generator().manual_seed(5)
    x = noise()
    for timestep in scheduler.timesteps:
        v = RING(x, (timestep / 1000).expand(len(x)))
        x = scheduler.step(v, timestep, x, generator=g).prev_sample

    ours = time_grid(steps, shift=math.exp(mu), terminal=terminal)
    for grid in (ours, grid_from_times(scheduler.sigmas)):
        g = torch.Generator().manual_seed(5)
        fresh = [torch.randn(x.shape, generator=g) for _ in range(steps)]
        states = sample(RING, grid, noise(), eta=float(stochastic), renoise=fresh.__getitem__)
        torch.testing.assert_close(final(states), x, rtol=1e-4, atol=2e-5)


# --- the generator ------------------------------------------------------------------------------


def test_states_tell_the_whole_step() -> None:
    z, grid = noise(), time_grid(3, shift=2.0)
    states = list(sample(RING, grid, z))
    assert [s.index for s in states] == [0, 1, 2]
    assert torch.equal(states[0].x_t, z)
    for s, after in pairwise(states):
        assert s.u == after.t
        assert torch.equal(s.x, after.x_t)
    for s in states:
        assert torch.equal(s.v, RING(s.x_t, torch.full((len(z),), s.t)))
        torch.testing.assert_close(s.x_hat, s.x_t - s.t * s.v)
    torch.testing.assert_close(states[-1].x, states[-1].x_hat)


def test_the_caller_may_stop_and_pays_only_for_what_it_took() -> None:
    net = counted(RING)
    next(sample(net, time_grid(10), noise(4)))
    assert net.per_image(4) == 1


def test_a_grid_may_end_above_zero_and_be_continued() -> None:
    z, grid = noise(), time_grid(6)
    half = final(sample(RING, grid[:4], z))
    assert torch.equal(final(sample(RING, grid[3:], half)), final(sample(RING, grid, z)))


def test_gradients_flow_unless_the_field_is_frozen() -> None:
    z = noise(4).requires_grad_()
    final(sample(RING, time_grid(2), z)).sum().backward()
    assert z.grad is not None
    assert z.grad.abs().sum() > 0


def test_bad_input_is_refused_before_any_call() -> None:
    net = counted(RING)
    with pytest.raises(BadInput, match=r"^renoise="):
        sample(net, time_grid(2), noise(), eta=1.0)
    with pytest.raises(BadInput, match=r"^eta="):
        sample(net, time_grid(2), noise(), eta=-0.1)
    with pytest.raises(BadInput, match=r"^times="):
        sample(net, time_grid(2).flip(0), noise())
    with pytest.raises(BadInput, match=r"^batch="):
        draw_samples(net, time_grid(2), (2,), seed=0, indices=range(3), batch=0)
    with pytest.raises(BadInput, match=r"^c="):
        draw_samples(net, time_grid(2), (2,), torch.zeros(2), seed=0, indices=range(3))
    with pytest.raises(BadInput, match=r"^states="):
        final([])
    assert net.images == 0


def test_one_renoised_step_to_zero_needs_no_noise() -> None:
    x = final(sample(RING, time_grid(1), noise(), eta=1.0))
    assert torch.equal(x, final(sample(RING, time_grid(1), noise())))


# --- drawing many -------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_batch_size_and_company_change_no_image(eta: float) -> None:
    c = torch.arange(10) % 4
    field = guided(RING, torch.tensor([-1]), 2.0)

    def draw(rows: list[int], batch: int) -> Tensor:
        return draw_samples(
            field, time_grid(4), (2,), c[rows], seed=3, indices=rows, eta=eta, batch=batch
        )

    everything = draw(list(range(10)), 256)
    for batch in (1, 3, 10):
        assert torch.equal(draw(list(range(10)), batch), everything)
    assert torch.equal(draw([7, 2], 256), everything[[7, 2]])
    assert not torch.equal(everything[0], everything[4])


def test_seeds_and_steps_draw_different_noise() -> None:
    seen = []

    def still(x: Tensor, t: Tensor, c: None) -> Tensor:
        seen.append(x)
        return x / t[:, None]  # predicts x̂ = 0, so the next state is pure renoise

    draw_samples(still, time_grid(3), (2,), seed=0, indices=range(50), eta=1.0)
    draw_samples(still, time_grid(3), (2,), seed=1, indices=range(50), eta=1.0)
    flat = torch.stack([x.flatten() for x in seen])
    off = torch.corrcoef(flat) - torch.eye(6)
    assert off.abs().max() < 0.45  # 100 numbers: independent ones correlate by about 0.1


def test_progress_counts_images_and_no_image_is_fine() -> None:
    seen: list[tuple[int, int]] = []
    grid = time_grid(1)
    x = draw_samples(
        RING, grid, (2,), seed=0, indices=range(7), batch=3, progress=lambda *a: seen.append(a)
    )
    assert x.shape == (7, 2)
    assert not x.requires_grad
    assert seen == [(3, 7), (6, 7), (7, 7)]
    assert draw_samples(RING, grid, (2,), seed=0, indices=[]).shape == (0, 2)
