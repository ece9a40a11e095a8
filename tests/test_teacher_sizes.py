"""Which size of the teacher gives most for a minute."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from turbo_lab.postcards import draw_scenes, render
from turbo_lab.studies import teacher_sizes
from turbo_lab.testbeds.postcards import NetSize, spawn_net

SMALL = NetSize(layers=1, heads=1, head_width=16, text_width=8)


def test_sizes_are_trained_for_as_long_and_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1.8 seconds are six steps of 0.29 and three of 0.59."""
    monkeypatch.setenv("TURBO_LAB_CACHE", str(tmp_path))
    wide = SMALL.model_copy(update={"head_width": 64})
    assert teacher_sizes._seconds(teacher_sizes.grown(SMALL, 1e-6)) > 0
    cost = {SMALL: 0.29, wide: 0.59}
    monkeypatch.setattr(teacher_sizes, "_seconds", lambda recipe: cost[recipe.net])
    found = teacher_sizes.compare((SMALL, wide), minutes=0.03, captions=8, steps=2)
    assert list(found.index) == ["teacher-1x1x16", "teacher-1x1x64"]
    assert list(found["steps"]) == [6, 3] and found["parameters"].is_monotonic_increasing
    assert found["loss"].between(0, 2).all() and found["whole_body"].between(0, 1).all()


def test_a_network_that_says_nothing_has_the_loss_of_saying_nothing() -> None:
    """Of v = z - x, with noise of variance 1 and x apart from it, the mean square is 1 + x²."""
    net = spawn_net(SMALL, 0)
    with torch.no_grad():
        for parameter in net.transformer.proj_out.parameters():
            parameter.zero_()
    found = teacher_sizes.losses(net, n=128)
    power = float(render(draw_scenes("select", range(128))).square().mean())
    assert all(value == pytest.approx(1 + power, rel=0.02) for value in found.values())
