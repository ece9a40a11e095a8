"""What a stage on postcards asks for, and the refusal of one that has not been given it.

Nothing is loaded or computed here; `turbo_lab.workbench` makes the players.
"""

from __future__ import annotations

import dataclasses

from turbo_lab.errors import BadInput
from turbo_lab.methods import METHODS
from turbo_lab.methods.divergences import divergence_named, needs_ratio
from turbo_lab.methods.gan import Generates
from turbo_lab.recipes import Recipe, Stage
from turbo_lab.recipes.adversarial import EYE

FAKE = "fake"
"""The player that starts as the teacher, or as the stage before, and learns the student's score."""
CRITIC = "critic"
"""The player that tells two sides apart, where the options of a stage ask for it: teacher from
student for the ratio of a divergence, or consistency's two predictions; or where it has a GAN term.
Without it a stage is, to the bit, what it was before critics."""
HEAD = "head"
"""The player that learns the teacher's transitions, from which the student then learns."""


def fields_of(stage: Stage) -> set[str]:
    """Names of the fields of a stage's method: what it can be given."""
    return {f.name for f in dataclasses.fields(METHODS[stage.method])}


def rivals_of(stage: Stage) -> tuple[str, ...]:
    """Names of the players that learn beside the student of a stage."""
    has = fields_of(stage)
    critic = stage.gan is not None or _asks_critic(stage)
    asked = {FAKE: FAKE in has, CRITIC: critic, HEAD: HEAD in has}
    return tuple(name for name, wanted in asked.items() if wanted)


def check_stages(recipe: Recipe) -> None:
    """Refuse, before any work, a stage that asks for what it has not been given.

    Raises:
        BadInput: it needs a critic and has no rate, or no samples of the teacher, for it; or a
            rival is to start from a stage before, and there is none, or no such rival; or a GAN
            term does not go with its method.
    """
    for k, stage in enumerate(recipe.stages):
        _check_critic(stage)
        _check_gan(recipe, stage)
        if stage.rivals_from is not None and FAKE not in fields_of(stage):
            allowed = f"method {stage.method!r} has no rival to start; leave it out"
            raise BadInput("rivals_from", stage.rivals_from, allowed)
        if stage.rivals_from in ("before", FAKE):
            _check_rivals(stage, recipe.stages[k - 1] if k else recipe.start)


def _check_rivals(stage: Stage, before: Stage | Recipe | None) -> None:
    """A fake score that is to start from the stage before needs one there."""
    if before is None:
        allowed = "there is no stage before the first; use 'teacher' or leave it out"
        raise BadInput("rivals_from", stage.rivals_from, allowed)
    last = before.stages[-1] if isinstance(before, Recipe) else before
    if stage.rivals_from == FAKE and FAKE not in fields_of(last):
        allowed = f"the stage before, {last.method!r}, has no fake score; use 'before' or 'teacher'"
        raise BadInput("rivals_from", FAKE, allowed)


def _asks_critic(stage: Stage) -> bool:
    """Whether the options of a stage ask for a critic."""
    return _is_adversarial(stage) or _asks_ratio(stage)


def _is_adversarial(stage: Stage) -> bool:
    """Whether a critic looks at the two predictions of a consistency stage."""
    if CRITIC not in fields_of(stage):
        return False
    return float(str(stage.options.get("adversarial_weight", 0.0))) > 0


def _asks_ratio(stage: Stage) -> bool:
    """Whether the divergence of a stage weighs samples by a ratio."""
    if not {CRITIC, "divergence"} <= fields_of(stage):
        return False
    name = str(stage.options.get("divergence", "rkl"))
    alpha = float(str(stage.options.get("alpha", 0.0)))
    divergence_named(name, alpha)
    return needs_ratio(name, alpha)


def _check_critic(stage: Stage) -> None:
    """A critic needs a rate; one that learns a ratio of densities, samples of the teacher too."""
    if not _asks_critic(stage):
        if stage.taps is not None:
            raise BadInput("taps", stage.taps, "this stage has no critic; leave it out")
        return
    why = "divergence" if _asks_ratio(stage) else "adversarial_weight"
    needs = f"{why}={stage.options[why]!r} needs"
    if _asks_ratio(stage) and stage.pairs is None:
        raise BadInput("pairs", None, f"{needs} samples of the teacher for its critic")
    if CRITIC not in stage.rates:
        raise BadInput("rates", sorted(stage.rates), f"{needs} one for player {CRITIC!r} too")


def _check_gan(recipe: Recipe, stage: Stage) -> None:
    """A GAN term needs a rate, a student, and a method with samples and no critic of its own."""
    if stage.gan is None:
        return
    method, features = stage.method, stage.gan.features
    if recipe.teacher is None:
        raise BadInput("gan", features, "it is for students; this recipe has no teacher")
    if not issubclass(METHODS[method], Generates) or stage.options.get("edges"):
        raise BadInput("gan", features, f"method {method!r} makes no clean samples in this stage")
    if _asks_critic(stage):
        raise BadInput("gan", features, f"method {method!r} has a critic of its own here")
    if stage.gan.eye not in (None, EYE):
        raise BadInput("eye", stage.gan.eye, f"the mini-DINO of this version is {EYE}")
    if features == FAKE and FAKE not in fields_of(stage):
        raise BadInput("gan", features, f"method {method!r} has no fake score")
    if CRITIC not in stage.rates:
        raise BadInput("rates", sorted(stage.rates), f"gan needs one for player {CRITIC!r} too")
