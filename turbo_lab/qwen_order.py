"""What to draw with Qwen-Image, checked before the model is loaded: an order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from turbo_lab.errors import BadInput
from turbo_lab.lora_files import TensorFile, opened
from turbo_lab.lora_read import Lora, read_lora
from turbo_lab.path import MAX_STEPS, grid_from_times
from turbo_lab.qwen_counts import Work
from turbo_lab.qwen_fast import FP8_LINEARS, KERNELS
from turbo_lab.schedules import of_file, published, wanted_by
from turbo_lab.testbeds.linears import qwen_linears
from turbo_lab.testbeds.qwen_data import warn_of_cuts
from turbo_lab.testbeds.qwen_files import CHANNELS, DEFAULT_MODEL, SCALE, Bundle, located
from turbo_lab.testbeds.qwen_image import Schedule

TEACHER_STEPS, TEACHER_GUIDANCE = 50, 4.0
"""Of the model without adapters, as its authors use it."""


MOST_WEIGHT = 100.0
"""Of an adapter, either way; far above what anybody means, and far below what overflows."""


@dataclass(frozen=True, kw_only=True)
class Fast:
    """Parts of the fast path; all but fp8 compute the same function.

    Args:
        adapters: "fused" into the weights, or "attached" beside them.
        precision: "full" (bfloat16 on a GPU) or "fp8" for the linear layers of the blocks.
        keep: beginnings of layers' names that stay in full precision, such as ``img_mlp``.
        known_times: compute the modulation once for the steps' times and forget its weights.
        by_length: call prompts of one length together, without padding and mask.
        attention: "auto", or a kernel of `turbo_lab.qwen_fast.KERNELS`.
        compiled: compile blocks and decoder, at their first call.
        offload: keep blocks in the computer's memory.
        decoder: "collapsed" to 2-D, or "stock".
        channels_last: layout of the collapsed decoder.
    """

    adapters: str = "fused"
    precision: str = "full"
    keep: tuple[str, ...] = ()
    known_times: bool = True
    by_length: bool = True
    attention: str = "auto"
    compiled: bool = False
    offload: bool = False
    decoder: str = "collapsed"
    channels_last: bool = True

    def __post_init__(self) -> None:
        """Check them.

        Raises:
            BadInput: a value is not allowed, or two of them exclude each other.
        """
        choices = {
            "adapters": ("fused", "attached"),
            "precision": ("full", "fp8"),
            "attention": ("auto", *KERNELS),
            "decoder": ("collapsed", "stock"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise BadInput(name, getattr(self, name), f"choose one of {', '.join(allowed)}")
        if self.precision == "fp8" and self.adapters == "attached":
            raise BadInput("adapters", "attached", "fp8 weights need them fused")
        if self.compiled and self.offload:
            raise BadInput("compiled", True, "blocks that are copied for each call stay eager")
        for name in self.keep:
            if not any(target.startswith(name) for target in FP8_LINEARS):
                raise BadInput("keep", name, f"begin one of {', '.join(FP8_LINEARS)}")
        if self.keep and self.precision != "fp8":
            raise BadInput(
                "keep", ", ".join(self.keep), "nothing is in fp8; ask for it, or leave it out"
            )


PARTS: Mapping[str, Mapping[str, Any]] = {
    "fused": {"adapters": "attached"},
    "known-times": {"known_times": False},
    "by-length": {"by_length": False},
    "collapsed": {"decoder": "stock"},
    "channels-last": {"channels_last": False},
}
"""Parts that are on unless they are left out, by a name, and what they are without."""


def without(fast: Fast, parts: Sequence[str]) -> Fast:
    """Leave out parts of the fast path.

    Args:
        fast: where they are on.
        parts: names of `PARTS`; ``all`` stands for each of them.

    Raises:
        BadInput: there is no such part, or another one needs it.
    """
    for name in parts:
        if name not in (*PARTS, "all"):
            raise BadInput("without", name, f"choose among {', '.join(PARTS)}, or all")
    chosen = PARTS if "all" in parts else parts
    return replace(fast, **{key: value for name in chosen for key, value in PARTS[name].items()})


STOCK = without(Fast(), ["all"])
"""Every part off: what a stock pipeline does."""


@dataclass(frozen=True, kw_only=True)
class Times:
    """When an adapter is called, and who says so.

    Attributes:
        grid: ``[steps + 1]``, falling to 0.
        eta: 0 takes Euler steps, 1 predicts and renoises.
        known: where the times come from, for a person.
    """

    grid: Tensor
    eta: float
    known: str

    @property
    def steps(self) -> int:
        """Network steps."""
        return len(self.grid) - 1


@dataclass(frozen=True, kw_only=True)
class Order:
    """What to draw; build it with `checked_order`.

    Attributes:
        bundle: the model.
        prompts: one for each picture.
        loras: adapters that were checked, with their weights.
        times: of the steps.
        width: of the pictures in pixels.
        height: of the pictures in pixels.
        seed: of the noise; picture i has its own, whatever else is drawn.
        guidance_scale: 1 is one call per step.
        negative: text of the unguided branch.
        fast: see `Fast`.
        device: cpu or cuda.
    """

    bundle: Bundle
    prompts: tuple[str, ...]
    loras: tuple[tuple[Lora, float], ...]
    times: Times
    width: int
    height: int
    seed: int = 0
    guidance_scale: float = 1.0
    negative: str = " "
    fast: Fast = field(default_factory=Fast)
    device: str = "cpu"

    @property
    def work(self) -> Work:
        """Its pictures, steps and passes, for counts."""
        return Work(
            height=self.height,
            width=self.width,
            batch=len(self.prompts),
            steps=self.times.steps,
            passes=1 if self.guidance_scale == 1 else 2,
        )

    @property
    def texts(self) -> tuple[str, ...]:
        """Its prompts, each once."""
        return tuple(dict.fromkeys(self.prompts))

    @property
    def numbers(self) -> tuple[int, ...]:
        """Of each picture, the place of its prompt in `texts`."""
        return tuple(self.texts.index(prompt) for prompt in self.prompts)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one latent."""
        return CHANNELS, self.height // SCALE, self.width // SCALE


