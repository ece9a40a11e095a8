"""Qwen-Image's decoder for single pictures: causal 3-D convolutions collapsed to 2-D ones.

The VAE is one for video. Its convolutions see a frame and the two before it, and before the first
frame there are only zeros: of a kernel ``[out, in, 3, k, k]`` nothing but the last slice in time
meets a picture, the other two multiply zeros. So ``conv2d`` with that slice is the same function
at a third of the work, and the doubling in time, which begins at the second frame, falls away.

Everything else is as in diffusers' ``AutoencoderKLQwenImage``, its tiles and their blending
included, but tiles of one shape are decoded together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from turbo_lab.errors import BadInput
from turbo_lab.testbeds.qwen_files import SCALE

QUERIES = 8192
"""Of the one attention, at a time: its heads of 384 are too wide for flash kernels, and with all
65,536 positions of 2048 x 2048 pixels at once a score matrix alone has 8.6 GB."""

Net = Callable[[Tensor], Tensor]


# --- the layers ---------------------------------------------------------------------------------


class Norm(nn.Module):
    """``x √C γ / ‖x‖`` over the channels of ``[B, C, H, W]``; half precision is normed in float32.

    It is diffusers' ``QwenImageRMS_norm`` without the axis of time.
    """

    def __init__(self, stock: Any) -> None:
        super().__init__()
        self.gamma = nn.Parameter(stock.gamma.detach().clone().view(1, -1, 1, 1))
        self.scale = stock.scale

    def forward(self, x: Tensor) -> Tensor:
        """Return the normed picture, in the dtype of ``x``."""
        wide = x if x.dtype == torch.float64 else x.float()
        return F.normalize(wide, dim=1).to(x.dtype) * self.scale * self.gamma


class Residual(nn.Module):
    """``shortcut(x) + conv(silu(norm(conv(silu(norm(x))))))``."""

    def __init__(self, stock: Any) -> None:
        super().__init__()
        self.norm1, self.norm2 = Norm(stock.norm1), Norm(stock.norm2)
        self.conv1, self.conv2 = collapsed(stock.conv1), collapsed(stock.conv2)
        plain = isinstance(stock.conv_shortcut, nn.Identity)
        self.shortcut = nn.Identity() if plain else collapsed(stock.conv_shortcut)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[B, C', H, W]``."""
        h = self.conv1(F.silu(self.norm1(x)))
        out: Tensor = self.conv2(F.silu(self.norm2(h))) + self.shortcut(x)
        return out


class Attention(nn.Module):
    """Attention of all positions with one head, queries in parts of `QUERIES`."""

    def __init__(self, stock: Any) -> None:
        super().__init__()
        self.norm = Norm(stock.norm)
        self.to_qkv, self.proj = _copied(stock.to_qkv), _copied(stock.proj)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to the same."""
        qkv = self.to_qkv(self.norm(x)).flatten(2).transpose(1, 2)[:, None]
        q, k, v = qkv.contiguous().chunk(3, dim=-1)
        parts = [F.scaled_dot_product_attention(some, k, v) for some in q.split(QUERIES, dim=2)]
        out = torch.cat(parts, dim=2)[:, 0].transpose(1, 2).reshape(x.shape)
        return x + cast(Tensor, self.proj(out))


class Upsample(nn.Module):
    """Each pixel four times, then a convolution. Copies need no float32, which diffusers takes."""

    def __init__(self, stock: Any) -> None:
        super().__init__()
        self.conv = _copied(stock.resample[1])

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[B, C/2, 2H, 2W]``."""
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


def collapsed(conv: Any) -> nn.Conv2d:
    """Return the 2-D convolution that a causal 3-D one is for the first frame."""
    _, _, _, *sides = conv.weight.shape
    flat = nn.Conv2d(
        conv.in_channels, conv.out_channels, tuple(sides), padding=sides[0] // 2, device="meta"
    )
    return _with(flat, conv.weight[:, :, -1], conv.bias)


def _copied(conv: nn.Conv2d) -> nn.Conv2d:
    same = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        cast(Any, conv.kernel_size),
        padding=cast(Any, conv.padding),
        device="meta",
    )
    return _with(same, conv.weight, conv.bias)


def _with(conv: nn.Conv2d, weight: Tensor, bias: Tensor | None) -> nn.Conv2d:
    assert bias is not None  # every convolution of this VAE has one
    conv.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))
    conv.bias = nn.Parameter(bias.detach().clone())
    return conv


