"""Diversity: how different samples of one prompt are, and how much of the truth they cover."""

from __future__ import annotations

import torch
from torch import Tensor

from turbo_lab.errors import BadInput
from turbo_lab.measure.palette import hue_shares, hue_truth

COVERED_FROM = 0.25
"""A mode counts as covered from this fraction of its true share."""


def pairwise_distance(samples: Tensor) -> Tensor:
    """Mean root-mean-square distance over the pairs of each prompt's samples, ``[P]``.

    ``2 / (K (K - 1)) sum_{i<j} |x_i - x_j| / sqrt(D)``

    Args:
        samples: ``[P, K, ...]``, K >= 2 samples of each of P prompts.

    Raises:
        BadInput: fewer than two samples per prompt.
    """
    if samples.dim() < 3 or samples.shape[1] < 2:
        raise BadInput("samples", tuple(samples.shape), "use [prompts, at least 2 samples, ...]")
    flat = samples.flatten(2).float()
    first, second = torch.triu_indices(flat.shape[1], flat.shape[1], offset=1)
    # Differences, not inner products: cdist's shortcut loses digits for near-equal samples.
    distance = torch.stack([(rows[first] - rows[second]).square().mean(1).sqrt() for rows in flat])
    return distance.mean(1)


def mode_coverage(modes: Tensor) -> float:
    """True probability, in [0, 1], of the hue modes that the samples cover.

    A mode is covered when its share among the samples is at least a quarter of its true share.

    Args:
        modes: ``[B]`` long, index into HUE_MODES, -1 off every mode.

    Raises:
        BadInput: no modes.
    """
    truth = hue_truth()
    return float(truth[hue_shares(modes)[:-1] >= COVERED_FROM * truth].sum())
