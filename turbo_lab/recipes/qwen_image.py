"""Students of Qwen-Image: adapters on the shared base, at any size, one recipe per method.

What was published is used as it is and its source named; what was not is marked as ours. Nothing
here has been trained on the full model yet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from types import MappingProxyType
from typing import Literal

from turbo_lab.errors import BadInput
from turbo_lab.path import qwen_mu, shift_from_mu, time_grid
from turbo_lab.recipes.models import Option, Pairs, Profile, Rates
from turbo_lab.recipes.qwen_models import (
    ADAPTER,
    GUIDANCE,
    QwenGan,
    QwenRecipe,
    QwenStage,
    Source,
)

__all__ = [
    "ADAPTER",
    "GUIDANCE",
    "PASS_TOKENS",
    "QWEN_RECIPES",
    "SIZES",
    "QwenGan",
    "QwenRecipe",
    "QwenStage",
    "micro_batches",
    "options_at",
    "resolution_shift",
    "resolve_qwen",
    "student_times",
]

SIZES = (512, 1024, 1328)
"""Sides of the square pictures that batch sizes were chosen for; other multiples of 16 work too."""
TEACHER_STEPS = 50
"""Of the published pipeline, at a guidance of 4; the negative prompt is one space."""
PASS_TOKENS = 8192
"""Image tokens of one forward pass in training, ours: 8 pictures of 512 px, 2 of 1024."""
WULI = (1.0, 0.7155)
LIGHTNING_SHIFT = 3.0
TAPS = (2, 5, 8, 11)
"""Blocks of a small vision transformer that StyleGAN-T's heads are on, its last among them."""
CROP, VIEW = 32, 224
"""Latents of the squares that are decoded for the critic, and pixels of them that it looks at."""
CHAIN = (40, 20, 10, 5, 2)
"""Steps of the guided teacher, then of the student after each stage."""


