"""Students of notebook 03: distribution matching (DMD2) at 8, 4 and 2 steps, and its variants."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType

from turbo_lab.adapters import AdapterSize
from turbo_lab.errors import BadInput
from turbo_lab.methods.divergences import LINE, needs_ratio
from turbo_lab.path import shift_time
from turbo_lab.recipes.models import Family, Option, Pairs, Profile, Rates, Recipe, Stage
from turbo_lab.recipes.teacher import GUIDANCE
from turbo_lab.recipes.trajectory import ADAPTER, student

DMD2_STEPS = (8, 4, 2)
SHIFT = 2.5
"""Timestep shift of the students' samplers; two steps are then at 1 and 0.7143, beside the 0.7155
of the published 2-step schedule, which is used as it is."""
SECOND = 0.7155
CALLS: Mapping[Profile, int] = {"smoke": 2_000, "quick": 140_000, "paper": 1_500_000}
"""Network calls that each student may spend: one per image and forward pass, three with a
gradient; a guided velocity is two."""
RIVAL_UPDATES = 2
RATIO_PAIRS: Mapping[Profile, Pairs] = {
    "smoke": Pairs(n=8, steps=4),
    "quick": Pairs(n=1024, steps=40),
    "paper": Pairs(n=4096, steps=40),
}
"""Samples of the guided teacher from which a critic learns the ratio r = p / q."""
NOISE_SHIFT = 4.0
"""Timestep shift of the times at which student and teacher are compared, and the fake learns: where
a sign goes and what it says is decided at high noise. LOG.md has the looks that chose it."""


RATES: Mapping[str, Rates] = MappingProxyType(
    {
        "student": Rates(lr=1e-3, betas=(0.0, 0.999), warmup=10, final=0.1),
        "fake": Rates(lr=2e-3, betas=(0.0, 0.999), warmup=10, final=0.1),
    }
)
"""Of the plain student and its fake; a critic that learns has the student's."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What a student has that the plain one of as many steps has not.

    Args:
        title: for tables and figures.
        steps: of the student.
        options: of the method, over those of the plain student.
        guidance_scale: of the teacher.
        extra: network calls per sample that an update of the student costs more than usual, its
            share of its rivals' turns included.
        calls: network calls that it may spend, over those of the plain student.
        adapter: its size, and that of its fake score.
        rates: of the two.
    """

    title: str
    steps: int = 2
    options: Mapping[str, Option] = field(default_factory=dict)
    guidance_scale: float = GUIDANCE
    extra: float = 0.0
    calls: float = 1.0
    adapter: AdapterSize = ADAPTER
    rates: Mapping[str, Rates] = field(default_factory=lambda: RATES)


def sampler_times(steps: int) -> tuple[float, ...]:
    """Times of the students' sampler, falling from 1; the closing 0 is left out."""
    if steps == 2:
        return (1.0, SECOND)
    return tuple(round(shift_time(1 - k / steps, SHIFT), 4) for k in range(steps))


VARIANTS: Mapping[str, Variant] = MappingProxyType(
    {
        "second-0.5": Variant(title="second time 0.5", options={"times": (1.0, 0.5)}),
        "second-0.8": Variant(title="second time 0.8", options={"times": (1.0, 0.8)}),
        "guidance-2": Variant(title="guidance 2", guidance_scale=2.0),
        "updates-1": Variant(title="1 update of the fake", options={"rival_updates": 1}),
        "updates-4": Variant(title="4 updates of the fake", options={"rival_updates": 4}),
        # The critic looks at samples of the student in each of two turns.
        "alpha-0.5": Variant(
            title="weight r^0.5", options={"divergence": LINE, "alpha": 0.5}, extra=3.0
        ),
        "alpha-1": Variant(title="weight r", options={"divergence": LINE, "alpha": 1.0}, extra=3.0),
        # Matching asks the plain teacher once, guidance both of them, at times of their own.
        "decoupled": Variant(
            title="decoupled guidance", options={"guidance_range": (0.5, 0.98)}, extra=2.0
        ),
        # Every other turn of the student follows the teacher's path, five guided steps.
        "anchored": Variant(title="anchored first step", options={"anchor_weight": 1.0}, extra=4.5),
        "forward": Variant(title="noised real data", options={"rollout": "forward"}, extra=-1.5),
    }
)
"""What the 2-step student is compared with; each changes one thing."""
LONG = "long"
LONGER: Mapping[str, Variant] = MappingProxyType(
    {
        LONG: Variant(
            title="trained longer, rank 32",
            steps=4,
            options={"rival_updates": 1, "noise_shift": 2.5, "fake_shift": 2.5},
            calls=3.0,
            adapter=AdapterSize(rank=32, alpha=32),
            rates={
                "student": RATES["student"].model_copy(update={"final": 0.02}),
                "fake": RATES["fake"].model_copy(update={"final": 0.05}),
            },
        )
    }
)
"""What it takes to come near the teacher's signs: several changes at once, see LOG.md."""
_CHANGED: Mapping[str, Variant] = MappingProxyType({**VARIANTS, **LONGER})


