"""What the mini-DINO knows of a postcard: linear probes beside a random and a supervised network.

One protocol for all networks. Of every block: the class token, the mean and the maximum of the
patch tokens, side by side; standardised; one logistic regression per target, fitted on scenes of
the stream ``select``, its ridge chosen there on a fifth that is held out; errors on ``eval``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import cross_entropy

from turbo_lab.claims import Interval, bootstrap, wilson
from turbo_lab.dino import dino_features, dino_recipe, random_features
from turbo_lab.dino.net import tapped
from turbo_lab.dino.supervised import TARGETS, ceiling, ceiling_recipe, labels
from turbo_lab.dino.transplants import Transplants
from turbo_lab.features import VitFeatures
from turbo_lab.figures import ACCENT, SECOND, SOFT, style
from turbo_lab.keys import key_of
from turbo_lab.postcards import draw_scenes, render
from turbo_lab.progress import progress
from turbo_lab.store import Store
from turbo_lab.streams import Draw

if TYPE_CHECKING:
    import pandas as pd

NETWORKS: Mapping[str, str] = {
    "random": "random weights",
    "dino": "mini-DINO",
    "ceiling": "trained on the labels",
}
"""Networks of the table, all of one architecture, and their titles."""
BARS = ("digits", "hue")
"""What the error must be halved on, see `error_ratios`."""
RIDGES = (1e-4, 1e-3, 1e-2)
"""Weights of the squared coefficients that a probe chooses from."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much is probed: scenes to fit on, and scenes to test on."""

    fit: int = 4000
    test: int = 2000


BUDGETS: Mapping[str, Budget] = {
    "smoke": Budget(fit=200, test=100),
    "quick": Budget(fit=1500, test=1000),
    "paper": Budget(fit=20_000, test=10_000),
}


@dataclass(frozen=True, kw_only=True)
class Probed:
    """Which answers were wrong, ``[networks, targets, scenes]``, and the budget."""

    wrong: Mapping[str, np.ndarray]  # network -> [targets, scenes] bool
    budget: Budget


def networks(*, store: Store | None = None, seed: int = 0) -> dict[str, VitFeatures]:
    """The three networks with every block tapped; what is not in the store is trained now.

    Args:
        store: where the mini-DINO and the ceiling are.
        seed: of the random weights.
    """
    return {
        "random": random_features(seed),
        "dino": dino_features(store),
        "ceiling": tapped(ceiling(ceiling_recipe(), store=store)),
    }


def keys() -> tuple[str, ...]:
    """Artefact keys of the mini-DINO and the ceiling."""
    return key_of(dino_recipe().spec()), key_of(ceiling_recipe().spec())


def probed(nets: Mapping[str, VitFeatures], *, budget: Budget = Budget(), seed: int = 0) -> Probed:
    """Probe networks for every target on the same scenes.

    Args:
        nets: by name, see `networks`.
        budget: how much is probed.
        seed: of the scenes.
    """
    x, y = _scenes("select", budget.fit, seed)
    x_test, y_test = _scenes("eval", budget.test, seed)
    wrong = {}
    with progress(len(nets) * len(TARGETS), "probing") as tick:
        for k, (name, net) in enumerate(nets.items()):
            known, asked = pooled(net, x), pooled(net, x_test)
            rows = []
            for j, answers in enumerate(TARGETS.values()):
                said = answered(known, y[:, j], asked, answers=answers)
                rows.append((said != y_test[:, j]).numpy())
                tick(k * len(TARGETS) + j + 1, name)
            wrong[name] = np.stack(rows)
    return Probed(wrong=wrong, budget=budget)