def collapsed_net(vae: Any) -> nn.Sequential:
    """Return the decoder of an ``AutoencoderKLQwenImage`` for pictures, with weights of its own.

    ``[B, 16, h, w]`` latents of the VAE's own scale to ``[B, 3, 8h, 8w]``, not clamped.
    """
    stock = vae.decoder
    first, *rest = stock.mid_block.resnets
    layers: list[nn.Module] = [
        collapsed(vae.post_quant_conv),
        collapsed(stock.conv_in),
        Residual(first),
    ]
    for attention, residual in zip(stock.mid_block.attentions, rest, strict=True):
        layers += [Attention(attention), Residual(residual)]
    for block in stock.up_blocks:
        layers += [Residual(residual) for residual in block.resnets]
        layers += [Upsample(up) for up in block.upsamplers or ()]
    layers += [Norm(stock.norm_out), nn.SiLU(), collapsed(stock.conv_out)]
    return nn.Sequential(*layers).requires_grad_(False).eval()


# --- decoding -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Overlapping squares of latents that are decoded apart and blended where they overlap.

    The attention then sees one tile at a time, so tiled pictures differ a little from whole ones.

    Args:
        side: latents along a tile; diffusers' own tiles have 32.
        stride: latents from one tile to the next, at most ``side``; diffusers' own is 24.
    """

    side: int = 32
    stride: int = 24

    def __post_init__(self) -> None:
        """Check them.

        Raises:
            BadInput: they leave gaps, or are no sizes.
        """
        if not 1 <= self.stride <= self.side:
            raise BadInput("stride", self.stride, f"use an integer from 1 to side={self.side}")


@dataclass(frozen=True, kw_only=True, eq=False)
class Decoder:
    """From normalised latents to pictures; build it with `picture_decoder`.

    Attributes:
        net: see `collapsed_net`; compiled or not.
        mean: of the latents, ``[1, 16, 1, 1]``.
        std: of the latents, ``[1, 16, 1, 1]``.
        at_once: pictures, or tiles of pictures, per call of the network.
        tiles: None decodes whole pictures.
        memory: layout of what goes in.
    """

    net: Net
    mean: Tensor
    std: Tensor
    at_once: int = 1
    tiles: Tiles | None = None
    memory: torch.memory_format = torch.contiguous_format

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Tensor:
        """Latents ``[B, 16, h, w]`` to pictures ``[B, 3, 8h, 8w]`` in [-1, 1], float32."""
        place = latents.to(self.mean.device, torch.float32)
        z = (place * self.std.float() + self.mean.float()).to(self.mean.dtype)
        side = max(z.shape[-2:])
        whole = self.tiles is None or side <= self.tiles.side
        pictures = self._decoded(z) if whole else self._tiled(z, cast(Tiles, self.tiles))
        return pictures.clamp(-1, 1)

    def _decoded(self, z: Tensor) -> Tensor:
        parts = [z_i.contiguous(memory_format=self.memory) for z_i in z.split(self.at_once)]
        return torch.cat([self.net(part).float() for part in parts])

    def _tiled(self, z: Tensor, tiles: Tiles) -> Tensor:
        """Decode all tiles, those of one shape together, and lay them out as diffusers does."""
        rows, (height, width) = len(z), z.shape[-2:]
        tops, lefts = (range(0, n, tiles.stride) for n in (height, width))
        places = [(top, left) for top in tops for left in lefts]
        cut = {at: z[..., at[0] : at[0] + tiles.side, at[1] : at[1] + tiles.side] for at in places}
        done: dict[tuple[int, int], Tensor] = {}
        for some in _of_one_shape(cut):
            made = self._decoded(torch.cat([cut[at] for at in some]))
            done |= zip(some, made.split(rows), strict=True)
        overlap, keep = SCALE * (tiles.side - tiles.stride), SCALE * tiles.stride
        lines = []
        for top in tops:
            line = []
            for left in lefts:
                tile = done[top, left]
                if top:
                    _blend(done[top - tiles.stride, left], tile, overlap, axis=-2)
                if left:
                    _blend(done[top, left - tiles.stride], tile, overlap, axis=-1)
                line.append(tile[..., :keep, :keep])
            lines.append(torch.cat(line, dim=-1))
        return torch.cat(lines, dim=-2)[..., : SCALE * height, : SCALE * width]


def _of_one_shape(cut: dict[tuple[int, int], Tensor]) -> Iterator[list[tuple[int, int]]]:
    def shape(at: tuple[int, int]) -> tuple[int, ...]:
        return tuple(cut[at].shape)

    for _, places in groupby(sorted(cut, key=shape), key=shape):
        yield list(places)


def _blend(before: Tensor, tile: Tensor, overlap: int, *, axis: int) -> None:
    """Fade the end of the tile before into the beginning of a tile, in place."""
    n = min(before.shape[axis], tile.shape[axis], overlap)
    if not n:
        return
    share = torch.arange(n, device=tile.device, dtype=tile.dtype) / n
    share = share.view(-1, 1) if axis == -2 else share
    end = before.narrow(axis, before.shape[axis] - n, n)
    start = tile.narrow(axis, 0, n)
    start.copy_(end * (1 - share) + start * share)


def picture_decoder(
    vae: Any,
    *,
    at_once: int = 1,
    tiles: Tiles | None = None,
    channels_last: bool = False,
) -> Decoder:
    """Return the collapsed decoder of a VAE, on its device and in its dtype.

    Args:
        vae: an ``AutoencoderKLQwenImage``; it is not needed afterwards.
        at_once: pictures or tiles per call of the network, at least 1.
        tiles: None decodes whole pictures; only so it equals the stock decoder without tiles.
        channels_last: layout of weights and pictures: the same numbers, at another speed.

    Raises:
        BadInput: ``at_once`` is below 1.
    """
    if at_once < 1:
        raise BadInput("at_once", at_once, "use an integer of at least 1")
    memory = torch.channels_last if channels_last else torch.contiguous_format
    weight = vae.post_quant_conv.weight
    mean, std = (
        torch.tensor(numbers, device=weight.device, dtype=weight.dtype).view(1, -1, 1, 1)
        for numbers in (vae.config.latents_mean, vae.config.latents_std)
    )
    net = collapsed_net(vae).to(memory_format=memory)
    return Decoder(net=net, mean=mean, std=std, at_once=at_once, tiles=tiles, memory=memory)


def compiled(decoder: Decoder, backend: str = "inductor") -> Decoder:
    """Return the decoder with its network compiled, at the first call of each shape."""
    net = torch.compile(decoder.net, backend=backend, fullgraph=True, dynamic=False)
    return replace(decoder, net=net)


def bytes_per_latent(base: int, each: int) -> int:
    """Bytes that decoding holds at its worst moment, per latent of a picture; an upper estimate.

    That moment is in a residual block of ``base`` channels at full resolution: its input and the
    first convolution's output are kept while the second norm has two float32 copies, or while a
    convolution has its input, its output and a copy of each in its kernel's own layout.

    Args:
        base: the VAE's ``base_dim``.
        each: bytes of a number.
    """
    return SCALE**2 * base * (5 * each + 8)


def fitting(
    latents: Sequence[int], *, base: int, each: int, free: int, largest: int = 128
) -> tuple[int, Tiles | None]:
    """Choose how much is decoded at once, so that it fits in ``free`` bytes.

    Args:
        latents: pictures, height and width of the latents.
        base: the VAE's ``base_dim``.
        each: bytes of a number.
        free: bytes.
        largest: side of the largest tile that is tried.

    Returns:
        ``at_once`` and ``tiles`` for `picture_decoder`.

    Raises:
        BadInput: not even one tile of diffusers' own size fits.
    """
    rows, height, width = latents
    one = bytes_per_latent(base, each)
    if one * height * width <= free:
        return min(rows, free // (one * height * width)), None
    side = min(largest, 1 << int(math.log2(max(1.0, math.sqrt(free / one)))))
    if side < Tiles().side:
        needed = one * Tiles().side ** 2 / 1e6
        raise BadInput("free", free, f"a tile of the decoder needs {needed:.0f} MB")
    tiles = Tiles(side=side, stride=3 * side // 4)
    return max(1, free // (one * side**2)), tiles


def to_uint8(pictures: Tensor) -> Tensor:
    """Pictures ``[B, 3, H, W]`` in [-1, 1] to ``[B, H, W, 3]`` uint8, rounded as diffusers does."""
    halves = (pictures * 0.5 + 0.5).clamp(0, 1)
    return (halves * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
