"""Interactive sections of the notebooks: plain controls around functions of the package."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from html import escape
from types import MappingProxyType
from typing import TYPE_CHECKING

from torch import Tensor

from turbo_lab.errors import TurboLabError
from turbo_lab.figures import contact_sheet
from turbo_lab.lab import Lab
from turbo_lab.postcards import Caption, caption_tokens
from turbo_lab.postcards.captions import ARMS, GROUNDS, LEGS
from turbo_lab.recipes import FAMILIES
from turbo_lab.sampling import TEACHER_GUIDANCE, TEACHER_STEPS, checked_sampling

if TYPE_CHECKING:
    import ipywidgets

    from turbo_lab.qwen_workshop import Workshop


def postcard_png(
    lab: Lab, caption: str, *, steps: int, guidance_scale: float, shift: float, seed: int
) -> bytes:
    """Draw one postcard with the teacher and return it as PNG, eight times enlarged.

    Raises:
        BadInput: a number out of range, or a caption outside the grammar.
    """
    sampling = checked_sampling(
        {"steps": steps, "guidance_scale": guidance_scale, "shift": shift, "seed": seed}
    )
    images, _, _ = lab.draw_for(caption_tokens([caption]), sampling)
    return _png(images)


def teacher_explorer(lab: Lab) -> ipywidgets.Widget:
    """Controls for steps, guidance, shift, seed and caption beside the picture they give."""
    import ipywidgets as w

    late = {"continuous_update": False}  # a drag draws once, when it ends
    controls = {
        "steps": w.IntSlider(value=40, min=1, max=50, description="steps", **late),
        "guidance_scale": w.FloatSlider(value=4, min=1, max=8, step=0.5, description="guidance"),
        "shift": w.FloatSlider(value=1, min=0.5, max=5, step=0.1, description="shift", **late),
        "seed": w.BoundedIntText(value=0, min=0, max=10**6, description="seed"),
    }
    controls["guidance_scale"].continuous_update = False
    words = caption_boxes()
    picture, note = w.Image(format="png", width=256, height=256), w.Label()

    def draw(_: object = None) -> None:
        try:
            caption = str(Caption(**{name: box.value for name, box in words.items()}))
            values = {name: box.value for name, box in controls.items()}
            picture.value = postcard_png(lab, caption, **values)
            note.value = (
                f"{caption} · {values['steps'] * (2, 1)[values['guidance_scale'] == 1]} NFE"
            )
        except TurboLabError as error:
            note.value = str(error)

    for box in (*controls.values(), *words.values()):
        box.observe(draw, names="value")
    draw()
    return panel([*controls.values(), *words.values()], [picture, note])


def student_pngs(
    lab: Lab, caption: str, *, family: str, steps: int, seed: int
) -> tuple[bytes, bytes]:
    """Draw one postcard with a student and, from the same noise, with the teacher, as PNGs.

    Raises:
        BadInput: an unknown family, steps it has no student for, a negative seed, or a caption
            outside the grammar.
    """
    student = lab.student(family, steps=steps)
    asked = student.sampling(n=1, seed=seed)
    ours, _, _ = lab.draw_for(caption_tokens([caption]), asked, "", student)
    theirs = postcard_png(
        lab, caption, steps=TEACHER_STEPS, guidance_scale=TEACHER_GUIDANCE, shift=1.0, seed=seed
    )
    return _png(ours), theirs


def student_explorer(lab: Lab, families: Sequence[str]) -> ipywidgets.Widget:
    """Controls for method, steps, caption and noise beside the student's and teacher's picture."""
    import ipywidgets as w

    names = [(FAMILIES[f].title, f) for f in families]
    controls = {
        "family": w.Dropdown(options=names, description="method"),
        "steps": w.SelectionSlider(
            options=[1, 2, 4, 8], value=2, description="steps", continuous_update=False
        ),
        "seed": w.BoundedIntText(value=0, min=0, max=10**6, description="noise"),
    }
    words = caption_boxes()
    pictures = [w.Image(format="png", width=256, height=256) for _ in range(2)]
    note = w.Label()

    def draw(_: object = None) -> None:
        try:
            caption = str(Caption(**{name: box.value for name, box in words.items()}))
            values = {name: box.value for name, box in controls.items()}
            drawn = student_pngs(lab, caption, **values)
            for picture, png in zip(pictures, drawn, strict=True):
                picture.value = png
            note.value = f"{caption} · left {values['steps']} NFE, right {2 * TEACHER_STEPS} NFE"
        except TurboLabError as error:
            note.value = str(error)

    for box in (*controls.values(), *words.values()):
        box.observe(draw, names="value")
    draw()
    return panel([*controls.values(), *words.values()], [w.HBox(pictures), note])


KNOBS: Mapping[tuple[float, ...], str] = MappingProxyType(
    {
        (8, 0.7155, 4.0, 2, 0.0): "dmd2",
        (4, 0.7155, 4.0, 2, 0.0): "dmd2",
        (2, 0.5, 4.0, 2, 0.0): "dmd2-second-0.5",
        (2, 0.7155, 4.0, 2, 0.0): "dmd2",
        (2, 0.8, 4.0, 2, 0.0): "dmd2-second-0.8",
        (2, 0.7155, 2.0, 2, 0.0): "dmd2-guidance-2",
        (2, 0.7155, 4.0, 1, 0.0): "dmd2-updates-1",
        (2, 0.7155, 4.0, 4, 0.0): "dmd2-updates-4",
        (2, 0.7155, 4.0, 2, 0.5): "dmd2-alpha-0.5",
        (2, 0.7155, 4.0, 2, 1.0): "dmd2-alpha-1",
    }
)
"""Steps, second time (of 2 steps), guidance, updates of the fake for each of the student's, and
alpha, of the DMD2 students that there are."""


def dmd2_png(lab: Lab, caption: str, *, family: str, steps: int, noises: int, seed: int) -> bytes:
    """Draw many noises of one caption with a DMD2 student, and its garment hues beside the truth.

    Raises:
        BadInput: a family or steps without a student, a negative seed, or a caption outside the
            grammar.
    """
    from matplotlib.figure import Figure

    from turbo_lab import figures, measure
    from turbo_lab.postcards import HUE_MODES

    student = lab.student(family, steps=steps)
    tokens = caption_tokens([caption]).expand(noises, -1)
    sampling = checked_sampling({**student.sampling(n=noises).model_dump(), "seed": seed})
    images, _, _ = lab.draw_for(tokens, sampling, "", student)
    shares = measure.hue_shares(measure.read(images).garment.mode)
    with figures.style():
        figure = Figure(figsize=(7, 3.2), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=[1.5, 1])
        left.imshow(contact_sheet(images, columns=6, enlarge=3))
        figures.bare(left)
        names = [*HUE_MODES, "other"]
        right.bar(names, shares, color=figures.ACCENT, label="these samples")
        truth = [*measure.hue_truth().tolist(), 0.0]
        right.plot(names, truth, "_", color=figures.INK, ms=18, mew=2, label="truth")
        right.tick_params(axis="x", rotation=60)
        right.legend(fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def dmd2_explorer(lab: Lab, *, noises: int = 24) -> ipywidgets.Widget:
    """Controls for steps, second time, guidance, updates of the fake and alpha beside samples."""
    import ipywidgets as w

    def choices(k: int) -> list[float]:
        return sorted({knobs[k] for knobs in KNOBS})

    controls = {
        "steps": w.SelectionSlider(options=choices(0), value=2, description="steps"),
        "second": w.SelectionSlider(options=choices(1), value=0.7155, description="second time"),
        "guidance": w.SelectionSlider(options=choices(2), value=4.0, description="guidance"),
        "updates": w.SelectionSlider(options=choices(3), value=2, description="updates"),
        "alpha": w.SelectionSlider(options=choices(4), value=0.0, description="alpha"),
        "seed": w.BoundedIntText(value=0, min=0, max=10**6, description="noise"),
    }
    words = caption_boxes()
    picture, note = w.Image(format="png", width=700), w.Label()

    def draw(_: object = None) -> None:
        values = {name: box.value for name, box in controls.items()}
        seed = values.pop("seed")
        family = KNOBS.get(tuple(values.values()))
        if family is None:
            note.value = (
                "No student was trained so: only one of the knobs was turned at a time. "
                "This is still the picture before."
            )
            return
        try:
            caption = str(Caption(**{name: box.value for name, box in words.items()}))
            picture.value = dmd2_png(
                lab, caption, family=family, steps=values["steps"], noises=noises, seed=seed
            )
            note.value = f"{caption} · {values['steps']} NFE"
        except TurboLabError as error:
            note.value = str(error)

    for box in (*controls.values(), *words.values()):
        box.observe(draw, names="value")
    draw()
    return panel([*controls.values(), *words.values()], [picture, note])


def warm_png(lab: Lab, caption: str, *, family: str, direct: str, noises: int, seed: int) -> bytes:
    """Draw many noises of one caption with two 2-step students, broken bodies outlined.

    Args:
        lab: with the teacher.
        caption: of every picture.
        family: the student on the right.
        direct: the student on the left.
        noises: how many pictures each.
        seed: of the noise.

    Raises:
        BadInput: a family without a 2-step student, a negative seed, or a caption outside the
            grammar.
    """
    from turbo_lab import charts

    tokens = caption_tokens([caption]).expand(noises, -1)
    blocks = {}
    for side, name in (("left", direct), ("right", family)):
        student = lab.student(name, steps=2)
        sampling = checked_sampling({**student.sampling(n=noises).model_dump(), "seed": seed})
        images, _, _ = lab.draw_for(tokens, sampling, "", student)
        blocks[f"{side}: {FAMILIES[name].title}"] = charts.judged(images)
    buffer = io.BytesIO()
    charts.judged_blocks(blocks, columns=4).savefig(buffer, format="png")
    return buffer.getvalue()


def warm_explorer(lab: Lab, shares: Mapping[str, float], *, noises: int = 12) -> ipywidgets.Widget:
    """Controls for the warm start's share, caption and noise beside direct DMD2's pictures.

    Args:
        lab: with the teacher.
        shares: family to its share of the network calls; that of share 0 is drawn on the left.
        noises: pictures of the caption on each side.
    """
    import ipywidgets as w

    options = [(f"{share:.0%}", family) for family, share in shares.items()]
    direct = min(shares, key=lambda family: shares[family])
    box = {
        "family": w.SelectionSlider(
            options=options, value=options[len(options) // 2][1], description="warm start",
            continuous_update=False,
        ),
        "seed": w.BoundedIntText(value=0, min=0, max=10**6, description="noise"),
    }  # fmt: skip
    words = caption_boxes()
    picture, note = w.Image(format="png", width=760), w.Label()

    def draw(_: object = None) -> None:
        try:
            caption = str(Caption(**{name: word.value for name, word in words.items()}))
            values = {name: control.value for name, control in box.items()}
            picture.value = warm_png(lab, caption, direct=direct, noises=noises, **values)
            note.value = f"{caption} · {shares[values['family']]:.0%} of the calls before DMD2"
        except TurboLabError as error:
            note.value = str(error)

    for control in (*box.values(), *words.values()):
        control.observe(draw, names="value")
    draw()
    return panel([*box.values(), *words.values()], [picture, note])


def factory_explorer(shop: Workshop) -> ipywidgets.Widget:
    """Controls for prompt, size, LoRA, steps and noise beside Qwen-Image's picture.

    Without the LoRA it is the base with guidance 4. A trap is said below the picture.
    """
    import ipywidgets as w

    from turbo_lab.qwen_workshop import SIZES, picture_and_note

    sizes = sorted({shop.size, *SIZES[shop.tiny]}, key=len)
    late = {"continuous_update": False}
    controls = {
        "prompt": w.Text(value="a cat on the moss", description="prompt", **late),
        "size": w.Dropdown(options=sizes, value=shop.size, description="size"),
        "adapter": w.Dropdown(
            options=[(shop.lora.name, True), ("none", False)], description="LoRA"
        ),
        "steps": w.IntSlider(value=2, min=1, max=50, description="steps", **late),
        "seed": w.BoundedIntText(value=0, min=0, max=10**6, description="noise"),
    }
    picture, note = w.Image(format="png", width=384), w.HTML()

    def draw(_: object = None) -> None:
        try:
            values = {name: control.value for name, control in controls.items()}
            picture.value, note.value = picture_and_note(shop, **values)
        except TurboLabError as error:
            note.value = escape(str(error))

    for control in controls.values():
        control.observe(draw, names="value")
    draw()
    return panel([*controls.values()], [picture, note])


def panel(
    knobs: Sequence[ipywidgets.Widget], shown: Sequence[ipywidgets.Widget]
) -> ipywidgets.Widget:
    """Lay controls out beside what they change, however wide that is."""
    import ipywidgets as w

    fixed = w.Layout(flex="0 0 auto")  # a wide picture would squeeze the controls
    return w.HBox([w.VBox(list(knobs), layout=fixed), w.VBox(list(shown))])


def caption_boxes() -> dict[str, ipywidgets.Widget]:
    """Controls for the words of a caption, by the names of `turbo_lab.postcards.Caption`."""
    import ipywidgets as w

    return {
        "arms": w.Dropdown(options=ARMS, description="arms"),
        "legs": w.Dropdown(options=LEGS, description="legs"),
        "ground": w.Dropdown(options=GROUNDS, description="ground"),
        "number": w.Text(value="42", description="sign", continuous_update=False),
    }


def _png(images: Tensor) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(contact_sheet(images, columns=1, enlarge=8)).save(buffer, format="PNG")
    return buffer.getvalue()
