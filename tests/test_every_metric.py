"""One table of every metric: its numbers are those of `measure`, its floor is real."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from turbo_lab import measure
from turbo_lab.errors import BadInput
from turbo_lab.postcards import Scenes, asked, draw_scenes, render
from turbo_lab.studies import every_metric as em
from turbo_lab.studies.textures import EACH


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return draw_scenes("eval", range(48))


@pytest.fixture(scope="module")
def images(scenes: Scenes) -> Tensor:
    return render(scenes)


@pytest.fixture(scope="module")
def real() -> em.Reference:
    return em.reference(96)


@pytest.fixture(scope="module")
def found(images: Tensor, scenes: Scenes, real: em.Reference) -> em.Found:
    return em.find(images, scenes, real, images.unflatten(0, (6, 8)))


def test_values_are_those_of_measure(
    images: Tensor, scenes: Scenes, real: em.Reference, found: em.Found
) -> None:
    values = found.all_values()
    report = measure.report(images, scenes.fields)
    fur = scenes.fields[:, 2] == 1
    others = render(draw_scenes("critic", range(96)))
    assert list(values) == list(em.METRICS)
    assert values["saturation"] == pytest.approx(float(report["saturation"].mean()), rel=1e-5)
    assert values["fur_slope"] == pytest.approx(float(report["psd_slope"][fur].mean()), rel=1e-5)
    assert values["hue_kl"] == pytest.approx(measure.hue_kl(report["hue_mode"]), rel=1e-5)
    grids = images.unflatten(0, (6, 8))
    assert values["diversity"] == pytest.approx(float(measure.pairwise_distance(grids).mean()))
    # Histograms of 64 bins against the exact distance.
    assert values["chroma_w1"] == pytest.approx(measure.chroma_w1(images, others), abs=2e-3)
    free = measure.read(images).free
    patches = measure.ground_patches(images, free, each=EACH)[fur]
    fur_real = draw_scenes("critic", range(96))
    fur_real = fur_real[fur_real.fields[:, 2] == 1]
    pictures = render(fur_real)
    reals = measure.ground_patches(pictures, measure.read(pictures).free, each=EACH)
    exact = measure.sliced_wasserstein(patches, reals, projections=32)
    assert values["fur_patches"] == pytest.approx(exact, rel=1e-4)


def test_trainings_are_averaged_not_pooled(found: em.Found, scenes: Scenes, images: Tensor) -> None:
    grey = em.find(images * 0, scenes, found.real)
    both = em.table([found, grey], resamples=5).set_index("metric")["value"]
    single = [one.all_values()["hue_kl"] for one in (found, grey)]
    assert both["hue_kl"] == pytest.approx(np.mean(single))
    assert np.isnan(both["diversity"])  # one of the two has no grids
    assert em.per_training([found, grey])["hue_kl"] == pytest.approx(single)


def test_intervals_hold_their_values_and_differences_of_equals_are_zero(found: em.Found) -> None:
    rows = em.table([found, found], resamples=40)
    assert (rows["low"] <= rows["value"] + 1e-9).all() and (rows["high"] >= rows["value"]).all()
    gap = em.difference([found, found], [found], "fur_patches", resamples=10)
    assert (gap.value, gap.low, gap.high) == (0.0, 0.0, 0.0)


def test_the_floor_is_other_real_pictures_of_the_same_captions(
    scenes: Scenes, real: em.Reference
) -> None:
    floor = em.floor(scenes, real, sets=2, captions=3, each=4)
    values = em.per_training(floor)
    for rate in ("sign_read", "whole_body", "pose_right"):
        assert values[rate].tolist() == [1.0, 1.0]
    assert (values["diversity"] > 0.2).all()
    assert floor[0].values["saturation"][0] != floor[1].values["saturation"][0]


def test_asked_scenes_are_read_as_the_other_captions_say() -> None:
    drawn = draw_scenes("eval", range(64))
    fields = draw_scenes("eval", range(64, 128)).fields
    other = asked(drawn, fields)
    report = measure.report(render(other), fields)
    assert bool(report["sign_read"].all()) and bool(report["pose_right"].all())
    assert bool(report["ground_right"].all())
    assert torch.equal(render(asked(drawn, drawn.fields)), render(drawn))
    back = asked(other, drawn.fields)
    assert torch.allclose(back.leg_angles, drawn.leg_angles, atol=1e-5)
    with pytest.raises(BadInput, match="fields"):
        asked(drawn, fields[:3])
