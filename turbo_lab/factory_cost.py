"""What a training on Qwen-Image computes, counted from its recipe: passes and FLOP of every part.

Only what is asked of the transformer and of a critic's decoder is counted. Prompts and images are
encoded once, and a critic's eye and heads are small beside what is decoded for them: both are left
out, and so are optimisers and averages.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from turbo_lab.errors import BadInput
from turbo_lab.factory_plan import pairs_of
from turbo_lab.qwen_counts import Work, decode_counts, pass_flops
from turbo_lab.qwen_plan import Device
from turbo_lab.qwen_sizes import Model
from turbo_lab.recipes.models import Pairs
from turbo_lab.recipes.qwen_models import QwenGan, QwenRecipe, QwenStage
from turbo_lab.testbeds.qwen_files import SCALE

GUIDED = 2
"""Passes of a guided velocity."""
GRADIENT_CALLS = 3
"""Network calls that a pass with a gradient counts as, in the budgets of postcards' students."""


@dataclass(frozen=True, kw_only=True)
class Passes:
    """Passes through the transformer for one picture of a batch, in one training step.

    Attributes:
        forward: without a gradient.
        gradient: with one, its backward pass included.
    """

    forward: float
    gradient: float

    @property
    def calls(self) -> float:
        """Network calls, as budgets on postcards count them."""
        return self.forward + GRADIENT_CALLS * self.gradient


@dataclass(frozen=True, kw_only=True)
class Cost:
    """One part of a training.

    Attributes:
        stage: from 1; 0 for samples of the teacher, which come before.
        what: its method, or the samples.
        steps: of the training; of the sampler for the teacher's samples.
        pictures: that go through in a step; all samples for the teacher's.
        passes: for each of them in each step.
        flops: of all of it.
    """

    stage: int
    what: str
    steps: int
    pictures: int
    passes: Passes
    flops: float

    @property
    def calls(self) -> float:
        """Network calls of all of it, see `Passes.calls`."""
        return self.steps * self.pictures * self.passes.calls


def costs(recipe: QwenRecipe, model: Model | None = None) -> tuple[Cost, ...]:
    """Count the samples of the teacher that a recipe needs, and each of its stages.

    Args:
        recipe: what is trained; batches of other shapes cost about what squares do.
        model: sizes of the networks; None for Qwen-Image's.

    Raises:
        BadInput: a method or a critic that is not counted, see `passes_of`.
    """
    model = model or Model()
    each = pass_flops(model.transformer, Work(height=recipe.size, width=recipe.size))
    drawn = [_samples(pairs, each["forward"]) for pairs in pairs_of(recipe)]
    trained = [
        _trained(stage, number, each, _decoding(stage.gan, model))
        for number, stage in enumerate(recipe.stages, start=1)
    ]
    return (*drawn, *trained)


def _samples(pairs: Pairs, forward: float) -> Cost:
    return Cost(
        stage=0,
        what="samples of the teacher",
        steps=pairs.steps,
        pictures=pairs.n,
        passes=Passes(forward=GUIDED, gradient=0),
        flops=pairs.n * pairs.steps * GUIDED * forward,
    )


def _trained(stage: QwenStage, number: int, each: Mapping[str, float], decoding: float) -> Cost:
    passes = passes_of(stage)
    transformer = passes.forward * each["forward"] + passes.gradient * each["gradient"]
    return Cost(
        stage=number,
        what=stage.method + (" and GAN" if stage.gan else ""),
        steps=stage.steps,
        pictures=stage.batch_size,
        passes=passes,
        flops=stage.steps * stage.batch_size * (transformer + _looks(stage) * decoding),
    )


def passes_of(stage: QwenStage) -> Passes:
    """Count the passes of a stage per picture and step, on average over what is drawn.

    Raises:
        BadInput: no recipe for Qwen-Image has this method, or such a critic.
    """
    if stage.gan is not None and stage.gan.features != "dino":
        raise BadInput("features", stage.gan.features, "only critics of pictures are counted")
    if stage.method not in PASSES:
        raise BadInput("method", stage.method, f"choose one of {', '.join(PASSES)}")
    return PASSES[stage.method](stage)