def calls_per_round(steps: int, rival_updates: int, *, critic: bool = False) -> float:
    """Network calls per sample in a round: one update of the fake, and its share of a student's.

    The fake's turn samples the student (k forward passes without gradient to the drawn step k and
    that step, (steps + 1) / 2 on average) and learns (3). The student's turn samples without
    gradient to the drawn step ((steps - 1) / 2), takes it with one (3), and asks the guided
    teacher (2) and the fake (1). A critic looks at one more batch of samples in every round.

    Args:
        steps: of the student, at least 1.
        rival_updates: of the fake for each of the student, at least 1.
        critic: whether there is a GAN term.
    """
    plain = (steps + 1) / 2 + 3 + ((steps - 1) / 2 + 6) / rival_updates
    return plain + ((steps + 1) / 2 if critic else 0)


def dmd2(profile: Profile, seed: int, *, steps: int, variant: str = "") -> Recipe:
    """DMD2 from the teacher itself, without a warm start.

    Args:
        profile: smoke, quick or paper.
        seed: of the training.
        steps: of the student, one of `DMD2_STEPS`.
        variant: a name of `VARIANTS` or `LONGER`; empty for the plain student.
    """
    changed = _CHANGED[variant] if variant else Variant(title="")
    options: dict[str, Option] = {
        "times": sampler_times(steps),
        "rival_updates": RIVAL_UPDATES,
        "noise_shift": NOISE_SHIFT,
        "fake_shift": NOISE_SHIFT,
        **changed.options,
    }
    batch_size = {"smoke": 4, "quick": 16, "paper": 32}[profile]
    rival_updates = int(str(options["rival_updates"]))
    per_round = calls_per_round(steps, rival_updates) + changed.extra / rival_updates
    calls = CALLS[profile] * changed.calls
    rounds = max(2 * rival_updates, int(calls / (per_round * batch_size)))
    rates = dict(changed.rates)
    weighed = needs_ratio(
        str(options.get("divergence", "rkl")), float(str(options.get("alpha", 0)))
    )
    if weighed:
        rates["critic"] = rates["student"]
    stage = Stage(
        method="dmd2",
        options=options,
        steps=rounds,
        batch_size=batch_size,
        rates=rates,
        ema=0.99,
        teacher="guided",
        guidance_scale=changed.guidance_scale,
        pairs=RATIO_PAIRS[profile] if weighed else None,
    )
    name = f"dmd2-{steps}{'-' * bool(variant)}{variant}"
    return student(name, seed, (stage,), adapter=changed.adapter)


def _family(steps: int, profile: Profile, seed: int, *, variant: str = "") -> Recipe:
    have = (_CHANGED[variant].steps,) if variant else DMD2_STEPS
    if steps not in have:
        raise BadInput("steps", steps, f"choose one of {', '.join(map(str, have))}")
    return dmd2(profile, seed, steps=steps, variant=variant)


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "dmd2": Family(title="DMD2", eta=0.0, recipe=_family),
        **{
            f"dmd2-{name}": Family(
                title=f"DMD2, {variant.title}", eta=0.0, recipe=partial(_family, variant=name)
            )
            for name, variant in _CHANGED.items()
        },
    }
)

RECIPES: Mapping[str, Callable[[Profile, int], Recipe]] = MappingProxyType(
    {
        **{f"dmd2-{steps}": partial(dmd2, steps=steps) for steps in DMD2_STEPS},
        **{
            f"dmd2-{of.steps}-{name}": partial(dmd2, steps=of.steps, variant=name)
            for name, of in _CHANGED.items()
        },
    }
)
