"""What makes Qwen-Image's transformer faster or smaller for sampling, each part on its own.

Adapters are fused, the modulation is computed once for the times of the steps, linear layers run
in fp8, attention takes a chosen kernel, blocks are compiled, or wait in the computer's memory.
All but fp8 compute the same function, up to rounding; how far fp8 is off is measured.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from typing import Any

import torch
from torch import Tensor, nn

from turbo_lab.adapters import QWEN_LINEARS, AdapterSize
from turbo_lab.errors import BadInput, MissingPiece
from turbo_lab.field import Condition, Field
from turbo_lab.qwen_rotation import rotate_in_reals
from turbo_lab.testbeds.qwen_data import NULL, Prompts

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
"""The largest number of this format: 4 bits of exponent, 3 of mantissa."""
FP8_LINEARS = tuple(name for name in QWEN_LINEARS if "_mod." not in name)
"""The layers of a block that every token goes through. The modulation sees one row per picture."""
KERNELS: Mapping[str, str] = {
    "cudnn": "CUDNN_ATTENTION",
    "flash": "FLASH_ATTENTION",
    "efficient": "EFFICIENT_ATTENTION",
    "math": "MATH",
}
"""PyTorch's own kernels of attention, by what they are called here."""


# --- adapters -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Weighted:
    """An adapter and how strongly it is worn.

    Attributes:
        size: of the adapter.
        tensors: named as in `turbo_lab.adapters`.
        weight: 1 as it was trained.
    """

    size: AdapterSize
    tensors: Mapping[str, Tensor]
    weight: float = 1.0

    @property
    def paths(self) -> Iterator[str]:
        """Layers that it changes."""
        end = ".lora_A.weight"
        return (key.removesuffix(end) for key in self.tensors if key.endswith(end))


@torch.no_grad()
def fuse(transformer: nn.Module, adapters: Sequence[Weighted]) -> None:
    """Add adapters to the weights: ``W + Σ_k w_k (alpha_k / rank_k) B_k A_k``.

    The sum is in float32 and rounded once, whatever the number of adapters.

    Raises:
        BadInput: an adapter is for a layer that is not there.
    """
    for path in sorted({path for adapter in adapters for path in adapter.paths}):
        layer = _linear(transformer, path)
        weight = layer.weight.float()
        for adapter in adapters:
            pair = [adapter.tensors.get(f"{path}.lora_{half}.weight") for half in "AB"]
            if pair[0] is not None and pair[1] is not None:
                a, b = (half.to(weight) for half in pair if half is not None)
                weight.addmm_(b, a, alpha=adapter.weight * adapter.size.alpha / adapter.size.rank)
        layer.weight.copy_(weight)


def attach(transformer: Any, adapters: Sequence[Weighted]) -> None:
    """Put adapters around the layers by diffusers' own loader; the weights stay as they are.

    Raises:
        BadInput: an adapter is for a layer that is not there.
    """
    names = [f"adapter_{k}" for k in range(len(adapters))]
    for name, adapter in zip(names, adapters, strict=True):
        for path in adapter.paths:
            _linear(transformer, path)
        settings = {
            "r": adapter.size.rank,
            "lora_alpha": adapter.size.alpha,
            "target_modules": list(adapter.paths),
        }
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            transformer.load_lora_adapter(
                {f"transformer.{key}": value for key, value in adapter.tensors.items()},
                adapter_name=name,
                metadata={f"transformer.{key}": value for key, value in settings.items()},
            )
    transformer.set_adapters(names, [adapter.weight for adapter in adapters])


def _linear(transformer: nn.Module, path: str) -> Any:
    try:
        layer = transformer.get_submodule(path)
    except AttributeError:
        raise BadInput("lora", path, "the transformer has no such layer") from None
    return layer


# --- modulation at known times ------------------------------------------------------------------


class Rows(nn.Module):
    """What a modulation says at each of a few times: ``[steps, 6 d]``, one row of it at a time."""

    rows: Tensor

    def __init__(self, rows: Tensor, now: Tensor) -> None:
        super().__init__()
        self.register_buffer("rows", rows, persistent=False)
        self.now = now  # shared by all, so that one number moves them

    def forward(self, temb: Tensor) -> Tensor:
        """Return the row of now for each of ``temb [B, d]``."""
        return self.rows.index_select(0, self.now.to(self.rows.device)).expand(len(temb), -1)


