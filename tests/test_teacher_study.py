"""Notebook 01's study: the table of the curriculum says what the recipe does."""

from __future__ import annotations

import pytest

from turbo_lab.recipes import resolve
from turbo_lab.studies import teacher


def test_the_curriculum_is_the_recipes() -> None:
    recipe = resolve("teacher")
    rows = teacher.curriculum(recipe)
    assert rows["steps"].tolist() == [stage.steps for stage in recipe.stages]
    assert rows["blocks"].iloc[[0, -1]].tolist() == [recipe.net.layers, recipe.size.layers]
    shares = rows[["postcards", "posters", "busts"]].map(lambda t: float(t.rstrip("%") or 0))
    assert shares.sum(axis=1).to_numpy() == pytest.approx(100, abs=1)  # thirds are rounded
    assert shares.loc[11].tolist() == [33, 33, 33] and shares.loc[16].tolist() == [100, 0, 0]
    assert rows["shift"].between(1, 2.5).all() and rows["shift"].nunique() == 3
    early = teacher.curriculum(resolve("teacher-early"))
    assert early.equals(rows.loc[: len(early)]) and len(early) == 6
