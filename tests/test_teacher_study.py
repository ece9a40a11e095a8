"""Notebook 01's study: the table of the curriculum says what the recipe does."""

from __future__ import annotations

import pandas as pd
import pytest
from torch import Tensor
from torch.nn.functional import avg_pool2d

from turbo_lab.lab import Samples
from turbo_lab.postcards import draw_scenes, render
from turbo_lab.postcards.captions import GROUNDS
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


def test_the_claims_hold_where_few_steps_blur_and_guidance_sharpens_and_saturates() -> None:
    scenes = draw_scenes("eval", range(60))
    real = render(scenes)
    grey = real.mean(1, keepdim=True)

    def sweep(axis: str, pictures: dict[float, Tensor]) -> teacher.Sweep:
        samples = {
            at: Samples(images=images, scenes=scenes, nfe=1.0, seconds_per_image=1.0, key="k")
            for at, images in pictures.items()
        }
        return teacher.Sweep(axis=axis, samples=samples, table=pd.DataFrame())

    blurred = avg_pool2d(real, 3, 1, 1)
    steps = sweep("steps", {40.0: real, 2.0: blurred})
    guidance = sweep("guidance", {1.0: blurred, 4.0: real, 8.0: grey + 1.5 * (real - grey)})
    found = teacher.claims(steps, guidance, profile="quick", keys=("k",))
    assert {c.id: c.verdict for c in found} == {f"T{k}": "holds" for k in range(1, 7)}
    moss = int((scenes.fields[:, 2] == GROUNDS.index("moss")).sum())
    assert [c.samples for c in found] == [60, 60, 60, moss, 60, 60]
