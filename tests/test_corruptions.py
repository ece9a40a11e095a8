"""Known corruptions: strength 0 is the real picture, and each does exactly what it says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from skimage import filters
from torch import Tensor

from turbo_lab import measure
from turbo_lab.errors import BadInput
from turbo_lab.measure import corruptions as co
from turbo_lab.measure.truth import free_places, sign_pixels
from turbo_lab.measure.views import luma
from turbo_lab.postcards import HUE_MODES, Scenes, draw_scenes, render
from turbo_lab.postcards.render import PLATE, plates

N = 40
SHARES = [
    "phase scramble", "limbs", "pose", "digit swap", "sign loss", "ghost sign", "grain scramble",
]  # fmt: skip
"""Those that spoil a share of the pictures and leave the others."""


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return draw_scenes("eval", range(N))


@pytest.fixture(scope="module")
def images(scenes: Scenes) -> Tensor:
    return render(scenes)


def changed(one: Tensor, other: Tensor) -> Tensor:
    """Which pictures differ ``[n]``."""
    return (one != other).flatten(1).any(1)


@pytest.mark.parametrize("name", co.ALL)
def test_strength_zero_is_the_real_picture_and_one_is_not(
    name: str, scenes: Scenes, images: Tensor
) -> None:
    # Captions that come five times, so that layouts can repeat.
    own = replace(scenes, fields=scenes.fields[:8].repeat(5, 1)) if name == "one layout" else scenes
    clean = render(own) if own is not scenes else images
    assert torch.equal(co.corrupted(name, own, 0.0), clean)
    spoiled = co.corrupted(name, own, 1.0, seed=3)
    assert spoiled.shape == clean.shape and bool(spoiled.isfinite().all())
    assert not torch.equal(spoiled, clean)
    assert torch.equal(spoiled, co.corrupted(name, own, 1.0, seed=3))


@pytest.mark.parametrize("name", SHARES)
def test_a_share_of_the_pictures_is_spoiled_and_more_are_a_superset(
    name: str, scenes: Scenes, images: Tensor
) -> None:
    some, more, most = (changed(co.corrupted(name, scenes, s), images) for s in (0.25, 0.5, 1.0))
    assert int(some.sum()) == N // 4 and int(more.sum()) == N // 2 and bool(most.all())
    assert bool((more | ~some).all())
    half, full = co.corrupted(name, scenes, 0.5), co.corrupted(name, scenes, 1.0)
    assert torch.equal(half[more], full[more])


def test_blur_is_that_of_skimage_and_sharpening_adds_what_it_takes(
    scenes: Scenes, images: Tensor
) -> None:
    picture = images[0].double().numpy()
    theirs = filters.gaussian(picture, co.BLUR * 0.25**0.5, mode="reflect", channel_axis=0)
    ours = co.blur(scenes, 0.25)
    assert ours[0].double().numpy() == pytest.approx(theirs, abs=1e-5)
    sharp = co.sharpen(scenes, 0.5)
    detail = images - co.blur(scenes, 1.0)  # both widths are one pixel
    assert co.SHARPEN_WIDTH == co.BLUR
    free = sharp.abs() < 1
    assert torch.allclose(sharp[free], (images + 0.5 * co.SHARPEN * detail)[free], atol=1e-6)


def test_noise_has_its_deviation_and_grows_along_one_draw(scenes: Scenes, images: Tensor) -> None:
    inner = images.abs() < 0.3  # far enough from the border to stay uncut
    noise = (co.add_noise(scenes, 0.5) - images)[inner]
    assert float(noise.std()) == pytest.approx(0.5 * co.NOISE, rel=0.03)
    assert float(noise.mean()) == pytest.approx(0, abs=0.01)
    twice = (co.add_noise(scenes, 0.25) - images)[inner] * 2
    assert torch.allclose(noise, twice, atol=1e-5)


def test_contrast_turns_values_about_their_mean(scenes: Scenes, images: Tensor) -> None:
    bold = co.gain_contrast(scenes, 0.2)
    assert float(bold.abs().max()) == 1
    for before, after in zip(images, bold, strict=True):
        free = after.abs() < 1
        slope, offset = np.polyfit(before[free], after[free], 1)
        assert slope == pytest.approx(1 + 0.2 * co.CONTRAST, rel=1e-4)
        assert offset / (1 - slope) == pytest.approx(float(before.mean()), abs=1e-3)


def test_chroma_grows_by_its_factor_and_the_luminance_stays(scenes: Scenes, images: Tensor) -> None:
    vivid = co.gain_chroma(scenes, 0.3)
    free = (vivid.abs() < 1).all(1)
    spread, before = ((x.amax(1) - x.amin(1))[free] for x in (vivid, images))
    assert torch.allclose(spread, before * (1 + 0.3 * co.CHROMA), atol=1e-5)
    assert torch.allclose(luma(vivid)[free], luma(images)[free], atol=1e-5)


def test_hues_collapse_to_the_most_frequent_and_are_lost_from_the_rarest(scenes: Scenes) -> None:
    shares = torch.tensor([p for _, p in HUE_MODES.values()])

    def modes(name: str, strength: float) -> Tensor:
        return measure.read(co.corrupted(name, scenes, strength)).garment.mode

    assert bool((modes("hue collapse", 1.0) == shares.argmax()).all())
    moved = modes("hue collapse", 0.25) != scenes.hue_mode
    chosen = co.spoiled(N, 0.5, 0, "collapse hues")  # the root of 0.25
    assert torch.equal(moved, chosen & (scenes.hue_mode != shares.argmax()))
    assert bool((modes("hue loss", 1.0) == shares.argmax()).all())
    rarest = shares.argsort()[:2]  # 0.4 of five
    left = modes("hue loss", 0.4)
    gone = torch.isin(scenes.hue_mode, rarest)
    assert bool(gone.any()) and not bool(torch.isin(left, rarest).any())
    assert torch.equal(left[~gone], scenes.hue_mode[~gone])


def test_figures_of_lost_hues_follow_the_shares_of_those_left() -> None:
    many = draw_scenes("eval", range(1600))
    shares = torch.tensor([p for _, p in HUE_MODES.values()])
    rarest = shares.argsort()[:2]
    kept = shares.clone()
    kept[rarest] = 0
    gone = torch.isin(many.hue_mode, rarest)
    small = many[gone]
    found = measure.hue_shares(measure.read(co.lose_hues(small, 0.4)).garment.mode)[:-1]
    sure = 4 * (0.25 / len(small)) ** 0.5
    assert torch.allclose(found.float(), (kept / kept.sum()).float(), atol=sure)


def test_one_layout_repeats_places_and_pose_of_each_caption(scenes: Scenes) -> None:
    own = replace(scenes, fields=scenes.fields[:1].repeat(N, 1))
    seen = measure.read(co.repeat_layouts(own, 1.0))
    assert bool((seen.sign.x == scenes.sign[0, 0]).all())
    assert bool((seen.sign.y == scenes.sign[0, 1]).all())
    half = measure.read(co.repeat_layouts(own, 0.5)).sign
    same = (half.x == scenes.sign[0, 0]) & (half.y == scenes.sign[0, 1])
    chosen = co.spoiled(N, 0.5, 0, "repeat layouts")
    assert bool(same[chosen].all()) and not bool(same.all())
    assert len(seen.garment.mode.unique()) > 1


def test_limbs_are_missing_or_one_too_many(scenes: Scenes) -> None:
    body = measure.read_bodies(co.edit_limbs(scenes, 1.0))
    edit = torch.arange(N) % 5
    assert not bool(body.whole.any())
    assert bool((body.arms[edit < 2] == 1).all())
    assert bool((body.legs[(edit == 2) | (edit == 3)] == 1).all())
    assert bool((body.arms[edit == 4] == 3).all())


def test_poses_are_the_opposite_of_the_asked_ones_on_whole_bodies(scenes: Scenes) -> None:
    body = measure.read_bodies(co.swap_poses(scenes, 1.0))
    assert torch.equal(body.arm_pose, 1 - scenes.fields[:, 0])
    assert torch.equal(body.leg_pose, scenes.fields[:, 1])
    assert bool(body.whole.all())


def test_erosion_turns_ink_white_and_touches_nothing_else(scenes: Scenes, images: Tensor) -> None:
    ink = plates()[scenes.fields[:, 3] * 10 + scenes.fields[:, 4]] < PLATE / 2
    at = sign_pixels(*scenes.sign.unbind(1))
    inside = torch.zeros(N, 32, 32, dtype=torch.bool)
    inside[at] = ink
    gone = []
    for strength in (0.5, 1.0):
        spoiled = co.erode_glyphs(scenes, strength)
        touched = (spoiled != images).any(1)
        assert not bool((touched & ~inside).any())
        assert torch.allclose(spoiled.permute(0, 2, 3, 1)[touched], torch.tensor(PLATE * 2 - 1))
        gone.append(touched)
    assert bool((gone[1] | ~gone[0]).all())
    share = float(gone[1].sum() / ink.sum())
    assert share == pytest.approx(co.EROSION, abs=4 * (0.25 / float(ink.sum())) ** 0.5)


def test_swapped_digits_are_crisp_and_the_tens_stay(scenes: Scenes) -> None:
    sign = measure.read_signs(co.swap_digits(scenes, 1.0))
    assert torch.equal(sign.tens, scenes.fields[:, 3])
    assert bool((sign.units != scenes.fields[:, 4]).all()) and bool(sign.crisp.all())


def test_signs_are_lost_or_doubled_in_number(scenes: Scenes, images: Tensor) -> None:
    assert bool((measure.read_signs(co.lose_signs(scenes, 1.0)).count == 0).all())
    ghosts = co.add_ghosts(scenes, 1.0)
    assert bool((measure.read_signs(ghosts).count == 2).all())
    y = scenes.sign[:, 1]
    # The second plate is at least a plate away from the first one, so it never covers it.
    assert bool((((y + 13) % 26 - y).abs() >= 7).all())
    at = sign_pixels(*scenes.sign.unbind(1))
    assert torch.equal(ghosts.permute(0, 2, 3, 1)[at], images.permute(0, 2, 3, 1)[at])


def test_combed_moss_keeps_its_power_and_has_one_direction(scenes: Scenes, images: Tensor) -> None:
    moss = scenes.fields[:, 2] == 0
    combed = co.comb_moss(scenes, 1.0)
    assert not bool(changed(combed, images)[~moss].any())
    free = measure.read(images).free
    before, after = (measure.window_power(x, free)[moss].mean(0) for x in (images, combed))
    assert float(after.sum()) == pytest.approx(float(before.sum()), rel=0.15)
    across, along = after[0, 1:4].sum(), after[1:4, 0].sum()
    assert float(across) > 4 * float(along)
    assert float(before[0, 1:4].sum()) == pytest.approx(float(before[1:4, 0].sum()), rel=0.5)


def test_scrambles_keep_the_spectrum_of_pictures_and_of_grain(
    scenes: Scenes, images: Tensor
) -> None:
    spoiled = co.scramble_phases(scenes, 1.0)
    one, other = (torch.fft.rfft2(x).abs() for x in (images, spoiled))
    # Where a frequency is its own mirror image the turned phase is not real.
    inner = (slice(None), slice(None), slice(1, 16), slice(1, 16))
    assert torch.allclose(one[inner], other[inner], atol=1e-3)
    grain = co.scramble_grain(scenes, 1.0)
    seen = measure.report(grain, scenes.fields)
    for name in ("sign_read", "whole_body", "pose_right", "ground_right"):
        assert bool(seen[name].all())
    assert bool(changed(grain, images).all())


def test_free_places_of_the_oracles_tests_are_still_free(scenes: Scenes) -> None:
    x, y = free_places(scenes, 0)
    both = torch.zeros(N, 32, 32)
    for a, b in ((x, y), scenes.sign.unbind(1)):
        at = sign_pixels(a, b)
        both[at] = both[at] + 1
    assert float(both.max()) == 1 and bool((both.sum((1, 2)) == 2 * 7 * 9).all())


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda s: co.corrupted("smear", s, 0.5), "corruption"),
        (lambda s: co.corrupted("blur", s, 1.5), "strength"),
        (lambda s: co.corrupted("noise", s, -0.1), "strength"),
        (lambda s: co.corrupted("limbs", s, 0.5, seed=-1), "seed"),
    ],
)
def test_wrong_input_is_refused(
    call: Callable[[Scenes], object], word: str, scenes: Scenes
) -> None:
    with pytest.raises(BadInput, match=word):
        call(scenes)
