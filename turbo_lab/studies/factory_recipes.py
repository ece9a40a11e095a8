"""Part C of the notebooks: a method's recipe for Qwen-Image, resolved, and its command."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import pandas as pd
from torch import nn

from turbo_lab.factory_memory import planned
from turbo_lab.qwen_counts import Model
from turbo_lab.qwen_plan import ENCODER, VAE
from turbo_lab.recipes.models import Profile
from turbo_lab.recipes.qwen_image import QwenGan, QwenRecipe, resolve_qwen
from turbo_lab.testbeds.qwen_files import SCALE
from turbo_lab.testbeds.qwen_sizes import Counts, adapter_parameters


def resolved(names: Sequence[str], *, size: int = 1024, profile: Profile = "quick") -> pd.DataFrame:
    """One row per stage of each recipe: options, budget, rates, adapter.

    Args:
        names: of `turbo_lab.recipes.qwen_image.QWEN_RECIPES`.
        size: pixels of the square pictures.
        profile: smoke, quick or paper.
    """
    rows = []
    for name in names:
        recipe = resolve_qwen(name, size=size, profile=profile)
        for number, stage in enumerate(recipe.stages, start=1):
            rows.append(
                {
                    "recipe": name,
                    "stage": number,
                    "options": ", ".join(f"{k} {_short(v)}" for k, v in stage.options.items()),
                    "steps × batch": f"{stage.steps} × {stage.batch_size}",
                    "rates": ", ".join(f"{p} {r.lr:g}" for p, r in stage.rates.items()),
                    "EMA": stage.ema,
                    "rank": recipe.adapter.rank,
                    "guidance": recipe.guidance_scale,
                    "learns from": recipe.source,
                }
            )
    return pd.DataFrame(rows).set_index(["recipe", "stage"])


def _short(value: object) -> str:
    if isinstance(value, tuple):
        return "(" + ", ".join(_short(v) for v in value) + ")"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def commands(names: Sequence[str], *, size: int = 1024) -> str:
    """The commands that train them, one per line; ``--dry-run`` prints recipe and memory plan."""
    return "\n".join(
        f"turbo-lab train qwen_image --recipe {name} --prompts prompts.txt --size {size}"
        for name in names
    )


def critics(names: Sequence[str], *, size: int = 1024, profile: Profile = "quick") -> pd.DataFrame:
    """One row per GAN term of each recipe; see `resolved`."""
    recipes = {name: resolve_qwen(name, size=size, profile=profile) for name in names}
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
        "real images": f"{100 * gan.rho:g}%",
        "teacher's steps": "" if gan.pairs is None else gan.pairs.steps,
        "weight": f"{gan.balance:g} of the gradient" if gan.balance else gan.weight,
    }


def memory(names: Sequence[str], *, size: int = 1024, profile: Profile = "quick") -> pd.DataFrame:
    """GB that each recipe holds at full size in bf16, by what it is for; activations not counted.

    The text encoder is freed before the base is loaded, so it is no part of the sum. What
    ``--dry-run`` prints where the model is at hand, from the settings of its classes.
    """
    columns = {}
    for name in names:
        recipe = resolve_qwen(name, size=size, profile=profile)
        plan = planned(recipe, full_counts(recipe), Model().transformer, each=2, encodes=False)
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


def full_counts(recipe: QwenRecipe) -> Counts:
    """Parameters of the full-size networks, and of one adapter of a recipe."""
    return Counts(
        transformer=Model().transformer.parameters,
        adapter=adapter_parameters(_empty_transformer(), recipe.adapter),
        text_encoder=ENCODER,
        vae=VAE,
    )


@cache
def _empty_transformer() -> nn.Module:
    """The full-size transformer, without memory."""
    from accelerate import init_empty_weights
    from diffusers import QwenImageTransformer2DModel

    with init_empty_weights():
        net: nn.Module = QwenImageTransformer2DModel()
    return net
