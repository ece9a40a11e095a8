"""Part C of the notebooks: a method's recipe for Qwen-Image, resolved, and its command."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import pandas as pd

from turbo_lab.factory_memory import planned, published_counts
from turbo_lab.factory_plan import gans
from turbo_lab.qwen_sizes import Model
from turbo_lab.recipes.models import Profile
from turbo_lab.recipes.qwen_image import (
    QWEN_RECIPES,
    QwenGan,
    QwenRecipe,
    QwenStage,
    resolve_qwen,
)
from turbo_lab.testbeds.qwen_files import SCALE

SOURCES = {"pairs": "teacher's samples", "images": "real images", "prompts": "prompts alone"}
"""What a recipe learns from, in words."""
LEGEND: Mapping[str, str] = MappingProxyType(
    {
        "grid_steps": "Euler steps of the guided teacher from 1 to 0, of which one is taken",
        "distance": "between the two predictions",
        "edges": "where phases meet: the student's steps start there",
        "times": "where the student's steps start",
        "steps": "of the student",
        "teacher_steps": "of what it follows: the teacher, then the student of the stage before",
        "warmup": "training steps until the student's own derivative counts in full",
        "rival_updates": "updates of the fake score for each of the student",
        "noise_range": "times to which samples are noised where fake and teacher are compared",
        "fake_range": "the same where the fake score learns",
        "noise_shift": "above 1, more of those times lie at high noise",
        "fake_shift": "the same where the fake score learns",
        "shift": "above 1, more of the training times lie at high noise; the size's own",
    }
)
"""What the options of methods mean, by the names that ``--dry-run`` and ``--set`` use."""


def chosen(name: str, *, size: int = 1024, profile: Profile = "quick") -> QwenRecipe:
    """A recipe as its line of `commands` resolves it: with real images where a critic sees them."""
    images = bool(gans(resolve_qwen(name, size=size, profile=profile)))
    images = images and "images" in QWEN_RECIPES[name][1]
    return resolve_qwen(name, size=size, profile=profile, images=images)


def resolved(names: Sequence[str], *, size: int = 1024, profile: Profile = "quick") -> pd.DataFrame:
    """One row per stage of each recipe: method and options, budget, rates, adapter, data.

    Args:
        names: of `turbo_lab.recipes.qwen_image.QWEN_RECIPES`.
        size: pixels of the square pictures.
        profile: smoke, quick or paper.
    """
    rows = []
    for name in names:
        recipe = chosen(name, size=size, profile=profile)
        for number, stage in enumerate(recipe.stages, start=1):
            rows.append(
                {
                    "recipe": name,
                    "stage": number,
                    "method": stage.method,
                    "options": ", ".join(f"{k} {_short(v)}" for k, v in stage.options.items()),
                    "steps × batch": f"{stage.steps} × {stage.batch_size}",
                    "learning rates": ", ".join(f"{p} {r.lr:g}" for p, r in stage.rates.items()),
                    "EMA": stage.ema,
                    "rank": recipe.adapter.rank,
                    "guidance": recipe.guidance_scale,
                    "learns from": _source(recipe, stage),
                    "critic's real side": _real_side(stage.gan),
                }
            )
    return pd.DataFrame(rows).set_index(["recipe", "stage"])


def _source(recipe: QwenRecipe, stage: QwenStage) -> str:
    """Distribution matching makes its own samples, and reads of the data the prompts alone."""
    return SOURCES["prompts" if stage.method == "dmd2" else recipe.source]


def _real_side(gan: QwenGan | None) -> str:
    if gan is None:
        return ""
    return f"{100 * gan.rho:g}% real images, {100 - 100 * gan.rho:g}% teacher's samples"


def legend(names: Sequence[str]) -> str:
    """What the options of `resolved` mean, one per line."""
    used = {option for name in names for stage in chosen(name).stages for option in stage.options}
    return "\n".join(f"{name}: {what}" for name, what in LEGEND.items() if name in used)


def _short(value: object) -> str:
    if isinstance(value, tuple):
        return "(" + ", ".join(_short(v) for v in value) + ")"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def commands(names: Sequence[str], *, size: int = 1024) -> str:
    """The commands that train them, one per line; ``--dry-run`` prints recipe and memory plan.

    ``photos/`` has one picture for each prompt, in the order of names.
    """
    found = []
    for name in names:
        images = " --images photos/" if chosen(name, size=size).source == "images" else ""
        found.append(
            f"turbo-lab train qwen_image --recipe {name} --prompts prompts.txt{images} "
            f"--size {size}"
        )
    return "\n".join(found)


def critics(names: Sequence[str], *, size: int = 1024, profile: Profile = "quick") -> pd.DataFrame:
    """One row per GAN term of each recipe; see `resolved`."""
    recipes = {name: chosen(name, size=size, profile=profile) for name in names}
    rows = [
        {"recipe": name, "stage": number, **_critic(stage.gan)}
        for name, recipe in recipes.items()
        for number, stage in enumerate(recipe.stages, start=1)
        if stage.gan is not None
    ]
    return pd.DataFrame(rows).set_index(["recipe", "stage"])


def _critic(gan: QwenGan) -> dict[str, object]:
    dino = gan.features == "dino"
    return {
        "looks through": gan.vit if dino else gan.features,
        "blocks": ", ".join(map(str, gan.blocks)) or "all",
        "decoded": f"{SCALE * gan.crop} px" if dino else "",
        "seen": f"{gan.view} px" if dino else "",
        "its real side": _real_side(gan),
        "teacher's samples": "" if gan.pairs is None else f"{gan.pairs.n}, {gan.pairs.steps} steps",
        "weight": _weight(gan),
    }


def _weight(gan: QwenGan) -> str:
    if gan.balance is None:
        return f"{gan.weight:g}"
    return f"its gradient at a sample is {gan.balance:g} times the method's"


def memory(names: Sequence[str], *, size: int = 1024, profile: Profile = "quick") -> pd.DataFrame:
    """GB that each recipe holds at full size in bf16, by what it is for; activations not counted.

    Text encoder and VAE are freed before the base is loaded, so they are no part of the sum. What
    ``--dry-run`` prints where the model is at hand, from the settings of its classes.
    """
    columns = {}
    for name in names:
        recipe = chosen(name, size=size, profile=profile)
        counts = published_counts(recipe.adapter)
        plan = planned(recipe, counts, Model().transformer, each=2, encodes=False)
        columns[name] = {
            "text encoder, freed before": plan.text_encoder,
            "frozen base": plan.base,
            "adapters": plan.adapters,
            "gradients": plan.gradients,
            "optimiser": plan.optimiser,
            "critic": plan.critic,
            "training, all": plan.phases["training"],
        }
    return (pd.DataFrame(columns) / 1e9).rename_axis("GB").round(2)