@dataclass(frozen=True, kw_only=True, eq=False)
class KnownTimes:
    """A field that knows few times; build it with `know_times`."""

    field: Field
    times: tuple[float, ...]
    now: Tensor

    def __call__(self, x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
        """Return the velocity at one of the known times.

        Raises:
            BadInput: it is another time.
        """
        time = float(t.flatten()[0])
        near = min(range(len(self.times)), key=lambda k: abs(self.times[k] - time))
        if abs(self.times[near] - time) > 1e-6 or bool((t != t.flatten()[0]).any()):
            raise BadInput("t", t.tolist(), f"its modulation is known at {self.times} only")
        self.now.fill_(near)
        return self.field(x_t, t, c)


@torch.no_grad()
def know_times(field: Field, transformer: Any, times: Sequence[float]) -> KnownTimes:
    """Replace every modulation by its rows at some times, and forget its weights.

    Modulation depends on nothing but time. It is 6.8 of the 20.4 billion parameters, so 13.6 GB in
    bf16, of which a student of two steps needs 8.8 MB.

    Args:
        field: a `QwenNet` around the transformer.
        transformer: its network; it cannot be used at other times afterwards.
        times: of the sampler's steps.
    """
    weight = transformer.img_in.weight
    stamps = 1000 * torch.tensor(times, dtype=torch.float32, device=weight.device)
    rounded = stamps.to(weight.dtype) / 1000  # as QwenNet and the stock pipeline round them
    temb = transformer.time_text_embed(rounded, weight.new_zeros(1, 1))
    now = torch.zeros(1, dtype=torch.long, device=weight.device)
    for block in transformer.transformer_blocks:
        home = next(block.img_mod.parameters()).device
        for name in ("img_mod", "txt_mod"):
            rows = torch.cat([getattr(block, name)(row[None].to(home)) for row in temb])
            setattr(block, name, Rows(rows, now))
    return KnownTimes(field=field, times=tuple(map(float, times)), now=now)


# --- fp8 ----------------------------------------------------------------------------------------


class Fp8Linear(nn.Module):
    """A linear layer whose weight and input are fp8, with one scale for each of their rows.

    ``y = s_x s_w (x / s_x)₈ (W / s_w)₈ᵀ + b``, where a scale is the largest number of its row over
    448, and ₈ rounds to e4m3. Sums are in float32, on a GPU in its units' fast mode, which keeps
    fewer digits of them.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight, scale = quantised(linear.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale.T.contiguous())
        self.bias = linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``, in the dtype of ``x``."""
        flat, scale = quantised(x.reshape(-1, self.in_features))
        product = _on_gpu if x.is_cuda else simulated
        out = product(flat, scale, self.weight, self.scale, self.bias, x.dtype)
        return out.view(*x.shape[:-1], self.out_features)


def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round the rows of ``x [n, k]`` to fp8: ``(x / s)₈ [n, k]`` and ``s [n, 1]`` float32."""
    wide = x.float()
    scale = (wide.abs().amax(dim=1, keepdim=True) / FP8_MAX).clamp(min=1e-12)
    return (wide / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale


def simulated(
    x: Tensor, scale_x: Tensor, w: Tensor, scale_w: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Multiply fp8 numbers in float32 on any device: `torch._scaled_mm`, but for fast sums' errors.

    Args:
        x: ``[n, k]`` fp8.
        scale_x: ``[n, 1]``.
        w: ``[m, k]`` fp8.
        scale_w: ``[1, m]``.
        bias: ``[m]`` or None.
        dtype: of the result ``[n, m]``.
    """
    out = (x.float() @ w.float().T) * scale_x * scale_w
    return (out if bias is None else out + bias.float()).to(dtype)


def _on_gpu(
    x: Tensor, scale_x: Tensor, w: Tensor, scale_w: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """By the GPU's fp8 units, which write bfloat16, in their fast mode (`use_fast_accum`)."""
    out: Tensor = torch._scaled_mm(
        x,
        w.t(),
        scale_a=scale_x,
        scale_b=scale_w,
        bias=None if bias is None else bias.bfloat16(),
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return out.to(dtype)


def to_fp8(transformer: Any, keep: Sequence[str] = ()) -> int:
    """Replace the linear layers of the blocks by fp8 ones, and return how many.

    Args:
        transformer: adapters must be fused, not attached.
        keep: beginnings of names inside a block that stay as they are, such as ``img_mlp``.

    Raises:
        BadInput: an adapter is attached, or ``keep`` names nothing.
    """
    done = 0
    for name in keep:
        if not any(target.startswith(name) for target in FP8_LINEARS):
            raise BadInput("keep", name, f"begin one of {', '.join(FP8_LINEARS)}")
    targets = [t for t in FP8_LINEARS if not any(t.startswith(name) for name in keep)]
    for block in transformer.transformer_blocks:
        for target in targets:
            path = target if "mlp" in target else f"attn.{target}"
            layer = block.get_submodule(path)
            if not isinstance(layer, nn.Linear):
                raise BadInput("precision", "fp8", "fuse adapters first; they are attached here")
            parent, _, last = path.rpartition(".")
            setattr(block.get_submodule(parent), last, Fp8Linear(layer))
            done += 1
    return done


def check_fp8(device: str) -> None:
    """Refuse a GPU without fp8 units; a CPU simulates them.

    Raises:
        MissingPiece: naming the GPU.
    """
    if device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        name = torch.cuda.get_device_name()
        raise MissingPiece(f"{name} has no fp8 units: leave precision at full.")


# --- kernels, graphs, places --------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class WithKernel:
    """A field whose attention runs in one of PyTorch's own kernels and in no other."""

    field: Field
    kernel: str

    def __call__(self, x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
        """Return the velocity.

        Raises:
            MissingPiece: the kernel cannot do this on this device.
        """
        from torch.nn.attention import SDPBackend, sdpa_kernel

        try:
            with sdpa_kernel([getattr(SDPBackend, KERNELS[self.kernel])]):
                return self.field(x_t, t, c)
        except RuntimeError as error:
            if "No available kernel" not in str(error) and "No viable backend" not in str(error):
                raise
            raise MissingPiece(
                f"The attention kernel {self.kernel} cannot be used on this device with these "
                f"shapes: choose another, or auto."
            ) from None


def with_kernel(field: Field, kernel: str) -> WithKernel:
    """Wrap a field; see `KERNELS`.

    Raises:
        BadInput: there is no such kernel.
    """
    if kernel not in KERNELS:
        raise BadInput("attention", kernel, f"choose auto or one of {', '.join(KERNELS)}")
    return WithKernel(field=field, kernel=kernel)


@dataclass(frozen=True, kw_only=True, eq=False)
class ByLength:
    """A field that calls rows with prompts of one length together, so that none is padded.

    Padding needs a mask, and with a mask PyTorch takes a slower kernel of attention. Guidance is
    such a batch: the negative prompt is shorter than the others.
    """

    field: Field
    prompts: Prompts
    lengths: dict[int, int] = dataclass_field(default_factory=dict)

    def __call__(self, x_t: Tensor, t: Tensor, c: Tensor) -> Tensor:
        """Return the velocity, shaped like ``x_t``."""
        lengths = [self._length(number) for number in c.tolist()]
        if len(set(lengths)) == 1:
            return self.field(x_t, t, c)
        t, v = t.expand(len(x_t)), torch.empty_like(x_t, dtype=torch.float32)
        for length in sorted(set(lengths)):
            rows = [k for k, other in enumerate(lengths) if other == length]
            v[rows] = self.field(x_t[rows], t[rows], c[rows])
        return v

    def _length(self, number: int) -> int:
        if number not in self.lengths:
            row = self.prompts.null if number == NULL else self.prompts.rows[number]
            self.lengths[number] = len(row)
        return self.lengths[number]


def compile_blocks(transformer: Any, backend: str = "inductor") -> None:
    """Compile the blocks, which are alike: one of them is compiled, at its first call.

    Rotations become real first: PyTorch's compiler fuses no complex numbers.
    """
    rotate_in_reals(transformer)
    transformer.compile_repeated_blocks(backend=backend, fullgraph=True)


def offload_blocks(transformer: Any, device: str) -> None:
    """Keep blocks in the computer's memory and copy each to the device for its turn.

    diffusers' own group offloading; on a GPU the next block is copied while one computes.
    """
    transformer.enable_group_offload(
        onload_device=torch.device(device),
        offload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
        use_stream=device == "cuda",
    )


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """``‖a - b‖ / ‖b‖`` over everything, in float32."""
    wide = theirs.float()
    return float((ours.float() - wide).norm() / wide.norm())
