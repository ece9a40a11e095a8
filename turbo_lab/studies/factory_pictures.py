"""Notebook 07: few steps beside many from the same noise, and what a wrong last time does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor

from turbo_lab.figures import bare, image_rows, style
from turbo_lab.lab import Lab
from turbo_lab.quality import per_image
from turbo_lab.qwen_order import TEACHER_STEPS, Order
from turbo_lab.qwen_sample import Drawn
from turbo_lab.qwen_workshop import Workshop
from turbo_lab.schedules import BASE

PROMPTS = (
    "a cat on the moss",
    "two dogs beside a wooden sign that reads 42",
    "a street in the rain at night, neon light in the puddles",
    "a portrait of an old fisherman, soft light from a window",
)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much is drawn: prompts of `PROMPTS`, and postcards for the figure of last times."""

    prompts: int
    postcards: int


BUDGETS: Mapping[str, Budget] = MappingProxyType(
    {
        "smoke": Budget(prompts=1, postcards=16),
        "quick": Budget(prompts=3, postcards=128),
        "paper": Budget(prompts=4, postcards=512),
    }
)


# --- few beside many ----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Drawing:
    """An order and its pictures."""

    order: Order
    drawn: Drawn


@dataclass(frozen=True, kw_only=True, eq=False)
class Compared:
    """The adapter's few steps and the base's many guided ones, from the same noise."""

    few: Drawing
    many: Drawing

    @property
    def rows(self) -> dict[str, Drawing]:
        """Both, with what to call them."""
        return {_called(one.order): one for one in (self.few, self.many)}


def _called(order: Order) -> str:
    worn = "adapter" if order.loras else f"base, guidance {order.guidance_scale:g}"
    return f"{order.times.steps} steps, {worn}"


def compared(shop: Workshop, budget: Budget, *, seed: int = 0) -> Compared:
    """Draw the same prompts and noises with the adapter at its steps, and with the base at 50."""
    prompts = PROMPTS[: budget.prompts]
    few = shop.order(prompts, adapter=True, seed=seed)
    many = shop.order(prompts, adapter=False, steps=TEACHER_STEPS, seed=seed)
    return Compared(
        few=Drawing(order=few, drawn=shop.drawn(few)),
        many=Drawing(order=many, drawn=shop.drawn(many)),
    )


def times(both: Compared) -> pd.DataFrame:
    """One row each: passes per picture, who says the times, and the seconds of each phase.

    Seconds of drawing and decoding are of all pictures; opening embeds prompts and loads weights.
    """
    rows = {}
    for name, one in both.rows.items():
        n = len(one.order.prompts)
        rows[name] = {
            "pictures": n,
            "passes per picture": one.order.work.calls // n,
            "first times": ", ".join(f"{t:.4g}" for t in one.order.times.grid[:2].tolist()),
            **{f"{phase}, s": round(spent, 3) for phase, spent in one.drawn.seconds.items()},
            "times from": one.order.times.known,
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def figure_pictures(both: Compared) -> Figure:
    """Draw few steps above many, a column per prompt; seconds are in `times`, not in a picture."""
    n = len(both.few.order.prompts)
    with style():
        figure = Figure(figsize=(1.9 * max(n, 2) + 1.6, 4.3), layout="constrained")
        axes = figure.subplots(2, n, squeeze=False)
        for row, (name, one) in zip(axes, both.rows.items(), strict=True):
            for axis, picture in zip(row, one.drawn.pixels.numpy(), strict=True):
                axis.imshow(picture, interpolation="nearest")
                bare(axis)
            row[0].set_ylabel(
                f"{name}\n{one.order.work.calls // n} passes a picture",
                rotation=0, ha="right", va="center", fontsize=8,
            )  # fmt: skip
        for axis, prompt in zip(axes[0], both.few.order.prompts, strict=True):
            words = prompt.split()
            half = -(-len(words) // 2)
            axis.set_title("\n".join([" ".join(words[:half]), " ".join(words[half:])]), fontsize=7)
    return figure


# --- what a wrong last time does ----------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LastTimes:
    """Postcards of one 2-step student at its own second time and at a wrong one.

    Attributes:
        images: label to ``[N, 3, 32, 32]``, the same captions and noises; its own times first.
        values: label to what `turbo_lab.quality.per_image` says of each picture.
        key: of the student.
    """

    images: Mapping[str, Tensor]
    values: Mapping[str, Mapping[str, np.ndarray]]
    key: str

    @property
    def table(self) -> pd.DataFrame:
        """Rates and means, one row per label."""
        rows = {
            label: {title: float(values[name].mean()) for name, title in SHOWN.items()}
            for label, values in self.values.items()
        }
        return pd.DataFrame.from_dict(rows, orient="index")


SHOWN: Mapping[str, str] = MappingProxyType(
    {
        "sign_read": "signs read",
        "whole_body": "whole bodies",
        "high_frequency_share": "high-frequency share",
    }
)
"""Measures of `turbo_lab.quality` that the figure shows, and their titles."""


def last_times(lab: Lab, budget: Budget, *, family: str, seed: int = 0) -> LastTimes:
    """Sample a 2-step student of the postcards at the time it was trained for, and at 0.02.

    Args:
        lab: with the teacher.
        budget: how many.
        family: of the student.
        seed: of the noise.
    """
    student = lab.student(family, steps=2)
    own = student.sampling(n=budget.postcards, seed=seed)
    wrong = own.model_copy(update={"times": (1.0, BASE.terminal)})
    images, values = {}, {}
    for name, sampling in (("its own", own), ("terminal 0.02", wrong)):
        label = f"{name}: {', '.join(f'{t:.4g}' for t in sampling.grid[:-1].tolist())}"
        images[label], _, _ = lab.draw(sampling, name, student)
        values[label] = per_image(images[label], lab.scenes(sampling))
    return LastTimes(images=images, values=values, key=student.artefact.key)


def figure_last_times(found: LastTimes, *, columns: int = 8) -> Figure:
    """Draw the first postcards of both, with their rates."""
    rows = {label: images[:columns] for label, images in found.images.items()}
    notes = {
        str(label): "\n".join(f"{name} {value:.0%}" for name, value in row.items())
        for label, row in found.table.iterrows()
    }
    return image_rows(rows, notes=notes)
