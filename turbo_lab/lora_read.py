"""A LoRA from a file, whoever wrote it, as an adapter of this package.

Header, names, ranks and shapes are checked against the base before a value is read, and values
before a model sees them. What comes out is what the file computes: same dtype and same bits where
all its layers have one rank and one alpha / rank, float32 where they have several.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from turbo_lab.adapters import QWEN_LINEARS, AdapterSize
from turbo_lab.lora_files import TensorFile
from turbo_lab.lora_names import (
    OURS,
    Layer,
    Scheme,
    Shapes,
    layers_of,
    peft_alpha,
    refused,
    renamed,
    scheme_of,
)
from turbo_lab.progress import progress

MAX_RANK = 256
MOST_SCALE = 1000.0
"""Of alpha / rank; far above what anybody means, and far below what overflows."""
"""The highest rank that `AdapterSize` allows."""


@dataclass(frozen=True, kw_only=True)
class Lora:
    """A checked LoRA.

    Attributes:
        file: where it comes from.
        scheme: how its tensors are named there.
        size: rank, alpha and layers of the adapter it becomes.
        tensors: of that adapter, named as in `turbo_lab.adapters`.
        ranks: of the layers in the file, from low to high, each once.
        layers: number of adapted layers, and of linear layers in the base.
    """

    file: TensorFile
    scheme: Scheme
    size: AdapterSize
    tensors: Mapping[str, Tensor]
    ranks: tuple[int, ...]
    layers: tuple[int, int]

    @property
    def parameters(self) -> int:
        """Numbers in A and B of all layers, as in the file."""
        slots = (s for s in self.file.slots.values() if len(s.shape) == 2)
        return sum(slot.shape[0] * slot.shape[1] for slot in slots)

    @property
    def dtypes(self) -> str:
        """Of A and B in the file."""
        found = {str(s.dtype) for s in self.file.slots.values() if len(s.shape) == 2}
        return ", ".join(sorted(name.removeprefix("torch.") for name in found))


def read_lora(file: TensorFile, shapes: Shapes, base: str) -> Lora:
    """Check a LoRA against a transformer, and read it.

    Args:
        file: from `turbo_lab.lora_files.opened`.
        shapes: linear layers of the transformer it shall fit.
        base: name of that transformer, for sentences.

    Raises:
        BadInput: it is no LoRA, not for this base, or has values that are not finite.
    """
    scheme = scheme_of(file)
    layers = layers_of(file, scheme, shapes, base)
    ranks = tuple(sorted({layer.rank for layer in layers.values()}))
    if ranks[-1] > MAX_RANK:
        raise refused(file, f"it has rank {ranks[-1]}; use a file of rank {MAX_RANK} at most")
    known = peft_alpha(file)
    alphas = {path: _alpha(file, layer, known) for path, layer in layers.items()}
    scales = {path: alphas[path] / layer.rank for path, layer in layers.items()}
    strongest = max(scales, key=lambda path: scales[path])
    if scales[strongest] > MOST_SCALE:
        said = f"alpha / rank is {scales[strongest]:g} in {strongest!r}"
        raise refused(file, f"{said} and must be at most {MOST_SCALE:g}")
    rank, uniform = ranks[-1], len(set(scales.values())) == 1
    widest = next(path for path, layer in layers.items() if layer.rank == rank)
    alpha = alphas[widest] if uniform else float(rank)
    tensors: dict[str, Tensor] = {}
    with progress(len(layers), "reading layers") as tick:
        for done, (path, layer) in enumerate(layers.items(), start=1):
            pair = _pair(file, layer, rank, 1.0 if uniform else scales[path])
            tensors.update(zip(renamed(path, OURS), pair, strict=True))
            tick(done, "")
    return Lora(
        file=file,
        scheme=scheme,
        size=AdapterSize(rank=rank, alpha=alpha, targets=_targets(layers, shapes)),
        tensors=tensors,
        ranks=ranks,
        layers=(len(layers), len(shapes)),
    )


def _alpha(file: TensorFile, layer: Layer, known: float | None) -> float:
    """Alpha of a layer: its tensor, or what the metadata say, or the rank."""
    if layer.alpha is None:
        return float(layer.rank) if known is None else known
    if known is not None:
        raise refused(file, "its tensors and its metadata both give alphas; keep one of them")
    alpha = float(file.tensor(layer.alpha))
    if not 0 < alpha < torch.finfo(torch.float32).max:
        raise refused(file, f"alpha is {alpha} in {layer.alpha!r} and must be above 0 and finite")
    return alpha


def _pair(file: TensorFile, layer: Layer, rank: int, factor: float) -> tuple[Tensor, Tensor]:
    """A and B of a layer, with zeros up to a rank; B times a factor."""
    a, b = _finite(file, layer.down), _finite(file, layer.up)
    if factor != 1.0:
        b = b.float() * factor
        if not bool(b.isfinite().all()):
            raise refused(file, f"{layer.up!r} overflows when it is scaled by alpha / rank")
    if rank != layer.rank:
        more = rank - layer.rank
        a = torch.cat([a, a.new_zeros(more, a.shape[1])])
        b = torch.cat([b, b.new_zeros(b.shape[0], more)], dim=1)
    return a, b


def _finite(file: TensorFile, name: str) -> Tensor:
    """Read a tensor, float64 as float32."""
    value = file.tensor(name)
    value = value.float() if value.dtype == torch.float64 else value
    if not bool(value.isfinite().all()):
        raise refused(file, f"{name!r} has values that are not finite")
    return value


def _targets(layers: Mapping[str, Layer], shapes: Shapes) -> tuple[str, ...]:
    """Name layers as `AdapterSize` does: by their ends where that says it, else in full."""
    short = [end for end in QWEN_LINEARS if (hits := _ending(end, shapes)) and hits <= set(layers)]
    said = {path for end in short for path in _ending(end, shapes)}
    return (*short, *(path for path in layers if path not in said))


def _ending(end: str, paths: Shapes | Sequence[str]) -> set[str]:
    return {path for path in paths if path == end or path.endswith(f".{end}")}
