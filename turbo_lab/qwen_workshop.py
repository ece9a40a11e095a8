"""Few steps beside many on Qwen-Image: a model, an adapter, and pictures with their times.

Where no model is named, one of kilobytes with random weights is built on the spot. It runs through
the same classes and the same calls; its pictures are noise.
"""

from __future__ import annotations

import atexit
import io
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from turbo_lab.errors import BadInput
from turbo_lab.lab import chosen_device
from turbo_lab.path import TerminalWarning
from turbo_lab.places import expanded
from turbo_lab.qwen_order import Order, checked_order
from turbo_lab.qwen_plan import parsed_size
from turbo_lab.qwen_sample import Drawn, drawn
from turbo_lab.schedules import published, scheduler_config
from turbo_lab.store import Store
from turbo_lab.testbeds.tiny_qwen import tiny_adapter, tiny_pipeline

TINY_SCHEDULE = "wuli-2"
"""What the tiny adapter's file says of its times: those of the published 2-step adapter."""
TINY_SIZE, REAL_SIZE = "128", "1024"
SIZES = {True: ("64", "128", "192x128"), False: ("1024", "1328", "2048", "1664x928")}
"""Sizes to choose from, of a tiny model and of a real one."""


@dataclass(frozen=True, kw_only=True)
class Workshop:
    """A model and a few-step adapter; build it with `workshop`.

    Attributes:
        model: folder of a pipeline, or its id.
        lora: file of the adapter.
        size: of the pictures, WIDTHxHEIGHT.
        device: cpu or cuda.
        store: where embeddings of prompts live.
        tiny: whether its weights are random.
    """

    model: str
    lora: Path
    size: str
    device: str
    store: Store
    tiny: bool

    def order(
        self,
        prompts: Sequence[str],
        *,
        adapter: bool,
        steps: int | None = None,
        size: str = "",
        seed: int = 0,
    ) -> Order:
        """Check what to draw.

        Args:
            prompts: one for each picture.
            adapter: whether the adapter is worn; without it guidance is 4.
            steps: None for those of the adapter, or 50 without one.
            size: WIDTHxHEIGHT; empty for the workshop's.
            seed: of the noise, which pictures with and without adapter share.

        Raises:
            BadInput: a value is not allowed.
            MissingPiece: the model is nowhere.
        """
        width, height = parsed_size(size or self.size)
        return checked_order(
            prompts=prompts,
            model=self.model,
            loras=(self.lora,) if adapter else (),
            steps=steps,
            width=width,
            height=height,
            seed=seed,
            device=self.device,
        )

    def drawn(self, order: Order) -> Drawn:
        """Draw an order."""
        return drawn(order, self.store)

    def __str__(self) -> str:
        what = "tiny random pipeline: its pictures are noise" if self.tiny else self.model
        return f"{what}; adapter {self.lora.name}; {self.size} px; {self.device}"


def workshop(model: str = "", lora: str = "", *, size: str = "", device: str = "auto") -> Workshop:
    """Open a model with a few-step adapter, or build tiny ones; nothing large is loaded yet.

    Args:
        model: folder of a pipeline, or its id on a hub; empty for a tiny one.
        lora: file of its adapter; a model that is named needs one.
        size: WIDTHxHEIGHT in pixels; empty for 1024, or 128 for the tiny one.
        device: auto, cpu or cuda.

    Raises:
        BadInput: one of model and lora is given without the other, or a size is none.
        MissingPiece: the model is nowhere, or CUDA is missing.
    """
    check_workshop(model, lora, size=size, device=device)
    if model:
        return _named(model, lora, size, device)
    return _tiny(size or TINY_SIZE, chosen_device(device))


def check_workshop(model: str, lora: str, *, size: str = "", device: str = "auto") -> None:
    """Refuse what `workshop` would, whose arguments these are; nothing is built or loaded.

    Raises:
        BadInput: as `workshop`.
        MissingPiece: as `workshop`.
    """
    if bool(model) != bool(lora):
        name, other = ("lora", "model") if model else ("model", "lora")
        raise BadInput(name, "", f"{other} is given: give both, or neither for the tiny pipeline")
    if model:
        _named(model, lora, size, device).order(["a cat"], adapter=True)
    else:
        parsed_size(size or TINY_SIZE)
        chosen_device(device)


def _named(model: str, lora: str, size: str, device: str) -> Workshop:
    return Workshop(
        model=model,
        lora=expanded(lora, "lora"),
        size=size or REAL_SIZE,
        device=chosen_device(device),
        store=Store.default(),
        tiny=False,
    )


def _tiny(size: str, device: str) -> Workshop:
    """A pipeline and an adapter in a folder that is removed when Python ends."""
    folder = Path(tempfile.mkdtemp(prefix="turbo-lab-tiny-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    row = published(TINY_SCHEDULE)
    says = {"scheduler": scheduler_config(row.schedule), "steps": row.steps}
    model = tiny_pipeline(folder / "model")
    return Workshop(
        model=str(model),
        lora=tiny_adapter(model, folder / "random.safetensors", says=says),
        size=size,
        device=device,
        store=Store(cache=folder / "cache"),
        tiny=True,
    )


def picture_and_note(
    shop: Workshop, prompt: str, *, adapter: bool, steps: int, size: str, seed: int
) -> tuple[bytes, str]:
    """Draw one picture; return it as PNG, and its times, seconds and what is wrong with them.

    Raises:
        BadInput: a value is not allowed.
        MissingPiece: weights or memory are missing.
    """
    from PIL import Image

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", TerminalWarning)
        order = shop.order([prompt], adapter=adapter, steps=steps, size=size, seed=seed)
    done = shop.drawn(order)
    buffer = io.BytesIO()
    Image.fromarray(done.pixels[0].numpy()).save(buffer, format="PNG")
    spent = done.seconds["transformer"] + done.seconds["decoding"]
    note = f"{order.work.calls} passes, {spent:.2f} s drawing and decoding ({order.times.known})"
    trouble = [str(one.message) for one in said if issubclass(one.category, TerminalWarning)]
    return buffer.getvalue(), " · ".join([note, *trouble])
