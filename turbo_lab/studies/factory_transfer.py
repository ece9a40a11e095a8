"""Notebook 07's table of what the miniature measured, beside what the factory's recipe does.

Effects, intervals and verdicts are read from what the notebooks left in ``figures/``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import pandas as pd

from turbo_lab import places
from turbo_lab.claims import Interval
from turbo_lab.factory_cost import Cost, costs
from turbo_lab.recipes import turbo as miniature
from turbo_lab.recipes.adversarial import MAIN, START
from turbo_lab.recipes.distribution import SECOND
from turbo_lab.recipes.qwen_image import QwenRecipe
from turbo_lab.recipes.qwen_models import QwenGan
from turbo_lab.recipes.warm import SHARE, STARTS
from turbo_lab.studies.factory_recipes import chosen
from turbo_lab.studies.gathered import claims_of

NOT_MEASURED = "not measured"
NO_CLAIM = "no claim"
UNDECIDED = "undecided"
PARTLY = "in part"


@dataclass(frozen=True, kw_only=True)
class Found:
    """What was measured about a choice.

    Attributes:
        statement: of the claim, or what is compared.
        effect: with its interval.
        verdict: of the claim, or `NO_CLAIM`.
        speaks: for the choice (1), against it (-1), or neither.
    """

    statement: str
    effect: str
    verdict: str
    speaks: int


class Source(Protocol):
    """Where a finding stands."""

    @property
    def where(self) -> str:
        """Notebook, and claim or figure."""

    def read(self, figures: Path) -> Found | None:
        """The finding; None where it is not there."""


@dataclass(frozen=True, kw_only=True)
class Claimed:
    """A claim of a notebook."""

    notebook: str
    id: str

    @property
    def where(self) -> str:
        """Notebook and claim."""
        return f"{self.notebook[:2]} · {self.id}"

    def read(self, figures: Path) -> Found | None:
        """The claim, which speaks for itself if it holds."""
        asked = self.notebook, self.id
        mine = (c for c in claims_of(figures) if (c["notebook"], c["id"]) == asked)
        claim = next(mine, None)
        if claim is None:
            return None
        interval = Interval(**{part: claim[part] for part in ("value", "low", "high")})
        return Found(
            statement=claim["statement"],
            effect=f"{claim['statistic']}: {interval}",
            verdict=claim["verdict"],
            speaks={"holds": 1, "not reproduced": -1}.get(claim["verdict"], 0),
        )


@dataclass(frozen=True, kw_only=True)
class _Tabled:
    """What is read from the table beside a figure, and compared as the statement says."""

    notebook: str
    figure: str
    statement: str

    @property
    def where(self) -> str:
        """Notebook and figure."""
        return f"{self.notebook[:2]} · {self.figure}.json"

    def row(self, figures: Path, wanted: Mapping[str, Any]) -> Interval | None:
        """The interval of the first row of the table with these values; None without one."""
        file = figures / self.notebook / f"{self.figure}.json"
        try:
            table = json.loads(file.read_text("utf-8"))["data"]["table"]
            hits = [row for row in table if all(row[key] == value for key, value in wanted.items())]
            return Interval(**{part: hits[0][part] for part in ("value", "low", "high")})
        except (OSError, ValueError, KeyError, IndexError, TypeError):
            return None


@dataclass(frozen=True, kw_only=True)
class Difference(_Tabled):
    """A number that is a difference itself, and may be told from 0."""

    wanted: Mapping[str, Any]

    def read(self, figures: Path) -> Found | None:
        """The difference, which speaks for the choice if it lies above 0."""
        interval = self.row(figures, self.wanted)
        if interval is None:
            return None
        return Found(
            statement=self.statement,
            effect=str(interval),
            verdict=NO_CLAIM,
            speaks=(interval.low > 0) - (interval.high < 0),
        )


@dataclass(frozen=True, kw_only=True)
class Pair(_Tabled):
    """Two numbers: with a choice, and without it."""

    chosen: Mapping[str, Any]
    other: Mapping[str, Any]

    def read(self, figures: Path) -> Found | None:
        """Both numbers, which speak if their intervals are apart."""
        a, b = self.row(figures, self.chosen), self.row(figures, self.other)
        if a is None or b is None:
            return None
        return Found(
            statement=self.statement,
            effect=f"{a} against {b}",
            verdict=NO_CLAIM,
            speaks=(a.low > b.high) - (a.high < b.low),
        )


# --- what the factory does ----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """A choice that the miniature can say something about.

    Attributes:
        about: in two or three words.
        source: where the miniature's finding stands.
        does: what the recipe does, in words.
        same: whether that is the choice that the finding is about; None where it is so in part.
        option: of ``turbo-lab train qwen_image``, with which it does otherwise.
    """

    about: str
    source: Source
    does: Callable[[QwenRecipe], str]
    same: Callable[[QwenRecipe], bool | None]
    option: Callable[[QwenRecipe], str]


def _second(recipe: QwenRecipe) -> float:
    times = recipe.stages[-1].options["times"]
    assert isinstance(times, tuple)
    return times[1]


def _updates(recipe: QwenRecipe) -> int:
    updates = recipe.stages[-1].options["rival_updates"]
    assert isinstance(updates, int)
    return updates


def _gan(recipe: QwenRecipe) -> QwenGan:
    gan = recipe.stages[-1].gan
    assert gan is not None
    return gan


def _stages(recipe: QwenRecipe) -> list[Cost]:
    return [cost for cost in costs(recipe) if cost.stage]


def _calls(recipe: QwenRecipe) -> float:
    """Network calls of all stages, as the budgets on postcards count them."""
    return sum(cost.calls for cost in _stages(recipe))


def warm_share(recipe: QwenRecipe) -> float:
    """Share of the network calls before the GAN term that the warm start has."""
    first, second, *_ = _stages(recipe)
    return first.calls / (first.calls + second.calls)


def _shorter_start(recipe: QwenRecipe) -> str:
    """Steps of the warm start for the share that the miniature's main student has."""
    first, second, *_ = _stages(recipe)
    calls = SHARE / (1 - SHARE) * second.calls
    return f"--set 1.steps={round(calls / (first.pictures * first.passes.calls))}"


