"""Paired tests of two samplers on any metric, and Holm's correction of several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from turbo_lab.errors import BadInput
from turbo_lab.streams import rng
from turbo_lab.studies.every_metric import Found


def swapped(
    one: Sequence[Found],
    other: Sequence[Found],
    metric: str,
    *,
    swaps: int = 999,
    seed: int = 0,
) -> float:
    """Two-sided p-value of a paired permutation test on any metric of sets of pictures.

    Under the null the two samplers' pictures of a caption could be exchanged. Each permutation
    exchanges those of a random half of the captions, in all trainings alike, and computes the
    metric of both sets anew; p = (1 + those at least as far apart) / (1 + swaps) (Phipson and
    Smyth 2010).

    Args:
        one: trainings of a sampler, the same captions in each.
        other: as many of another, or a single one that stands for each.
        metric: one of `turbo_lab.studies.every_metric.METRICS`, but for the diversity, which is
            of other pictures.
        swaps: random permutations, at least 1.
        seed: of the permutations.

    Raises:
        BadInput: the diversity, no permutations, or another number of trainings.
    """
    if metric == "diversity":
        raise BadInput("metric", metric, "use a metric of the pictures of the captions themselves")
    if swaps < 1:
        raise BadInput("swaps", swaps, "use at least 1")
    if len(other) not in (1, len(one)):
        raise BadInput("other", len(other), f"give 1 or {len(one)} trainings")
    n = len(one[0])
    both = [_joined(a, other[k % len(other)]) for k, a in enumerate(one)]
    at = np.arange(n)

    def gap(flip: np.ndarray) -> float:
        ours, theirs = at + n * flip, at + n * (1 - flip)
        return float(np.mean([f.value(metric, ours) - f.value(metric, theirs) for f in both]))

    seen = abs(gap(np.zeros(n, dtype=int)))
    source = rng(seed, "swaps", metric)
    apart = [abs(gap(source.integers(0, 2, n))) for _ in range(swaps)]
    tolerance = 1e-12 * max(1.0, seen)  # equal sets in another order of summation
    return (1 + sum(a >= seen - tolerance for a in apart)) / (1 + swaps)


def _joined(one: Found, other: Found) -> Found:
    """Pictures of both, the second's after the first's."""
    return replace(
        one,
        values={k: np.concatenate([v, other.values[k]]) for k, v in one.values.items()},
        ground=np.concatenate([one.ground, other.ground]),
        cdf=np.concatenate([one.cdf, other.cdf]),
        along=torch.cat([one.along, other.along]),
    )


def holm(p: Sequence[float]) -> list[float]:
    """p-values after the step-down correction of Holm (1979), in the order given.

    Args:
        p: of one family of tests, each in [0, 1].
    """
    order = np.argsort(p, kind="stable")
    steps = np.array([(len(p) - k) * p[i] for k, i in enumerate(order)])
    out = np.empty(len(p))
    out[order] = np.minimum(1.0, np.maximum.accumulate(steps))
    return out.tolist()