def resolution_shift(size: int) -> float:
    """Qwen-Image's own timestep shift for square pictures of ``size`` pixels."""
    return shift_from_mu(qwen_mu((size // 16) ** 2))


def options_at(options: Mapping[str, Option], size: int, shift: float) -> Mapping[str, Option]:
    """Options for pictures whose own timestep shift is this, from those for squares.

    A shift that is not the square's own was chosen for other reasons, and stays.
    """
    if options.get("shift") != resolution_shift(size):
        return options
    return {**options, "shift": shift}


def student_times(steps: int) -> tuple[float, ...]:
    """Times of published few-step adapters: Wuli's at 2 steps, Lightning's (shift 3) else."""
    if steps == len(WULI):
        return WULI
    return tuple(round(t, 4) for t in time_grid(steps, shift=LIGHTNING_SHIFT).tolist()[:-1])


def micro_batches(size: int, batch_size: int) -> int:
    """Parts of a batch, so that one pass has at most `PASS_TOKENS` tokens."""
    rows = max(1, PASS_TOKENS // (size // 16) ** 2)
    return -(-batch_size // min(rows, batch_size))


def _stage(
    size: int,
    method: str,
    profile: Profile,
    steps: Mapping[Profile, int],
    rates: Mapping[str, Rates],
    options: Mapping[str, Option],
    teacher: Literal["guided", "before"] | None = "guided",
) -> QwenStage:
    """A stage whose batches are split so that one pass has at most `PASS_TOKENS` tokens."""
    batch_size = {"smoke": 2, "quick": 8, "paper": 32}[profile]
    return QwenStage(
        method=method,
        options=options,
        steps=steps[profile],
        batch_size=batch_size,
        micro_batches=micro_batches(size, batch_size),
        rates=rates,
        teacher=teacher,
    )


def _pairs(profile: Profile) -> Pairs:
    n = {"smoke": 4, "quick": 1000, "paper": 10_000}[profile]
    return Pairs(n=n, steps=10 if profile == "smoke" else TEACHER_STEPS)


def _recipe(
    name: str, size: int, profile: Profile, seed: int, source: Source, *stages: QwenStage
) -> QwenRecipe:
    pairs = _pairs(profile) if source == "pairs" else None
    return QwenRecipe(name=name, size=size, seed=seed, source=source, pairs=pairs, stages=stages)


def progressive(size: int, profile: Profile, seed: int, source: Source) -> QwenRecipe:
    """The guided teacher's 40 steps halved to 2; guidance is distilled in the first stage.

    The rate is DiffSynth's and TwinFlow's for adapters, 1e-4. The last two stages are twice as
    long, as in the code of Consistency Models. Budgets are ours.
    """
    chain = CHAIN if profile != "smoke" else (8, 4, 2)
    unit: dict[Profile, int] = {"smoke": 2, "quick": 250, "paper": 2000}
    stages = []
    for k, (before, steps) in enumerate(pairwise(chain)):
        long = 2 if k >= len(chain) - 3 else 1
        stages.append(
            _stage(
                size,
                "progressive",
                profile,
                {name: long * budget for name, budget in unit.items()},
                {"student": Rates(lr=1e-4, warmup=20, final=0.1)},
                {"steps": steps, "teacher_steps": before, "shift": resolution_shift(size)},
                "before" if k else "guided",
            )
        )
    return _recipe("progressive", size, profile, seed, source, *stages)


def _consistent(size: int, profile: Profile, edges: tuple[float, ...]) -> QwenStage:
    """A consistency stage with the grid, rate, decay and budget of PCM's adapter on SD3.

    100 Euler points, Huber, rate 5e-6 with weight decay 1e-3, the student itself as target, 20,000
    steps; 1,000 to 2,000 are said to show clear improvement.
    """
    options: dict[str, Option] = {
        "grid_steps": 100,
        "distance": "huber",
        "shift": resolution_shift(size),
    }
    return _stage(
        size,
        "consistency",
        profile,
        {"smoke": 4, "quick": 2000, "paper": 20_000},
        {"student": Rates(lr=5e-6, weight_decay=1e-3, warmup=20)},
        {**options, "edges": edges} if edges else options,
    )


def consistency(size: int, profile: Profile, seed: int, source: Source) -> QwenRecipe:
    """Discrete consistency with one phase."""
    return _recipe("consistency", size, profile, seed, source, _consistent(size, profile, ()))


def pcm(size: int, profile: Profile, seed: int, source: Source) -> QwenRecipe:
    """Phased consistency: two phases that meet at the second time of the published 2 steps."""
    return _recipe("pcm", size, profile, seed, source, _consistent(size, profile, WULI[1:]))


def warm(size: int, profile: Profile, seed: int, source: Source) -> QwenRecipe:
    """PCM, then distribution matching at the same two steps; the fake score starts as the base."""
    stages = (
        _consistent(size, profile, WULI[1:]),
        *dmd2(size, profile, seed, source, steps=len(WULI)).stages,
    )
    return _recipe("pcm-dmd2-2", size, profile, seed, source, *stages)


def turbo(size: int, profile: Profile, seed: int, source: Source) -> QwenRecipe:
    """PCM, then distribution matching, then both it and a critic: the whole way to two steps.

    Where the recipe of the published 2-step adapter has numbers they are not public; the stages
    are (see `pcm` and `dmd2` for theirs). Of the last one, StyleGAN-T has the heads' blocks and
    their rate of 2e-3 with betas (0, 0.99), and matching gradients rather than weights is the
    advice of DMD2's author. Ours, from the miniature of it in notebook 05: twice the gradient, a
    fifth of the student's rate, as one that moves faster outruns its critic, and half real images
    where there are any.
    """
    warmed = warm(size, profile, seed, source)
    matched = warmed.stages[-1]
    student = matched.rates["student"]
    rates = {
        **matched.rates,
        "student": student.model_copy(update={"lr": student.lr / 5}),
        "critic": Rates(lr=2e-3, betas=(0.0, 0.99), warmup=20),
    }
    gan = QwenGan(
        blocks=TAPS,
        crop=min(CROP, size // 8),
        view=min(VIEW, size // 14 * 14),
        rho=0.5 if source == "images" else 0.0,
        pairs=_pairs(profile),
        balance=2.0,
    )
    last = matched.model_copy(update={"rates": rates, "gan": gan, "rivals_from": "fake"})
    return _recipe("turbo", size, profile, seed, source, *warmed.stages, last)


def continuous(size: int, profile: Profile, seed: int, source: Source) -> QwenRecipe:
    """Continuous-time consistency; betas and tangent warm-up of 1,000 steps from rCM.

    rCM's rate of 2e-6 moves all weights; 2e-5 for an adapter is ours, and so are the budgets.
    """
    warmup = {"smoke": 2, "quick": 400, "paper": 1000}[profile]
    stage = _stage(
        size,
        "continuous",
        profile,
        {"smoke": 4, "quick": 2000, "paper": 10_000},
        {"student": Rates(lr=2e-5, betas=(0.0, 0.999), warmup=20)},
        {"warmup": warmup, "shift": resolution_shift(size)},
    )
    return _recipe("continuous", size, profile, seed, source, stage)


def direct(size: int, profile: Profile, seed: int, source: Source, *, steps: int) -> QwenRecipe:
    """The student unrolled over its steps to the teacher's sample; DiffSynth's rate, 1e-4."""
    stage = _stage(
        size,
        "direct",
        profile,
        {"smoke": 4, "quick": 1000, "paper": 10_000},
        {"student": Rates(lr=1e-4, warmup=20)},
        {"steps": steps, "shift": resolution_shift(size)},
        None,
    )
    return _recipe(f"direct-{steps}", size, profile, seed, source, stage)


def dmd2(size: int, profile: Profile, seed: int, source: Source, *, steps: int) -> QwenRecipe:
    """Distribution matching: rates, cadence and noise of LightX2V's Qwen-Image configuration.

    1e-4 for the student and 2e-5 for the fake, two updates of the fake for each of the student,
    times for both in 0.02..1 with shift 5, Euler steps in training as in sampling; betas from
    Lightning. A round is one update of the fake; Lightning is said to have used 1,000 to 2,000
    updates of the student.
    """
    rival_updates = 2
    betas = (0.0, 0.999)
    stage = _stage(
        size,
        "dmd2",
        profile,
        {"smoke": 4, "quick": rival_updates * 300, "paper": rival_updates * 2000},
        {
            "student": Rates(lr=1e-4, betas=betas, warmup=20),
            "fake": Rates(lr=2e-5, betas=betas, warmup=20),
        },
        {
            "times": student_times(steps),
            "rival_updates": rival_updates,
            "noise_range": (0.02, 1.0),
            "noise_shift": 5.0,
            "fake_range": (0.02, 1.0),
            "fake_shift": 5.0,
        },
    )
    return _recipe(f"dmd2-{steps}", size, profile, seed, source, stage)


def tdm(size: int, profile: Profile, seed: int, source: Source, *, steps: int) -> QwenRecipe:
    """Trajectory distribution matching: all numbers are those of `dmd2`, and so is the noise.

    TDM was published on other models; what it needs on this one is not known.
    """
    whole = dmd2(size, profile, seed, source, steps=steps)
    (stage,) = whole.stages
    kept = ("times", "rival_updates", "noise_shift")
    stage = stage.model_copy(
        update={"method": "tdm", "options": {name: stage.options[name] for name in kept}}
    )
    return whole.model_copy(update={"name": f"tdm-{steps}", "stages": (stage,)})


Resolve = Callable[[int, Profile, int, Source], QwenRecipe]

QWEN_RECIPES: Mapping[str, tuple[Resolve, tuple[Source, ...]]] = MappingProxyType(
    {
        "progressive": (progressive, ("pairs", "images")),
        "consistency": (consistency, ("pairs", "images")),
        "continuous": (continuous, ("pairs", "images")),
        "pcm": (pcm, ("pairs", "images")),
        "pcm-dmd2-2": (warm, ("pairs", "images")),
        "turbo": (turbo, ("pairs", "images")),
        **{f"direct-{n}": (partial(direct, steps=n), ("pairs",)) for n in (8, 4, 2, 1)},
        **{f"dmd2-{n}": (partial(dmd2, steps=n), ("prompts",)) for n in (8, 4, 2)},
        **{f"tdm-{n}": (partial(tdm, steps=n), ("prompts",)) for n in (4, 2)},
    }
)
"""Recipes by name, and the data each can learn from; the first where no images are given."""


def resolve_qwen(
    name: str,
    *,
    size: int = 512,
    profile: Profile = "quick",
    seed: int = 0,
    rank: int = ADAPTER.rank,
    images: bool = False,
) -> QwenRecipe:
    """Return the recipe of a name.

    Args:
        name: of `QWEN_RECIPES`.
        size: pixels of the square pictures, a multiple of 16 from 32 to 4096.
        profile: smoke, quick or paper.
        seed: of the training, at least 0.
        rank: of the adapters, 1 to 256; alpha is the same, so that a step keeps its size.
        images: whether there are real images to learn from.

    Raises:
        BadInput: a value is not allowed, or the recipe has no use for images.
    """
    if name not in QWEN_RECIPES:
        raise BadInput("recipe", name, f"choose one of {', '.join(QWEN_RECIPES)}")
    if profile not in ("smoke", "quick", "paper"):
        raise BadInput("profile", profile, "choose smoke, quick or paper")
    for what, value, low, high in (("seed", seed, 0, 2**62), ("rank", rank, 1, 256)):
        if not low <= value <= high:
            raise BadInput(what, value, f"use an integer from {low} to {high}")
    if not 32 <= size <= 4096 or size % 16:
        raise BadInput("size", size, "use a multiple of 16 from 32 to 4096")
    make, sources = QWEN_RECIPES[name]
    if images and "images" not in sources:
        what = {"pairs": "samples of the teacher", "prompts": "prompts alone"}[sources[0]]
        raise BadInput("images", "given", f"{name} learns from {what}; leave images out")
    recipe = make(size, profile, seed, "images" if images else sources[0])
    adapter = ADAPTER.model_copy(update={"rank": rank, "alpha": float(rank)})
    return recipe.model_copy(update={"adapter": adapter})
