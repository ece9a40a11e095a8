"""The frozen base of a training kept in fp8: half the bytes of its linear layers.

Weights are rounded by rows, as `turbo_lab.qwen_fast` does for sampling, and are made wide where
they are used. Inputs, products and sums stay in the dtype of the training: so gradients are those
of the rounded network, exactly, and no fp8 units are needed. It saves memory and no time.

A wide weight is kept for the backward pass of its layer. With recomputation that is one block's
at a time; without, it would be all of them, and nothing would be saved.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from turbo_lab.field import Condition, Field
from turbo_lab.qwen_fast import FP8_LINEARS, quantised, relative_error


class StoredLinear(nn.Module):
    """A frozen linear layer whose weight is kept in fp8, with one scale for each of its rows.

    ``y = s_w (x (W / s_w)₈ᵀ) + b``: the numbers of e4m3 are exact in every wider dtype, and the
    scales act on the sums.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, stored: nn.Linear) -> None:
        super().__init__()
        weight, scale = quantised(stored.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale[:, 0])
        self.bias = stored.bias
        self.in_features, self.out_features = stored.in_features, stored.out_features

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``, in the dtype of ``x``."""
        out = linear(x, self.weight.to(x.dtype)) * self.scale
        return (out if self.bias is None else out + self.bias).to(x.dtype)


def store_in_fp8(transformer: Any) -> int:
    """Round the linear layers of the blocks to fp8, below their adapters; return how many.

    The modulation stays as it is, as in sampling.

    Args:
        transformer: with all of its adapters; PEFT would give a later one the dtype of fp8.
    """
    done = 0
    for block in transformer.transformer_blocks:
        for target in FP8_LINEARS:
            path = target if "mlp" in target else f"attn.{target}"
            _store(block, path)
            done += 1
    return done


def _store(block: nn.Module, path: str) -> None:
    """Put a stored layer in the place of a layer, or of what its adapters are around."""
    from peft.tuners.lora import LoraLayer

    layer: Any = block.get_submodule(path)
    if isinstance(layer, LoraLayer):
        layer.base_layer = StoredLinear(layer.get_base_layer())
    else:
        block.set_submodule(path, StoredLinear(layer))


@torch.no_grad()
def stored_with_error(
    field: Field, transformer: Any, x_t: Tensor, t: Tensor, c: Condition
) -> float:
    """Round a base to fp8, and return how far its velocity moved: ``‖v' - v‖ / ‖v‖``.

    Args:
        field: the base without adapters, around the transformer.
        transformer: see `store_in_fp8`.
        x_t: latents ``[B, 16, h, w]`` to ask at.
        t: times ``[B]``.
        c: conditions.
    """
    before = field(x_t, t, c)
    store_in_fp8(transformer)
    return relative_error(field(x_t, t, c), before)
