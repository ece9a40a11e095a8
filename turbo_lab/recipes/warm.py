"""Students of notebook 04: a warm start by phased consistency, then distribution matching."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Literal

from turbo_lab.errors import BadInput
from turbo_lab.recipes.distribution import CALLS, SECOND, dmd2
from turbo_lab.recipes.models import Family, Profile, Rates, Recipe, Stage
from turbo_lab.recipes.teacher import GUIDANCE
from turbo_lab.recipes.trajectory import student

STEPS = 2
TIMES = (1.0, SECOND)
"""Of the sampler of the students here, but for those whose second time is moved."""
GRID_STEPS = 40
"""Steps of the guided teacher's grid that phased consistency walks: those it is sampled with."""
SHARE = 0.25
"""Of the network calls that the warm start of the main student spends."""
PER_SAMPLE = {"consistency": 6, "transition": 7}
"""Network calls per sample: student with gradient (3) and the guided teacher (2), and its own
prediction one step on (1), or the guided teacher once more (2); a head is not counted."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """How a 2-step DMD2 student is warmed up.

    Args:
        title: for tables and figures.
        share: of all network calls, in (0, 1].
        method: of the warm stage.
        edges: of its phases; none for one phase.
        second: time at which the student's second step starts.
        rivals_from: what the fake of the later stage starts as.
    """

    title: str
    share: float = SHARE
    method: Literal["consistency", "transition"] = "consistency"
    edges: tuple[float, ...] = (SECOND,)
    second: float = SECOND
    rivals_from: Literal["teacher", "before"] = "teacher"


STARTS: Mapping[str, Start] = MappingProxyType(
    {
        "warm": Start(title="PCM, then DMD2"),
        "warm-share-10": Start(title="PCM 10%, then DMD2", share=0.10),
        "warm-share-50": Start(title="PCM 50%, then DMD2", share=0.50),
        **{
            f"warm-second-{t:g}": Start(
                title=f"PCM, then DMD2, second time {t:g}", edges=(t,), second=t
            )
            for t in (0.5, 0.8)
        },
        "warm-one-phase": Start(title="consistency, then DMD2", edges=()),
        "warm-transition": Start(title="transition matching, then DMD2", method="transition"),
        "warm-fake": Start(title="PCM, then DMD2, fake warm too", rivals_from="before"),
    }
)
"""Warm starts by family; the first is the main one, each other changes one thing.

A moved second time moves the edge between the phases with it: two phases end where the two steps
do. DMD2 alone has students of the same second times, `turbo_lab.recipes.distribution.VARIANTS`."""


def warm_stage(profile: Profile, start: Start) -> Stage:
    """The stage before DMD2, of as many steps as its share of the calls pays for."""
    batch_size = {"smoke": 4, "quick": 16, "paper": 32}[profile]
    calls = CALLS[profile] * start.share
    steps = max(2, int(calls / (PER_SAMPLE[start.method] * batch_size)))
    rate = Rates(lr=5e-4, warmup=min(20, steps), final=0.1)
    phased = start.method == "consistency"
    return Stage(
        method=start.method,
        options={"grid_steps": GRID_STEPS, "edges": start.edges}
        if phased
        else {"times": (1.0, start.second)},
        steps=steps,
        batch_size=batch_size,
        rates={"student": rate} if phased else {"student": rate, "head": rate},
        ema=0.99,
        teacher="guided",
        guidance_scale=GUIDANCE,
    )


def warm(profile: Profile, seed: int, *, name: str = "warm") -> Recipe:
    """A warm start and then DMD2, by as many network calls together as DMD2 alone has.

    Args:
        profile: smoke, quick or paper.
        seed: of the training, shared with the student of `turbo_lab.recipes.distribution.dmd2`
            that it is compared with.
        name: of `STARTS`.
    """
    start = STARTS[name]
    variant = "" if start.second == SECOND else f"second-{start.second:g}"
    (direct,) = dmd2(profile, seed, steps=STEPS, variant=variant).stages
    rest = max(2, int(direct.steps * (1 - start.share)))
    rivals = None if start.rivals_from == "teacher" else start.rivals_from
    matching = direct.model_copy(update={"steps": rest, "rivals_from": rivals})
    return student(name, seed, (warm_stage(profile, start), matching))


def pcm(profile: Profile, seed: int) -> Recipe:
    """Phased consistency alone, by as many network calls as the others."""
    return student("pcm", seed, (warm_stage(profile, Start(title="PCM", share=1.0)),))


def started(name: str) -> Callable[[Profile, int], Recipe]:
    """The warm start of a student, before distribution matching."""

    def recipe(profile: Profile, seed: int) -> Recipe:
        before = warm(profile, seed, name=name).before
        assert before is not None
        return before

    return recipe


def two_steps(
    recipe: Callable[[Profile, int], Recipe],
) -> Callable[[int, Profile, int], Recipe]:
    """The recipe of a `Family` whose students have two steps and no other number of them."""

    def family(steps: int, profile: Profile, seed: int) -> Recipe:
        if steps != STEPS:
            raise BadInput("steps", steps, f"choose {STEPS}")
        return recipe(profile, seed)

    return family


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "pcm": Family(title="PCM", eta=0.0, recipe=two_steps(pcm)),
        "warm-start": Family(
            title="PCM 25%, before DMD2", eta=0.0, recipe=two_steps(started("warm"))
        ),
        **{
            name: Family(title=start.title, eta=0.0, recipe=two_steps(partial(warm, name=name)))
            for name, start in STARTS.items()
        },
    }
)

RECIPES: Mapping[str, Callable[[Profile, int], Recipe]] = MappingProxyType(
    {"pcm": pcm, **{name: partial(warm, name=name) for name in STARTS}}
)
