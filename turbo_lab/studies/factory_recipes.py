"""Part C of the notebooks: a method's recipe for Qwen-Image, resolved, and its command."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from turbo_lab.recipes.models import Profile
from turbo_lab.recipes.qwen_image import resolve_qwen


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
