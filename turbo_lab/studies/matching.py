"""What the studies of distribution matching measure of a sampler, and the intervals on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from turbo_lab import claims as cl
from turbo_lab import measure
from turbo_lab.claims import Interval
from turbo_lab.sampling import TEACHER_STEPS

RATES = {"sign_read": "signs read", "whole_body": "whole bodies", "ghost_signs": "ghost signs"}
MEANS = {
    "saturation": "mean saturation",
    "clipped": "clipped share",
    "contrast": "contrast",
    "moss_energy": "moss: band energy",
}
DISTRIBUTIONS = {
    "hue_kl": "hue KL to truth (nats)",
    "chroma_w1": "chroma distance to real",
}
RELATIVE = {
    "high_frequency_share": "high-frequency share / teacher",
    "diversity": "same-caption distance / teacher",
}
METRICS = {**RATES, **RELATIVE, **DISTRIBUTIONS, **MEANS}
PARTS = {"heads": 1, "arms": 2, "legs": 2}
"""Counted parts of the body, and how many there are."""
REAL = 512
"""Real postcards behind the chroma reference."""
_PER_IMAGE = ("saturation", "clipped", "contrast", "high_frequency_share", "hue_mode")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One sampler: per-image values ``[seeds, images]``, and of each caption's own samples.

    ``moss_energy`` has the images on moss only. ``cdf`` is the cumulative chroma histogram of each
    image ``[seeds, images, bins]``; ``diversity`` is ``[seeds, prompts]``.
    """

    values: Mapping[str, np.ndarray]
    cdf: np.ndarray
    diversity: np.ndarray

    @property
    def hue_mode(self) -> np.ndarray:
        """Hue mode of each image, -1 off every mode."""
        return self.values["hue_mode"]

    def training(self, k: int) -> Measured:
        """Of one training alone."""
        return Measured(
            values={name: rows[k : k + 1] for name, rows in self.values.items()},
            cdf=self.cdf[k : k + 1],
            diversity=self.diversity[k : k + 1],
        )


def measured(
    images: Sequence[Tensor], prompts: Sequence[Tensor], fields: Tensor, noises: int
) -> Measured:
    """Measure the samples of every training.

    Args:
        images: ``[n, 3, 32, 32]`` per training, the same captions in each.
        prompts: many noises of a few captions per training, ``[captions * noises, 3, 32, 32]``;
            none where they were not drawn.
        fields: ``[n, 5]``, what the captions ask for.
        noises: samples of each of the few captions.
    """
    reports = [measure.report(one, fields) for one in images]
    values = {m: _stack([r[m] for r in reports]) for m in (*_PER_IMAGE, *RATES, *PARTS)}
    moss = (fields[:, 2] == 0).numpy()
    values["moss_energy"] = _stack([r["band_energy"] for r in reports])[:, moss]
    grids = [one.unflatten(0, (-1, noises)) for one in prompts]
    return Measured(
        values=values,
        cdf=np.stack([measure.chroma_cdf(one).numpy() for one in images]),
        diversity=_stack([measure.pairwise_distance(g) for g in grids]) if grids else np.empty(0),
    )


# --- statistics ---------------------------------------------------------------------------------


def hue_kl(modes: np.ndarray) -> float:
    """Hue KL to truth of each training ``[seeds, images]``, averaged over trainings.

    Trainings are not pooled: two that collapsed to different modes are two collapses.
    """
    return float(np.mean([measure.hue_kl(torch.from_numpy(row).long()) for row in modes]))


def chroma_distance(found: Measured, real_cdf: np.ndarray) -> Callable[[np.ndarray], float]:
    """Chroma distance to real of the images whose flat indices are given."""
    flat = found.cdf.reshape(-1, found.cdf.shape[-1])
    return lambda at: float(np.abs(flat[at.astype(int).ravel()].mean(0) - real_cdf).mean())


def indices(found: Measured) -> np.ndarray:
    """Flat index of each image ``[seeds, images]``."""
    return np.arange(found.hue_mode.size).reshape(found.hue_mode.shape)


def like(one: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Values of a sampler without trainings ``[1, images]``, one row per training of another."""
    return np.repeat(one, len(rows), axis=0)


def ratio(a: np.ndarray, b: np.ndarray) -> float:
    """Ratio of the sums."""
    return float(a.sum() / max(b.sum(), 1e-12))


def intervals(found: Measured, teacher: Measured, real_cdf: np.ndarray) -> dict[str, Interval]:
    """Every metric of a sampler, with intervals over trainings and images.

    Args:
        found: of the sampler.
        teacher: on the same captions from the same noise.
        real_cdf: cumulative chroma histogram of real postcards ``[bins]``.
    """
    name = "high_frequency_share"
    plain = [m for m in (*RATES, *MEANS) if found.values[m].size]
    out = {m: cl.crossed_bootstrap(found.values[m]) for m in plain}
    pair = found.values[name], like(teacher.values[name], found.values[name])
    out[name] = cl.crossed_bootstrap(*pair, statistic=ratio)
    if found.diversity.size:
        pair = found.diversity, like(teacher.diversity, found.diversity)
        out["diversity"] = cl.crossed_bootstrap(*pair, statistic=ratio)
    out["hue_kl"] = _distance(found.hue_mode, hue_kl)
    out["chroma_w1"] = _distance(indices(found), chroma_distance(found, real_cdf))
    return out


def _distance(rows: np.ndarray, statistic: Callable[[np.ndarray], float]) -> Interval:
    return cl.crossed_bootstrap(rows, statistic=statistic, resamples=300, centred=True)


# --- tables and claims --------------------------------------------------------------------------


def wide(
    rows: pd.DataFrame,
    families: Mapping[str, str],
    metrics: Sequence[str],
    titles: Mapping[str, str] = METRICS,
    *,
    steps: int | None = None,
) -> pd.DataFrame:
    """One row per family and steps, one column per metric, as ``value [low, high]``.

    Args:
        rows: long form ``family, steps, metric, value, low, high``; the teacher's steps are NaN.
        families: shown, with their titles.
        metrics: the columns.
        titles: of the metrics.
        steps: of the students that are shown beside the teacher; None for all.
    """
    shown = rows[rows["metric"].isin(metrics) & rows["family"].isin(families)].copy()
    if steps is not None:
        shown = shown[shown["steps"].isna() | (shown["steps"] == steps)]
    shown["text"] = [f"{r.value:.3f} [{r.low:.3f}, {r.high:.3f}]" for r in shown.itertuples()]
    shown["steps"] = shown["steps"].fillna(TEACHER_STEPS).astype(int)
    shown["student"] = [families[f] for f in shown["family"]]
    pivot = shown.pivot(index=["student", "steps"], columns="metric", values="text")
    return pivot[list(metrics)].rename(columns=titles)


def claim_row(
    id_: str,
    statement: str,
    statistic: str,
    interval: Interval,
    side: Literal["above", "below"],
    threshold: float,
) -> dict[str, Any]:
    """What a claim says and was measured to be; the study adds what its claims share."""
    return {
        "id": id_,
        "statement": statement,
        "statistic": statistic,
        "interval": interval,
        "side": side,
        "threshold": float(threshold),
    }


def _stack(rows: Sequence[Tensor]) -> np.ndarray:
    return torch.stack([row.float() for row in rows]).numpy()
