"""Students of notebook 06: the whole recipe in two steps, and a ladder of what it is made of.

Every student here has spent as many network calls when it is finished, `CALLS`: those of
distribution matching (with or without a warm start) and those of the stage after it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Literal

from turbo_lab.recipes import distribution
from turbo_lab.recipes.adversarial import AGAINST, CONTROL, MAIN, START, TURBO, Against, going_on
from turbo_lab.recipes.adversarial import CALLS as LATER_CALLS
from turbo_lab.recipes.distribution import RIVAL_UPDATES, calls_per_round
from turbo_lab.recipes.models import Family, Profile, Recipe, Stage
from turbo_lab.recipes.trajectory import consistency, progressive
from turbo_lab.recipes.warm import STARTS, STEPS, two_steps, warm

CALLS: Mapping[Profile, int] = {
    profile: distribution.CALLS[profile] + later for profile, later in LATER_CALLS.items()
}
"""Network calls of each student, all stages together."""
SECOND = STARTS[START].second
"""Time at which the second step starts."""
CHAIN = (16, 8, 4, 2)
LONG = "turbo-long"
LIKE = distribution.LONGER[distribution.LONG]
"""The longer student of 4 steps, whose length and adapter `LONG` has."""


@dataclass(frozen=True, kw_only=True)
class Rung:
    """A student that goes on from another by DMD2.

    Args:
        title: for tables and figures.
        start: a warm start before distribution matching, or distribution matching alone.
        against: its critic; None for no GAN term.
    """

    title: str
    start: Literal["warm", "cold"] = "warm"
    against: Against | None = None


RUNGS: Mapping[str, Rung] = MappingProxyType(
    {
        "dmd2-more": Rung(title="DMD2", start="cold"),
        TURBO: Rung(title="PCM, DMD2 + GAN: turbo", against=MAIN),
        "turbo-cold": Rung(title="no warm start", start="cold", against=MAIN),
        "turbo-teacher-data": Rung(title="no real data", against=AGAINST["turbo-teacher-data"]),
        "turbo-random": Rung(title="no DINO", against=AGAINST["turbo-random"]),
        "turbo-small": Rung(title="small weight", against=AGAINST["turbo-small"]),
    }
)
"""Students that go on from DMD2, cold or warm; PCM and DMD2 without a GAN term is `CONTROL`."""


def turbo(profile: Profile, seed: int, *, name: str = TURBO) -> Recipe:
    """The whole recipe, or a rung of the ladder below it.

    PCM with the edge between its phases at the second time; DMD2, whose student and fake begin
    as PCM's student and the teacher; then DMD2 with a critic that looks through the mini-DINO at
    postcards and samples of the teacher, mixed at a fixed ratio.

    Args:
        profile: smoke, quick or paper.
        seed: of the training, and of its start's.
        name: of `RUNGS`.
    """
    rung = RUNGS[name]
    if rung.start == "warm":
        start = warm(profile, seed, name=START)
    else:
        start = distribution.dmd2(profile, seed, steps=STEPS, variant=f"second-{SECOND:g}")
    term = None if rung.against is None else rung.against.gan(profile)
    return going_on(start, profile, name=name, term=term)


def longer(profile: Profile, seed: int) -> Recipe:
    """The whole recipe by more calls in each of its stages, in a larger adapter, as `LIKE`.

    Every update of the student is followed by one of the fake, and not by two.

    Args:
        profile: smoke, quick or paper.
        seed: of the training.
    """
    whole = turbo(profile, seed)
    assert whole.start is not None
    size = {"adapter": LIKE.adapter}
    stages = tuple(_longer(stage) for stage in whole.start.stages)
    start = whole.start.model_copy(update={"name": f"{LONG}-start", "stages": stages, **size})
    last = {"stages": (_longer(whole.stages[-1]),), "start": start}
    return whole.model_copy(update={"name": LONG, **last, **size})


def _longer(stage: Stage) -> Stage:
    """A stage of `turbo` by more calls, with one update of the fake for each of the student."""
    changed: dict[str, object] = {"precision": "bf16"}
    rounds = LIKE.calls * stage.steps
    if stage.method == "dmd2":
        critic = stage.gan is not None
        before, after = (calls_per_round(STEPS, n, critic=critic) for n in (RIVAL_UPDATES, 1))
        rounds *= before / after
        changed["options"] = {**stage.options, "rival_updates": 1}
    return stage.model_copy(update={**changed, "steps": max(2, int(rounds))})


_chain = partial(progressive, chain=CHAIN, calls=CALLS, name="progressive-more")
_consistent = partial(consistency, calls=CALLS, name="consistency-more")


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "progressive-more": Family(title="progressive", eta=0.0, recipe=two_steps(_chain)),
        "consistency-more": Family(title="consistency", eta=1.0, recipe=two_steps(_consistent)),
        **{
            name: Family(
                title=rung.title.strip(), eta=0.0, recipe=two_steps(partial(turbo, name=name))
            )
            for name, rung in RUNGS.items()
        },
        LONG: Family(title="turbo, trained longer", eta=0.0, recipe=two_steps(longer)),
    }
)
LADDER = (
    "progressive-more",
    "consistency-more",
    "dmd2-more",
    CONTROL,
    *(name for name in RUNGS if name != "dmd2-more"),
)
"""Families from the first method to the whole recipe, and what it is without each ingredient."""

RECIPES: Mapping[str, Callable[[Profile, int], Recipe]] = MappingProxyType(
    {
        "progressive-more": _chain,
        "consistency-more": _consistent,
        LONG: longer,
        **{name: partial(turbo, name=name) for name in RUNGS},
    }
)