def checked_order(
    *,
    prompts: Sequence[str],
    model: str = DEFAULT_MODEL,
    loras: Sequence[str | Path] = (),
    weights: Sequence[float] = (),
    schedule: str = "",
    steps: int | None = None,
    width: int = 1024,
    height: int = 1024,
    batch: int | None = None,
    seed: int = 0,
    guidance_scale: float | None = None,
    negative: str = " ",
    fast: Fast | None = None,
    device: str = "cpu",
) -> Order:
    """Check what to draw; adapters are read, the model is not.

    Args:
        prompts: texts, each drawn equally often.
        model: folder of a pipeline, or its id on a hub.
        loras: files of adapters.
        weights: how strongly each is worn; empty for 1.
        schedule: a row of `turbo_lab.schedules.PUBLISHED`; empty to let the first adapter say.
        steps: network steps; None for the adapter's own, or 50 without one.
        width: of the pictures in pixels, a multiple of 16.
        height: of the pictures in pixels, a multiple of 16.
        batch: pictures in all; None for one of each prompt.
        seed: of the noise, at least 0.
        guidance_scale: None for 1 with an adapter and 4 without.
        negative: text of the unguided branch.
        fast: see `Fast`; None for its defaults.
        device: cpu or cuda.

    Raises:
        BadInput: a value is not allowed, or a file is not what it should be.
        MissingPiece: the model is nowhere.

    Warns:
        CutWarning: prompts are longer than what the model reads of them.
    """
    texts = _texts(prompts, batch)
    if weights and len(weights) != len(loras):
        raise BadInput("weight", list(weights), f"give one for each of {len(loras)} adapters")
    for weight in weights:
        if not abs(weight) <= MOST_WEIGHT:
            allowed = f"use a number from -{MOST_WEIGHT:g} to {MOST_WEIGHT:g}"
            raise BadInput("weight", weight, f"{allowed}; 1 is as it was trained")
    scale = guidance_scale if guidance_scale is not None else (1.0 if loras else TEACHER_GUIDANCE)
    if not 1 <= scale <= 20:
        raise BadInput("guidance", scale, "use a number from 1 (none) to 20")
    if seed < 0:
        raise BadInput("seed", seed, "use an integer of at least 0")
    _check_steps(steps)
    if schedule:
        published(schedule)
    files = tuple(opened(path) for path in loras)
    bundle = located(model)  # may ask a hub: what can be refused without it has been
    shapes = qwen_linears(bundle)
    read = tuple(read_lora(file, shapes, model) for file in files)
    tokens = Work(height=height, width=width, batch=len(texts)).tokens
    warn_of_cuts(bundle, prompts)
    return Order(
        bundle=bundle,
        prompts=texts,
        loras=tuple(zip(read, weights or [1.0] * len(read), strict=True)),
        times=times_for(bundle, read, schedule=schedule, steps=steps, tokens=tokens),
        width=width,
        height=height,
        seed=seed,
        guidance_scale=scale,
        negative=negative,
        fast=fast or Fast(),
        device=device,
    )


