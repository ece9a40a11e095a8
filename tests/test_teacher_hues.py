"""The exact posterior of a garment's colour, against what it must be at the ends and on average."""

from __future__ import annotations

import pytest
import torch

from turbo_lab.postcards import draw_scenes
from turbo_lab.postcards.render import garment_colour
from turbo_lab.studies import teacher_hues
from turbo_lab.testbeds.postcards import NetSize, spawn_net


def test_the_posterior_knows_a_clean_garment_and_of_noise_nothing_but_the_prior() -> None:
    colours = garment_colour(draw_scenes("select", range(200))) * 2 - 1
    pixels = torch.full((200,), 25.0)
    clean = teacher_hues.posterior_mean(0.98 * colours, pixels, 0.02)
    assert float((clean - colours).abs().max()) < 0.06
    mean = garment_colour(draw_scenes("critic", range(teacher_hues.COLOURS))).mean(0) * 2 - 1
    nothing = teacher_hues.posterior_mean(torch.randn(200, 3) / 5, pixels, 1.0)
    torch.testing.assert_close(nothing, mean.expand(200, 3))


@pytest.mark.parametrize("t", [0.6, 0.8])
def test_the_posterior_is_right_on_average(t: float) -> None:
    """The error of a posterior mean does not depend on what it says: E[(c - m) m] = 0."""
    generator = torch.Generator().manual_seed(0)
    colours = garment_colour(draw_scenes("select", range(4000))) * 2 - 1
    seen = (1 - t) * colours + t / 5 * torch.randn(4000, 3, generator=generator)
    found = teacher_hues.posterior_mean(seen, torch.full((4000,), 25.0), t)
    off = ((colours - found) * found).mean(0)
    assert float(off.abs().max()) < 4 * 0.5 / 4000**0.5
    power = (colours - found).square().mean()
    assert 0 < float(power) < float((colours - colours.mean(0)).square().mean())


def test_a_network_that_says_the_noise_alone_predicts_what_it_is_shown() -> None:
    net = spawn_net(NetSize(layers=1, heads=1, head_width=16, text_width=8), 0)
    with torch.no_grad():
        for parameter in net.transformer.proj_out.parameters():
            parameter.zero_()
    found = teacher_hues.errors(net, n=256, times=(0.2, 0.5))
    # It answers x_t: of a garment of N pixels, about 25, t² (c² + 1/N) is left.
    first = teacher_hues.FIRST
    shown = garment_colour(draw_scenes("select", range(first, first + 256))) * 2 - 1
    power = float(shown.square().mean())
    assert found.loc[0.5, "network"] == pytest.approx(0.25 * (power + 1 / 25), rel=0.1)
    assert found.loc[0.2, "posterior"] < found.loc[0.5, "posterior"] < found.loc[0.5, "network"]
