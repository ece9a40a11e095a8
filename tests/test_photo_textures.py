"""The photographs' study: parts apart, alterations found where they were put, AUC as SciPy's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import skimage.data
import torch
from matplotlib.figure import Figure
from scipy.stats import mannwhitneyu
from torch.nn.functional import softplus

from turbo_lab.claims import Claim
from turbo_lab.errors import MissingPiece
from turbo_lab.heads import Heads
from turbo_lab.lab import Lab
from turbo_lab.postcards import SIZE
from turbo_lab.store import Store
from turbo_lab.streams import Draw
from turbo_lab.studies import photo_critics, photo_figures, photo_textures
from turbo_lab.studies.photo_critics import LOOKS, TASKS, Answers, Told
from turbo_lab.studies.photo_textures import ALTERED, MATERIALS, TRUE, Study


@pytest.fixture(scope="module", autouse=True)
def rough_intervals() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(photo_textures, "RESAMPLES", 20)
        patch.setattr(photo_critics, "RESAMPLES", 100)
        yield


@pytest.fixture(scope="module")
def study() -> Study:
    return photo_textures.study()


@pytest.fixture(scope="module")
def bench(study_lab: Lab) -> Lab:
    """With the shipped artefacts behind it, for the mini-DINO."""
    return replace(
        study_lab, store=Store(cache=study_lab.store.cache, shipped=Store.default().shipped)
    )


# --- photographs --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MATERIALS)
def test_parts_are_the_photograph_halved_by_area_and_share_no_pixel(name: str) -> None:
    one = photo_textures.photograph(name)
    whole = np.atleast_3d(getattr(skimage.data, name)()).astype(float)
    height, width = (n // 2 * 2 for n in whole.shape[:2])
    even = whole[:height, :width].reshape(height // 2, 2, width // 2, 2, -1).mean((1, 3))
    both = torch.cat([one.reference, one.asked], dim=2).permute(1, 2, 0).numpy()
    assert both.shape[:2] == even.shape[:2]
    assert np.abs(both - even).max() <= 0.5  # rounded to 8 bits


def test_squares_lie_side_by_side_and_are_those_of_the_right_part() -> None:
    part = photo_textures.photograph("brick").asked
    squares = photo_textures.asked("brick", TRUE)
    across = part.shape[2] // SIZE
    assert len(squares) == (part.shape[1] // SIZE) * across
    last = ((squares[across + 1] + 1) * 127.5).round().to(torch.uint8)
    assert torch.equal(last, part[:, SIZE : 2 * SIZE, SIZE : 2 * SIZE])


def test_a_photograph_that_is_not_there_is_said_in_one_sentence() -> None:
    with pytest.raises(MissingPiece, match=r"marble\.png"):
        photo_textures.photograph("marble")


def test_alterations_are_what_they_are_called() -> None:
    part = photo_textures.photograph("gravel").asked
    spectra = {
        how: torch.fft.rfft2(change(part).double()).abs().square()
        for how, change in ALTERED.items()
    }
    true = torch.fft.rfft2(part.double()).abs().square()
    fine = torch.fft.fftfreq(part.shape[1])[:, None].abs() > 0.3
    ratio = {how: float((of * fine).sum() / (true * fine).sum()) for how, of in spectra.items()}
    assert ratio["blurred"] < 0.5 and ratio["sharpened"] > 1.5
    # but for rounding and what was cut off at black and white
    assert ratio["phases scrambled"] == pytest.approx(1, abs=0.1)
    moved = ALTERED["phases scrambled"](part).float()
    assert np.corrcoef(moved.flatten(), part.float().flatten())[0, 1] < 0.3


# --- measures -----------------------------------------------------------------------------------


def test_measures_rise_and_fall_with_sharpness_on_every_photograph(study: Study) -> None:
    for name in MATERIALS:
        of = {how: study.found[name, how] for how in (TRUE, *ALTERED)}
        energy = {how: float(one.energy.mean()) for how, one in of.items()}
        slope = {how: float(one.slope.mean()) for how, one in of.items()}
        assert energy["blurred"] < energy[TRUE] < energy["sharpened"], name
        assert slope["blurred"] < slope[TRUE] < slope["sharpened"], name


def test_tables_have_every_photograph_and_its_own_part_is_the_floor(study: Study) -> None:
    rows = photo_textures.table(study)
    assert len(rows) == len(MATERIALS) * (len(MATERIALS) + len(ALTERED)) * 3
    assert bool((rows["low"] <= rows["value"]).all() and (rows["value"] <= rows["high"]).all())
    wide = photo_textures.wide(rows, "patches")
    assert list(wide.index) == ["grass", "gravel", "brick", "cat"] and wide.loc["cat", "cat"] == ""
    for figure in (photo_figures.pictures(), photo_figures.distances(rows)):
        assert isinstance(figure, Figure)


def test_claims_say_what_the_measures_see(study: Study) -> None:
    found = {claim.id: claim for claim in photo_textures.claims(study, profile="smoke")}
    assert found["T-blur"].verdict == found["T-sharp"].verdict == "holds"
    assert found["T-material"].interval.value > found["T-blur"].interval.value
    gaps = [
        abs((study.found[m, "phases scrambled"].slope - study.found[m, TRUE].slope).mean())
        for m in MATERIALS
    ]
    assert found["T-spectrum"].interval.value == pytest.approx(float(np.mean(gaps)))


# --- critics ------------------------------------------------------------------------------------


def test_the_area_is_that_of_the_rank_test_critic_by_critic() -> None:
    source = np.random.default_rng(0)
    zero = 10.0 * np.arange(3)[:, None]  # every critic has its own
    true, other = (source.integers(0, high, (3, 20)) + zero for high in (9, 7))
    ranks = [mannwhitneyu(a, b).statistic / (20 * 20) for a, b in zip(true, other, strict=True)]
    assert photo_critics.auc(true, other) == pytest.approx(np.mean(ranks))


def told(gap: float, seed: int) -> Told:
    source = np.random.default_rng(seed)
    return Told(true=source.normal(gap, 1, (3, 80)), other=source.normal(0, 1, (3, 80)))


def test_claims_hold_where_the_critic_is_right_and_not_where_it_guesses() -> None:
    """Normal logits a distance d apart have an AUC of Phi(d / sqrt 2): 0.76 for 1."""
    gaps = {"pixels": 0.0, "random": 0.0, "dino": 1.0, "teacher": 1.0}
    answers = Answers(
        told={(k, task): told(gaps[k], n) for n, task in enumerate(TASKS) for k in LOOKS},
        budget=photo_critics.BUDGETS["smoke"],
        keys=("a",),
    )
    rows = photo_critics.table(answers).set_index(["features", "task"])
    assert rows.loc[("dino", "blurred"), "value"] == pytest.approx(0.76, abs=0.05)
    assert rows.loc[("random", "blurred"), "low"] < 0.5 < rows.loc[("random", "blurred"), "high"]
    made: list[Claim] = photo_critics.claims(answers, profile="smoke")
    assert {c.id: c.verdict for c in made} == dict.fromkeys(
        ("T-dino-blur", "T-dino-phases", "T-dino-random", "T-dino-pixels"), "holds"
    )
    assert list(photo_critics.wide(rows.reset_index()).index) == list(LOOKS.values())


def test_a_critic_learns_from_the_left_and_is_asked_about_the_same_places_on_the_right() -> None:
    learnt, asked = photo_critics.learnt_from(TRUE, 40), photo_critics.asked_about(TRUE, 5)
    blurred = photo_critics.asked_about("blurred", 5)
    assert learnt.shape == (40, 3, SIZE, SIZE) and asked.shape == blurred.shape
    right = torch.cat([photo_textures.asked(name, TRUE) for name in MATERIALS])
    assert all(bool((right == one).flatten(1).all(1).any()) for one in asked)
    assert not any(bool((right == one).flatten(1).all(1).any()) for one in learnt)
    near = torch.stack([(blurred - one).flatten(1).norm(dim=1) for one in asked]).argmin(1)
    assert near.tolist() == list(range(len(asked)))


def test_heads_tell_tokens_apart_by_the_logistic_loss() -> None:
    source = torch.Generator().manual_seed(0)
    true, other = (torch.randn(40, 3, 4, generator=source) + k for k in (0.8, -0.8))
    before = photo_critics.trained_heads((true,), (other,), steps=1, seed=0)
    heads = photo_critics.trained_heads((true,), (other,), steps=60, seed=0)
    again = photo_critics.trained_heads((true,), (other,), steps=60, seed=0)

    @torch.no_grad()
    def loss(of: Heads) -> float:
        return float((softplus(-of((true,), None)) + softplus(of((other,), None))).mean())

    assert loss(heads) < 0.7 * loss(before) and loss(heads) == loss(again)
    telling = photo_critics.Telling(heads=heads, true=(true,), other=(other,))
    draw = Draw(seed=0, step=0, total=8)
    batch = telling.batches(draw)
    terms = telling.loss(batch, draw)
    rows = heads((true[batch.x[:, 0]],), None)
    torch.testing.assert_close(terms["teacher"], softplus(-rows).mean(1))


def test_every_kind_of_features_is_asked(bench: Lab) -> None:
    budget = photo_critics.Budget(steps=2, crops=4, most=2, seeds=2)
    answers = photo_critics.answers(bench, budget)
    assert set(answers.told) == {(looks, task) for looks in LOOKS for task in TASKS}
    assert {told.true.shape for told in answers.told.values()} == {(2, 8)}


def test_only_random_features_have_a_seed(bench: Lab) -> None:
    images = photo_critics.asked_about(TRUE, 1)
    for looks in LOOKS:
        one, other = (photo_critics.tokens_of(bench, looks, images, seed) for seed in (0, 1))
        same = all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
        assert same == (looks != "random"), looks
