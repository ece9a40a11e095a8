"""The oracles against ground truth, the measures against closed forms and other libraries.

`pytest -s tests/test_measure.py` prints the two tables of oracle accuracies.
"""

from __future__ import annotations

import colorsys
import math
from dataclasses import replace

import pandas as pd
import pytest
import torch
from scipy.ndimage import gaussian_filter
from scipy.spatial.distance import pdist
from scipy.stats import wasserstein_distance
from torch import Tensor

from turbo_lab import measure
from turbo_lab.errors import BadInput
from turbo_lab.measure.views import hue_degrees
from turbo_lab.postcards import Scenes, draw_scenes, render
from turbo_lab.postcards.captions import GROUNDS, null_tokens
from turbo_lab.streams import generator

FRESH_BAR, NOISY_BAR, EDIT_BAR = 0.995, 0.985, 0.99


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return draw_scenes("eval", range(600))


@pytest.fixture(scope="module")
def images(scenes: Scenes) -> Tensor:
    return render(scenes)


@pytest.fixture(scope="module")
def reading(images: Tensor) -> measure.Reading:
    return measure.read(images)


def blurred(images: Tensor, sigma: float) -> Tensor:
    return torch.from_numpy(gaussian_filter(images.numpy(), (0, 0, sigma, sigma)))


def gained(images: Tensor, gain: float) -> Tensor:
    """Move colours away from grey; the luminance stays."""
    weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    grey = (images * weights).sum(1, keepdim=True)
    return grey + gain * (images - grey)


def phase_scrambled(images: Tensor) -> Tensor:
    """Keep every amplitude of the Fourier transform, draw the phases anew."""
    shape = (len(images), 1, *images.shape[2:])
    phases = torch.fft.rfft2(torch.randn(shape, generator=generator(0, "phases")))
    turn = phases / phases.abs()
    turn[:, :, 0, 0] = 1
    return torch.fft.irfft2(torch.fft.rfft2(images) * turn, s=images.shape[2:])


def shown(title: str, table: pd.DataFrame) -> pd.Series:
    rate = table["right"] / table["n"]
    print(f"\n{title}\n{table.assign(rate=rate.map('{:.4f}'.format)).to_string(index=False)}")
    return rate


# Ground truth


def test_oracles_are_right_on_fresh_postcards() -> None:
    rate = shown("Oracles on fresh postcards", measure.fresh_truth(n=1000))
    assert (rate >= FRESH_BAR).all()


def test_oracles_are_right_under_noise() -> None:
    rate = shown("... with noise of std 0.04", measure.fresh_truth(n=500, noise=0.04))
    assert (rate >= NOISY_BAR).all()


def test_oracles_detect_edits_of_the_ground_truth() -> None:
    rate = shown("Edits detected", measure.edited_truth(n=500))
    assert (rate >= EDIT_BAR).all()


def test_reading_does_not_depend_on_the_batch(images: Tensor, reading: measure.Reading) -> None:
    alone = measure.read(images[77:78])
    assert torch.allclose(alone.sign.score, reading.sign.score[77:78], atol=1e-5)
    assert alone.garment.mode == reading.garment.mode[77]
    assert torch.equal(alone.free[0], reading.free[77])


def test_faded_and_blurred_signs_are_not_read(images: Tensor, scenes: Scenes) -> None:
    number = scenes.fields[:, 3] * 10 + scenes.fields[:, 4]
    # Hide the plate under one of another number, half transparent: a ghost over the sign.
    ghost = measure.paste_sign(images, scenes.sign[:, 0], scenes.sign[:, 1], 99 - number, 0.5)
    for broken in (ghost, blurred(images, 0.8)):
        rate = measure.report(broken, scenes.fields)["sign_read"].float().mean()
        assert rate < 0.01


def test_two_half_figures_are_not_a_body() -> None:
    a, b = draw_scenes("eval", range(200)), draw_scenes("eval", range(200, 400))
    mixed = 0.5 * render(a) + 0.5 * render(replace(b, fields=a.fields, grain=a.grain))
    apart = (a.head - b.head).abs().amax(1) > 4
    far = ((a.sign - b.sign).abs() >= torch.tensor([9, 7])).any(1)
    seen = measure.report(mixed, a.fields)
    assert seen["whole_body"][apart].float().mean() < 0.02
    assert seen["ghost_signs"][far].float().mean() > 0.99
    assert seen["sign_read"].float().mean() < 0.05


