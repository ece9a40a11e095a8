"""Colour: the garment's hue and its modes, saturation, chroma, contrast, clipping.

`HUE_TOLERANCE` was chosen on the ``select`` stream: fresh hues read within 9 degrees of their
mode's centre (draws are cut at 9), and the closest two modes are 35 degrees apart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from scipy.stats import wasserstein_distance
from torch import Tensor

from turbo_lab.errors import BadInput
from turbo_lab.measure.anatomy import BodyReading, capsule
from turbo_lab.measure.views import checked, chroma, hue_degrees, luma, unit
from turbo_lab.postcards import HUE_MODES, SIZE
from turbo_lab.postcards.render import HIP, SHOULDER

HUE_TOLERANCE = 15.0
GREY = 0.35
"""A garment less saturated than this has no hue; drawn garments have 0.68 to 0.82."""
OFF_MODE = 0.01
"""Probability the smoothed truth gives to a hue off every mode."""
CHROMA_BINS = 64
"""Of `chroma_cdf`, over [0, 1]."""
CLIPPED = 0.99
"""Real postcards stay below this magnitude everywhere."""


@dataclass(frozen=True, kw_only=True)
class GarmentReading:
    """Colour of the garments; every field is ``[B]``."""

    hue: Tensor  # degrees in [0, 360)
    mode: Tensor  # long, index into HUE_MODES, -1 for a hue off every mode
    saturation: Tensor  # [0, 1]
    value: Tensor  # [0, 1]


def read_garments(images: Tensor, bodies: BodyReading) -> GarmentReading:
    """Read the colour of the torso's core: ``hue = arg sum_p s_p exp(i h_p)``, saturation s_p.

    Args:
        images: ``[B, 3, 32, 32]`` in [-1, 1].
        bodies: where the figures are.
    """
    pixels = unit(images).permute(0, 2, 3, 1)
    centres = torch.arange(SIZE) + 0.5
    x = (centres - bodies.x[:, None])[:, None, :]
    y = (centres - bodies.y[:, None])[:, :, None]
    core = capsule(x, y, SHOULDER[1] + 1.2, HIP[1] - 0.6, 1.0)
    top = pixels.amax(-1)
    saturated = (top - pixels.amin(-1)) / top.clamp_min(1e-6)
    weight, radians = core * saturated, hue_degrees(pixels) * (math.pi / 180)
    hue = torch.atan2((weight * radians.sin()).sum((1, 2)), (weight * radians.cos()).sum((1, 2)))
    hue, area = hue * (180 / math.pi) % 360, core.sum((1, 2)).clamp_min(1e-6)
    saturation_ = weight.sum((1, 2)) / area
    return GarmentReading(
        hue=hue,
        mode=torch.where(saturation_ >= GREY, hue_mode(hue), -1),
        saturation=saturation_,
        value=(core * top).sum((1, 2)) / area,
    )


def hue_mode(hue: Tensor) -> Tensor:
    """Index of the nearest mode ``[B]``, -1 beyond `HUE_TOLERANCE` degrees."""
    away = (hue[:, None] - _centres() + 180) % 360 - 180
    distance, nearest = away.abs().min(1)
    return torch.where(distance <= HUE_TOLERANCE, nearest, -1)


def hue_shares(modes: Tensor) -> Tensor:
    """Share of each mode and, last, of hues off every mode ``[7]``.

    Raises:
        BadInput: no modes.
    """
    if len(modes) == 0:
        raise BadInput("modes", "an empty tensor", "give at least one reading")
    bins = torch.where(modes < 0, len(HUE_MODES), modes)
    return bins.bincount(minlength=len(HUE_MODES) + 1) / len(modes)


def hue_truth() -> Tensor:
    """Declared probabilities of the modes ``[6]``."""
    return torch.tensor([p for _, p in HUE_MODES.values()])


def hue_kl(modes: Tensor, off: float = OFF_MODE) -> float:
    """Divergence of the samples' hue modes from the truth in nats, at least 0.

    ``KL(q || p) = sum_k q_k log(q_k / p_k)`` with q the plain shares of the six modes and of
    "off every mode", and p the declared shares scaled by ``1 - off``, ``off`` for the last: so a
    lost mode, an overgrown mode and invented colours all cost, and no share needs smoothing. Of
    n real images it has mean about ``off + 5 / (2 n)``.

    Args:
        modes: ``[B]`` long, see `GarmentReading`.
        off: smoothing mass, in (0, 1).

    Raises:
        BadInput: no modes, or ``off`` out of range.
    """
    if not 0 < off < 1:
        raise BadInput("off", off, "use a number between 0 and 1")
    truth = torch.cat([hue_truth() * (1 - off), torch.tensor([off])])
    shares = hue_shares(modes)
    return float(torch.xlogy(shares, shares / truth).sum())


def saturation(images: Tensor) -> Tensor:
    """Mean HSV saturation of each image ``[B]`` in [0, 1]."""
    picture = unit(images)
    return (chroma(images) / picture.amax(1).clamp_min(1e-6)).mean((1, 2))


def contrast(images: Tensor) -> Tensor:
    """Standard deviation of each image's luminance ``[B]``, in units of [-1, 1]."""
    return luma(images).std((1, 2), correction=0)


def clipped(images: Tensor) -> Tensor:
    """Share of each image's values ``[B]`` beyond +-0.99; real postcards have none."""
    return (checked(images).abs() > CLIPPED).float().mean((1, 2, 3))


def chroma_w1(samples: Tensor, reference: Tensor) -> float:
    """Wasserstein-1 distance between the pixels' chroma distributions of two sets, in [0, 1].

    Args:
        samples: ``[B, 3, 32, 32]`` in [-1, 1].
        reference: ``[N, 3, 32, 32]`` in [-1, 1].
    """
    ours, theirs = chroma(samples).flatten().numpy(), chroma(reference).flatten().numpy()
    return float(wasserstein_distance(ours, theirs))


def chroma_cdf(images: Tensor) -> Tensor:
    """Cumulative histogram of each image's pixel chroma ``[B, CHROMA_BINS]``, rising to 1.

    The mean difference of two of them is their `chroma_w1`, to the width of a bin.

    Args:
        images: ``[B, 3, 32, 32]`` in [-1, 1].
    """
    pixels = chroma(images).flatten(1).clamp(0, 1)
    rows = torch.stack([torch.histc(row, CHROMA_BINS, 0.0, 1.0) for row in pixels])
    return rows.cumsum(1) / pixels.shape[1]


def _centres() -> Tensor:
    return torch.tensor([centre for centre, _ in HUE_MODES.values()])