def _check_steps(steps: int | None) -> None:
    if steps is not None and not 1 <= steps <= MAX_STEPS:
        raise BadInput("steps", steps, f"use an integer from 1 to {MAX_STEPS}")


def _texts(prompts: Sequence[str], batch: int | None) -> tuple[str, ...]:
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise BadInput("prompt", "", "write what the pictures show")
    for prompt in prompts:
        if any("\ud800" <= letter <= "\udfff" for letter in prompt):  # what a shell passes on
            raise BadInput("prompt", prompt, "write it in UTF-8")
    batch = len(prompts) if batch is None else batch
    if not 1 <= batch <= 1024 or batch % len(prompts):
        many = f"a multiple of the {len(prompts)} prompts, up to 1024"
        why = f"use {many if len(prompts) > 1 else 'an integer from 1 to 1024'}"
        raise BadInput("batch", batch, why)
    return tuple(prompts[k * len(prompts) // batch] for k in range(batch))


def times_for(
    bundle: Bundle, loras: Sequence[Lora], *, schedule: str, steps: int | None, tokens: int
) -> Times:
    """Choose the times of the steps: a named schedule, else the first adapter's, else the model's.

    An adapter's are those its file says, or those of the published one with such a file name.

    Raises:
        BadInput: the adapter is for another number of steps, or the schedule is not known.

    Warns:
        TerminalWarning: few steps with the model's own settings for many.
    """
    _check_steps(steps)
    if schedule:
        row = published(schedule)
        grid = row.schedule.grid(steps or row.steps, tokens)
        return Times(grid=grid, eta=0.0, known=f"schedule {row.name}")
    for lora in loras:
        times = _said(lora.file, steps, tokens) or _published(lora.file, steps, tokens)
        if times is not None:
            return times
    grid = Schedule.of(bundle).grid(steps or TEACHER_STEPS, tokens)
    return Times(grid=grid, eta=0.0, known="the model's own scheduler")


def _said(file: TensorFile, steps: int | None, tokens: int) -> Times | None:
    """Times that an adapter's file says; None where it says none, or none that can be followed.

    Raises:
        BadInput: they are for another number of steps.
    """
    try:
        wanted = wanted_by(file.metadata)
        n = steps or wanted.steps
        if wanted.sigmas:
            grid = grid_from_times(wanted.sigmas)
        elif wanted.schedule is not None and n is not None:
            grid = wanted.schedule.grid(n, tokens)
        else:
            return None
    except BadInput:  # of another tool, with words of its own by the same names, as in an import
        return None
    if wanted.sigmas and n != wanted.steps:
        why = f"{file.path.name} is for {wanted.steps}; or name a schedule"
        raise BadInput("steps", steps, why)
    eta = 1.0 if file.metadata.get("eta") == "1" else 0.0
    other = "" if wanted.steps in (None, n) else f", but for {wanted.steps} steps"
    return Times(grid=grid, eta=eta, known=f"{file.path.name} says{other}")


def _published(file: TensorFile, steps: int | None, tokens: int) -> Times | None:
    """Times of the published adapter whose file has such a name; None where there is none."""
    row = of_file(file.path.name)
    if row is None:
        return None
    n = steps or row.steps
    other = "" if n == row.steps else f", for {row.steps} steps"
    grid = row.schedule.grid(n, tokens)
    return Times(grid=grid, eta=0.0, known=f"published as {row.name}{other}")