# Colour


def test_hue_is_that_of_colorsys() -> None:
    colours = torch.rand(200, 3, generator=generator(0, "colours"))
    expected = [360 * colorsys.rgb_to_hsv(*c)[0] for c in colours.tolist()]
    assert torch.allclose(hue_degrees(colours), torch.tensor(expected), atol=1e-2)


def test_garment_colour_is_the_drawn_one(scenes: Scenes, reading: measure.Reading) -> None:
    away = (reading.garment.hue - scenes.hue + 180) % 360 - 180
    assert away.abs().max() < 1.0
    assert torch.allclose(reading.garment.saturation, scenes.saturation, atol=0.02)
    assert torch.allclose(reading.garment.value, scenes.value, atol=0.02)


@pytest.mark.parametrize("lost", range(6))
def test_hue_kl_of_a_lost_mode_has_its_closed_form(lost: int) -> None:
    truth = measure.hue_truth()
    counts = (truth * 10_000).round().long()
    counts[lost] = 0
    modes = torch.arange(6).repeat_interleave(counts)
    expected = -math.log(float(1 - truth[lost]) * 0.99)
    assert measure.hue_kl(modes) == pytest.approx(expected, abs=1e-5)
    assert measure.mode_coverage(modes) == pytest.approx(float(1 - truth[lost]), abs=1e-6)


def test_hue_kl_of_real_images_is_near_its_floor(reading: measure.Reading) -> None:
    floor = 0.01 + 5 / (2 * len(reading.garment.mode))
    assert 0 <= measure.hue_kl(reading.garment.mode) < 2 * floor
    # Invented colours cost as well.
    some_off = torch.where(torch.arange(600) < 60, -1, reading.garment.mode)
    assert measure.hue_kl(some_off) > 0.1


def test_chroma_distance_grows_with_gain_and_nothing_else_moves(
    images: Tensor, scenes: Scenes, reading: measure.Reading
) -> None:
    a, b = images[:300], images[300:]
    floor = measure.chroma_w1(a, b)
    distances = [measure.chroma_w1(gained(a, g), a) for g in (1.0, 1.05, 1.1, 1.2, 1.4)]
    assert distances[0] == 0 and distances == sorted(distances)
    assert distances[3] > 2 * floor
    energy = [measure.band_energy(x, scenes.fields[:300, 2], reading.free[:300])
              for x in (a, gained(a, 1.4))]  # fmt: skip
    assert torch.allclose(energy[0], energy[1], rtol=1e-4, atol=1e-7)


def test_saturation_contrast_and_clipping_of_plain_images() -> None:
    red, white = torch.tensor([1.0, -0.5, -0.5]), torch.ones(3)
    pair = torch.stack([red, white])[:, :, None, None].expand(-1, -1, 32, 32)
    assert measure.saturation(pair).tolist() == pytest.approx([0.75, 0])
    assert measure.clipped(pair).tolist() == pytest.approx([1 / 3, 1])
    stripes = torch.ones(1, 3, 32, 32)
    stripes[..., ::2] = -1
    assert measure.contrast(stripes).item() == pytest.approx(1)


def test_real_postcards_are_never_clipped(images: Tensor) -> None:
    assert measure.clipped(images).max() == 0


# Sharpness and texture


@pytest.mark.parametrize("ground", GROUNDS)
def test_ground_spectrum_is_that_of_the_known_filter(ground: str) -> None:
    drawn = draw_scenes("eval", range(1200))
    drawn = drawn[drawn.fields[:, 2] == GROUNDS.index(ground)]
    drawn = replace(drawn, parts=torch.zeros_like(drawn.parts))
    free = torch.ones(len(drawn), 32, 32, dtype=torch.bool)
    rows = torch.arange(32)
    for axis, size in ((0, 9), (1, 7)):
        start = drawn.sign[:, axis, None]
        free = free & ~((rows >= start) & (rows < start + size)).unsqueeze(1 + axis) | (
            free & _outside(drawn, axis)
        )
    measured = measure.window_power(render(drawn), free).mean(0)
    expected = measure.expected_power(ground)
    assert measured.sum() == pytest.approx(float(expected.sum()), rel=0.03)
    assert (measured - expected).abs().max() < 0.06 * expected.max()


def _outside(scenes: Scenes, axis: int) -> Tensor:
    raise NotImplementedError
