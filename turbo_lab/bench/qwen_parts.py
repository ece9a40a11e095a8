"""What a device does with the parts of Qwen-Image: rates, encoder, transformer, decoder, training.

Each function measures one thing and returns rows; medians of several repeats after one that is
not counted. Everything is measured at the very sizes of the work.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from turbo_lab.bench import qwen_nets
from turbo_lab.bench.qwen_nets import Place, Settings
from turbo_lab.errors import MissingPiece
from turbo_lab.qwen_counts import TEMPLATE_TOKENS, Work, decode_counts, text_counts
from turbo_lab.qwen_counts import transformer_counts as counts_of
from turbo_lab.qwen_fast import KERNELS, attach, compile_blocks, fuse, quantised, relative_error
from turbo_lab.qwen_order import STOCK, Fast, Order, Times
from turbo_lab.qwen_sample import Opened, prepared
from turbo_lab.schedules import Published
from turbo_lab.testbeds.qwen_files import Bundle
from turbo_lab.testbeds.qwen_pictures import Codec
from turbo_lab.vae_decode import Decoder, compiled, picture_decoder

RANK = 64
"""Of the random adapter, as Wuli's."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What is measured, and where.

    Args:
        settings: full or tiny networks.
        place: device and dtype.
        work: pictures.
        row: the published adapter whose times are used.
        repeats: counted runs of each thing.
        side: of the square matrices of the matmul rate.
        backend: of torch.compile.
    """

    settings: Settings
    place: Place
    work: Work
    row: Published
    repeats: int = 5
    side: int = 8192
    backend: str = "inductor"

    @property
    def rank(self) -> int:
        """Of random adapters."""
        return RANK if self.settings.name == "full" else 4

    @property
    def order(self) -> Order:
        """The work as an order of no pipeline: its networks are random."""
        grid = self.row.schedule.grid(self.work.steps, self.work.tokens)
        return Order(
            bundle=Bundle(model="random weights", folder=Path()),
            prompts=("",) * self.work.batch,
            loras=(),
            times=Times(grid=grid, eta=0.0, known=self.row.name),
            width=self.work.width,
            height=self.work.height,
            device=self.place.device,
        )


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement.

    Attributes:
        part: of the program: rates, text, transformer, decoding, total, teacher, training.
        name: what was measured.
        seconds: the median; None where it could not run.
        runs: all of them.
        tflop: of it, counted.
        gigabytes: read and written, of a copy.
        peak: bytes on the GPU at its worst moment, weights included; None on a CPU.
        error: relative, against the first row of its part on the same noise.
        note: why it could not run, or what else to know.
    """

    part: str
    name: str
    seconds: float | None = None
    runs: tuple[float, ...] = ()
    tflop: float | None = None
    gigabytes: float | None = None
    peak: int | None = None
    error: float | None = None
    note: str = ""

    @property
    def rate(self) -> float | None:
        """TFLOP per second."""
        return self.tflop / self.seconds if self.tflop and self.seconds else None

    @staticmethod
    def read(record: Mapping[str, Any]) -> Row:
        """Return the row that `record` wrote."""
        known = {one.name: record[one.name] for one in fields(Row) if one.name in record}
        return Row(**{**known, "runs": tuple(record.get("runs", ()))})

    def record(self) -> dict[str, Any]:
        """The row as plain JSON, without what is not known."""
        every = {**asdict(self), "runs": list(self.runs), "rate": self.rate}
        return {key: value for key, value in every.items() if value not in (None, "", [])}


def clocked(task: Callable[[], object], device: str) -> float:
    """Seconds of a task, on a GPU of work that is done."""
    wait(device)
    began = time.perf_counter()
    task()
    wait(device)
    return time.perf_counter() - began


def wait(device: str) -> None:
    """Wait for a GPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def measured(
    setup: Setup, part: str, name: str, task: Callable[[], object], *, flops: float = 0
) -> Row:
    """Run a task once, then as often as asked for, and take the median and the peak."""
    device = setup.place.device
    task()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    runs = tuple(clocked(task, device) for _ in range(setup.repeats))
    return Row(
        part=part,
        name=name,
        seconds=statistics.median(runs),
        runs=runs,
        tflop=flops / 1e12 or None,
        peak=torch.cuda.max_memory_allocated() if device == "cuda" else None,
    )


def free() -> None:
    """Give memory back between parts."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# --- rates --------------------------------------------------------------------------------------


