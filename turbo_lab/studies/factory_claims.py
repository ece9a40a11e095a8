"""Notebook 07's claims: ours against stock diffusers, counted and measured where they are made.

Those on pictures use a tiny pipeline with random weights, whatever model the notebook draws with:
they are about what is computed, and the classes are the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from turbo_lab.claims import Claim, Interval, Side, paired_difference
from turbo_lab.progress import library_bars
from turbo_lab.qwen_counts import Work, decode_counts
from turbo_lab.qwen_order import Order
from turbo_lab.qwen_sample import opened
from turbo_lab.qwen_sizes import Model
from turbo_lab.qwen_workshop import Workshop, workshop
from turbo_lab.schedules import (
    PUBLISHED,
    scheduler_config,
    stock_sigmas,
    wanted_by,
)
from turbo_lab.streams import noise
from turbo_lab.studies.factory_pictures import PROMPTS, LastTimes
from turbo_lab.testbeds.postcards import pack
from turbo_lab.testbeds.qwen_files import load_vae
from turbo_lab.testbeds.qwen_image import tokens_of
from turbo_lab.testbeds.qwen_pictures import Codec
from turbo_lab.vae_decode import picture_decoder

NOTEBOOK = "07_factory"
STATED = 20.43
"""Parameters of Qwen-Image's transformer in 10⁹."""


@dataclass(frozen=True, kw_only=True)
class Equality:
    """What was computed in two ways on the tiny pipeline; `measured` fills it.

    Attributes:
        few: largest difference of latents from the stock pipeline's, 2 steps with an adapter.
        guided: the same with guidance 4 and no adapter.
        decoding: largest difference of pictures, collapsed from stock decoder.
        calls_few: rows that went through the network per picture, counted.
        calls_many: the same of the guided steps.
        pictures: how many were compared.
    """

    few: float
    guided: float
    decoding: float
    calls_few: float
    calls_many: float
    pictures: int


# --- computed in two ways -----------------------------------------------------------------------


def measured(shop: Workshop | None = None, *, pictures: int = 2, seed: int = 0) -> Equality:
    """Draw with our sampler and with a stock ``QwenImagePipeline``, and compare.

    Args:
        shop: with the tiny pipeline; None builds one.
        pictures: how many, at most those of `PROMPTS`.
        seed: of the noise.
    """
    shop = shop if shop is not None and shop.tiny else workshop(size="64", device="cpu")
    prompts = PROMPTS[:pictures]
    two = shop.order(prompts, adapter=True, size="64", seed=seed)
    many = shop.order(prompts, adapter=False, size="64", seed=seed)
    ours_two, calls_two = _counted(shop, two)
    ours_many, calls_many = _counted(shop, many)
    return Equality(
        few=_largest(pack(ours_two), stock_latents(two)),
        guided=_largest(pack(ours_many), stock_latents(many)),
        decoding=_decoding(two, ours_two),
        calls_few=calls_two,
        calls_many=calls_many,
        pictures=len(prompts),
    )


def stock_latents(order: Order) -> Tensor:
    """Draw an order with diffusers' own pipeline, from the same noise: packed latents.

    The adapter is attached by diffusers, and the scheduler is set to what the adapter's file says.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline

    with library_bars():
        pipeline: Any = QwenImagePipeline.from_pretrained(order.bundle.folder)
    pipeline.set_progress_bar_config(disable=True)
    for lora, _ in order.loras:
        file = lora.file.path
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
        wanted = wanted_by(lora.file.metadata)
        if wanted.schedule is not None:
            settings = scheduler_config(wanted.schedule)
            pipeline.scheduler = FlowMatchEulerDiscreteScheduler(**settings)
    z = noise(order.shape, seed=order.seed, stream="z", indices=range(len(order.prompts)))
    guided = order.guidance_scale > 1  # without, the pipeline warns of a negative prompt
    negative = [order.negative] * len(order.prompts) if guided else None
    latents: Tensor = pipeline(
        prompt=list(order.prompts),
        negative_prompt=negative,
        true_cfg_scale=order.guidance_scale,
        num_inference_steps=order.times.steps,
        height=order.height,
        width=order.width,
        latents=pack(z),
        output_type="latent",
    ).images
    return latents


def _counted(shop: Workshop, order: Order) -> tuple[Tensor, float]:
    """Draw an order; return its latents and the rows per picture that the network saw."""
    rows: list[int] = []
    ready = opened(order, shop.store)
    ready.transformer.register_forward_pre_hook(
        lambda _, inputs, named: rows.append(len(named["hidden_states"])), with_kwargs=True
    )
    latents = ready.latents()
    return latents, sum(rows) / len(order.prompts)


def _decoding(order: Order, latents: Tensor) -> float:
    vae = load_vae(order.bundle, "cpu")
    return _largest(picture_decoder(vae)(latents), Codec(vae=vae).decode(latents))


def _largest(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.float() - theirs.float()).abs().max())


# --- counts and times ---------------------------------------------------------------------------


def network_parameters() -> int:
    """Parameters of diffusers' own class at its default settings, built without memory."""
    from accelerate import init_empty_weights
    from diffusers import QwenImageTransformer2DModel

    with init_empty_weights(include_buffers=True):
        net = QwenImageTransformer2DModel()
    return sum(parameter.numel() for parameter in net.parameters())


