"""The linear probe of the mini-DINO: against closed forms, counts, and the labels themselves."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from turbo_lab import dino
from turbo_lab.dino.net import VitSize, spawn_vit, tapped
from turbo_lab.dino.supervised import CeilingRecipe, ceiling, labels
from turbo_lab.postcards import Caption, draw_scenes, render
from turbo_lab.postcards.captions import ARMS, GROUNDS, LEGS
from turbo_lab.store import Store
from turbo_lab.studies import dino_probe

TINY = VitSize(width=16, depth=2, heads=2)


@cache
def cards(n: int, stream: str = "select") -> Tensor:
    return render(draw_scenes(stream, range(n)))


def test_a_probe_reads_what_is_there_and_guesses_what_is_not() -> None:
    generator = torch.manual_seed(0)
    y = torch.randint(4, (1500,), generator=generator)
    noise = torch.randn(1500, 20, generator=generator)
    told = noise.clone()
    told[:, :4] += 8 * torch.nn.functional.one_hot(y, 4)
    for x, low, high in ((told, 0.0, 0.01), (noise, 0.68, 0.82)):
        said = dino_probe.answered(x[:1000], y[:1000], x[1000:], answers=4)
        wrong = float((said != y[1000:]).float().mean())
        assert low <= wrong <= high


def test_a_probe_reaches_the_bayes_error_of_two_normals() -> None:
    generator = torch.manual_seed(0)
    y = torch.randint(2, (12_000,), generator=generator)
    x = torch.randn(12_000, 2, generator=generator) + (2 * y[:, None] - 1)
    said = dino_probe.answered(x[:4000], y[:4000], x[4000:], answers=2)
    bayes = 0.5 * math.erfc(math.sqrt(2) / math.sqrt(2))  # distance sqrt 2 to the border
    assert float((said != y[4000:]).float().mean()) == pytest.approx(bayes, abs=0.01)


def test_labels_are_what_the_scenes_say() -> None:
    scenes = draw_scenes("select", range(5))
    found = labels(scenes)
    for row, caption in zip(found.tolist(), scenes.captions, strict=True):
        ground, arms, legs, tens, units, _ = row
        assert caption == Caption(
            arms=ARMS[arms], legs=LEGS[legs], ground=GROUNDS[ground], number=f"{tens}{units}"
        )
    assert torch.equal(found[:, -1], scenes.hue_mode)


def test_tables_and_ratios_are_counts_of_wrong_answers(tmp_path: Path) -> None:
    wrong = {name: np.zeros((6, 200), dtype=bool) for name in dino_probe.NETWORKS}
    wrong["random"][3:5, :100] = True
    wrong["dino"][3:5, :20] = True
    wrong["random"][5, :40] = wrong["dino"][5, :30] = True
    found = dino_probe.Probed(wrong=wrong, budget=dino_probe.Budget(fit=1, test=200))
    ratios = dict(dino_probe.error_ratios(found))
    assert ratios["digits"].value == pytest.approx(0.2) and ratios["digits"].high < 0.5
    assert ratios["hue"].value == pytest.approx(0.75) and ratios["hue"].high > 0.5
    back = dict(dino_probe.error_ratios(found, ours="random", than="dino"))
    assert back["digits"].value == pytest.approx(5.0)
    rows = dino_probe.table(found).set_index(["network", "target"])
    one = rows.loc[("random", "first digit")]
    assert one["value"] == 0.5 and one["low"] < 0.5 < one["high"]
    shown = dino_probe.wide(dino_probe.table(found))
    assert list(shown.index) == list(dino_probe.NETWORKS.values())
    assert shown.loc["mini-DINO", "hue"].startswith("15.0 [")
    figure = dino_probe.figure(dino_probe.table(found))
    dots = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
    heights = [float(y) for line in dots for y in line.get_ydata()]  # type: ignore[union-attr]
    shares = [100 * wrong[n][k].mean() for n in dino_probe.NETWORKS for k in range(6)]
    assert heights == pytest.approx(shares)


def test_the_whole_probe_runs_on_any_networks_and_the_ceiling_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dino_probe, "RIDGES", (1e-1,))
    rates = dino.dino_recipe("smoke").rates
    recipe = CeilingRecipe(vit=TINY, steps=2, batch_size=4, rates=rates)
    taught = ceiling(recipe, store=Store(cache=tmp_path))
    nets = {"random": dino.random_features(size=TINY, blocks=(1,)), "ceiling": tapped(taught, (1,))}
    found = dino_probe.probed(nets, budget=dino_probe.Budget(fit=50, test=25))
    assert all(flags.shape == (6, 25) for flags in found.wrong.values())
    assert not torch.equal(taught.cls_token, spawn_vit(TINY, 0).cls_token.half().float())


def test_pooling_takes_class_mean_and_maximum_of_every_block() -> None:
    features = dino.random_features(size=TINY)
    x = cards(3)
    tokens = features(x, torch.zeros(3), None)
    found = dino_probe.pooled(features, x, batch=2).view(3, 2, 3, 16)
    for k in range(2):
        assert torch.allclose(found[:, k, 1], tokens[k].mean(1), atol=1e-5)
        assert torch.allclose(found[:, k, 2], tokens[k].amax(1), atol=1e-5)
    last = features.net.norm(found[:, 1, 0])
    assert torch.allclose(last, features.net.forward_features(x)[:, 0], atol=1e-5)
