"""The explorer of notebook 06: a student beside its teacher, with what the oracles see."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from turbo_lab import measure
from turbo_lab.errors import TurboLabError
from turbo_lab.explore import caption_boxes, panel
from turbo_lab.figures import contact_sheet
from turbo_lab.lab import Lab
from turbo_lab.postcards import HUE_MODES, Caption, caption_tokens
from turbo_lab.postcards.captions import parse
from turbo_lab.recipes import FAMILIES
from turbo_lab.sampling import TEACHER_GUIDANCE, TEACHER_STEPS, checked_sampling

if TYPE_CHECKING:
    import ipywidgets


def said(images: Tensor, caption: str) -> list[str]:
    """What the oracles see in pictures ``[B, 3, 32, 32]`` of one caption, a line for each.

    Raises:
        BadInput: a caption outside the grammar.
    """
    seen = measure.read(images)
    fields = torch.tensor([parse(caption).fields]).expand(len(images), -1)
    report = measure.report(images, fields, seen)
    hues = [*HUE_MODES, "no known"]
    out = []
    for k in range(len(images)):
        right, signs = bool(report["sign_read"][k]), int(seen.sign.count[k])
        found = "no sign" if not signs else f"{signs} sign{'s' * (signs > 1)}, not read"
        sign = "sign reads" if right else found
        body = "whole body" if bool(report["whole_body"][k]) else "broken body"
        out.append(f"{sign} · {body} · {hues[int(report['hue_mode'][k])]} garment")
    return out


def pair_png(
    lab: Lab, caption: str, *, family: str, steps: int, noises: int, seed: int
) -> tuple[bytes, list[str], list[str]]:
    """Draw a caption with a student and, from the same noises, with its own teacher below.

    Args:
        lab: with a teacher, that of the student or another.
        caption: of every picture.
        family: the student.
        steps: of its sampler.
        noises: pictures of each.
        seed: of the noise.

    Returns:
        A PNG, what the oracles see in the student's pictures, and in the teacher's.

    Raises:
        BadInput: an unknown family, steps it has no student for, a negative seed, or a caption
            outside the grammar.
    """
    from PIL import Image

    tokens = caption_tokens([caption]).expand(noises, -1)
    student = lab.student(family, steps=steps)
    sampling = checked_sampling({**student.sampling(n=noises).model_dump(), "seed": seed})
    ours, _, _ = lab.draw_for(tokens, sampling, "", student)
    slow = {"steps": TEACHER_STEPS, "guidance_scale": TEACHER_GUIDANCE, "seed": seed}
    theirs, _, _ = student.bench.draw_for(tokens, checked_sampling({**slow, "n": noises}))
    buffer = io.BytesIO()
    sheet = contact_sheet(torch.cat([ours, theirs]), columns=noises, enlarge=5)
    Image.fromarray(sheet).save(buffer, format="PNG")
    return buffer.getvalue(), said(ours, caption), said(theirs, caption)


def turbo_explorer(
    lab: Lab, families: Mapping[str, Sequence[int]], *, noises: int = 4
) -> ipywidgets.Widget:
    """Caption, student, steps and noise beside the student's pictures and its teacher's.

    Args:
        lab: with the teacher.
        families: students, and the numbers of steps that each has.
        noises: pictures of each.
    """
    import ipywidgets as w

    family = w.Dropdown(options=[(FAMILIES[f].title, f) for f in families], description="student")
    steps = w.Dropdown(options=list(families[family.value]), description="steps")
    seed = w.BoundedIntText(value=0, min=0, max=10**6, description="noise")
    words = caption_boxes()
    picture, note = w.Image(format="png", width=680), w.HTML()

    def choose(_: object) -> None:
        steps.options = list(families[family.value])

    def draw(_: object = None) -> None:
        if steps.value is None:  # between two lists of options
            return
        try:
            caption = str(Caption(**{name: box.value for name, box in words.items()}))
            picture.value, ours, theirs = pair_png(
                lab, caption, family=family.value, steps=steps.value, noises=noises, seed=seed.value
            )
            note.value = _note(caption, {family.label: ours, "teacher": theirs})
        except TurboLabError as error:
            note.value = escape(str(error))

    family.observe(choose, names="value")
    for knob in (family, steps, seed, *words.values()):
        knob.observe(draw, names="value")
    draw()
    return panel([family, steps, seed, *words.values()], [picture, note])


def _note(caption: str, rows: Mapping[str, Sequence[str]]) -> str:
    lines = [f"<b>{caption}</b>"]
    lines += [f"{who}, from the left: {'; '.join(seen)}" for who, seen in rows.items()]
    return "<br>".join(lines)