def _longer(recipe: QwenRecipe) -> str:
    """Steps for as many calls as the miniature's longer student has, the stages' shares kept."""
    factor = _LONG_CALLS / _calls(recipe)
    return " ".join(
        f"--set {k}.steps={math.ceil(factor * stage.steps)}"
        for k, stage in enumerate(recipe.stages, start=1)
    )


_04, _05, _06 = "04_pcm_warm_start", "05_gan_texture", "06_two_step_turbo"
_03 = "03_dmd2_and_mode_collapse"
_MINIATURE = STARTS[START]
_LONG_CALLS = miniature.LIKE.calls * miniature.CALLS["quick"]


def _by(family: str, metric: str, **more: Any) -> dict[str, Any]:
    return {"family": family, "metric": metric, **more}


_WARM = Lesson(
    about=f"a warm start, second time {_MINIATURE.second:g}",
    source=Claimed(notebook=_06, id="L-warm"),
    does=lambda r: f"{r.stages[0].method}, second time {_second(r):g}",
    same=lambda r: len(_stages(r)) > 1 and (_second(r) == _MINIATURE.second or None),
    option=lambda r: "--recipe dmd2-2, which has no GAN term either",
)
_REAL = Lesson(
    about="real data",
    source=Claimed(notebook=_06, id="L-data"),
    does=lambda r: f"{_gan(r).rho:.0%} of the real side",
    same=lambda r: _gan(r).rho > 0,
    option=lambda r: "without --images, or --set 3.gan.rho=1",
)
LESSONS = (
    Lesson(
        about="second time",
        source=Pair(
            notebook=_04,
            figure="choices",
            chosen=_by("warm-second-0.5", "whole_body", training=0),
            other=_by("warm", "whole_body", training=0),
            statement="whole bodies, PCM then DMD2: second time 0.5 against 0.7155, one training",
        ),
        does=lambda r: f"{_second(r):g}",
        same=lambda r: _second(r) == _MINIATURE.second,
        option=lambda r: "--set all.options.times=1,0.5 --set 1.options.edges=0.5",
    ),
    _WARM,
    replace(
        _WARM,
        about=f"a warm start, second time {SECOND:g}",
        source=Claimed(notebook=_04, id="C4-bodies"),
        same=lambda r: len(_stages(r)) > 1 and (_second(r) == SECOND or None),
    ),
    Lesson(
        about="half of the calls for it",
        source=Difference(
            notebook=_04,
            figure="choices",
            wanted=_by("warm-share-50", "gain", training=0),
            statement="whole bodies at 0.7155: PCM by 50% of the calls minus none, one training",
        ),
        does=lambda r: f"{warm_share(r):.0%} of the calls before the GAN term",
        same=lambda r: warm_share(r) >= 0.5,
        option=_shorter_start,
    ),
    Lesson(
        about="one update of the fake",
        source=Pair(
            notebook=_03,
            figure="variants",
            chosen=_by("dmd2-updates-1", "sign_read", steps=2),
            other=_by("dmd2", "sign_read", steps=2),
            statement="signs read of DMD2: 1 update of the fake, one training, against 2, three",
        ),
        does=lambda r: f"{_updates(r)} updates",
        same=lambda r: _updates(r) == 1,
        option=lambda r: "--set all.options.rival_updates=1",
    ),
    Lesson(
        about="more updates of the fake",
        source=Claimed(notebook=_03, id="P8"),
        does=lambda r: f"{_updates(r)} updates",
        same=lambda r: _updates(r) >= 5,
        option=lambda r: "--set all.options.rival_updates=5",
    ),
    Lesson(
        about="length and rank",
        source=Claimed(notebook=_06, id="L-long-signs"),
        does=lambda r: (
            f"rank {r.adapter.rank}, {_calls(r):,.0f} network calls (the miniature's longer one: "
            f"rank {miniature.LIKE.adapter.rank}, {_LONG_CALLS:,.0f})"
        ),
        same=lambda r: r.adapter.rank >= miniature.LIKE.adapter.rank and _calls(r) >= _LONG_CALLS,
        option=lambda r: f"{_longer(r)}, or --profile paper",
    ),
    Lesson(
        about="a GAN term",
        source=Claimed(notebook=_06, id="L-gan-fur"),
        does=lambda r: "in the last stage",
        same=lambda r: r.stages[-1].gan is not None,
        option=lambda r: "--recipe pcm-dmd2-2",
    ),
    Lesson(
        about="its weight",
        source=Claimed(notebook=_06, id="L-weight"),
        does=lambda r: f"balance {_gan(r).balance:g} (the miniature's: {MAIN.balance:g})",
        same=lambda r: _gan(r).balance == MAIN.balance,
        option=lambda r: "--set 3.gan.balance=0.125",
    ),
    Lesson(
        about="features that know the pictures",
        source=Claimed(notebook=_06, id="L-dino"),
        does=lambda r: f"DINOv2 ({_gan(r).vit.split('.')[0]})",
        same=lambda r: _gan(r).features == "dino",
        option=lambda r: "--vit random",
    ),
    _REAL,
    replace(
        _REAL,
        about="real data, where the teacher is wrong",
        source=Claimed(notebook=_05, id="P20"),
    ),
)
"""In the order of the recipe."""


def table(name: str = "turbo", *, figures: Path | None = None, size: int = 1024) -> pd.DataFrame:
    """One row per choice: what the miniature measured, and whether a recipe does so.

    Args:
        name: of a recipe that ends with a GAN term.
        figures: of the notebooks; None for those of the checkout.
        size: pixels of the square pictures.

    Returns:
        Where nothing was measured, or an interval does not tell, there is nothing to follow.
    """
    recipe, folder = chosen(name, size=size), figures or places.root() / "figures"
    rows = []
    for lesson in LESSONS:
        found = lesson.source.read(folder)
        rows.append(
            {
                "choice": lesson.about,
                "the miniature": found.statement if found else NOT_MEASURED,
                "effect [95%]": found.effect if found else "",
                "verdict": found.verdict if found else "",
                "from": lesson.source.where,
                "the factory": lesson.does(recipe),
                "follows": _follows(found, lesson.same(recipe)),
                "to change it": lesson.option(recipe),
            }
        )
    return pd.DataFrame(rows).set_index("choice")


def _follows(found: Found | None, same: bool | None) -> str:
    if found is None:
        return ""
    if not found.speaks:
        return UNDECIDED
    if same is None:
        return PARTLY
    return "yes" if same == (found.speaks > 0) else "no"
