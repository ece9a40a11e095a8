"""The metrics against published implementations of the same quantity, on pictures of all kinds.

Only what somebody else has published is here; the oracles (signs, bodies, modes) are compared with
the renderer's own truth in `test_measure`.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np
import ot
import pytest
import torch
from scipy import fft, ndimage, signal, stats
from skimage import color
from torch import Tensor
from torchmetrics.functional import kl_divergence, pairwise_euclidean_distance

from turbo_lab import measure
from turbo_lab.measure import corruptions as co
from turbo_lab.measure.palette import OFF_MODE
from turbo_lab.measure.sharpness import HIGH_FREQUENCY
from turbo_lab.measure.views import hue_degrees, luma
from turbo_lab.postcards import SIZE, Scenes, draw_scenes, render
from turbo_lab.streams import generator

KINDS = ("real", "blur", "noise", "chroma", "phase scramble")


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return draw_scenes("eval", range(24))


@pytest.fixture(scope="module")
def pictures(scenes: Scenes) -> dict[str, Tensor]:
    """Real and spoiled pictures ``[24, 3, 32, 32]``, all within [-1, 1]."""
    spoiled = {name: co.corrupted(name, scenes, 0.5) for name in KINDS[1:]}
    return {k: v.clamp(-1, 1) for k, v in {"real": render(scenes), **spoiled}.items()}


def rgb(images: Tensor) -> np.ndarray:
    """Pictures as others take them: ``[B, 32, 32, 3]`` doubles in [0, 1]."""
    return ((images.double() + 1) / 2).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_saturation_hue_and_contrast_are_those_of_skimage(
    kind: str, pictures: dict[str, Tensor]
) -> None:
    images = pictures[kind]
    hsv = color.rgb2hsv(rgb(images))
    theirs = hsv[..., 1].mean((1, 2))
    assert measure.saturation(images).numpy() == pytest.approx(theirs, abs=1e-5)
    turn = hue_degrees((images.permute(0, 2, 3, 1) + 1) / 2).numpy() / 360 - hsv[..., 0]
    apart = np.abs(turn - np.round(turn))  # around the circle
    # Hues of near-grey pixels are a quotient of rounding errors.
    assert apart[hsv[..., 1] > 0.01].max() < 1e-3
    light = color.rgb2yuv(rgb(images))[..., 0]
    assert measure.contrast(images).numpy() == pytest.approx(2 * light.std((1, 2)), abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_chroma_distance_is_that_of_pot(kind: str, pictures: dict[str, Tensor]) -> None:
    """Another optimal transport than the one inside, and of sets of different size."""
    ours, theirs = pictures[kind], pictures["real"][:7]
    chroma = [np.ptp(rgb(x), axis=-1).ravel() for x in (ours, theirs)]
    wanted = float(ot.wasserstein_1d(*chroma, p=1))
    assert wanted > 0
    assert measure.chroma_w1(ours, theirs) == pytest.approx(wanted, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_sliced_wasserstein_of_patches_is_that_of_pot(
    kind: str, pictures: dict[str, Tensor]
) -> None:
    free = measure.read(pictures["real"]).free
    a, b = (measure.ground_patches(pictures[k], free, each=8) for k in (kind, "real"))
    slices = measure.sliced(b, projections=16)

    def pot(one: Tensor, other: Tensor) -> float:
        own = [x.reshape(-1, x.shape[-1]).double().numpy() for x in (one, other)]
        directions = slices.directions.double().numpy()
        return float(ot.sliced.sliced_wasserstein_distance(*own, projections=directions, p=1))

    ours = measure.sliced_wasserstein(a, b, projections=16)
    assert ours == pytest.approx(pot(a, b), rel=1e-4, abs=1e-7)
    # Sets of different size are compared on the quantiles of the smaller one, which is not exact.
    few = a[:15]
    ours = measure.sliced_wasserstein(few, b, projections=16)
    assert ours == pytest.approx(pot(few, b), rel=0.03)


def test_pairwise_distance_is_that_of_torchmetrics(pictures: dict[str, Tensor]) -> None:
    grids = pictures["real"].unflatten(0, (6, 4))
    ours = measure.pairwise_distance(grids)
    for own, grid in zip(ours, grids, strict=True):
        flat = grid.flatten(1).double()
        square = pairwise_euclidean_distance(flat) / flat.shape[1] ** 0.5
        pairs = [float(square[i, j]) for i, j in combinations(range(len(flat)), 2)]
        assert float(own) == pytest.approx(np.mean(pairs), rel=1e-5)


@pytest.mark.parametrize("n", [1, 5, 300])
def test_hue_divergence_is_that_of_torchmetrics_and_of_scipy(n: int) -> None:
    draw = torch.randint(-1, 6, (n,), generator=generator(0, "agreement", "modes"))
    counts = np.bincount(draw.numpy() % 7, minlength=7)  # -1, off every mode, comes last
    truth = np.append(measure.hue_truth().double().numpy() * (1 - OFF_MODE), OFF_MODE)
    ours = measure.hue_kl(draw)
    assert ours == pytest.approx(stats.entropy(counts, truth), rel=1e-5)
    shares = torch.from_numpy(counts / n)[None]
    theirs = float(kl_divergence(shares, torch.from_numpy(truth)[None]))
    assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_spectra_are_those_of_scipy(kind: str, pictures: dict[str, Tensor]) -> None:
    images = pictures[kind]
    window = np.outer(signal.windows.hann(SIZE), signal.windows.hann(SIZE))
    frequency = fft.fftfreq(SIZE)
    radius = np.hypot(*np.meshgrid(frequency, frequency))
    rings = np.arange(1, SIZE // 2 + 1)
    for k, light in enumerate(luma(images).double().numpy()):
        light = light - np.average(light, weights=window)
        power = np.abs(fft.fft2(light * window)) ** 2 / (window**2).sum()
        wanted = ndimage.mean(power, np.round(radius * SIZE), rings)
        one = images[k : k + 1]
        assert measure.radial_power(one)[0].numpy() == pytest.approx(wanted, rel=1e-3, abs=1e-8)
        slope = stats.linregress(np.log(rings[1:]), np.log(wanted[1:])).slope
        assert float(measure.psd_slope(one)) == pytest.approx(slope, abs=2e-3)
        share = ndimage.sum(power, radius >= HIGH_FREQUENCY, True) / power.sum()
        assert float(measure.high_frequency_share(one)) == pytest.approx(share, rel=1e-3)


def test_window_power_is_the_mean_periodogram_of_scipy(pictures: dict[str, Tensor]) -> None:
    """On fully free pictures: Welch's windows, one axis after the other."""
    images = pictures["real"]
    free = torch.ones(len(images), SIZE, SIZE, dtype=torch.bool)
    taper = signal.windows.hann(10)[1:-1]
    window = np.outer(taper, taper)
    for light, ours in zip(
        luma(images).double().numpy(), measure.window_power(images, free), strict=True
    ):
        views = np.lib.stride_tricks.sliding_window_view(light, (8, 8))[::2, ::2].reshape(-1, 8, 8)
        means = np.average(views, axis=(1, 2), weights=np.broadcast_to(window, views.shape))
        power = np.abs(fft.fft2((views - means[:, None, None]) * window)) ** 2
        wanted = power.mean(0) / (64 * (window**2).sum())
        assert ours.numpy() == pytest.approx(wanted, rel=1e-3, abs=1e-8)
