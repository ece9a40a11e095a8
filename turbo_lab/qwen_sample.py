"""Pictures from Qwen-Image: its pipeline with adapters, at the times they were trained for.

It computes what a stock ``QwenImagePipeline`` does with the same adapters, times and noise. Text
encoder, transformer and decoder are loaded one after the other; see `turbo_lab.qwen_fast` for what
makes each of them faster or smaller.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from turbo_lab.errors import MissingPiece, NonFinite
from turbo_lab.field import Field, frozen, guided
from turbo_lab.memory import free_memory, gigabytes
from turbo_lab.progress import progress
from turbo_lab.qwen_fast import (
    ByLength,
    Weighted,
    attach,
    check_fp8,
    compile_blocks,
    fuse,
    know_times,
    offload_blocks,
    relative_error,
    to_fp8,
    with_kernel,
)
from turbo_lab.qwen_order import Order
from turbo_lab.qwen_plan import Precision, activation_bytes
from turbo_lab.qwen_sizes import Model
from turbo_lab.sample import draw_samples
from turbo_lab.store import Store
from turbo_lab.streams import noise
from turbo_lab.testbeds.qwen_data import NULL, Prompts, embedded, release
from turbo_lab.testbeds.qwen_files import (
    CHANNELS,
    SCALE,
    check_weights,
    dtype_on,
    load_transformer,
    load_vae,
)
from turbo_lab.testbeds.qwen_image import QwenNet
from turbo_lab.testbeds.qwen_pictures import Codec
from turbo_lab.vae_decode import compiled, fitting, picture_decoder, to_uint8

TOKENS_AT_ONCE = 4096
"""Image tokens of one pass: larger ones are hardly faster, and one prompt alone needs no mask."""
PROBE = 256
"""Pixels of the square on which fp8 is compared where the weights are on the processor."""

Decode = Callable[[Tensor], Tensor]


# --- loading ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Guard:
    """How far fp8 is from full precision, on the same noise and prompt.

    Attributes:
        velocity: relative error of the first call.
        latents: relative error of what the last step leaves.
        layers: how many are in fp8.
        pixels: width and height of the picture that was compared.
    """

    velocity: float
    latents: float
    layers: int
    pixels: tuple[int, int]

    def __str__(self) -> str:
        size = "{} x {}".format(*self.pixels)
        return (
            f"fp8 in {self.layers} layers, against full precision on the same noise at {size}: "
            f"first velocity off by {self.velocity:.2%}, last latents by {self.latents:.2%}"
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Opened:
    """A loaded model, ready to draw an order; build it with `opened`.

    Attributes:
        order: what it was opened for.
        transformer: its network.
        field: of the velocity, with guidance if there is any.
        prompts: cached embeddings of the order's texts.
        guard: of fp8; None in full precision.
    """

    order: Order
    transformer: Any
    field: Field
    prompts: Prompts
    guard: Guard | None = None

    def latents(self, *, seed: int | None = None, at_once: int = 0) -> Tensor:
        """Draw the pictures as normalised latents ``[N, 16, h, w]`` on the processor.

        Args:
            seed: another one than the order's.
            at_once: pictures per call; 0 chooses.
        """
        order, n = self.order, len(self.order.prompts)
        with progress(n, "drawing") as tick:
            return draw_samples(
                self.field,
                order.times.grid,
                order.shape,
                torch.tensor(order.numbers),
                seed=order.seed if seed is None else seed,
                indices=range(n),
                eta=order.times.eta,
                batch=at_once or max(1, TOKENS_AT_ONCE // order.work.tokens),
                device=order.device,
                progress=lambda done, _: tick(done, ""),
            )


def opened(order: Order, store: Store | None = None) -> Opened:
    """Embed the prompts, free the encoder, and load the transformer with its adapters.

    Raises:
        MissingPiece: weights are missing or damaged, memory is short, or the GPU has no fp8.
    """
    fast = order.fast
    if fast.precision == "fp8":
        check_fp8(order.device)
    check_weights(order.bundle, ("text_encoder", "transformer"))
    prompts = embedded(
        order.bundle,
        order.texts,
        order.negative,
        store=store or Store.default(),
        device=_encoding_place(order),
    )
    place = _loading_place(order)
    transformer: Any = load_transformer(order.bundle, place, dtype_on(order.device))
    worn = [Weighted(size=a.size, tensors=a.tensors, weight=weight) for a, weight in order.loras]
    if worn:
        {"fused": fuse, "attached": attach}[fast.adapters](transformer, worn)
    return prepared(order, transformer, prompts, place)


def prepared(order: Order, transformer: Any, prompts: Prompts, place: str) -> Opened:
    """Apply the parts of the fast path to a transformer on a device, and move it to the order's."""
    fast, grid = order.fast, order.times.grid
    transformer.requires_grad_(False)
    network: Field = QwenNet(transformer, prompts)
    if fast.known_times:
        network = know_times(network, transformer, grid[:-1].tolist())
    guard = None
    if fast.precision == "fp8":
        guard = _guarded(order, network, transformer, place)
    if fast.offload:
        offload_blocks(transformer, order.device)
    elif place != order.device:
        transformer.to(order.device)
    if fast.compiled:
        compile_blocks(transformer)
    if fast.attention != "auto":
        network = with_kernel(network, fast.attention)
    if fast.by_length:
        network = ByLength(field=network, prompts=prompts)
    whole = guided(network, torch.tensor([NULL]), order.guidance_scale, rescale="token")
    return Opened(
        order=order, transformer=transformer, field=frozen(whole), prompts=prompts, guard=guard
    )


