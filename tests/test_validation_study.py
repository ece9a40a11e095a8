"""The validation of the metrics: bands, effects and claims, at smoke size and (slow) at quick."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from turbo_lab.measure import corruptions as co
from turbo_lab.postcards import draw_scenes, render
from turbo_lab.studies import every_metric as em
from turbo_lab.studies import validation as va
from turbo_lab.studies import validation_figures as vf
from turbo_lab.studies.validation_cases import CASES, CONTROL


@pytest.fixture(scope="module")
def smoke() -> va.Validation:
    return va.validate("smoke")


def test_every_metric_has_a_corruption_and_every_corruption_a_case() -> None:
    assert list(CASES) == list(co.ALL)
    owned = {metric for case in CASES.values() for metric in case.own}
    assert owned == set(em.METRICS)
    for name, case in CASES.items():
        assert case.listed <= set(em.METRICS), name
        assert not case.listed & set(case.own), f"{name}: its own metric is no coupling"
        assert all(why.strip() for why in case.coupled)
        assert len(case.quiet) + len(case.own) + len(case.listed) == len(em.METRICS)
    assert not CASES[CONTROL].own and not CASES[CONTROL].listed
    listed = va.couplings()
    assert len(listed) == sum(len(case.coupled) for case in CASES.values())


def test_measuring_what_changed_is_measuring_everything() -> None:
    scenes = draw_scenes("eval", range(24))
    images, real = render(scenes), em.reference(96)
    clean = em.find(images, scenes, real, images.unflatten(0, (3, 8)))
    spoiled = co.corrupted("sign loss", scenes, 0.5)
    grids = spoiled.unflatten(0, (3, 8))
    short = em.find_changed(spoiled, images, scenes, clean, grids).all_values()
    whole = em.find(spoiled, scenes, real, grids).all_values()
    assert short == pytest.approx(whole, rel=1e-5, abs=1e-7)
    assert short["sign_lost"] == 0.5 and clean.all_values()["sign_lost"] == 0
    same = em.find_changed(images, images, scenes, clean)
    assert same.all_values()["fur_patches"] == clean.all_values()["fur_patches"]
    assert math.isnan(same.all_values()["diversity"])


def test_bands_are_prediction_intervals_of_one_more_set(smoke: va.Validation) -> None:
    scenes = [draw_scenes("eval", range(24 * k, 24 * k + 24)) for k in range(4)]
    null = [em.find(render(s), s, em.reference(96)) for s in scenes]
    bands = va.null_bands(null)
    values = np.array([one.all_values()["saturation"] for one in null])
    level = 1 - 0.05 / len(em.METRICS)
    low, high = stats.t.interval(
        level, 3, loc=values.mean(), scale=values.std(ddof=1) * math.sqrt(1 + 1 / 4)
    )
    band = bands["saturation"]
    assert (band.value - band.half, band.value + band.half) == pytest.approx((low, high))
    # No real sign is ever misread, yet the band of a rate has a width: that of Wilson.
    zero = stats.binomtest(0, 24).proportion_ci(0.95, method="wilson").high
    assert bands["sign_lost"].half == pytest.approx(zero)
    assert bands["clipped"].half == va.RESOLUTION["clipped"]
    assert all(band.half > 0 for band in smoke.bands.values())


def test_effects_are_paired_and_in_half_widths(smoke: va.Validation) -> None:
    rows = va.ladders(smoke)
    budget = smoke.budget
    assert len(rows) == len(CASES) * len(em.METRICS) * (1 + len(budget.strengths))
    assert (rows[rows["strength"] == 0]["effect"] == 0).all()
    full = rows[rows["strength"] == 1].set_index(["corruption", "metric"])
    half = smoke.bands["sign_lost"].half
    assert full.loc[("sign loss", "sign_lost"), "effect"] == pytest.approx(1 / half)
    matrix = va.matrix(smoke)
    assert matrix.loc["pose", "pose_right"] == pytest.approx(-1 / smoke.bands["pose_right"].half)
    assert matrix.loc["pose", "sign_read"] == 0
    assert not matrix.isna().any().any()


def test_the_smallest_step_decides_and_a_ladder_that_goes_back_fails(smoke: va.Validation) -> None:
    step = va.own_step(smoke, "sign loss")
    assert step.value == pytest.approx(0.5 / smoke.bands["sign_lost"].half)
    back = replace(
        smoke,
        found={**smoke.found, ("sign loss", 1.0): smoke.clean},
    )
    assert va.own_step(back, "sign loss").value == pytest.approx(-step.value)
    made = {c.id: c for c in va.claims(back, profile="smoke")}
    assert made["V-own-sign-loss"].verdict == "not reproduced"


def test_a_metric_that_is_moved_without_being_listed_is_named(smoke: va.Validation) -> None:
    swapped = {("pose", s): smoke.found["ghost sign", s] for s in smoke.budget.strengths}
    leaking = replace(smoke, found={**smoke.found, **swapped})
    metric, strength = va.loudest(leaking, "pose")
    assert metric not in CASES["pose"].own and strength == 1
    size = va.leak(leaking, "pose")
    assert size.value == pytest.approx(
        abs(leaking.effect("pose", strength, metric, leaking.everyone))
    )
    assert size.value > va.leak(smoke, "pose").value
    assert leaking.effect("pose", 1.0, "ghost_signs", leaking.everyone) > 1


def test_a_control_that_moves_something_is_seen(smoke: va.Validation) -> None:
    assert va.outside(smoke).value == 0
    moved = {(CONTROL, s): smoke.found["phase scramble", s] for s in smoke.budget.strengths}
    assert va.outside(replace(smoke, found={**smoke.found, **moved})).value > 0.2


def test_claims_come_in_pairs_and_one_for_the_control(smoke: va.Validation) -> None:
    made = va.claims(smoke, profile="smoke")
    assert len(made) == 2 * (len(CASES) - 1) + 1 == len({c.id for c in made})
    assert {c.samples for c in made} == {smoke.budget.pictures}


def test_figures_show_every_corruption_and_frame_what_is_expected(smoke: va.Validation) -> None:
    rows = va.ladders(smoke)
    panels = [a for a in vf.ladder_panels(rows).axes if a.get_visible()]
    assert [a.get_title() for a in panels] == list(CASES)
    blur = panels[0]
    assert len(blur.lines) == len(CASES["blur"].own) + len(CASES["blur"].quiet)
    heat = vf.matrix_map(va.matrix(smoke)).axes[0]
    framed = sum(len(case.own) + len(case.listed) for case in CASES.values())
    assert len(heat.patches) == framed
    numbers = [text for text in heat.texts if text.get_text()]
    assert len(numbers) == int((va.matrix(smoke).abs() > 1).to_numpy().sum())


@pytest.mark.slow
def test_at_quick_every_ladder_is_monotone_and_nothing_else_leaves_its_band() -> None:
    found = va.validate("quick")
    made = va.claims(found, profile="quick")
    by = {c.id: c for c in made}
    assert [i for i, c in by.items() if "-own-" in i and c.verdict != "holds"] == []
    assert [i for i, c in by.items() if c.verdict == "not reproduced"] == []
    assert by["V-control"].verdict == "holds"
    rows = va.ladders(found)
    quiet: pd.DataFrame = rows[rows["role"] == "quiet"]
    assert quiet[quiet["effect"].abs() >= 1].empty
    # The unspoiled pictures are one more real set, so they lie in the bands themselves.
    clean = rows[rows["strength"] == 0]
    assert ((clean["value"] - clean["low"] >= -1e-9) & (clean["high"] >= clean["value"])).all()
    # A reason whose metrics never feel it has no place on the list.
    size = rows.assign(size=rows["effect"].abs())
    felt = size.groupby(["corruption", "metric"])["size"].max()
    for name, case in CASES.items():
        for why, metrics in case.coupled.items():
            assert max(felt[name, m] for m in metrics) > 0.25, (name, why)
