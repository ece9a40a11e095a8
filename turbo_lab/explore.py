"""Interactive sections of the notebooks: plain controls around functions of the package."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from turbo_lab.errors import TurboLabError
from turbo_lab.figures import contact_sheet
from turbo_lab.lab import Lab, checked_sampling
from turbo_lab.postcards import Caption, caption_tokens
from turbo_lab.postcards.captions import ARMS, GROUNDS, LEGS

if TYPE_CHECKING:
    import ipywidgets


def postcard_png(
    lab: Lab, caption: str, *, steps: int, guidance_scale: float, shift: float, seed: int
) -> bytes:
    """Draw one postcard with the teacher and return it as PNG, eight times enlarged.

    Raises:
        BadInput: a number out of range, or a caption outside the grammar.
    """
    from PIL import Image

    sampling = checked_sampling(
        {"steps": steps, "guidance_scale": guidance_scale, "shift": shift, "seed": seed}
    )
    images, _, _ = lab.draw_for(caption_tokens([caption]), sampling)
    buffer = io.BytesIO()
    Image.fromarray(contact_sheet(images, columns=1, enlarge=8)).save(buffer, format="PNG")
    return buffer.getvalue()


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
    words = {
        "arms": w.Dropdown(options=ARMS, description="arms"),
        "legs": w.Dropdown(options=LEGS, description="legs"),
        "ground": w.Dropdown(options=GROUNDS, description="ground"),
        "number": w.Text(value="42", description="sign", **late),
    }
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
    return w.HBox([w.VBox([*controls.values(), *words.values()]), w.VBox([picture, note])])
