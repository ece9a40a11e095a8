"""The mini-DINO backbone, timm's own vision transformer at postcard size, and how it is tapped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import gelu

from turbo_lab.errors import BadInput
from turbo_lab.features import VitFeatures, check_blocks
from turbo_lab.postcards import SIZE
from turbo_lab.streams import seed_for

PATCH = 4
"""Pixels of a side of a token: two strides of two in the stem."""
STEM = 24
"""Channels of the stem's first convolution."""


class VitSize(BaseModel):
    """Size of the backbone."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    width: int = Field(96, ge=8)
    depth: int = Field(3, ge=1)
    heads: int = Field(4, ge=1)

    @model_validator(mode="after")
    def _divides(self) -> VitSize:
        if self.width % self.heads:
            raise BadInput("heads", self.heads, f"use a divisor of the width, {self.width}")
        return self


class Stem(nn.Module):
    """Four convolutions that turn 4x4 pixels into a token; takes the place of timm's PatchEmbed.

    Xiao et al. 2021 (arXiv 2106.14881): early convolutions make a transformer train sooner. A
    token sees 17x17 pixels, so a sign of 9x7 is not cut by the grid of patches, and where things
    lie to each other is known without a position embedding: a window is read like a picture.

    Args:
        img_size: pixels of a side, for timm.
        patch_size: only `PATCH`.
        in_chans: channels of a picture.
        embed_dim: width of a token.
        bias: of the last convolution.
        dynamic_img_pad, strict_img_size, output_fmt: as timm calls its own; tokens are always
            ``[B, H/4, W/4, D]`` and any multiple of 4 is a size.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        *,
        img_size: int,
        patch_size: int,
        in_chans: int,
        embed_dim: int,
        bias: bool,
        dynamic_img_pad: bool = False,
        strict_img_size: bool = False,
        output_fmt: str = "NHWC",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        assert patch_size == PATCH and output_fmt == "NHWC" and not dynamic_img_pad
        self.grid_size = (img_size // PATCH, img_size // PATCH)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.convolutions = nn.Sequential(
            nn.Conv2d(in_chans, STEM, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(STEM, 2 * STEM, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(2 * STEM, embed_dim, 3, stride=2, padding=1, bias=bias),
        ).to(device, dtype)
        self.around = nn.Conv2d(embed_dim, embed_dim, 3, padding=1, device=device, dtype=dtype)

    def feat_ratio(self) -> int:
        """Pixels per token, for timm."""
        return PATCH

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens ``[B, H/4, W/4, D]`` of pictures ``[B, C, H, W]``."""
        tokens = self.convolutions(x)
        return (tokens + self.around(gelu(tokens))).permute(0, 2, 3, 1)


def spawn_vit(size: VitSize, seed: int) -> Any:
    """Build timm's ``VisionTransformer`` from a seed without touching the global generator."""
    from timm.models.vision_transformer import VisionTransformer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(seed, "vit"))
        return VisionTransformer(
            img_size=SIZE,
            patch_size=PATCH,
            embed_dim=size.width,
            depth=size.depth,
            num_heads=size.heads,
            num_classes=0,
            pos_embed="none",
            dynamic_img_size=True,
            embed_layer=Stem,
        )


def tapped(vit: Any, blocks: Sequence[int] | None = None) -> VitFeatures:
    """Freeze a backbone and tap its patch tokens after the given blocks, all if None.

    Raises:
        BadInput: no block, one that is not there, or not in rising order.
    """
    depth = len(vit.blocks)
    chosen = tuple(range(depth)) if blocks is None else tuple(blocks)
    check_blocks(chosen, depth)
    return VitFeatures(
        net=vit.eval().requires_grad_(False),
        blocks=chosen,
        size=SIZE,
        fit="resize",
        mean=(0.5,) * 3,  # it was trained on pictures in [-1, 1]
        std=(0.5,) * 3,
    )


def load_vit(size: VitSize, weights: Mapping[str, Tensor]) -> Any:
    """Build a backbone and give it these weights, in float32."""
    vit = spawn_vit(size, 0)
    vit.load_state_dict({name: value.float() for name, value in weights.items()})
    return vit
