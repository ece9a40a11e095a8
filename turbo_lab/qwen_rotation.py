"""Qwen-Image's rotary embedding in real numbers, which PyTorch's compiler can fuse.

diffusers multiplies complex numbers, for which the compiler makes no code of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def rotate_in_reals(transformer: Any) -> None:
    """Replace the rotations of a ``QwenImageTransformer2DModel``, once."""
    if isinstance(transformer.pos_embed, RealAngles):
        return
    transformer.pos_embed = RealAngles(transformer.pos_embed)
    for block in transformer.transformer_blocks:
        block.attn.set_processor(RealRotation())


class RealAngles(nn.Module):
    """The stock rotary embedding, with cosines and sines ``[n, D/2, 2]`` for complex numbers."""

    def __init__(self, stock: nn.Module) -> None:
        super().__init__()
        self.stock = stock

    def forward(
        self, video_fhw: Any, device: torch.device | None = None, max_txt_seq_len: Any = None
    ) -> tuple[Tensor, Tensor]:
        """Return those of image tokens and of text tokens."""
        image, text = self.stock(video_fhw, device=device, max_txt_seq_len=max_txt_seq_len)
        return torch.view_as_real(image), torch.view_as_real(text)


class RealRotation:
    """Joint attention as in diffusers' ``QwenDoubleStreamAttnProcessor2_0``, rotated in reals."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor | None = None,
        attention_mask: None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return what is added to the image stream and to the text stream."""
        assert image_rotary_emb is not None
        turns, text_turns = image_rotary_emb
        width = attn.inner_dim // attn.heads
        image = [f(hidden_states).unflatten(-1, (-1, width))
                 for f in (attn.to_q, attn.to_k, attn.to_v)]  # fmt: skip
        text = [f(encoder_hidden_states).unflatten(-1, (-1, width))
                for f in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)]  # fmt: skip
        image[:2] = [rotated(attn.norm_q(image[0]), turns), rotated(attn.norm_k(image[1]), turns)]
        text[:2] = [
            rotated(attn.norm_added_q(text[0]), text_turns),
            rotated(attn.norm_added_k(text[1]), text_turns),
        ]
        q, k, v = (torch.cat(both, dim=1).transpose(1, 2) for both in zip(text, image, strict=True))
        mask = None
        if encoder_hidden_states_mask is not None:
            seen = encoder_hidden_states_mask.new_ones(hidden_states.shape[:2])
            mask = torch.cat([encoder_hidden_states_mask, seen], dim=1)[:, None, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        n = encoder_hidden_states.shape[1]
        return attn.to_out[0](out[:, n:].contiguous()), attn.to_add_out(out[:, :n].contiguous())


def rotated(x: Tensor, turns: Tensor) -> Tensor:
    """Turn pairs of ``x [B, n, H, D]``, in float32: ``(a + ib)(c + is)``, turns ``[n, D/2, 2]``."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    c, s = turns[:, None].unbind(-1)
    return torch.stack([a * c - b * s, a * s + b * c], dim=-1).flatten(-2).to(x.dtype)
