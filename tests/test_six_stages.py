"""The best student stage by stage, and TDM in place of its last ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from turbo_lab.lab import open_lab
from turbo_lab.recipes import resolve
from turbo_lab.recipes.six_blocks import EDGE, TURBO
from turbo_lab.stages import check_stages
from turbo_lab.store import Store
from turbo_lab.studies.six_stages import LOOKED_AT, candidates, looks, with_tdm


@pytest.mark.parametrize("after", [0, 2])
def test_tdm_takes_the_place_of_what_follows(after: int) -> None:
    whole, other = resolve(TURBO), with_tdm(after)
    check_stages(other)
    assert other.start == whole.start and other.stages[:after] == whole.stages[:after]
    *_, last = other.stages
    assert last.method == "tdm" and last.gan is None and other.times == (1.0, EDGE)
    assert last.steps == (900 if after else 1800)
    assert last.rivals_from == whole.stages[min(after, 1)].rivals_from


def test_every_candidate_is_sampled_as_the_student_is() -> None:
    found = candidates()
    assert {recipe.times for recipe in found.values()} == {(1.0, EDGE)}
    assert len({recipe.spec()["seed"] for recipe in found.values()}) == 1
    assert found["PCM, DMD2 twice, GAN"] == resolve(TURBO)


@pytest.mark.slow
def test_it_is_trained_and_looked_at(tmp_path: Path) -> None:
    store = Store(cache=tmp_path, shipped=Store.default().shipped)
    bench = open_lab(device="cpu", store=store, teacher="teacher")
    table = looks(bench, {"TDM": with_tdm(0, profile="smoke")}, captions=48)
    assert list(table.index) == ["TDM", "teacher"] and list(table.columns) == list(LOOKED_AT)
    assert table["sign_read"]["teacher"] > 0.8
    assert table.notna().all(axis=None)