def rates(setup: Setup) -> Iterator[Row]:
    """Copy, matrix products in full precision and fp8, and every kernel of attention."""
    place, n = setup.place, setup.side
    a, b = (torch.randn(n, n, device=place.device, dtype=place.dtype) for _ in range(2))
    out = torch.empty_like(a)
    copy = measured(setup, "rates", "copy", lambda: out.copy_(a))
    moved = 2 * a.numel() * a.element_size()
    yield replace(copy, gigabytes=moved / 1e9)
    yield measured(setup, "rates", "matmul", lambda: torch.mm(a, b, out=out), flops=2 * n**3)
    if place.device == "cuda" and torch.cuda.get_device_capability() >= (8, 9):
        yield _fp8_rate(setup, a, b)
    yield from _attention(setup)


def _fp8_rate(setup: Setup, a: Tensor, b: Tensor) -> Row:
    """Of the product alone; a layer also has to round its input."""
    (x, sx), (w, sw) = quantised(a), quantised(b)
    scale = sw.t().contiguous()

    def product() -> Tensor:
        out: Tensor = torch._scaled_mm(
            x, w.t(), scale_a=sx, scale_b=scale, out_dtype=torch.bfloat16, use_fast_accum=True
        )
        return out

    return measured(setup, "rates", "matmul fp8", product, flops=2 * len(a) ** 3)


