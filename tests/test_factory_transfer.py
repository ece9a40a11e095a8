"""The miniature beside the factory: findings are those of the files, options do what they say."""

from __future__ import annotations

import itertools
import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from turbo_lab import places
from turbo_lab.recipes.qwen_changes import changed
from turbo_lab.studies import factory_transfer
from turbo_lab.studies.factory_recipes import chosen
from turbo_lab.studies.factory_transfer import LESSONS, Claimed, Difference, Lesson, Pair

TURBO = chosen("turbo")
CLAIM = {
    **{"id": "L-x", "notebook": "06_n", "statement": "more is better", "statistic": "of signs"},
    **{"value": 0.2, "low": 0.1, "high": 0.3, "seeds": 1, "profile": "quick"},
    **{"verdict": "holds", "artefact_keys": []},
}


def figures(folder: Path, rows: list[dict[str, Any]], **claim: object) -> Path:
    """A folder of figures with one claim and one table."""
    (folder / "06_n").mkdir(parents=True)
    (folder / "06_n" / "claims.json").write_text(json.dumps([{**CLAIM, **claim}]), "utf-8")
    (folder / "06_n" / "f.json").write_text(json.dumps({"data": {"table": rows}}), "utf-8")
    return folder


@pytest.mark.parametrize(
    ("verdict", "speaks"), [("holds", 1), ("not reproduced", -1), ("inconclusive", 0)]
)
def test_a_claim_is_read_and_speaks_by_its_verdict(
    tmp_path: Path, verdict: str, speaks: int
) -> None:
    found = Claimed(notebook="06_n", id="L-x").read(figures(tmp_path, [], verdict=verdict))
    assert found is not None
    assert (found.verdict, found.speaks) == (verdict, speaks)
    assert (found.statement, found.effect) == ("more is better", "of signs: 0.2 [0.1, 0.3]")
    assert Claimed(notebook="05_n", id="L-x").read(tmp_path) is None


@pytest.mark.parametrize(("shift", "speaks"), [(0.5, 1), (0.05, 0), (-0.5, -1)])
def test_a_pair_speaks_where_its_intervals_are_apart(
    tmp_path: Path, shift: float, speaks: int
) -> None:
    rows = [
        {"family": name, "value": at, "low": at - 0.1, "high": at + 0.1}
        for name, at in (("with", shift), ("without", 0.0))
    ]
    folder = figures(tmp_path, rows)
    options: dict[str, Any] = {"notebook": "06_n", "figure": "f", "statement": ""}
    with_, without = ({"family": name} for name in ("with", "without"))
    pair = Pair(**options, chosen=with_, other=without).read(folder)
    alone = Difference(**options, wanted=with_).read(folder)
    assert pair is not None and pair.speaks == speaks
    assert alone is not None and alone.speaks == speaks
    assert Difference(**options, wanted={"family": "another"}).read(folder) is None


def test_what_is_not_there_was_not_measured(tmp_path: Path) -> None:
    table = factory_transfer.table(figures=tmp_path)
    assert set(table["the miniature"]) == {"not measured"}
    assert set(table["follows"]) == set(table["verdict"]) == {""}


def test_every_finding_is_in_the_figures_of_the_checkout() -> None:
    folder = places.root() / "figures"
    for lesson in LESSONS:
        assert lesson.source.read(folder) is not None, lesson.about
    table = factory_transfer.table()
    assert {"yes", "no", "in part", "undecided"} == set(table["follows"])
    claim = next(
        c
        for c in json.loads((folder / "06_two_step_turbo" / "claims.json").read_text("utf-8"))
        if c["id"] == "L-long-signs"
    )
    assert (
        f"{claim['low']:.3g}, {claim['high']:.3g}" in table.loc["length and rank", "effect [95%]"]
    )


def _sets(lesson: Lesson) -> list[str]:
    words = shlex.split(lesson.option(TURBO).partition(", or")[0])
    return [value for option, value in itertools.pairwise(words) if option == "--set"]


SETTABLE = [lesson for lesson in LESSONS if _sets(lesson)]


@pytest.mark.parametrize("lesson", SETTABLE, ids=lambda lesson: lesson.about)
def test_an_option_that_sets_numbers_changes_what_the_recipe_does(lesson: Lesson) -> None:
    other = changed(TURBO, _sets(lesson))
    assert lesson.does(other) != lesson.does(TURBO)
    numbers = {
        "second time",
        "half of the calls for it",
        "one update of the fake",
        "length and rank",
    }
    if lesson.about in numbers:
        assert lesson.same(other) != lesson.same(TURBO)


def test_the_shorter_start_has_the_share_of_the_miniature() -> None:
    (lesson,) = (one for one in LESSONS if one.about == "half of the calls for it")
    other = changed(TURBO, _sets(lesson))
    assert factory_transfer.warm_share(other) == pytest.approx(0.25, abs=0.002)
