"""How near a teacher comes to the exact posterior of what no caption says: the garment's hue.

``python -m turbo_lab.studies.teacher_hues`` prints it for the shipped teachers. A hue between two
modes is a sample that never decided; the exact posterior shows at which times it has to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import pandas as pd
import torch
from torch import Tensor

from turbo_lab.lab import open_lab
from turbo_lab.path import mix
from turbo_lab.postcards import Scenes, draw_scenes, render
from turbo_lab.postcards.render import garment_colour
from turbo_lab.streams import noise
from turbo_lab.testbeds.postcards import LATENT_SHAPE, PostcardNet, decode, encode

TIMES = (0.5, 0.6, 0.7, 0.8, 0.9)
FIRST = 10_000
"""Scenes of ``select`` from here on: no sweep samples their captions."""
COLOURS = 4_000
"""Draws of the garment's colour that stand for its prior."""


def posterior_mean(seen: Tensor, pixels: Tensor, t: float) -> Tensor:
    r"""The exact posterior mean of a garment's colour, given where the garment is.

    Of N flat pixels, noised to t, the mean y is enough:

    .. math:: E[c | y] = \sum_k w_k c_k, \quad w_k \propto \exp(-N |y - (1 - t) c_k|^2 / (2 t^2))

    with colours :math:`c_k` of the prior. A network does not know where the garment is; it does
    see pixels that are partly covered, which this leaves out.

    Args:
        seen: mean colour of the garment in noised pictures ``[B, 3]``.
        pixels: how many there are ``[B]``.
        t: time, in (0, 1].

    Returns:
        ``[B, 3]`` in [-1, 1].
    """
    colours = _prior()
    away = (seen[:, None] - (1 - t) * colours).square().sum(-1)
    return (-away * pixels[:, None] / (2 * t * t)).softmax(1) @ colours


@torch.no_grad()
def errors(
    net: PostcardNet, *, n: int, times: Sequence[float] = TIMES, batch: int = 128
) -> pd.DataFrame:
    """Mean squared errors of the garment's colour in clean pictures predicted from noised ones.

    Args:
        net: velocity field on latents ``[B, 12, 16, 16]``, without guidance.
        n: postcards of the stream ``select``, at least 1.
        times: to which they are noised.
        batch: of a forward pass.

    Returns:
        One row per time: of the exact posterior, of the network, and between the two; squared
        values in [-1, 1], mean over channels.
    """
    scenes = draw_scenes("select", range(FIRST, FIRST + n))
    true = garment_colour(scenes) * 2 - 1
    garment = _garment(scenes)
    pixels = garment.sum((1, 2))
    x = encode(render(scenes))
    z = noise(LATENT_SHAPE, seed=0, stream="hues", indices=range(n))

    def colour(latents: Tensor) -> Tensor:
        return (decode(latents) * garment[:, None]).sum((2, 3)) / pixels[:, None]

    rows = {}
    for at in times:
        t = torch.full((n,), at)
        x_t = mix(x, z, t)
        parts = zip(*(p.split(batch) for p in (x_t, t, scenes.tokens)), strict=True)
        predicted = colour(x_t - at * torch.cat([net(*part) for part in parts]))
        exact = posterior_mean(colour(x_t), pixels, at)
        pairs = {"posterior": (exact, true), "network": (predicted, true)}
        pairs["between"] = (predicted, exact)
        rows[at] = {k: float((a - b).square().mean()) for k, (a, b) in pairs.items()}
    return pd.DataFrame(rows).T.rename_axis("t")


@cache
def _prior() -> Tensor:
    """Colours ``[COLOURS, 3]`` in [-1, 1] as postcards draw them."""
    return garment_colour(draw_scenes("critic", range(COLOURS))) * 2 - 1


def _garment(scenes: Scenes) -> Tensor:
    """1 where a pixel is all garment ``[B, 32, 32]``: it alone changes as the value does, fully."""
    dark, bright = (render(replace(scenes, value=scenes.value * k)) for k in (0.5, 1.0))
    change = (bright - dark).abs().sum(1)
    return (change > 0.999 * change.amax((1, 2), keepdim=True)).float()


if __name__ == "__main__":
    for name in ("teacher-early", "teacher"):
        print(name)
        print(errors(open_lab(device="cpu", teacher=name).testbed.net, n=1024).round(4).to_string())