def _attention(setup: Setup) -> Iterator[Row]:
    """Each of PyTorch's kernels on the heads and tokens of one picture."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    size, place = setup.settings.model.transformer, setup.place
    length = setup.work.tokens + setup.work.text
    shape = (1, size.heads, length, size.head_width)
    q, k, v = (torch.randn(shape, device=place.device, dtype=place.dtype) for _ in range(3))
    flops = 4 * length**2 * size.width
    for name, backend in KERNELS.items():
        if name == "math" and length > 8192:
            yield Row(part="rates", name="attention math", note="scores would not fit; left out")
            continue

        def attend(backend: str = backend) -> Tensor:
            with sdpa_kernel([getattr(SDPBackend, backend)]):
                return nn.functional.scaled_dot_product_attention(q, k, v)

        try:
            yield measured(setup, "rates", f"attention {name}", attend, flops=flops)
        except RuntimeError as error:
            why = str(error).splitlines()[0][:100]
            yield Row(part="rates", name=f"attention {name}", note=f"cannot run: {why}")


# --- encoder ------------------------------------------------------------------------------------


def text(setup: Setup) -> Iterator[Row]:
    """The encoder on all prompts, as the stock pipeline calls it and without its unread head."""
    encoder = qwen_nets.text_encoder(setup.settings, setup.place)
    tokens = torch.full(
        (setup.work.batch, setup.work.text + TEMPLATE_TOKENS), 5, device=setup.place.device
    )
    call = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    counts = text_counts(setup.settings.model.text, setup.work)
    tasks = {
        "shipped": lambda: encoder(**call, output_hidden_states=True),
        "needed": lambda: encoder.model(**call),
    }
    with torch.no_grad():
        for name, task in tasks.items():
            row = measured(setup, "text", name, task, flops=counts[name].flops)
            yield replace(row, name={"shipped": "stock", "needed": "without its head"}[name])


# --- transformer --------------------------------------------------------------------------------


def variants(setup: Setup) -> dict[str, Fast]:
    """The parts of the fast path, one after the other."""
    eager = replace(STOCK, adapters="fused")
    found = {
        "plain": STOCK,
        "fused": eager,
        "known times": replace(eager, known_times=True),
        **{
            f"attention {kernel}": replace(eager, known_times=True, attention=kernel)
            for kernel in KERNELS
            if kernel != "math"
        },
        "compiled": replace(eager, known_times=True, compiled=True),
        "fp8": replace(eager, known_times=True, precision="fp8"),
        "fp8, img_mlp kept": replace(
            eager, known_times=True, precision="fp8", keep=("img_mlp",)
        ),
        "fp8 compiled": replace(eager, known_times=True, precision="fp8", compiled=True),
    }  # fmt: skip
    if setup.place.device == "cuda":
        found["fp8 compiled cudnn"] = replace(found["fp8 compiled"], attention="cudnn")
    return found


def transformer(setup: Setup, *, only: tuple[str, ...] = ()) -> Iterator[Row]:
    """All pictures through the transformer, part by part; the same weights, noise and prompts."""
    flops = sum(c.flops for c in counts_of(setup.settings.model.transformer, setup.work))
    reference: Tensor | None = None
    for name, fast in variants(setup).items():
        if only and name not in only:
            continue
        try:
            ready = with_random_weights(setup, fast)
            row = measured(setup, "transformer", name, ready.latents, flops=flops)
            latents = ready.latents()
        except (MissingPiece, torch.OutOfMemoryError) as error:
            yield Row(part="transformer", name=name, note=str(error).splitlines()[0][:160])
            continue
        finally:
            ready = None  # type: ignore[assignment]
            free()
        reference = latents if reference is None else reference
        yield replace(row, error=relative_error(latents, reference))


def with_random_weights(setup: Setup, fast: Fast, *, adapted: bool = True) -> Opened:
    """Return a transformer of random weights, prepared as `turbo_lab.qwen_sample.opened` does.

    Args:
        setup: networks and work.
        fast: parts of the fast path.
        adapted: in a random adapter, fused or attached.
    """
    place = setup.place
    net = qwen_nets.transformer(setup.settings, place)
    if adapted:
        adapter = qwen_nets.random_adapter(net, place, rank=setup.rank)
        {"fused": fuse, "attached": attach}[fast.adapters](net, [adapter])
    prompts = qwen_nets.random_prompts(
        setup.settings, place, n=setup.work.batch, tokens=setup.work.text
    )
    order = replace(setup.order, fast=replace(fast, compiled=False))
    ready = prepared(order, net, prompts, place.device)
    if fast.compiled:
        torch.compiler.reset()  # each variant is compiled anew, and none runs into a limit
        compile_blocks(net, setup.backend)
    return ready


# --- decoder ------------------------------------------------------------------------------------


def decoding(setup: Setup) -> Iterator[Row]:
    """All pictures one by one: stock, collapsed, in another layout, and compiled."""
    vae = qwen_nets.vae(setup.settings, setup.place)
    counts = decode_counts(setup.settings.model.vae, setup.work)
    z = latents_of(setup)
    reference: Tensor | None = None
    for name, decode in _decoders(setup, vae).items():
        flops = counts["shipped" if name == "stock" else "collapsed"].flops
        try:
            row = measured(setup, "decoding", name, partial(_each, decode, z), flops=flops)
        except torch.OutOfMemoryError as error:
            yield Row(part="decoding", name=name, note=str(error).splitlines()[0][:160])
            continue
        picture = decode(z[:1])
        reference = picture if reference is None else reference
        yield replace(row, error=relative_error(picture, reference))
        del picture
        free()


def _each(decode: Callable[[Tensor], Tensor], z: Tensor) -> list[Tensor]:
    return [decode(one) for one in z.split(1)]


def _decoders(setup: Setup, vae: Any) -> dict[str, Callable[[Tensor], Tensor]]:
    flat = picture_decoder(vae)
    last: Decoder = picture_decoder(vae, channels_last=True)
    return {
        "stock": Codec(vae=vae).decode,
        "collapsed": flat,
        "collapsed, channels last": last,
        "collapsed, compiled": compiled(flat, setup.backend),
        "collapsed, channels last, compiled": compiled(last, setup.backend),
    }


def latents_of(setup: Setup) -> Tensor:
    """Return noise of the shape of the work's latents ``[B, 16, h, w]``, on the device."""
    numbers = torch.Generator().manual_seed(0)
    shape = (setup.work.batch, *setup.order.shape)
    return torch.randn(shape, generator=numbers).to(setup.place.device)