def _teacher(stage: QwenStage) -> int:
    """Passes of one velocity of what teaches: the student of the stage before has no guidance."""
    return GUIDED if stage.teacher == "guided" else 1


def _number(stage: QwenStage, name: str) -> int:
    value = stage.options[name]
    assert isinstance(value, int)
    return value


def _consistency(stage: QwenStage) -> Passes:
    """One Euler step of the teacher, the target there, and the student."""
    return Passes(forward=_teacher(stage) + 1, gradient=1)


def _continuous(stage: QwenStage) -> Passes:
    """The teacher, a derivative in forward mode (two passes' products), and the student."""
    return Passes(forward=_teacher(stage) + 2, gradient=1)


def _progressive(stage: QwenStage) -> Passes:
    """The teacher's steps in one of the student's, and the student."""
    steps = _number(stage, "teacher_steps") / _number(stage, "steps")
    return Passes(forward=_teacher(stage) * steps, gradient=1)


def _direct(stage: QwenStage) -> Passes:
    """All steps of the student; the teacher's samples were drawn before."""
    return Passes(forward=0, gradient=_number(stage, "steps"))


def _dmd2(stage: QwenStage) -> Passes:
    """One round: the fake learns from a sample, and a critic, and the student has its share.

    A sample takes k passes to the drawn step and that step, (steps + 1) / 2 on average; the
    student's own step has the gradient, and its sample is shown to teacher and fake.
    """
    times = stage.options["times"]
    assert isinstance(times, tuple)
    sample = (len(times) + 1) / 2
    rivals = sample + (sample if stage.gan else 0)
    share = 1 / _number(stage, "rival_updates")
    student = (sample - 1) + _teacher(stage) + 1
    return Passes(forward=rivals + share * student, gradient=1 + share)


def _tdm(stage: QwenStage) -> Passes:
    """As `_dmd2`, but a critic looks at samples of all steps, never at an earlier step's."""
    times = stage.options["times"]
    assert isinstance(times, tuple)
    whole, common = len(times), _dmd2(stage)
    more = whole - (whole + 1) / 2 if stage.gan else 0
    return Passes(forward=common.forward + more, gradient=common.gradient)


PASSES: Mapping[str, Callable[[QwenStage], Passes]] = MappingProxyType(
    {
        "consistency": _consistency,
        "continuous": _continuous,
        "progressive": _progressive,
        "direct": _direct,
        "dmd2": _dmd2,
        "tdm": _tdm,
    }
)
"""Of the methods that have a recipe here."""


# --- the critic ---------------------------------------------------------------------------------


def _decoding(gan: QwenGan | None, model: Model) -> float:
    """FLOP of decoding one square for a critic."""
    if gan is None:
        return 0.0
    work = Work(height=SCALE * gan.crop, width=SCALE * gan.crop)
    return decode_counts(model.vae, work)["collapsed"].flops


def _looks(stage: QwenStage) -> float:
    """Squares decoded per picture and step: both sides of the critic, and the student's share.

    The student's is decoded, decoded again, and gone back through, which costs about as much.
    """
    updates = stage.options.get("rival_updates", 1)
    assert isinstance(updates, int)
    return 2 + 3 / updates


# --- as text ------------------------------------------------------------------------------------


def hours(flops: float, device: Device, utilisation: float = 1.0) -> float:
    """Hours of one device, whose dense bf16 rate is reached to a share of ``utilisation``."""
    return flops / (device.bf16 * utilisation) / 3600


def lines(found: Sequence[Cost], device: Device) -> list[str]:
    """Costs as text, one line for each part and one for all of them."""
    rows = {f"{cost.stage} {cost.what}" if cost.stage else cost.what: cost.flops for cost in found}
    rows["all"] = sum(rows.values())
    head = f"computed, and hours at least of one {device.name}, by count:"
    return [
        head,
        *(
            f"{name:24s}{flops / 1e15:>14,.2f} PFLOP{hours(flops, device):>10,.2f} h"
            for name, flops in rows.items()
        ),
    ]
