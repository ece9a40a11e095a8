"""Students of the teacher of six blocks: phased consistency by far more calls, and all after it.

Their sizes and lengths were found by looks at the stream ``select``, see LOG.md; none of them was
chosen by another that has as many calls. The other students follow `turbo_lab.recipes.EARLY`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from turbo_lab.adapters import AdapterSize
from turbo_lab.recipes.adversarial import MAIN
from turbo_lab.recipes.distribution import NOISE_SHIFT, SECOND
from turbo_lab.recipes.models import Family, Option, Profile, Rates, Recipe, Stage
from turbo_lab.recipes.teacher import GUIDANCE, teacher
from turbo_lab.recipes.warm import GRID_STEPS, two_steps

PCM, TURBO = "pcm-six", "turbo-six"
EDGE = 0.6
"""Of the two phases in the end, and the second time of all students here."""
ADAPTER = AdapterSize(rank=64, alpha=64)
_PCM_STEPS = (9_895, 1_700, 5_000)
"""Of phased consistency: with the edge of the published second time, then at `EDGE`, and then with
more of the teacher's steps above it."""
_DMD2_ROUNDS, _GAN_ROUNDS = 1_800, 900
"""Of distribution matching, twice so many, each time with a rate that falls; of the last stage."""
_OF: Mapping[Profile, float] = {"smoke": 0.0, "quick": 1.0, "paper": 10.0}
"""Lengths by profile, of those above."""
_SIZES = {"smoke": 4, "quick": 16, "paper": 32}


def _consistency(profile: Profile, steps: int, edge: float, *, lr: float, shift: float) -> Stage:
    # What is the default is written out: the key of what was trained names it.
    options: dict[str, Option] = {
        "grid_steps": GRID_STEPS,
        "edges": (edge,),
        "solver": "euler",
        "distance": "l2",
        "target": "current",
    }
    if shift != 1:
        options["shift"] = shift
    steps = max(2, int(steps * _OF[profile]))
    return Stage(
        method="consistency",
        options=options,
        steps=steps,
        batch_size=_SIZES[profile],
        rates={"student": Rates(lr=lr, warmup=min(50, steps), final=0.02)},
        ema=0.99,
        teacher="guided",
        guidance_scale=GUIDANCE,
        precision="bf16",
    )


def pcm(profile: Profile, seed: int) -> Recipe:
    """Phased consistency alone (Wang et al. 2024, arXiv 2405.18407), by 1.6 million calls at quick.

    The edge between the phases falls from the published second time to `EDGE`: what one jump to
    it has not decided, a jump from a time with less noise completes more of.

    Args:
        profile: smoke, quick or paper.
        seed: of the training.
    """
    first, lowered, above = _PCM_STEPS
    base = teacher("quick", 0)
    return Recipe(
        name=PCM,
        seed=seed,
        net=base.net,
        teacher=base,
        adapter=ADAPTER,
        stages=(
            _consistency(profile, first, SECOND, lr=1e-3, shift=1.0),
            _consistency(profile, lowered, EDGE, lr=7e-4, shift=1.0),
            _consistency(profile, above, EDGE, lr=1e-3, shift=2.0),
        ),
    )


def turbo(profile: Profile, seed: int) -> Recipe:
    """The whole recipe: `pcm`, DMD2 from it in two stages, and DMD2 with the critic of notebook 06.

    All trainings go on from one of `pcm`, so that seeds differ from DMD2 on.

    Args:
        profile: smoke, quick or paper.
        seed: of the trainings after `pcm`.
    """
    start = pcm(profile, 0)
    matching = Stage(
        method="dmd2",
        options={
            "times": (1.0, EDGE),
            "rival_updates": 1,
            "noise_shift": NOISE_SHIFT,
            "fake_shift": NOISE_SHIFT,
        },
        steps=max(2, int(_DMD2_ROUNDS * _OF[profile])),
        batch_size=_SIZES[profile],
        rates={
            "student": Rates(lr=5e-4, betas=(0.0, 0.999), warmup=20, final=0.05),
            "fake": Rates(lr=1e-3, betas=(0.0, 0.999), warmup=10, final=0.1),
        },
        ema=0.99,
        teacher="guided",
        guidance_scale=GUIDANCE,
        precision="bf16",
    )
    again = matching.model_copy(
        update={
            "rates": {
                "student": matching.rates["student"],
                "fake": matching.rates["fake"].model_copy(update={"lr": 7e-4}),
            },
            "rivals_from": "fake",
        }
    )
    judged = matching.model_copy(
        update={
            "steps": max(2, int(_GAN_ROUNDS * _OF[profile])),
            "rates": {
                "student": Rates(lr=1e-4, betas=(0.0, 0.999), warmup=10, final=0.1),
                "fake": Rates(lr=5e-4, betas=(0.0, 0.999), warmup=10, final=0.1),
                "critic": Rates(lr=5e-3, betas=(0.0, 0.99), warmup=10),
            },
            "gan": MAIN.gan(profile),
            "rivals_from": "fake",
        }
    )
    return start.model_copy(
        update={"name": TURBO, "seed": seed, "stages": (matching, again, judged), "start": start}
    )


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        PCM: Family(title="PCM, six blocks", eta=0.0, recipe=two_steps(pcm)),
        TURBO: Family(title="turbo, six blocks", eta=0.0, recipe=two_steps(turbo)),
    }
)
RECIPES: Mapping[str, Callable[[Profile, int], Recipe]] = MappingProxyType({PCM: pcm, TURBO: turbo})
