"""Which size of the teacher gives most for a minute of one core.

``python -m turbo_lab.studies.teacher_sizes`` trains networks of several sizes from nothing, each
for as many minutes, and prints what came out.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from itertools import pairwise

import pandas as pd
import torch

from turbo_lab.fit import fit
from turbo_lab.lab import lab_of
from turbo_lab.path import mix, velocity
from turbo_lab.postcards import draw_scenes, render
from turbo_lab.recipes import Recipe
from turbo_lab.recipes.teacher import teacher
from turbo_lab.sampling import Sampling
from turbo_lab.store import Store
from turbo_lab.streams import noise
from turbo_lab.studies.every_metric import find, reference
from turbo_lab.testbeds.postcards import LATENT_SHAPE, NetSize, PostcardNet, encode
from turbo_lab.training import workbench

SIZES = (
    NetSize(layers=2, heads=6),
    NetSize(layers=4, heads=4),
    NetSize(layers=6, heads=4),
    NetSize(layers=4, heads=6),
)
LOOKED_AT = ("sign_read", "whole_body", "hue_kl", "chroma_w1", "moss_patches", "fur_patches")
TIMED = 8
"""Steps that say what a step takes."""
TIMES = (0.2, 0.5, 0.8, 0.95)
"""At which held-out losses are measured."""
EMA = 0.998
"""The teacher's first stage averages over 2,000 steps, which is long for a short training."""


def grown(size: NetSize, minutes: float, *, seed: int = 0) -> Recipe:
    """The first stage of the teacher's recipe for a network of this size, for so many minutes.

    Args:
        size: of the network.
        minutes: of processor time, all threads together; steps are counted out by a first few.
        seed: of the training.
    """
    stage = teacher("quick", seed).stages[0]

    def of(steps: int) -> Recipe:
        return Recipe(
            name=f"teacher-{size.layers}x{size.heads}x{size.head_width}",
            net=size,
            seed=seed,
            stages=(stage.model_copy(update={"steps": steps, "ema": EMA}),),
        )

    return of(max(2, int(60 * minutes / _seconds(of(TIMED)))))


def _seconds(recipe: Recipe) -> float:
    """Processor time of a step: the median of `TIMED` less the first."""
    stage, bench, clock = recipe.stages[0], workbench(recipe, Store.default()), []
    for _ in fit(
        bench.objective(stage),
        bench.batches,
        steps=stage.steps,
        batch_size=stage.batch_size,
        seed=recipe.seed,
        optimisers={name: rates.optimiser() for name, rates in stage.rates.items()},
    ):
        clock.append(time.process_time())
    return statistics.median(after - before for before, after in pairwise(clock))


@torch.no_grad()
def losses(net: PostcardNet, *, n: int, batch: int = 64) -> dict[str, float]:
    r"""Velocity error of held-out postcards at fixed times, and its mean over those times.

    .. math:: E \| v_\theta(x_t, t, c) - (z - x) \|^2 / D

    (the loss of `turbo_lab.methods.flow`, without its random times and dropped captions).

    Args:
        net: velocity field on latents ``[B, 12, 16, 16]``.
        n: postcards of the stream ``select``, at least 1.
        batch: of a forward pass.
    """
    scenes = draw_scenes("select", range(n))
    x = encode(render(scenes))
    z = noise(LATENT_SHAPE, seed=0, stream="sizes", indices=range(n))
    out = {}
    for at in TIMES:
        t = torch.full((n,), at)
        parts = zip(*(part.split(batch) for part in (x, z, t, scenes.tokens)), strict=True)
        errors = [(net(mix(a, b, s), s, c) - velocity(a, b)).square() for a, b, s, c in parts]
        out[f"loss at {at:g}"] = float(torch.cat(errors).mean())
    return {"loss": statistics.mean(out.values()), **out}


def compare(
    sizes: Sequence[NetSize] = SIZES, *, minutes: float, captions: int = 256, steps: int = 40
) -> pd.DataFrame:
    """Train every size for as many minutes of processor time, and measure it.

    Args:
        sizes: of networks.
        minutes: of processor time for each.
        captions: of the stream ``select`` that are sampled, and postcards that losses are of.
        steps: guided Euler steps of the samples.

    Returns:
        One row per size: parameters (millions), steps taken, losses (squared latents), metrics of
        the samples.
    """
    rows, real, store = {}, reference(1024), Store.default()
    for size in sizes:
        recipe = grown(size, minutes)
        lab = lab_of(recipe, store=store, device="cpu")
        net = lab.testbed.net
        drawn = lab.samples(Sampling(steps=steps, n=captions, stream="select"), recipe.name)
        rows[recipe.name] = {
            "parameters": sum(p.numel() for p in net.parameters()) / 1e6,
            "steps": recipe.stages[0].steps,
            **losses(net, n=captions),
            **find(drawn.images, drawn.scenes, real).all_values(LOOKED_AT),
        }
    return pd.DataFrame(rows).T


if __name__ == "__main__":
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--minutes", type=float, default=10.0, help="of processor time for each")
    print(compare(minutes=asked.parse_args().minutes).round(4).to_string())
