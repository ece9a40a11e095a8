"""Qwen-Image as a whole: from noise to pixels by a stock pipeline and by ours, and its teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from turbo_lab.bench import qwen_nets
from turbo_lab.bench.qwen_parts import Row, Setup, free, latents_of, measured, with_random_weights
from turbo_lab.errors import MissingPiece
from turbo_lab.qwen_counts import transformer_counts
from turbo_lab.qwen_order import STOCK, Fast
from turbo_lab.schedules import scheduler_config
from turbo_lab.testbeds.postcards import pack
from turbo_lab.testbeds.qwen_data import NULL
from turbo_lab.vae_decode import compiled, picture_decoder, to_uint8

TEACHER_STEPS = 50


def total(setup: Setup, ways: Mapping[str, Fast]) -> Iterator[Row]:
    """From noise to uint8 pixels on the host, prompts embedded: a stock pipeline, then ours.

    Args:
        setup: the work.
        ways: parts of the fast path that ours uses, by a name for the row.
    """
    yield _stock_total(setup, qwen_nets.vae(setup.settings, setup.place))
    for name, fast in ways.items():
        free()
        try:
            yield _our_total(setup, name, fast)
        except (MissingPiece, torch.OutOfMemoryError) as error:
            yield Row(part="total", name=name, note=str(error).splitlines()[0][:160])


def _our_total(setup: Setup, name: str, fast: Fast) -> Row:
    ready = with_random_weights(setup, fast)
    vae = qwen_nets.vae(setup.settings, setup.place)
    decoder = picture_decoder(vae, channels_last=fast.channels_last)
    decode = compiled(decoder, setup.backend) if fast.compiled else decoder

    def pictures() -> list[Tensor]:
        return [to_uint8(decode(one)).cpu() for one in ready.latents().split(1)]

    row = measured(setup, "total", name, pictures)
    return replace(row, note=str(ready.guard or ""))


def _stock_total(setup: Setup, vae: Any) -> Row:
    """A pipeline with everything on the device; its decoder slices a batch that does not fit."""
    call = stock_call(setup, vae)

    def pictures() -> object:
        return (255 * call(output_type="np").images).round().astype("uint8")

    try:
        return measured(setup, "total", "stock pipeline", pictures)
    except torch.OutOfMemoryError:
        free()
        vae.enable_slicing()
    try:
        row = measured(setup, "total", "stock pipeline", pictures)
    except torch.OutOfMemoryError as error:
        note = str(error).splitlines()[0][:160]
        return Row(part="total", name="stock pipeline", note=note)
    return replace(row, note="with enable_slicing of its decoder: a batch at once did not fit")


def stock_call(setup: Setup, vae: Any) -> Callable[..., Any]:
    """Return a call of a stock pipeline on the work.

    With one pass per step it wears an adapter, attached; with two it is the guided teacher.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline

    place, work, guidance = setup.place, setup.work, setup.work.passes == 2
    ready = with_random_weights(setup, STOCK, adapted=not guidance)
    pipeline = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**scheduler_config(setup.row.schedule)),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        transformer=ready.transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    both = {"": range(work.batch), **({"negative_": [NULL] * work.batch} if guidance else {})}
    texts: dict[str, Any] = {}
    for kind, numbers in both.items():
        embeds, _ = ready.prompts.padded(list(numbers))  # of one length: no mask
        texts[f"{kind}prompt_embeds"] = embeds.to(place.device)
        texts[f"{kind}prompt_embeds_mask"] = torch.ones(
            embeds.shape[:2], dtype=torch.long, device=place.device
        )
    noise = pack(latents_of(setup)).to(place.dtype)

    def call(**change: Any) -> Any:
        return pipeline(
            **texts,
            true_cfg_scale=4.0 if guidance else 1.0,
            num_inference_steps=work.steps,
            height=work.height,
            width=work.width,
            latents=noise,
            **change,
        )

    return call


def teacher(setup: Setup, *, steps: int = TEACHER_STEPS, timed: int = 2) -> Iterator[Row]:
    """The guided model, scaled from a few steps: what a few-step adapter replaces.

    Args:
        setup: the work; its number of steps does not count.
        steps: that the teacher takes.
        timed: that are measured.
    """
    short = replace(setup, work=replace(setup.work, steps=timed, passes=2))
    call = stock_call(short, qwen_nets.vae(setup.settings, setup.place))
    counts = transformer_counts(setup.settings.model.transformer, short.work)
    flops = sum(count.flops for count in counts)
    name = f"{timed} guided steps"
    row = measured(short, "teacher", name, lambda: call(output_type="latent"), flops=flops)
    yield row
    seconds = (row.seconds or 0.0) / timed * steps
    note = f"scaled from {timed} measured steps of a stock pipeline; transformer alone"
    yield Row(part="teacher", name=f"{steps} guided steps", seconds=seconds, note=note)
