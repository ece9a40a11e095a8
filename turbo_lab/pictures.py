"""Pictures for captions, on demand: a grid of them in a PNG that says what it shows."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import turbo_lab
from turbo_lab.atomic import atomic_write_bytes
from turbo_lab.delivery import FEW, Delivery, delivery, is_key
from turbo_lab.errors import BadInput, NonFinite
from turbo_lab.figures import contact_sheet
from turbo_lab.keys import key_of
from turbo_lab.lab import Lab, Student, open_lab
from turbo_lab.lora_export import check_out
from turbo_lab.postcards import caption_tokens
from turbo_lab.recipes import EARLY, resolve, student_recipe
from turbo_lab.sampling import TEACHER_GUIDANCE, TEACHER_STEPS, Sampling, checked_sampling

ENLARGE = 8
AT_ONCE = 8
"""Pictures of one forward pass; progress is shown after each of these."""
MAX_SIDE = 32
"""Rows, and columns, of a grid."""
_BASES = ("teacher", EARLY)
"""Recipes of the shipped teachers, on which students wear their adapters."""
_GRID = re.compile(r"([1-9][0-9]?)x([1-9][0-9]?)")


@dataclass(frozen=True, kw_only=True)
class Order:
    """What to draw; build it with `checked_order`.

    Attributes:
        captions: one for each picture, row by row.
        columns: of the grid.
        sampling: of the teacher; a student's is its own.
        student: a family, the key of an artefact, or empty for the teacher.
        first: number of the first picture: picture i has noise of its own, from (seed, i).
        delivered: the artefact, where a key was given.
    """

    captions: tuple[str, ...]
    columns: int
    sampling: Sampling
    student: str = ""
    first: int = 0
    delivered: Delivery | None = None


def checked_order(
    *,
    captions: Sequence[str],
    grid: str = "",
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
    first: int = 0,
    student: str = "",
) -> Order:
    """Check what to draw, before anything is loaded.

    Args:
        captions: what the pictures show; on a grid each is drawn equally often.
        grid: ``ROWSxCOLUMNS``; empty for one picture of each caption.
        steps: of the sampler; None for the teacher's 40, or a student's.
        guidance: of the teacher; a student has its guidance distilled in.
        seed: base seed, at least 0.
        first: number of the first picture, at least 0.
        student: a family, the key of an artefact, or empty for the teacher.

    Raises:
        BadInput: a value is not allowed, or a caption is outside the grammar.
    """
    if not captions:
        raise BadInput("caption", "", "give at least one caption")
    caption_tokens(captions)
    places, columns = _shape(grid, len(captions))
    if places % len(captions):
        why = f"its {places} places cannot show {len(captions)} captions equally often"
        raise BadInput("grid", grid, why)
    if not 0 <= first < 2**31:
        raise BadInput("first", first, "use an integer from 0 to 2147483647")
    if student and guidance is not None:
        raise BadInput("guidance", guidance, "a student has its guidance distilled in; leave it")
    delivered = _by_key(student, steps) if is_key(student) else None
    if student and delivered is None:
        steps = FEW if steps is None else steps
        student_recipe(student, steps=steps)  # refuses what there is no student for
    values = {
        "steps": steps if steps is not None else TEACHER_STEPS,
        "guidance_scale": TEACHER_GUIDANCE if guidance is None else guidance,
        "seed": seed,
    }
    return Order(
        captions=tuple(captions[k * len(captions) // places] for k in range(places)),
        columns=columns,
        sampling=checked_sampling(values),
        student=student,
        first=first,
        delivered=delivered,
    )


def sample_images(order: Order, out: str | Path, *, device: str = "auto") -> None:
    """Draw the pictures of an order and write them as one PNG, eight times enlarged.

    Its text chunks say prompt, recipe, key, seed, steps and sigmas, so that it can be drawn again.

    Raises:
        BadInput: a file name that is not a PNG, before anything is loaded.
    """
    from PIL import Image

    out = check_out(out, ".png")
    lab = open_lab(device=device, teacher=_teacher(order))
    who, sampling = _who(lab, order)
    tokens = caption_tokens(order.captions)
    images, _, _ = lab.draw_for(tokens, sampling, "sampling", who, first=order.first, batch=AT_ONCE)
    if not bool(images.isfinite().all()):
        raise NonFinite("What was drawn is not finite, so there is no picture; see the student.")
    sheet = contact_sheet(images, columns=order.columns, enlarge=ENLARGE)
    buffer = io.BytesIO()
    Image.fromarray(sheet).save(buffer, "PNG", pnginfo=_chunks(said(order, lab, sampling, who)))
    atomic_write_bytes(out.absolute(), buffer.getvalue())


def said(order: Order, lab: Lab, sampling: Sampling, who: Student | None) -> dict[str, str]:
    """Text by name for a PNG: all it takes to draw it again."""
    artefact = lab.artefact if who is None else who.artefact
    rows = -(-len(order.captions) // order.columns)
    return {
        "prompt": "\n".join(dict.fromkeys(order.captions)),
        "recipe": lab.recipe.name if who is None else who.family,
        "artefact": artefact.key,
        "testbed": "postcards",
        "teacher": lab.artefact.key,
        "seed": str(sampling.seed),
        "first": str(order.first),
        "grid": f"{rows}x{order.columns}",
        "steps": str(sampling.steps),
        "sigmas": json.dumps([round(t, 7) for t in sampling.grid.tolist()]),
        "eta": f"{sampling.eta:g}",
        "guidance_scale": f"{sampling.guidance_scale:g}",
        "Software": f"turbo-lab {turbo_lab.__version__}",
    }


def _who(lab: Lab, order: Order) -> tuple[Student | None, Sampling]:
    """Who draws, and how: the teacher as asked for, a student as it was trained."""
    if not order.student:
        return None, order.sampling
    given = order.delivered
    if given is None:
        who = lab.student(order.student, steps=order.sampling.steps)
    else:
        who = Student(
            bench=lab,
            family=given.recipe,
            steps=len(given.times),
            eta=given.eta,
            artefact=given.artefact,
            field=lab.dressed(given.size, given.artefact),
            times=given.times,
        )
    return who, who.sampling(n=len(order.captions), seed=order.sampling.seed)


def _by_key(key: str, steps: int | None) -> Delivery:
    """A student of a shipped teacher on postcards by its key."""
    found = delivery(key, steps=steps)
    if found.testbed != "postcards":
        raise BadInput("student", key, f"{found.artefact.name} is not for postcards")
    if not found.times:
        raise BadInput("student", key, "its file did not say at which times it is sampled")
    if found.base.startswith("postcards/teacher") and _base(found) is None:
        raise BadInput("student", key, f"it belongs to another teacher than {' and '.join(_BASES)}")
    return found


def _base(student: Delivery) -> str | None:
    """Name of the shipped teacher whose key the base of a student has; None if no one's."""
    return next((name for name in _BASES if key_of(resolve(name).spec()) in student.base), None)


def _teacher(order: Order) -> str:
    """Name of the shipped teacher whose network draws; of most students' for a foreign file."""
    if not order.student:
        return "teacher"
    if order.delivered is not None:
        return _base(order.delivered) or EARLY
    own = student_recipe(order.student, steps=order.sampling.steps).teacher
    return next(name for name in _BASES if resolve(name) == own)


def _shape(grid: str, captions: int) -> tuple[int, int]:
    """Places and columns of a grid; one for each caption, 8 in a row, where none is asked for."""
    if not grid:
        return captions, min(8, captions)
    match = _GRID.fullmatch(grid)
    if match is None or max(int(match[1]), int(match[2])) > MAX_SIDE:
        raise BadInput("grid", grid, f"write ROWSxCOLUMNS, such as 4x4, each from 1 to {MAX_SIDE}")
    return int(match[1]) * int(match[2]), int(match[2])


def _chunks(texts: Mapping[str, str]) -> object:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for name, text in texts.items():
        info.add_itxt(name, text)
    return info