def schedule_error() -> float:
    """Largest difference of our times from diffusers', of all published rows at three sizes."""
    errors = [
        _largest(row.schedule.grid(row.steps, tokens_of(size)), stock)
        for row in PUBLISHED
        for size in (512, 1024, 2048)
        for stock in [stock_sigmas(row.schedule, row.steps, size=size)]
    ]
    return max(errors)


def misprinted() -> int:
    """How many of the published times, to their four digits, do not follow from the settings."""
    grids = {row.name: row.schedule.grid(row.steps, tokens_of(1024)) for row in PUBLISHED}
    return sum(
        abs(float(ours) - printed) > 5e-5 + 1e-7
        for row in PUBLISHED
        for ours, printed in zip(grids[row.name], row.sigmas, strict=False)
    )


def decoding_share() -> float:
    """FLOP of the collapsed decoder over those of the shipped one, 2048 x 2048 pixels."""
    found = decode_counts(Model().vae, Work(height=2048, width=2048))
    return found["collapsed"].flops / found["shipped"].flops


# --- claims -------------------------------------------------------------------------------------


def claims(equality: Equality, lasts: LastTimes, *, profile: str) -> list[Claim]:
    """The claims of notebook 07; one number has no interval, and stands for its own."""
    exact = [
        Claim(
            **words, interval=Interval(value=value, low=value, high=value), side=side,
            threshold=limit, notebook=NOTEBOOK, seeds=1, profile=profile,
        )
        for words, value, side, limit in _rows(equality)
    ]  # fmt: skip
    return [*exact, _terminal(lasts, profile)]


_Row = tuple[dict[str, Any], float, Side, float]


def _rows(e: Equality) -> Iterator[_Row]:
    counted = max(abs(n / 1e9 - STATED) for n in (network_parameters(), _ours()))
    yield _words(
        "F1", "The transformer has 20.43 billion parameters",
        "counted in diffusers' own class, and by our formula",
        "larger distance of both from 20.43, in 10⁹", 2,
    ), counted, "below", 0.01  # fmt: skip
    yield _words(
        "F2", "Every published schedule follows from its settings", "diffusers' scheduler",
        "largest difference of a time from diffusers', three sizes", 3 * len(PUBLISHED),
    ), schedule_error(), "below", 1e-6  # fmt: skip
    yield _words(
        "F3", "and so do the digits in which it is published", "the published rows",
        "printed times that do not follow", sum(row.steps for row in PUBLISHED),
    ), float(misprinted()), "below", 0.5  # fmt: skip
    yield _words(
        "F4", "Two steps with an adapter are those of a stock pipeline",
        "QwenImagePipeline, tiny random weights", "largest difference of latents", e.pictures,
    ), e.few, "below", 1e-4  # fmt: skip
    yield _words(
        "F5", "50 guided steps are those of a stock pipeline",
        "QwenImagePipeline, tiny random weights", "largest difference of latents", e.pictures,
    ), e.guided, "below", 1e-4  # fmt: skip
    yield _words(
        "F6", "The decoder collapsed to 2-D is the stock decoder",
        "AutoencoderKLQwenImage, tiny random weights", "largest difference of pixels in [-1, 1]",
        e.pictures,
    ), e.decoding, "below", 1e-5  # fmt: skip
    yield _words(
        "F7", "The collapsed decoder does less than half of the work",
        "counted at full size, 2048 × 2048",
        "FLOP over those of the shipped one", 1,
    ), decoding_share(), "below", 0.5  # fmt: skip
    yield _words(
        "F8", "A picture takes 2 network passes and not 100", "counted at the network",
        "passes of 50 guided steps over those of the adapter", e.pictures,
    ), e.calls_many / e.calls_few, "above", 49.0  # fmt: skip


def _ours() -> int:
    return Model().transformer.parameters


def _words(
    number: str, statement: str, source: str, statistic: str, samples: int
) -> dict[str, Any]:
    return {
        "id": number, "statement": statement, "source": source, "statistic": statistic,
        "samples": samples,
    }  # fmt: skip


def _terminal(lasts: LastTimes, profile: str) -> Claim:
    own, wrong = (np.asarray(v["sign_read"], float) for v in lasts.values.values())
    return Claim(
        id="F9",
        notebook=NOTEBOOK,
        statement="A last time of 0.02 spoils a 2-step student",
        source="Qwen-Image-Lightning's example switches it off; here a student of the postcards",
        statistic="signs read at its own times minus at 1, 0.02, paired",
        interval=paired_difference(own, wrong),
        side="above",
        threshold=0.0,
        seeds=1,
        samples=len(own),
        profile=profile,
        artefact_keys=(lasts.key,),
    )
