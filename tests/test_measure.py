"""The oracles against ground truth, the measures against closed forms and other libraries.

`pytest -s tests/test_measure.py` prints the two tables of oracle accuracies.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable
from dataclasses import replace

import pandas as pd
import pytest
import torch
from scipy.ndimage import gaussian_filter
from scipy.stats import wasserstein_distance
from torch import Tensor

from turbo_lab import measure
from turbo_lab.errors import BadInput
from turbo_lab.measure.corruptions import add_ghosts
from turbo_lab.measure.views import hue_degrees
from turbo_lab.postcards import SIZE, Scenes, draw_scenes, render
from turbo_lab.postcards.captions import GROUNDS, null_tokens
from turbo_lab.postcards.scenes import PARTS
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


def shown(title: str, table: pd.DataFrame) -> pd.Series:
    rate = table["right"] / table["n"]
    print(f"\n{title}\n{table.assign(rate=rate.map('{:.4f}'.format)).to_string(index=False)}")
    return rate


# Ground truth; `turbo-lab bars` counts the same on more scenes


def test_oracles_are_right_on_fresh_postcards() -> None:
    rate = shown("Oracles on fresh postcards", measure.fresh_truth(n=500))
    assert (rate >= FRESH_BAR).all()


def test_oracles_are_right_under_noise() -> None:
    rate = shown("... with noise of std 0.04", measure.fresh_truth(n=250, noise=0.04))
    assert (rate >= NOISY_BAR).all()


def test_oracles_detect_edits_of_the_ground_truth() -> None:
    rate = shown("Edits detected", measure.edited_truth(n=200))
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


def test_a_second_sign_beside_the_right_one_is_not_all_right(
    images: Tensor, scenes: Scenes
) -> None:
    doubled = add_ghosts(scenes, 1.0)
    was, now = (measure.report(x, scenes.fields) for x in (images, doubled))
    second = now["ghost_signs"]
    assert second.float().mean() > 0.95
    assert was["sign_alone"].all() and was["all_right"].float().mean() > 0.99
    assert now["sign_read"].float().mean() > 0.95  # the right one is still the best
    assert not now["sign_alone"][second].any() and not now["all_right"][second].any()
    other = measure.report(images, scenes.fields.flip(0))
    parts = ("sign_alone", "whole_body", "pose_right")
    assert torch.equal(other["all_right"], torch.stack([other[k] for k in parts]).all(0))
    assert 0 < other["sign_alone"].sum() < len(images)


def test_a_third_digit_against_the_sign_is_seen_where_the_count_of_signs_misses_it(
    images: Tensor, scenes: Scenes
) -> None:
    x, y = scenes.sign.T
    side = torch.where(x < SIZE // 2, 4, -4)
    tens, units = scenes.fields[:, 3], scenes.fields[:, 4]
    # A plate that shares a digit with the first: together they read abc.
    number = torch.where(side > 0, 10 * units + 7, 70 + tens)
    longer = measure.paste_sign(images, x + side, y, number, 1.0)
    was, now = (measure.report(p, scenes.fields) for p in (images, longer))
    assert not was["third_digit"].any()
    assert now["third_digit"].float().mean() > 0.99
    assert now["ghost_signs"].float().mean() < 0.5  # which is why it is asked for
    apart = measure.report(add_ghosts(scenes, 1.0), scenes.fields)
    assert apart["third_digit"].float().mean() < 0.01


def test_two_half_figures_are_not_a_body() -> None:
    a, b = draw_scenes("eval", range(200)), draw_scenes("eval", range(200, 400))
    mixed = 0.5 * render(a) + 0.5 * render(replace(b, fields=a.fields, grain=a.grain))
    apart = (a.head - b.head).abs().amax(1) > 4
    far = ((a.sign - b.sign).abs() >= torch.tensor([9, 7])).any(1)
    seen = measure.report(mixed, a.fields)
    assert seen["whole_body"][apart].float().mean() < 0.02
    assert seen["ghost_signs"][far].float().mean() > 0.99
    assert seen["sign_read"].float().mean() < 0.05


def test_two_legs_on_one_side_are_not_a_whole_body(scenes: Scenes) -> None:
    left, right = PARTS.index("left leg"), PARTS.index("right leg")

    def drawn(parts: list[int], degrees: float) -> Tensor:
        kept = scenes.parts.clone()
        kept[:, [left, right]] = 0
        kept[:, parts] = 1
        angles = torch.full_like(scenes.leg_angles, math.radians(degrees))
        return render(replace(scenes, parts=kept, leg_angles=angles))

    near, far, none = drawn([left], 6), drawn([left], 60), drawn([], 0)
    body = measure.read_bodies(torch.where((far != none).any(1, keepdim=True), far, near))
    other = measure.read_bodies(drawn([left, right], 25))
    assert (body.legs == 2).float().mean() > 0.99 and not body.whole.any()
    assert other.whole.float().mean() > 0.99


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


def test_a_garment_that_is_nearly_grey_has_no_hue(scenes: Scenes) -> None:
    for saturation, expected in ((0.3, torch.tensor(-1)), (0.68, scenes.hue_mode)):
        faded = replace(scenes, saturation=torch.full_like(scenes.saturation, saturation))
        garment = measure.read(render(faded)).garment
        assert garment.saturation.mean() == pytest.approx(saturation, abs=0.02)
        assert (garment.mode == expected).float().mean() > 0.99


@pytest.mark.parametrize("lost", range(6))
def test_hue_kl_of_a_lost_mode_has_its_closed_form(lost: int) -> None:
    truth = measure.hue_truth()
    counts = (truth * 10_000).round().long()
    counts[lost] = 0
    modes = torch.arange(6).repeat_interleave(counts)
    expected = -math.log(float(1 - truth[lost]) * 0.99)
    assert measure.hue_kl(modes) == pytest.approx(expected, abs=1e-5)
    assert measure.mode_coverage(modes) == pytest.approx(float(1 - truth[lost]), abs=1e-6)


def test_a_mode_is_covered_from_a_quarter_of_its_share() -> None:
    truth = measure.hue_truth()
    for share, found in ((0.24, 1 - float(truth[0])), (0.26, 1.0)):
        counts = (truth * 10_000).round().long()
        few = round(share * int(counts[0]))
        counts[1] += counts[0] - few
        counts[0] = few
        modes = torch.arange(6).repeat_interleave(counts)
        assert measure.mode_coverage(modes) == pytest.approx(found, abs=1e-6)


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
    assert distances[0] < 1e-6 and distances == sorted(distances)
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
    bare = render(drawn)
    measured = measure.window_power(bare, ~measure.read_signs(bare).cover).mean(0)
    expected = measure.expected_power(ground)
    assert measured.sum() == pytest.approx(float(expected.sum()), rel=0.04)
    assert (measured - expected).abs().max() < 0.06 * expected.max()


@pytest.mark.parametrize("ground", GROUNDS)
def test_band_energy_of_whole_postcards_is_the_expected_one(
    ground: str, images: Tensor, scenes: Scenes, reading: measure.Reading
) -> None:
    energy = measure.band_energy(images, scenes.fields[:, 2], reading.free)
    energy = energy[scenes.fields[:, 2] == GROUNDS.index(ground)]
    error = energy.std() / len(energy) ** 0.5
    assert abs(energy.mean() - measure.expected_band_energy(ground)) < 4 * error


def test_blur_lowers_every_sharpness_measure(
    images: Tensor, scenes: Scenes, reading: measure.Reading
) -> None:
    ladder = [images, *(blurred(images, s) for s in (0.4, 0.6, 0.8, 1.2))]
    shares = [float(measure.high_frequency_share(x).mean()) for x in ladder]
    slopes = [float(measure.psd_slope(x).mean()) for x in ladder]
    assert shares == sorted(shares, reverse=True) and slopes == sorted(slopes, reverse=True)
    energies = torch.stack(
        [measure.band_energy(x, scenes.fields[:, 2], reading.free) for x in ladder]
    )
    for ground in range(3):
        mean = energies[:, scenes.fields[:, 2] == ground].mean(1)
        assert (mean.diff() < 0).all()


def test_white_noise_has_a_flat_spectrum() -> None:
    noise = torch.randn(400, 1, 32, 32, generator=generator(0, "white")).expand(-1, 3, -1, -1)
    assert torch.allclose(
        measure.radial_power(0.2 * noise).mean(0)[1:], torch.full((15,), 0.04), rtol=0.1
    )
    assert measure.psd_slope(noise).mean().abs() < 0.1
    everywhere = torch.ones(400, 32, 32, dtype=torch.bool)
    # Removing the mean costs each window a little of its lowest frequencies.
    total = measure.window_power(0.2 * noise, everywhere).sum((1, 2)).mean()
    assert 0.036 < total < 0.04


def test_phase_scramble_keeps_spectra_and_moves_patches(images: Tensor) -> None:
    a, b = images[:300], images[300:]
    scrambled = measure.scrambled(a)
    amplitude = torch.fft.rfft2(a).abs()
    assert torch.allclose(torch.fft.rfft2(scrambled).abs(), amplitude, rtol=1e-2, atol=1e-2)
    everywhere = torch.ones(300, 32, 32, dtype=torch.bool)
    real, other, broken = (measure.ground_patches(x, everywhere) for x in (a, b, scrambled))
    floor = measure.sliced_wasserstein(other, real)
    assert measure.sliced_wasserstein(broken, real) > 5 * floor


@pytest.mark.parametrize("ground", ["moss", "fur"])  # blur leaves a smooth sky as it is
def test_blur_moves_ground_patches_off_the_real_floor(
    ground: str, images: Tensor, scenes: Scenes, reading: measure.Reading
) -> None:
    rows = (scenes.fields[:, 2] == GROUNDS.index(ground)).nonzero()[:, 0]
    a, b = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    real = measure.ground_patches(images[a], reading.free[a])
    floor = measure.sliced_wasserstein(measure.ground_patches(images[b], reading.free[b]), real)
    distances = [
        measure.sliced_wasserstein(
            measure.ground_patches(blurred(images[b], s), reading.free[b]), real
        )
        for s in (0.5, 0.8, 1.2)
    ]
    assert distances == sorted(distances)
    assert distances[-1] > 2 * floor


def test_patches_come_from_free_ground_only() -> None:
    ramp = torch.arange(32.0).expand(1, 3, 32, 32) ** 2 / 1000
    free = torch.zeros(1, 32, 32, dtype=torch.bool)
    free[:, 3:9, 10:16] = True
    patches = measure.ground_patches(ramp, free, each=8)
    allowed = [ramp[0, 0, 3:8, x : x + 5] for x in (10, 11)]
    allowed = [(p - p.mean()).flatten() for p in allowed]
    nearest = torch.stack([(patches - p).abs().amax(-1) for p in allowed]).amin(0)
    assert nearest.max() < 1e-5


def test_sliced_wasserstein_in_one_dimension_is_scipys() -> None:
    a, b = torch.randn(2, 300, 1, generator=generator(0, "sets")).unbind(0)
    expected = wasserstein_distance(a[:, 0].numpy(), b[:, 0].numpy() + 0.5)
    assert measure.sliced_wasserstein(a, b + 0.5, projections=3) == pytest.approx(expected, 1e-4)
    # A set of another size is compared on quantiles.
    assert measure.sliced_wasserstein(a, a.repeat(3, 1)) < 0.02


# Coverage, report, errors


def test_report_has_one_value_per_image(
    images: Tensor, scenes: Scenes, reading: measure.Reading
) -> None:
    values = measure.report(images, scenes.fields, reading)
    assert all(v.shape == (600,) and v.isfinite().all() for v in values.values())
    assert torch.equal(measure.fields_of_tokens(scenes.tokens), scenes.fields)
    wrong = measure.report(images, scenes.fields.flip(0), reading)
    same = (scenes.fields == scenes.fields.flip(0)).float().mean(0)
    assert wrong["ground_right"].float().mean() == pytest.approx(float(same[2]), abs=0.01)
    assert wrong["arms_right"].float().mean() == pytest.approx(float(same[0]), abs=0.01)


def test_measures_survive_anything_finite() -> None:
    noise = 3 * torch.randn(8, 3, 32, 32, generator=generator(0, "anything"))
    odd = torch.cat([noise, torch.zeros(1, 3, 32, 32), torch.full((1, 3, 32, 32), -1.0)])
    values = measure.report(odd, torch.zeros(10, 5, dtype=torch.long))
    assert all(v.isfinite().all() for v in values.values())
    assert not values["sign_read"].any() and not values["whole_body"].any()


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: measure.read(torch.zeros(2, 3, 16, 16)), "images"),
        (lambda: measure.read(torch.zeros(0, 3, 32, 32)), "images"),
        (lambda: measure.read(torch.full((1, 3, 32, 32), torch.nan)), "images"),
        (lambda: measure.report(torch.zeros(2, 3, 32, 32), torch.zeros(1, 5)), "fields"),
        (lambda: measure.fields_of_tokens(null_tokens(2)), "tokens"),
        (lambda: measure.hue_kl(torch.zeros(3).long(), off=0), "off"),
        (lambda: measure.hue_shares(torch.zeros(0).long()), "modes"),
        (lambda: measure.pairwise_distance(torch.zeros(3, 1, 4)), "samples"),
        (lambda: measure.sliced_wasserstein(torch.zeros(3, 2), torch.zeros(3, 4)), "b="),
        (lambda: measure.expected_power("sand"), "ground"),
        (lambda: measure.edited_truth(n=0), "n=0"),
    ],
)
def test_wrong_input_is_refused_in_one_sentence(call: Callable[[], object], word: str) -> None:
    with pytest.raises(BadInput, match=word) as refused:
        call()
    assert str(refused.value).endswith(".") and "\n" not in str(refused.value)
