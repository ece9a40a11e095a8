"""What Qwen-Image needs of a device before anything is loaded: seconds at least, and memory.

Seconds are floors, by the roofline of Williams, Waterman and Patterson (2009): a component takes
at least ``max(FLOP / rate, bytes / bandwidth)``. No device reaches its floor. Memory counts
weights exactly; of activations it is an upper estimate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from turbo_lab.errors import BadInput
from turbo_lab.qwen_counts import LINEARS, Count, Work, counted
from turbo_lab.qwen_sizes import Model
from turbo_lab.testbeds.qwen_files import SCALE
from turbo_lab.vae_decode import Tiles, bytes_per_latent, fitting

if TYPE_CHECKING:
    import pandas as pd

Precision = Literal["bf16", "fp8"]
PRECISIONS: tuple[Precision, ...] = ("bf16", "fp8")
ENCODER = 8_292_166_656
"""Parameters of Qwen2.5-VL-7B, its vision tower and its head among them."""
VAE = 126_892_531
"""Parameters of the whole VAE; the collapsed decoder keeps 25.3 million of them."""
RESERVE = 1_000_000_000
"""Bytes that the driver, its kernels and fragments take, ours."""
ADAPTER_WIDTHS = 8 * (1 + 1) + 4 * (1 + 4) + 2 * (1 + 6)
"""Inputs and outputs, in widths, of the 14 linear layers of a block: numbers per rank."""


# --- devices ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Device:
    """A GPU by its vendor's own figures: dense matrix products with float32 sums, no sparsity.

    Attributes:
        name: as the driver says it, or a part of that.
        memory: bytes.
        bf16: FLOP per second.
        fp8: FLOP per second; None without such units.
        bandwidth: bytes per second of its memory.
        host: bytes per second from the computer's memory, of its slot in one direction.
        source: where the figures stand.
    """

    name: str
    memory: int
    bf16: float
    fp8: float | None
    bandwidth: float
    host: float
    source: str

    def rate(self, precision: Precision) -> float:
        """FLOP per second of linear layers in a precision, or in bf16 without fp8 units."""
        return self.fp8 if precision == "fp8" and self.fp8 is not None else self.bf16


def _device(
    name: str,
    gigabytes: float,
    tera: tuple[float, float | None],
    bandwidth: float,
    host: float,
    source: str,
) -> Device:
    bf16, fp8 = tera
    return Device(
        name=name,
        memory=int(gigabytes * 1e9),
        bf16=bf16 * 1e12,
        fp8=None if fp8 is None else fp8 * 1e12,
        bandwidth=bandwidth * 1e9,
        host=host * 1e9,
        source=source,
    )


DEVICES = (
    _device("B200", 180, (2250, 4500), 8000, 64, "NVIDIA, HGX B200 datasheet"),
    _device("H200", 141, (989.4, 1978.9), 4800, 64, "NVIDIA, H200 datasheet, SXM"),
    _device("H100", 80, (989.4, 1978.9), 3350, 64, "NVIDIA, H100 datasheet, SXM"),
    _device("A100", 80, (312, None), 2039, 32, "NVIDIA, A100 datasheet, SXM 80 GB"),
    _device("L40S", 48, (362.05, 733), 864, 32, "NVIDIA, L40S datasheet"),
    _device("RTX 5090", 32, (209.5, 419), 1792, 64, "NVIDIA, Blackwell RTX whitepaper"),
    _device("RTX 4090", 24, (165.2, 330.3), 1008, 32, "NVIDIA, Ada whitepaper"),
    _device("RTX 3090", 24, (71, None), 936, 32, "NVIDIA, Ampere GA102 whitepaper"),
)
"""Datasheets that print rates with sparsity are halved. Memory is the nominal size in 10⁹ bytes."""


def device_named(name: str) -> Device:
    """Return a device of the table by its name."""
    return next(one for one in DEVICES if one.name == name)


def known_device(name: str) -> Device | None:
    """Return the device whose name is part of what a driver says, or None."""
    return next((device for device in DEVICES if device.name in name), None)


# --- seconds ------------------------------------------------------------------------------------


def floor_seconds(
    counts: Sequence[Count], device: Device, precision: Precision = "bf16"
) -> dict[str, float]:
    """Return the least seconds of each component: ``max(FLOP / rate, bytes / bandwidth)``.

    In fp8 the linear layers of the blocks run at the fp8 rate with weights of one byte; attention,
    decoder and text encoder stay in bf16.

    Args:
        counts: with numbers of two bytes.
        device: its rates; measured ones make it that machine's own floor.
        precision: of the linear layers.
    """
    found = {}
    for count in counts:
        low = precision == "fp8" and device.fp8 is not None and count.component in LINEARS
        rate = device.rate(precision) if low else device.bf16
        moved = count.bytes - (count.weights // 2 if low else 0)
        found[count.component] = max(count.flops / rate, moved / device.bandwidth)
    return found


def floors(work: Work, model: Model | None = None) -> pd.DataFrame:
    """One row per device: least seconds of all pictures, in bf16 and fp8, and of their decoding."""
    import pandas as pd

    counts = counted(model or Model(), work)
    rows = []
    for device in DEVICES:
        row: dict[str, object] = {"device": device.name}
        for precision in PRECISIONS:
            known = precision == "bf16" or device.fp8 is not None
            seconds = floor_seconds(counts, device, precision)
            row[f"{precision}, s"] = sum(seconds.values()) if known else float("nan")
        row |= {"decoding, s": seconds["decoding"], "source": device.source}
        rows.append(row)
    found = pd.DataFrame(rows).set_index("device")
    return found.rename_axis(f"at least, for {said(work)}")


# --- memory -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Need:
    """Bytes of the phases of some work; of each phase its weights and its activations."""

    text: int
    transformer: int
    activations: int
    decoder: int
    decoding: int

    def at_once(self, name: str, decoding: int | None = None) -> int:
        """Bytes at the worst moment of a way.

        A stock pipeline keeps encoder, transformer and VAE on the device together; elsewhere the
        encoder is freed before the transformer is loaded, and both are larger than the VAE.

        Args:
            name: of `WAYS`.
            decoding: bytes of it; None for a whole picture.
        """
        last = max(self.activations, self.decoding if decoding is None else decoding)
        kept = self.transformer + self.decoder + last
        return self.text + kept if name == "resident" else max(self.text, kept)


def activation_bytes(
    model: Model, work: Work, precision: Precision = "bf16", *, each: int = 2
) -> int:
    """Bytes that one block holds at its worst moment for one picture; an upper estimate.

    In bf16 that is the attention, with 14 numbers per token and channel: the stream and its
    modulated copy, queries, keys and values twice, and float32 copies for their rotation. In fp8
    it is the rounding of the second MLP layer's input, four times as wide, in float32.
    """
    numbers = {"bf16": 24, "fp8": 40}[precision]  # of blocks that were run: 14 to 22, and 37
    return numbers * each * model.transformer.width * (work.tokens + work.text)


def need(
    work: Work, precision: Precision = "bf16", *, known_times: bool = False, rank: int = 0
) -> Need:
    """Count what some work needs, one picture at a time through transformer and decoder.

    Args:
        work: what is made.
        precision: of the linear layers of the blocks; in fp8 they have one byte per weight.
        known_times: keep of the modulation only what it says at the times of the steps.
        rank: of an adapter that is attached and not fused.
    """
    model = Model()
    size = model.transformer
    weights = 2 * size.parameters + 2 * rank * ADAPTER_WIDTHS * size.width * size.layers
    if precision == "fp8":
        weights -= 2 * size.layers * size.stream
    if known_times:
        weights -= 2 * 2 * size.layers * (size.modulation - 6 * size.width * work.steps)
    return Need(
        text=2 * ENCODER,
        transformer=weights,
        activations=activation_bytes(model, work, precision),
        decoder=2 * VAE,
        decoding=bytes_per_latent(model.vae.base, 2) * work.height * work.width // SCALE**2,
    )


@dataclass(frozen=True, kw_only=True)
class Way:
    """How some work is done in the memory of a device.

    Attributes:
        name: of `WAYS`.
        bytes: at the worst moment.
        seconds: at least; of copies from the computer's memory too, where there are any.
        tiles: of the decoder; None for whole pictures.
    """

    name: str
    bytes: int
    seconds: float
    tiles: Tiles | None = None


WAYS: Mapping[str, str] = MappingProxyType(
    {
        "resident": "all networks stay on the device in bf16, as in a stock pipeline",
        "freed": "text encoder freed before the transformer is loaded, bf16",
        "known times": "and of the modulation only what it says at the steps' times is kept",
        "fp8": "and the linear layers of the blocks are in fp8",
        "offload": "blocks of the transformer are copied from the computer's memory, bf16",
    }
)
"""From the simplest to the most sparing; the third is exact, the fourth is not."""


def needs(work: Work) -> dict[str, Need]:
    """Count what each of `WAYS` holds, in their order; offloaded, two blocks at a time."""
    bf16 = need(work)
    return {
        "resident": bf16,
        "freed": bf16,
        "known times": need(work, known_times=True),
        "fp8": need(work, "fp8", known_times=True),
        "offload": replace(bf16, transformer=2 * bf16.transformer // 60),
    }


def ways(work: Work, device: Device) -> tuple[Way, ...]:
    """Return the ways that fit in a device, the simplest first; empty if none does."""
    counts, found = counted(Model(), work), needs(work)
    seconds = {p: sum(floor_seconds(counts, device, p).values()) for p in PRECISIONS}
    copying = work.steps * work.passes * found["resident"].transformer / device.host
    least = {name: seconds["fp8" if name == "fp8" else "bf16"] for name in found}
    least["offload"] = max(seconds["bf16"], copying)
    if device.fp8 is None:
        del found["fp8"]
    every = (_way(name, work, needed, least[name], device) for name, needed in found.items())
    return tuple(way for way in every if way.bytes <= device.memory - RESERVE)


def _way(name: str, work: Work, needed: Need, least: float, device: Device) -> Way:
    """A way; but in a stock pipeline, the decoder takes tiles where it must.

    The encoder then runs on the processor, where the device cannot hold it.
    """
    free = device.memory - RESERVE
    if name == "resident":
        return Way(name=name, bytes=needed.at_once(name), seconds=least)
    tiles = _tiles(work, free - needed.transformer - needed.decoder)
    decoding = needed.decoding if tiles is None else _tile_bytes(tiles)
    if needed.text > free:
        needed = replace(needed, text=0)
    return Way(name=name, bytes=needed.at_once(name, decoding), seconds=least, tiles=tiles)


def _tiles(work: Work, free: int) -> Tiles | None:
    latents = (1, work.height // SCALE, work.width // SCALE)
    try:
        return fitting(latents, base=Model().vae.base, each=2, free=max(free, 1))[1]
    except BadInput:
        return Tiles()


def _tile_bytes(tiles: Tiles) -> int:
    return bytes_per_latent(Model().vae.base, 2) * tiles.side**2


# --- as text ------------------------------------------------------------------------------------


def parsed_size(text: str) -> tuple[int, int]:
    """Parse ``2048x1152``, width then height in pixels, or one number for a square.

    Raises:
        BadInput: it is something else.
    """
    sides = text.lower().split("x")
    if not 1 <= len(sides) <= 2 or not all(s.isascii() and s.isdecimal() for s in sides):
        raise BadInput("size", text, "write WIDTHxHEIGHT in pixels, such as 2048x2048")
    width, height = int(sides[0]), int(sides[-1])
    Work(height=height, width=width)
    return width, height


def said(work: Work) -> str:
    """Some work in words, such as "4 pictures of 2048 × 2048, 2 steps"."""
    return f"{work.batch} pictures of {work.width} × {work.height}, {work.steps} steps"


def device_table(work: Work, devices: Sequence[Device] = DEVICES) -> pd.DataFrame:
    """One row per device: the simplest way that fits, and the one with the lowest floor.

    Seconds are of all pictures.
    """
    import pandas as pd

    rows, least = [], f"least s for {work.batch}"
    for device in devices:
        fit = ways(work, device)
        best = min(fit, key=lambda way: way.seconds) if fit else None
        rows.append(
            {
                "device": device.name,
                "memory, GB": device.memory / 1e9,
                "simplest": fit[0].name if fit else "none fits",
                "needs, GB": fit[0].bytes / 1e9 if fit else float("nan"),
                "decodes": _decoded(fit[0].tiles) if fit else "",
                least: fit[0].seconds if fit else float("nan"),
                "fastest": best.name if best else "",
                f"its {least}": best.seconds if best else float("nan"),
                "source": device.source,
            }
        )
    return pd.DataFrame(rows).set_index("device")


def _decoded(tiles: Tiles | None) -> str:
    return "whole" if tiles is None else f"in tiles of {SCALE * tiles.side} px"


def need_table(work: Work) -> pd.DataFrame:
    """GB of the parts of each of `WAYS` for one picture, and of its worst moment.

    That moment is given for a picture that is decoded whole, and for one in tiles of diffusers'
    own size; a stock pipeline decodes whole.
    """
    import pandas as pd

    parts = ("text", "transformer", "decoder", "activations", "decoding")
    rows = {}
    for name, one in needs(work).items():
        tile = None if name == "resident" else min(one.decoding, _tile_bytes(Tiles()))
        rows[name] = {part: getattr(one, part) / 1e9 for part in parts} | {
            "at once": one.at_once(name) / 1e9,
            "at once, in tiles": one.at_once(name, tile) / 1e9,
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("GB, one picture at a time")
