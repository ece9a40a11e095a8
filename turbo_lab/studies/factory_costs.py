"""Notebook 07's tables of what a training of the factory computes, and for how many GPU-hours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import pandas as pd

from turbo_lab.factory_cost import costs, hours
from turbo_lab.qwen_plan import device_named
from turbo_lab.recipes.models import Profile
from turbo_lab.recipes.qwen_image import QWEN_RECIPES
from turbo_lab.studies.factory_recipes import chosen

UTILISATION = 0.4
"""Share of a GPU's peak that a training is assumed to reach. Nothing here has measured it."""
CARD = "H100"
"""An H200 has the same rate in bf16."""


def stages(name: str, *, size: int = 1024, profile: Profile = "quick") -> pd.DataFrame:
    """One row per part of a training, the teacher's samples first, and one for all.

    Args:
        name: of a recipe.
        size: pixels of the square pictures.
        profile: smoke, quick or paper.

    Returns:
        Passes of one picture in one step, passes of all in thousands, PFLOP, hours of one GPU.
    """
    rows = []
    for cost in costs(chosen(name, size=size, profile=profile)):
        both = {"forward": cost.passes.forward, "with gradient": cost.passes.gradient}
        shown = cost.steps * cost.pictures / 1e3
        rows.append(
            {
                "stage": cost.stage or "before",
                "what": cost.what,
                "steps × pictures": f"{cost.steps:,} × {cost.pictures:,}",
                **{f"passes {kind}": number for kind, number in both.items()},
                **{f"{kind}, 10³": number * shown for kind, number in both.items()},
                "flops": cost.flops,
            }
        )
    table = pd.DataFrame(rows)
    sums = table[[c for c in table if c == "flops" or str(c).endswith("10³")]].sum()
    table.loc[len(table)] = {"stage": "all", **sums}
    return _in_hours(table.set_index("stage"))


def totals(
    *, size: int = 1024, profiles: Sequence[Profile] = get_args(Profile)[1:]
) -> pd.DataFrame:
    """One row per recipe: PFLOP and hours of one GPU at each profile, the samples included."""
    rows = {
        (name, profile): {
            "flops": sum(c.flops for c in costs(chosen(name, size=size, profile=profile)))
        }
        for name in QWEN_RECIPES
        for profile in profiles
    }
    table = _in_hours(pd.DataFrame.from_dict(rows, orient="index")).unstack()
    table.columns = [f"{profile}: {what}" for what, profile in table.columns]
    ordered = [c for p in profiles for c in table.columns if c.startswith(f"{p}: ")]
    return table.loc[list(QWEN_RECIPES), ordered].rename_axis("recipe")


def _in_hours(table: pd.DataFrame) -> pd.DataFrame:
    """FLOP as PFLOP, and as hours at the peak and at `UTILISATION` of it."""
    flops = table.pop("flops")
    table["PFLOP"] = (flops / 1e15).round().astype(int)
    table["h at peak"] = hours(flops, device_named(CARD))
    table[f"h at {UTILISATION:.0%}"] = hours(flops, device_named(CARD), UTILISATION)
    return table.round(2).fillna("")
