"""Notebook 05's study: coarse, flat and scrambled textures are found where they were put."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from matplotlib.figure import Figure
from scipy.ndimage import gaussian_filter
from small_lab import quick_study, small_student
from torch import Tensor

from turbo_lab import explore_gan, measure
from turbo_lab.lab import Lab
from turbo_lab.postcards import Scenes, draw_scenes, render
from turbo_lab.recipes import student_recipe
from turbo_lab.recipes.adversarial import AGAINST, CALLS, CONTROL, START
from turbo_lab.recipes.distribution import RIVAL_UPDATES, calls_per_round
from turbo_lab.recipes.warm import STEPS
from turbo_lab.store import Store
from turbo_lab.studies import adversarial, adversarial_claims, adversarial_figures
from turbo_lab.studies.adversarial import DIRECT, EIGHT, GAN, STUDENTS, TEACHER, Budget, Comparison
from turbo_lab.studies.textures import METRICS, TEXTURES, distance, measured, nearer, real_slices

SWEEP = ("turbo-teacher-data", "gan-pixels")
BUDGET = Budget(captions=12, seeds=2, sweep=SWEEP, real=64)


@pytest.fixture(scope="module")
def bench(study_lab: Lab) -> Iterator[Lab]:
    """With the shipped artefacts behind it: the main critic looks through the mini-DINO."""
    store = Store(cache=study_lab.store.cache, shipped=Store.default().shipped)
    with quick_study(study_lab):
        yield replace(study_lab, store=store)


@pytest.fixture(scope="module")
def comparison(bench: Lab) -> Comparison:
    return adversarial.compare(bench, BUDGET, seed=0)


def cards(n: int, first: int = 0) -> tuple[Tensor, Scenes]:
    scenes = draw_scenes("eval", range(first, first + n))
    return render(scenes), scenes


def blurred(images: Tensor, sigma: float) -> Tensor:
    return torch.from_numpy(gaussian_filter(images.numpy(), (0, 0, sigma, sigma)))


# --- equal calls --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [CONTROL, *AGAINST])
def test_with_and_without_a_critic_the_same_calls_are_spent(name: str) -> None:
    """The samples that a critic looks at are calls, too; a stage rounds to whole steps."""
    (stage,) = student_recipe(name, steps=STEPS).stages
    each = calls_per_round(STEPS, RIVAL_UPDATES) + (0 if name == CONTROL else (1 + STEPS) / 2)
    spent = stage.steps * stage.batch_size * each
    assert spent == pytest.approx(CALLS["quick"], rel=0.01)


def test_everyone_is_drawn_for_the_same_captions(comparison: Comparison) -> None:
    drawn = comparison.drawn.samples
    wanted = {(f, 8 if f == EIGHT else STEPS, k) for f in STUDENTS for k in range(BUDGET.seeds)}
    assert set(drawn) == wanted | {(f, STEPS, 0) for f in SWEEP}
    assert all(torch.equal(s.scenes.fields, comparison.scenes.fields) for s in drawn.values())
    assert {s.nfe for (f, _, _), s in drawn.items() if f != EIGHT} == {2.0}
    gan = comparison.drawn.students[GAN, STEPS, 1].artefact
    assert gan.json("recipe.json")["start"]["name"] == START


# --- what is measured ---------------------------------------------------------------------------


def test_a_smoothed_ground_is_further_from_real_and_claims_see_it() -> None:
    images, scenes = cards(60)
    slices = real_slices(200)
    sharp, soft = (measured([x, x], scenes, slices) for x in (images, blurred(images, 0.8)))
    real = adversarial.Real(slices=slices, floor=sharp)
    for ground in TEXTURES:
        assert distance(real, soft, ground).low > distance(real, sharp, ground).high
        assert sharp.textures[ground].energy.mean() == pytest.approx(1, abs=0.35)
        assert soft.textures[ground].energy.mean() < 0.5
        gap = nearer(real, soft, sharp, [ground])
        assert gap.low > 0 and nearer(real, sharp, soft, [ground]).high < 0
    same = nearer(real, sharp, sharp, TEXTURES)
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_trainings_that_err_in_opposite_ways_are_not_pooled_to_a_good_one() -> None:
    images, scenes = cards(60)
    slices = real_slices(200)
    grey = images.mean((2, 3), keepdim=True)
    flat, rough = (grey + k * (images - grey) for k in (0.5, 1.5))
    real = adversarial.Real(slices=slices, floor=measured([images], scenes, slices))
    one = measured([flat, rough], scenes, slices)
    apart = [distance(real, one.training(k), "moss").value for k in (0, 1)]
    assert distance(real, one, "moss").value == pytest.approx(sum(apart) / 2)


def test_scrambled_phases_keep_the_spectrum_and_nothing_else() -> None:
    images, scenes = cards(40)
    mixed = measure.scrambled(images)
    power, other = (torch.fft.rfft2(x).abs() for x in (images, mixed))
    assert torch.allclose(power, other, rtol=1e-3, atol=1e-2)
    assert torch.allclose(images.mean((2, 3)), mixed.mean((2, 3)), atol=1e-5)
    again = measure.scrambled(images)
    assert torch.equal(mixed, again) and not torch.equal(mixed, measure.scrambled(images, seed=1))
    report = measure.report(mixed, scenes.fields)
    assert float(report["sign_read"].float().mean()) < 0.1
    assert float(report["whole_body"].float().mean()) < 0.1


def test_the_ground_spectrum_of_real_pictures_is_the_known_one(bench: Lab) -> None:
    images, scenes = cards(600)
    one = measured([images], scenes, real_slices(50))
    for ground in TEXTURES:
        own = adversarial.spectrum(one.textures[ground].power, ground)
        known = adversarial.spectrum(measure.expected_power(ground), ground)
        assert own == pytest.approx(known, rel=0.15)


# --- tables, claims, figures --------------------------------------------------------------------


def test_tables_have_everyone_and_every_metric(comparison: Comparison) -> None:
    rows = adversarial.table(comparison)
    assert set(rows["family"]) == set(adversarial.ROWS) and set(rows["metric"]) == set(METRICS)
    wide = adversarial.wide(rows, "moss_patches", "sign_read")
    assert list(wide.index) == list(adversarial.ROWS.values())
    swept = adversarial.ablations(comparison)
    assert set(swept["family"]) == {CONTROL, GAN, *SWEEP}
    assert CONTROL not in set(swept[swept["metric"] == "texture"]["family"])
    table = adversarial.scramble_table(comparison)
    same, other = table.loc["real"], table.loc["real, phases scrambled"]
    fine = "power above 1/4 cycle per pixel"
    assert other[fine] == pytest.approx(same[fine], abs=0.001)
    assert other["signs read"] < 0.5 < same["signs read"]


def test_each_ablation_changes_one_thing() -> None:
    for title, own in adversarial.groups().items():
        assert GAN in own and len(own) > 1, title
    named = [f for own in adversarial.groups().values() for f in own if f != GAN]
    assert sorted(named) == sorted(f for f in AGAINST if f != GAN)


def test_claims_say_who_is_held_against_whom(comparison: Comparison) -> None:
    found = {claim.id: claim for claim in adversarial_claims.claims(comparison, profile="smoke")}
    assert {f"{id_}-{g}" for id_ in ("C5", "C6", "C6-term", "C6-pass") for g in TEXTURES} < set(
        found
    )
    assert "C6-rho" in found and "C6-dino" not in found  # its students were not drawn
    assert found["C6-rho"].seeds == 1 and found["C6-moss"].seeds == BUDGET.seeds
    gap = nearer(
        comparison.real, comparison.measured[DIRECT], comparison.measured[TEACHER], ["moss"]
    )
    assert found["C5-moss"].interval == gap


def test_figures_are_drawn(comparison: Comparison) -> None:
    rows, swept = adversarial.table(comparison), adversarial.ablations(comparison)
    curves = adversarial.curves(comparison)
    assert set(curves["term"]) == set(adversarial.TERMS)
    for figure in (
        adversarial_figures.magnified(comparison, each=1),
        adversarial_figures.dots(rows, ["moss_patches", "sign_read"]),
        adversarial_figures.spectra(adversarial.spectra(comparison)),
        adversarial_figures.scrambles(comparison, count=2),
        adversarial_figures.ablations(swept, ["texture", "sign_read"]),
        adversarial_figures.training(curves),
        adversarial_figures.hurts(comparison, count=2),
    ):
        assert isinstance(figure, Figure)


def test_the_explorer_shows_the_nearest_student_that_there_is_and_says_which() -> None:
    for family, one in AGAINST.items():
        own = explore_gan.settings(family)
        if one.loss == "hinge":  # no knob for it: it is the main one but for its loss
            assert family not in explore_gan.on_knobs() and explore_gan.nearest(own) == GAN
            continue
        assert explore_gan.nearest(own) == family
        assert "exactly" in explore_gan.said(own, family)
    main = explore_gan.settings(GAN)
    both = {**main, "features": "teacher", "rho": 1.0}
    assert explore_gan.nearest(both, "features") == "gan-teacher"
    assert explore_gan.nearest(both, "rho") == "gan-rho-1"
    assert explore_gan.nearest(both, "balance") in ("gan-teacher", "gan-rho-1")
    words = explore_gan.said(both, "gan-teacher")
    assert "without rho 1," in words and "rho 0.5" in words and "taps of the teacher" in words
    all_three = {**both, "balance": 8.0}
    assert explore_gan.nearest(all_three, "balance") == "gan-balance-8"


def test_every_knob_offers_what_some_student_has() -> None:
    for knob in explore_gan.KNOBS:
        main = explore_gan.settings(GAN)
        for value in explore_gan.values(knob):
            wanted = {**main, knob: value}
            assert explore_gan.settings(explore_gan.nearest(wanted)) == wanted
    assert explore_gan.values("rho") == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_the_explorer_draws_with_and_without(
    bench: Lab, comparison: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "turbo_lab.lab.student_recipe", lambda *a, **k: small_student(bench, *a, **k)
    )
    box = explore_gan.gan_explorer(bench, noises=2)
    knobs, shown = box.children
    features, rho, balance, seed, *_ = knobs.children
    picture, note = shown.children
    assert bytes(picture.value).startswith(b"\x89PNG") and "exactly" in note.value
    assert (features.value, rho.value, balance.value) == ("dino", 0.5, 2.0)
    before = bytes(picture.value)
    rho.value = 0.0
    assert "exactly" in note.value and "rho 0," in note.value
    features.value = "pixels"
    assert "without rho 0," in note.value and "features pixels" in note.value
    seed.value = 7
    assert bytes(picture.value) != before
