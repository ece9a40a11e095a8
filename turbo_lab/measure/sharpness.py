"""Sharpness of whole images from the radial power spectrum of their luminance."""

from __future__ import annotations

import torch
from torch import Tensor

from turbo_lab.measure.views import luma
from turbo_lab.postcards import SIZE
from turbo_lab.streams import rng

HIGH_FREQUENCY = 0.25
"""Cycles per pixel from which power counts as high frequency; Nyquist is 0.5."""
_RINGS = SIZE // 2


def radial_power(images: Tensor) -> Tensor:
    """Mean power per frequency on rings k = 1 .. 16 cycles per image, ``[B, 16]``.

    Hann window, mean removed; scaled so that white noise of variance s^2 gives s^2 from ring 2 on
    (removing the mean takes a third of ring 1).
    """
    ring = _rings()
    power = _power(images).flatten(1)
    total = torch.zeros(len(power), _RINGS + 2).index_add_(1, ring, power)
    return (total / ring.bincount(minlength=_RINGS + 2))[:, 1 : _RINGS + 1]


def psd_slope(images: Tensor) -> Tensor:
    """Slope ``[B]`` of log power over log frequency, least squares over rings 2 .. 16.

    White noise has 0, blur makes it more negative; a power law ``f^-a`` gives ``-a``.
    """
    x = torch.arange(2, _RINGS + 1).log()
    x = x - x.mean()
    return (radial_power(images)[:, 1:].clamp_min(1e-12).log() * x).sum(1) / x.square().sum()


def high_frequency_share(images: Tensor) -> Tensor:
    """Share ``[B]`` of the luminance power at `HIGH_FREQUENCY` and above, in [0, 1]."""
    frequency = torch.fft.fftfreq(SIZE)
    radius = (frequency[:, None] ** 2 + frequency[None, :] ** 2).sqrt()
    power = _power(images)
    return power[:, radius >= HIGH_FREQUENCY].sum(1) / power.sum((1, 2)).clamp_min(1e-12)


def scrambled(images: Tensor, *, seed: int = 0) -> Tensor:
    """Pictures of the same spectrum in which nothing is to be seen: ``[B, 3, H, W]``, not clipped.

    The phase of every frequency is turned by that of white noise, the same in all channels, so the
    spectrum of the whole picture and the correlation of the channels stay as they are (Galerne et
    al. 2011, doi 10.1109/TIP.2010.2052822). What a measure gives for such pictures is what it knows
    of the spectrum alone.

    Args:
        images: ``[B, 3, H, W]``.
        seed: of the noise, at least 0.
    """
    noise = rng(seed, "phases").standard_normal(images[:, :1].shape)
    turn = torch.fft.rfft2(torch.from_numpy(noise).to(images.dtype))
    turn = turn / turn.abs().clamp_min(1e-12)
    turn[:, :, 0, 0] = 1  # the mean colour stays
    return torch.fft.irfft2(torch.fft.rfft2(images) * turn, s=images.shape[-2:])


def _power(images: Tensor) -> Tensor:
    window = torch.hann_window(SIZE, periodic=False)
    window = window[:, None] * window[None, :]
    light = luma(images)
    light = light - (light * window).sum((1, 2), keepdim=True) / window.sum()
    return torch.fft.fft2(light * window).abs().square() / window.square().sum()


def _rings() -> Tensor:
    """Ring index of each frequency ``[1024]``; corners beyond Nyquist go to the last bin."""
    k = torch.fft.fftfreq(SIZE) * SIZE
    radius = (k[:, None] ** 2 + k[None, :] ** 2).sqrt().round().long()
    return radius.clamp_max(_RINGS + 1).flatten()