def _guarded(order: Order, network: Field, transformer: Any, place: str) -> Guard:
    """Put linear layers into fp8, and compare a picture from before with one from after."""
    small = place != order.device or place == "cpu"
    width, height = (min(side, PROBE) if small else side for side in (order.width, order.height))
    shape = (CHANNELS, height // SCALE, width // SCALE)
    grid = order.times.grid

    def end(times: Tensor) -> Tensor:
        one, number = frozen(network), torch.tensor([0])
        return draw_samples(one, times, shape, number, seed=order.seed, indices=[0], device=place)

    def picture() -> tuple[Tensor, Tensor]:
        return end(torch.tensor([float(grid[0]), 0.0])), end(grid)

    before = picture()
    layers = to_fp8(transformer, order.fast.keep)
    after = picture()
    z = noise(shape, seed=order.seed, stream="z", indices=[0])
    return Guard(
        # One step from t to 0 leaves x = z - t v, so differences of x are those of v, times t.
        velocity=relative_error(after[0] - z, before[0] - z),
        latents=relative_error(after[1], before[1]),
        layers=layers,
        pixels=(width, height),
    )


def _loading_place(order: Order) -> str:
    """Load where the whole transformer fits, and else make it smaller on the processor first.

    Raises:
        MissingPiece: it fits nowhere, and what would.
    """
    precision: Precision = "fp8" if order.fast.precision == "fp8" else "bf16"
    one = replace(order.work, batch=1)
    working = activation_bytes(sizes(order), one, precision, each=_each(order))
    whole, small = loaded_bytes(order), kept_bytes(order)
    if order.fast.offload:
        whole = small = 2 * small // sizes(order).transformer.layers
    elif _fits(whole + working, order.device):
        return order.device
    if not _fits(small + working, order.device):
        _refuse(small + working, order.device, "choose a smaller size, precision fp8, or offload")
    if not _fits(loaded_bytes(order), "cpu"):
        _refuse(loaded_bytes(order), "cpu", "weights are prepared there before they are moved")
    return "cpu"


def _fits(needed: int, device: str) -> bool:
    free = free_memory(device)
    return free is None or needed <= free


def _refuse(needed: int, device: str, way: str) -> NoReturn:
    free = free_memory(device) or 0
    raise MissingPiece(
        f"The transformer needs {gigabytes(needed)} on {device} for this, and {gigabytes(free)} "
        f"are free: {way}."
    )


def sizes(order: Order) -> Model:
    """Sizes of the networks of an order's model."""
    parts = ("transformer", "vae", "text_encoder")
    return Model.of({part: order.bundle.config(part) for part in parts})


def loaded_bytes(order: Order) -> int:
    """Bytes of the transformer's weights as they are loaded."""
    return _each(order) * sizes(order).transformer.parameters


def kept_bytes(order: Order) -> int:
    """Bytes of the transformer's weights as they are kept by the parts of the fast path."""
    size, each, total = sizes(order).transformer, _each(order), loaded_bytes(order)
    if order.fast.known_times:
        rows = 6 * size.width * order.times.steps
        total -= 2 * each * size.layers * (size.modulation - rows)
    if order.fast.precision == "fp8":
        total -= (each - 1) * 2 * size.layers * size.stream
    return total


def _each(order: Order) -> int:
    return torch.empty((), dtype=dtype_on(order.device)).element_size()


def _encoding_place(order: Order) -> str:
    """Where the text encoder fits."""
    return order.device if _fits(_encoder_bytes(order), order.device) else "cpu"


def _encoder_bytes(order: Order) -> int:
    """Of its files, or what their index says where they are still on a hub."""
    folder = order.bundle.folder / "text_encoder"
    files = list(folder.glob("*.safetensors"))
    if files:
        return sum(file.stat().st_size for file in files)
    indices = [json.loads(file.read_text("utf-8")) for file in folder.glob("*.index.json")]
    return sum(int(index.get("metadata", {}).get("total_size", 0)) for index in indices)


# --- drawing ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Drawn:
    """Pictures and what they took.

    Attributes:
        pixels: ``[N, H, W, 3]`` uint8 on the processor.
        latents: ``[N, 16, h, w]`` normalised.
        seconds: of each phase; loading is in "opening".
        guard: of fp8.
    """

    pixels: Tensor
    latents: Tensor
    seconds: Mapping[str, float]
    guard: Guard | None


def drawn(order: Order, store: Store | None = None) -> Drawn:
    """Draw an order: embed, load, sample, free, decode.

    Raises:
        MissingPiece: see `opened`; the decoder's weights are asked for before anything is loaded.
        NonFinite: the adapters, or their weights, overflow.
    """
    seconds: dict[str, float] = {}
    check_weights(order.bundle, ("vae",))
    with _timed(seconds, "opening", order.device):
        ready = opened(order, store)
    with _timed(seconds, "transformer", order.device):
        latents = ready.latents()
    if not bool(latents.isfinite().all()):
        raise NonFinite("What was drawn is not finite, so there is no picture; see the adapters.")
    guard = ready.guard
    del ready
    release()
    with _timed(seconds, "loading the decoder", order.device):
        decode = decoder_for(order)
    with _timed(seconds, "decoding", order.device):
        pixels = torch.cat([to_uint8(decode(one)).cpu() for one in latents.split(1)])
    return Drawn(pixels=pixels, latents=latents, seconds=seconds, guard=guard)


def decoder_for(order: Order, vae: Any = None) -> Decode:
    """Load the decoder, or take that of a VAE, so that it fits in what is free.

    Raises:
        MissingPiece: weights are missing or damaged.
        BadInput: not even a small tile fits.
    """
    vae = vae if vae is not None else load_vae(order.bundle, order.device)
    if order.fast.decoder == "stock":
        return Codec(vae=vae).decode
    each = torch.empty((), dtype=vae.dtype).element_size()
    free = free_memory(order.device)
    latents = (len(order.prompts), *order.shape[1:])
    plan = {"base": vae.config.base_dim, "each": each, "free": free if free is not None else 2**62}
    at_once, tiles = fitting(latents, **plan)
    made = picture_decoder(
        vae, at_once=at_once, tiles=tiles, channels_last=order.fast.channels_last
    )
    return compiled(made) if order.fast.compiled else made


@contextmanager
def _timed(seconds: dict[str, float], phase: str, device: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    if device == "cuda":
        torch.cuda.synchronize()
    seconds[phase] = time.perf_counter() - began
