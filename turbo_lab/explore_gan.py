"""The explorer of notebook 05: features, share of real data and weight of a GAN term.

Students were trained with one of them changed at a time. The explorer shows the nearest student
that there is, and says which.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from html import escape
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeAlias, cast

from turbo_lab.errors import TurboLabError
from turbo_lab.explore import caption_boxes, panel
from turbo_lab.figures import contact_sheet
from turbo_lab.lab import Lab
from turbo_lab.postcards import Caption, caption_tokens
from turbo_lab.recipes.adversarial import AGAINST, CONTROL, LOOKS, MAIN
from turbo_lab.sampling import checked_sampling

if TYPE_CHECKING:
    import ipywidgets

    from turbo_lab.recipes.adversarial import Looks

Value: TypeAlias = str | float
KNOBS: Mapping[str, str] = MappingProxyType(
    {"features": "features", "rho": "rho", "balance": "weight"}
)
"""Fields of `turbo_lab.recipes.adversarial.Against`, and what they are called here."""


def settings(family: str) -> dict[str, Value]:
    """Values of the knobs that a family was trained with."""
    return {name: getattr(AGAINST[family], name) for name in KNOBS}


def on_knobs() -> tuple[str, ...]:
    """Families that differ from the main one by the knobs alone, the main one first."""
    return tuple(name for name, one in AGAINST.items() if one.loss == MAIN.loss)


def values(knob: str) -> list[Value]:
    """Values of a knob that some student has; numbers rise, features are as in `LOOKS`."""
    found = {settings(family)[knob] for family in on_knobs()}
    return [name for name in LOOKS if name in found] if knob == "features" else sorted(found)


def nearest(wanted: Mapping[str, Value], turned: str = "features") -> str:
    """The family that has most of the wanted values; of several, one with the knob last turned.

    Args:
        wanted: value by knob, for all of `KNOBS`.
        turned: the knob that decides between families as near.
    """

    def agreement(family: str) -> tuple[int, bool]:
        own = settings(family)
        return sum(own[k] == wanted[k] for k in KNOBS), own[turned] == wanted[turned]

    return max(on_knobs(), key=agreement)  # the first of equals: their order is fixed


def said(wanted: Mapping[str, Value], family: str) -> str:
    """Which student is shown, and what of the wish it does not have."""
    own = settings(family)
    shown = ", ".join(f"{title} {named(own[k])}" for k, title in KNOBS.items())
    missed = [f"{title} {named(wanted[k])}" for k, title in KNOBS.items() if own[k] != wanted[k]]
    if not missed:
        return f"exactly this student: {shown}"
    return f"nearest student, without {' and '.join(missed)}, shown is: {shown}"


def named(value: Value) -> str:
    """A value of a knob to read."""
    return LOOKS[cast("Looks", value)] if isinstance(value, str) else f"{value:g}"


def gan_png(lab: Lab, caption: str, *, families: Sequence[str], noises: int, seed: int) -> bytes:
    """Draw a caption with 2-step students, and below each picture a piece of its ground.

    Args:
        lab: with the teacher.
        caption: of every picture.
        families: students, from top to bottom; the same noises for each.
        noises: how many pictures each.
        seed: of the noise.

    Raises:
        BadInput: a family without a 2-step student, a negative seed, or a caption outside the
            grammar.
    """
    import numpy as np
    from PIL import Image

    from turbo_lab.charts import ground_piece

    tokens, sheets = caption_tokens([caption]).expand(noises, -1), []
    for name in families:
        student = lab.student(name, steps=2)
        sampling = checked_sampling({**student.sampling(n=noises).model_dump(), "seed": seed})
        images, _, _ = lab.draw_for(tokens, sampling, "", student)
        pieces = ground_piece(images)
        enlarge = 6 * images.shape[-1] // pieces.shape[-1]
        sheets.append(contact_sheet(images, columns=noises, enlarge=6, gap=0))
        sheets.append(contact_sheet(pieces, columns=noises, enlarge=enlarge, gap=0))
    buffer = io.BytesIO()
    Image.fromarray(np.concatenate(sheets)).save(buffer, format="PNG")
    return buffer.getvalue()


def gan_explorer(lab: Lab, *, noises: int = 4) -> ipywidgets.Widget:
    """Controls for features, rho and weight, caption and noise, beside the student without a GAN.

    Args:
        lab: with the teacher.
        noises: pictures of each.
    """
    import ipywidgets as w

    late = {"continuous_update": False}
    main = settings(next(iter(AGAINST)))
    knobs = {
        "features": w.Dropdown(options=_options("features"), description="features"),
        "rho": w.SelectionSlider(options=_options("rho"), description="rho", **late),
        "balance": w.SelectionSlider(options=_options("balance"), description="weight", **late),
    }
    for name, knob in knobs.items():
        knob.value = main[name]
    seed = w.BoundedIntText(value=0, min=0, max=10**6, description="noise")
    words = caption_boxes()
    picture, note = w.Image(format="png", width=760), w.HTML()
    turned = ["features"]

    def draw(_: object = None) -> None:
        try:
            caption = str(Caption(**{name: box.value for name, box in words.items()}))
            wanted = {name: knob.value for name, knob in knobs.items()}
            family = nearest(wanted, turned[0])
            picture.value = gan_png(
                lab, caption, families=[CONTROL, family], noises=noises, seed=seed.value
            )
            note.value = escape(
                f"{caption} · above without a GAN, below with it ({said(wanted, family)})"
            )
        except TurboLabError as error:
            note.value = escape(str(error))

    def turn(name: str) -> None:
        turned[0] = name
        draw()

    for name, knob in knobs.items():
        knob.observe(lambda _, name=name: turn(name), names="value")
    for box in (seed, *words.values()):
        box.observe(draw, names="value")
    draw()
    return panel([*knobs.values(), seed, *words.values()], [picture, note])


def _options(knob: str) -> list[tuple[str, Value]]:
    return [(named(value), value) for value in values(knob)]