def digits_in_views(
    nets: Mapping[str, VitFeatures], crops: Transplants, *, budget: Budget = Budget(), seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Error rates of the first and the second digit, read from views instead of whole pictures.

    Tells a network that cannot read from one that cannot find.

    Args:
        nets: by name, see `networks`.
        crops: how views are cut; the first of each two is read.
        budget: how much is probed.
        seed: of scenes and views.
    """
    (x, y), (x_test, y_test) = (
        _scenes(stream, n, seed) for stream, n in (("select", budget.fit), ("eval", budget.test))
    )
    seen, asked = (
        crops.cut(part, Draw(seed=seed, step=step, total=len(part))).first
        for step, part in enumerate((x, x_test))
    )
    places = [list(TARGETS).index(name) for name in ("first digit", "second digit")]
    wrong = {}
    for name, net in nets.items():
        net = replace(net, size=crops.wide)
        known, new = pooled(net, seen), pooled(net, asked)
        first, second = (
            float((answered(known, y[:, j], new, answers=10) != y_test[:, j]).float().mean())
            for j in places
        )
        wrong[name] = (first, second)
    return wrong


# --- the protocol -------------------------------------------------------------------------------


@torch.no_grad()
def pooled(net: VitFeatures, x: Tensor, *, batch: int = 250) -> Tensor:
    """Class token, mean and maximum of the patch tokens of every tap: ``[n, 3 sum(widths)]``.

    Args:
        net: the tapped network.
        x: pictures ``[n, 3, 32, 32]`` in [-1, 1].
        batch: pictures at a time.
    """
    return torch.cat([_pooled(net, part) for part in x.split(batch)])


def _pooled(net: VitFeatures, x: Tensor) -> Tensor:
    found: Any = net.net.forward_intermediates(
        net.seen(x),
        indices=list(net.blocks),
        return_prefix_tokens=True,
        output_fmt="NLC",
        intermediates_only=True,
    )
    parts = [(prefix[:, 0], tokens.mean(1), tokens.amax(1)) for tokens, prefix in found]
    return torch.cat([vector for part in parts for vector in part], dim=1)


def answered(known: Tensor, right: Tensor, asked: Tensor, *, answers: int) -> Tensor:
    """Answers ``[m]`` of a logistic regression for ``asked [m, D]``, fitted on ``known [n, D]``.

    Args:
        known: features to fit on; the last fifth chooses the ridge, then all are used.
        right: their labels ``[n]``.
        asked: features to answer for.
        answers: number of classes.
    """
    mean, scale = known.mean(0), known.std(0).clamp_min(1e-6)
    known, asked = (known - mean) / scale, (asked - mean) / scale
    cut = len(known) * 4 // 5

    def error(ridge: float) -> float:
        weights = fitted(known[:cut], right[:cut], answers=answers, ridge=ridge)
        return float((_logits(known[cut:], weights).argmax(1) != right[cut:]).float().mean())

    best = min(RIDGES, key=error)
    return _logits(asked, fitted(known, right, answers=answers, ridge=best)).argmax(1)


def fitted(x: Tensor, y: Tensor, *, answers: int, ridge: float, rounds: int = 100) -> Tensor:
    r"""Weights ``[D + 1, answers]`` of multinomial logistic regression, by L-BFGS from zero.

    .. math:: \min_W \frac1n \sum_i -\log \mathrm{softmax}(x_i W)_{y_i} + \lambda \| W \|^2

    The last row is the bias, which the ridge leaves alone.
    """
    weights = torch.zeros(x.shape[1] + 1, answers, requires_grad=True)
    solver = torch.optim.LBFGS([weights], max_iter=rounds, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        value = cross_entropy(_logits(x, weights), y) + ridge * weights[:-1].square().sum()
        value.backward()
        return value

    solver.step(loss)
    return weights.detach()


def _logits(x: Tensor, weights: Tensor) -> Tensor:
    return x @ weights[:-1] + weights[-1]


@cache
def _scenes(stream: str, n: int, seed: int) -> tuple[Tensor, Tensor]:
    scenes = draw_scenes(stream, range(n), seed=seed)
    return render(scenes), labels(scenes)


# --- tables and figure --------------------------------------------------------------------------


def table(found: Probed) -> pd.DataFrame:
    """Error rates with Wilson intervals: ``network``, ``target``, ``value``, ``low``, ``high``."""
    import pandas as pd

    rows = []
    for network, wrong in found.wrong.items():
        for target, flags in zip(TARGETS, wrong, strict=True):
            rate = wilson(int(flags.sum()), flags.size)
            rows.append({"network": network, "target": target, **vars(rate)})
    return pd.DataFrame(rows)


def wide(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per network, one column per target, errors in percent as ``value [low, high]``."""
    text = [
        f"{100 * r.value:.1f} [{100 * r.low:.1f}, {100 * r.high:.1f}]" for r in rows.itertuples()
    ]
    shown = rows.assign(text=text).pivot(index="network", columns="target", values="text")
    shown = shown.loc[[n for n in NETWORKS if n in shown.index], list(TARGETS)]
    return shown.rename(index=NETWORKS)


def error_ratios(
    found: Probed, *, ours: str = "dino", than: str = "random"
) -> Iterator[tuple[str, Interval]]:
    """Error of one network over that of another, paired by scene: ``digits``, ``hue``.

    Digits are both digits together.

    Args:
        found: with both networks.
        ours: the mini-DINO.
        than: the random weights.
    """
    names = list(TARGETS)
    for name, targets in zip(BARS, (("first digit", "second digit"), ("hue",)), strict=True):
        picked = [names.index(target) for target in targets]
        ours_wrong, theirs_wrong = (found.wrong[n][picked].sum(0) for n in (ours, than))
        yield name, bootstrap(ours_wrong, theirs_wrong, statistic=_ratio)


def _ratio(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(ours.sum() / max(theirs.sum(), 1))


def bars(store: Store | None = None) -> Iterator[tuple[str, Interval]]:
    """`error_ratios` of the shipped mini-DINO at the default budget; the limit is 0.5."""
    nets = {"random": random_features(), "dino": dino_features(store)}
    yield from error_ratios(probed(nets))


def figure(rows: pd.DataFrame) -> Figure:
    """Error rates by target, one dot per network, with their intervals."""
    colours = dict(zip(NETWORKS, (SOFT, ACCENT, SECOND), strict=True))
    shown: Sequence[str] = [n for n in NETWORKS if n in set(rows["network"])]
    with style():
        drawn = Figure(figsize=(6.4, 2.8), layout="constrained")
        axis = drawn.subplots()
        for k, network in enumerate(shown):
            one = rows[rows["network"] == network].set_index("target").loc[list(TARGETS)]
            error = 100 * np.abs([one["value"] - one["low"], one["high"] - one["value"]])
            places = np.arange(len(one)) + 0.2 * (k - (len(shown) - 1) / 2)
            axis.errorbar(
                places, 100 * one["value"], yerr=error, fmt="o", ms=5, lw=1, capsize=2,
                color=colours[network], label=NETWORKS[network],
            )  # fmt: skip
        axis.axhline(0, color=SOFT, lw=0.6, zorder=0)
        axis.set_xticks(range(len(TARGETS)), list(TARGETS))
        axis.set(ylabel="wrong answers of a linear probe (%)")
        axis.legend(fontsize=8)
    return drawn
