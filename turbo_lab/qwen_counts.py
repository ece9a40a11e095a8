"""What a picture of Qwen-Image costs: multiplications and bytes of every component, from settings.

A multiplication with its addition counts as 2 FLOP, and only matrix products and convolutions
count. Bytes are those that no kernel can avoid: weights read once per call, and what goes into
and comes out of each matrix product. What eager elementwise kernels move on top is not in it.

With width d, L blocks, n image tokens and t text tokens, one pass of one picture has

    24 d² L n   linear layers of the image stream        24 d² L t   of the text stream
    4 (n + t)² d L   attention                           24 d² L     modulation
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

from turbo_lab.errors import BadInput
from turbo_lab.qwen_sizes import Model, TextSize, TransformerSize, VaeSize
from turbo_lab.testbeds.qwen_files import SCALE

if TYPE_CHECKING:
    import pandas as pd

TEMPLATE_TOKENS = 34
"""Of the prompt's template, which the encoder reads and the pipeline cuts off."""
TEXT_TOKENS = 64
"""Of a prompt's embeddings, where nothing else is said."""
LINEARS = ("image linears", "text linears")
"""Components that can run in fp8."""
BACKWARD = 2.5
"""Work of attention's backward pass, in forward passes: five products for two."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """Pictures to make.

    Args:
        height: of a picture in pixels, a multiple of 16.
        width: of a picture in pixels, a multiple of 16.
        batch: pictures.
        steps: network steps of each.
        text: tokens of a prompt's embeddings.
        passes: network calls per step; 2 with guidance.
    """

    height: int
    width: int
    batch: int = 1
    steps: int = 1
    text: int = TEXT_TOKENS
    passes: int = 1

    def __post_init__(self) -> None:
        """Check them.

        Raises:
            BadInput: a number is out of range.
        """
        for what in ("height", "width"):
            side = getattr(self, what)
            if not 32 <= side <= 4096 or side % (2 * SCALE):
                raise BadInput(what, side, "use a multiple of 16 from 32 to 4096")
        for what, most in (("batch", 1024), ("steps", 1000), ("text", 1024), ("passes", 2)):
            if not 1 <= getattr(self, what) <= most:
                raise BadInput(what, getattr(self, what), f"use an integer from 1 to {most}")

    @property
    def tokens(self) -> int:
        """Image tokens of a picture, n."""
        return self.height * self.width // (2 * SCALE) ** 2

    @property
    def calls(self) -> int:
        """Passes of one picture through the transformer, over all pictures."""
        return self.batch * self.steps * self.passes


@dataclass(frozen=True, kw_only=True)
class Count:
    """One component of the work: FLOP, and bytes of weights and activations that must move."""

    component: str
    flops: int
    weights: int
    activations: int

    @property
    def bytes(self) -> int:
        """All that must move."""
        return self.weights + self.activations


def transformer_counts(size: TransformerSize, work: Work, *, each: int = 2) -> list[Count]:
    """Count the transformer's part of some work.

    Args:
        size: of the network.
        work: what is made; pictures of one step go through together.
        each: bytes of a number.
    """
    d, blocks, n, t = size.width, size.layers, work.tokens, work.text
    reads = work.steps * work.passes * each
    inout = {"image": size.channels_in + size.channels_out, "text": size.text_width}
    per_token = 18 * d * blocks  # in and out of 4 + 2 matrices: 8 d, 10 d
    streams = [
        Count(
            component=f"{name} linears",
            flops=work.calls * 2 * tokens * d * (12 * d * blocks + inout[name]),
            weights=reads * (blocks * size.stream + d * inout[name]),
            activations=work.calls * each * tokens * (per_token + inout[name] + d),
        )
        for name, tokens in (("image", n), ("text", t))
    ]
    attention = Count(
        component="attention",
        flops=work.calls * 4 * (n + t) ** 2 * d * blocks,
        weights=0,
        activations=work.calls * each * 4 * (n + t) * d * blocks,
    )
    ends = 256 * d + d * d + 2 * d * d  # of the time, and the last norm
    modulation = Count(
        component="modulation",
        flops=work.calls * 2 * (12 * d * d * blocks + ends),
        weights=reads * (2 * blocks * size.modulation + ends),
        activations=work.calls * each * 14 * d * blocks,
    )
    return [*streams, attention, modulation]


def pass_flops(
    size: TransformerSize, work: Work, *, checkpointing: bool = True
) -> dict[str, float]:
    """Count one ``forward`` pass of all pictures through the transformer, and one with a gradient.

    A pass with a ``gradient`` is a forward, the same again if activations are recomputed, and a
    backward that makes no gradients of the base's weights: once the linear layers, 2.5 times the
    attention.

    Args:
        size: of the network.
        work: with one step.
        checkpointing: recompute activations in the backward pass.
    """
    counts = transformer_counts(size, work)
    forward = sum(count.flops for count in counts)
    attention = sum(count.flops for count in counts if count.component == "attention")
    backward = forward + (BACKWARD - 1) * attention
    return {"forward": forward, "gradient": (2 if checkpointing else 1) * forward + backward}


@dataclass(frozen=True, kw_only=True)
class Convolution:
    """One of the decoder: channels, side of its kernel, pixels per latent, causal or not."""

    into: int
    out: int
    side: int
    pixels: int
    causal: bool = True


def convolutions(size: VaeSize) -> Iterator[Convolution]:
    """Yield the convolutions of the decoder in their order."""
    dims = [size.base * m for m in (size.multiples[-1], *reversed(size.multiples))]
    first, pixels = dims[0], 1
    yield Convolution(into=size.latent, out=size.latent, side=1, pixels=1)
    yield Convolution(into=size.latent, out=first, side=3, pixels=1)
    yield from _residual(first, first, 1)
    yield Convolution(into=first, out=3 * first, side=1, pixels=1, causal=False)
    yield Convolution(into=first, out=first, side=1, pixels=1, causal=False)
    yield from _residual(first, first, 1)
    for k, (into, out) in enumerate(pairwise(dims)):
        into = into // 2 if k else into
        for _ in range(size.residuals + 1):
            yield from _residual(into, out, pixels)
            into = out
        if k < len(size.multiples) - 1:
            pixels *= 4
            yield Convolution(into=out, out=out // 2, side=3, pixels=pixels, causal=False)
    yield Convolution(into=dims[-1], out=3, side=3, pixels=pixels)


def _residual(into: int, out: int, pixels: int) -> Iterator[Convolution]:
    yield Convolution(into=into, out=out, side=3, pixels=pixels)
    yield Convolution(into=out, out=out, side=3, pixels=pixels)
    if into != out:
        yield Convolution(into=into, out=out, side=1, pixels=pixels)


def decode_counts(size: VaeSize, work: Work, *, each: int = 2) -> dict[str, Count]:
    """Count the decoding of pictures: ``shipped`` as in diffusers, ``collapsed`` to 2-D."""
    latents = work.height * work.width // SCALE**2
    layers = list(convolutions(size))
    dim = size.base * size.multiples[-1]
    attention = 4 * latents**2 * dim
    moved = sum(c.pixels * (c.into + c.out) for c in layers) + 4 * dim
    found = {}
    for name, slices in (("shipped", 3), ("collapsed", 1)):
        work_of = [c.into * c.out * c.side**2 * _slices(c, slices) for c in layers]
        flops = sum(2 * w * c.pixels for w, c in zip(work_of, layers, strict=True))
        found[name] = Count(
            component="decoding",
            flops=work.batch * (latents * flops + attention),
            weights=each * sum(work_of),
            activations=work.batch * each * latents * moved,
        )
    return found


def _slices(one: Convolution, slices: int) -> int:
    return slices if one.causal and one.side == 3 else 1


def text_counts(size: TextSize, work: Work, *, each: int = 2) -> dict[str, Count]:
    """Count the encoding of prompts: ``needed``, and ``shipped`` with words nobody reads.

    diffusers calls the encoder as a model that also predicts the next word of every position.
    """
    tokens = work.text + TEMPLATE_TOKENS
    attention = 4 * tokens**2 * size.width * size.layers
    needed = Count(
        component="text encoder",
        flops=work.batch * (2 * size.layer * size.layers * tokens + attention),
        weights=each * size.layer * size.layers,
        activations=work.batch * each * tokens * size.layers * (6 * size.width + 5 * size.inner),
    )
    words = size.width * size.vocabulary
    shipped = replace(
        needed,
        flops=needed.flops + work.batch * 2 * words * tokens,
        weights=needed.weights + each * words,
        activations=needed.activations + work.batch * each * tokens * size.vocabulary,
    )
    return {"needed": needed, "shipped": shipped}


def counted(
    model: Model, work: Work, *, each: int = 2, decoder: str = "collapsed"
) -> tuple[Count, ...]:
    """Count every component of some work.

    Args:
        model: sizes of the networks.
        work: what is made.
        each: bytes of a number.
        decoder: "collapsed" or "shipped".
    """
    return (
        text_counts(model.text, work, each=each)["needed"],
        *transformer_counts(model.transformer, work, each=each),
        decode_counts(model.vae, work, each=each)[decoder],
    )


def table(counts: Sequence[Count]) -> pd.DataFrame:
    """One row per component: TFLOP, GB of weights and of activations, FLOP per byte."""
    import pandas as pd

    rows = [
        {
            "component": c.component,
            "TFLOP": c.flops / 1e12,
            "weights, GB": c.weights / 1e9,
            "activations, GB": c.activations / 1e9,
            "FLOP per byte": c.flops / c.bytes,
        }
        for c in counts
    ]
    return pd.DataFrame(rows).set_index("component")
