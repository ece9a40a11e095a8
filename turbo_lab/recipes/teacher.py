"""The teacher on postcards."""

from __future__ import annotations

from typing import Any

from turbo_lab.recipes.models import Profile, Rates, Recipe, Stage

GUIDANCE = 4.0
"""Guidance scale that every student distils."""

EARLY = "teacher-early"
"""Name of the recipe of the teacher that every student distils."""


def teacher(profile: Profile, seed: int) -> Recipe:
    """The guided flow-matching teacher on postcards: `early`, and ten stages at high noise.

    Without guidance, from a real picture noised to t = 0.7 the six-stage teacher reads 95% of the
    signs, and from noise alone 64%: digits are decided above, where a fifth of its training times
    lay (LOG.md, 2026-11-28). So: times shifted to noise, and wide, and Muon; half posters first,
    then postcards alone; and, since one such round had halved the signs that were missed, another.
    The third round is for the garments' hues, which neither had mended: a third of its pictures
    are busts, and a third posters. Its matrices are multiplied in bfloat16, which makes a step
    shorter where processors have AMX. The fourth is another of these, with a longer end. Every
    round ends on postcards alone: after one that ended on a quarter of posters, 13% of pictures had
    a second sign (LOG.md, 2026-11-29). More rounds for four blocks brought no more signs; the fifth
    is for a network of six, grown from them.
    """
    budget = {
        "smoke": (4, 4, 4, 4, 4, 4, 4, 4),
        "quick": (8_000, 5_000, 11_000, 3_000, 5_000, 5_000, 6_000, 9_000),
        "paper": (40_000, 20_000, 40_000, 20_000, 20_000, 20_000, 40_000, 40_000),
    }[profile]
    before = early(profile, seed)

    def stage(steps: int, final: float, posters: float = 0, **other: Any) -> Stage:
        rates = Rates(lr=1.5e-3, warmup=min(200, steps), final=final, muon="transformer_blocks")
        options = {"drop": 0.1, "shift": 2.5, "time_std": 1.3}
        changed = {"options": options, "steps": steps, "rates": {"student": rates}}
        return before.stages[-1].model_copy(update={**changed, "posters": posters, **other})

    mixed, last, busts, plain, more_busts, more_plain, grown, grown_plain = budget
    one_round = (stage(mixed, 0.3, posters=0.5), stage(last, 0.01))
    late: dict[str, Any] = {
        "options": {"drop": 0.1, "shift": 2.2, "time_std": 1.2},
        "precision": "bf16",
    }
    with_busts = (
        stage(busts, 0.3, posters=1 / 3, busts=1 / 3, **late),
        stage(plain, 0.01, **late),
        stage(more_busts, 0.3, posters=1 / 4, busts=1 / 4, **late),
        stage(more_plain, 0.01, **late),
        stage(grown, 0.3, posters=1 / 4, busts=1 / 4, layers=6, **late),
        stage(grown_plain, 0.01, **late),
    )
    stages = (*before.stages, *one_round, *one_round, *with_busts)
    return before.model_copy(update={"stages": stages})


def early(profile: Profile, seed: int) -> Recipe:
    """The teacher after six of its stages: a curriculum, and what students are distilled from.

    Signs may lie at any whole pixel, so every digit has 16 offsets within its tokens. Trained on
    9,000 steps of postcards alone, bodies and texture come but digits do not follow the caption;
    why this curriculum, and what was not compared with it, is in LOG.md (2026-11-23). So:
    postcards; signs at one offset, where the network learns whose digits to draw; posters of six
    signs at all offsets; postcards again; and, since signs were still getting better, a longer
    round of both: half posters, then postcards alone.
    """
    budget = {
        "smoke": (12, 4, 4, 4, 4, 4),
        "quick": (9_000, 700, 1_900, 2_600, 8_500, 3_500),
        "paper": (20_000, 2_000, 20_000, 20_000, 40_000, 20_000),
    }[profile]
    batch_size = {"smoke": 8, "quick": 64, "paper": 128}[profile]

    def stage(
        steps: int, ema: float, final: float, sign_grid: int = 1, posters: float = 0
    ) -> Stage:
        return Stage(
            method="flow",
            options={"drop": 0.1},
            steps=steps,
            batch_size=batch_size,
            rates={"student": Rates(lr=1.5e-3, warmup=min(200, steps), final=final)},
            ema=ema,
            sign_grid=sign_grid,
            posters=posters,
        )

    first, coarse, posters, between, mixed, last = budget
    stages = (
        stage(first, ema=0.9995, final=0.01),
        stage(coarse, ema=0.99, final=0.5, sign_grid=4),
        stage(posters, ema=0.99, final=0.5, posters=0.8),
        stage(between, ema=0.999, final=0.01),
        stage(mixed, ema=0.999, final=0.3, posters=0.5),
        stage(last, ema=0.999, final=0.01),
    )
    return Recipe(name="teacher", seed=seed, stages=stages)
