"""Views of a postcard: windows of its own pixels, a little brighter or darker, some of them grey.

Nothing is resized or mirrored: a digit stays a digit, grain its grain.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn.functional import avg_pool2d

from turbo_lab.dino.net import PATCH
from turbo_lab.measure.views import LUMA
from turbo_lab.postcards import SIZE
from turbo_lab.streams import Draw


class Views(NamedTuple):
    """What one step sees of a batch: ``first`` and ``second`` wide windows, and narrow ones.

    ``covered`` marks tokens of the first window that the student does not see.
    """

    first: Tensor  # [B, 3, wide, wide]
    second: Tensor  # [B, 3, wide, wide]
    covered: Tensor  # [B, M] long, indices of tokens
    narrow: tuple[Tensor, ...]  # each [B, 3, narrow, narrow]


class Cutter(Protocol):
    """What cuts views."""

    def cut(self, x: Tensor, draw: Draw) -> Views:
        """Cut views of pictures ``[B, 3, 32, 32]``, the rows of a draw."""


class Crops(BaseModel):
    """How views are cut.

    Args:
        wide: pixels of a side of the two global windows, a multiple of 4; see `salient`.
        reach: how far the second may lie from the first, in pixels along each axis.
        sharpness: of the draw of the first, see `salient`.
        narrow: pixels of a side of the local windows, a multiple of 4; they lie in the first.
        locals: how many of them.
        cover: share of the tokens of the first window that are covered.
        light: largest change of brightness, and of contrast as a share.
        noise: standard deviation of pixel noise.
        grey: share of the windows that lose their colour, each for itself, as in DINO: what two
            windows share must not be their hue alone.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    wide: int = Field(8, ge=PATCH, le=SIZE, multiple_of=PATCH)
    reach: int = Field(1, ge=0, le=SIZE)
    sharpness: float = Field(6.0, ge=0, le=20)
    narrow: int = Field(8, ge=PATCH, le=SIZE, multiple_of=PATCH)
    locals: int = Field(0, ge=0)
    cover: float = Field(0.25, gt=0, lt=1)
    light: float = Field(0.1, ge=0, lt=1)
    noise: float = Field(0.1, ge=0)
    grey: float = Field(0.2, ge=0, le=1)

    @property
    def covered(self) -> int:
        """Tokens that are covered, at least 1."""
        return max(1, round(self.cover * (self.wide // PATCH) ** 2))

    def cut(self, x: Tensor, draw: Draw) -> Views:
        """Cut views of pictures ``[B, 3, 32, 32]``, the rows of a draw."""
        free = SIZE - self.wide
        first = salient(x, self.wide, draw.uniform("first"), self.sharpness)
        moved = places(draw.sub("second"), 2 * self.reach) - self.reach
        second = (first + moved).clamp(0, free)
        names = [f"narrow {k}" for k in range(self.locals)]
        narrow = (first + places(draw.sub(name), self.wide - self.narrow) for name in names)
        return Views(
            first=self._lit(windows(x, first, self.wide), draw.sub("first")),
            second=self._lit(windows(x, second, self.wide), draw.sub("second")),
            covered=tokens_covered(draw, (self.wide // PATCH) ** 2, self.covered),
            narrow=tuple(
                self._lit(windows(x, place, self.narrow), draw.sub(name))
                for name, place in zip(names, narrow, strict=True)
            ),
        )

    def _lit(self, x: Tensor, draw: Draw) -> Tensor:
        """Take the colour of some, change contrast, brightness and every pixel a little."""
        if self.grey:
            x = greyed(x, draw.uniform("grey") < self.grey)
        return lit(x, draw, light=self.light, noise=self.noise)


def greyed(x: Tensor, which: Tensor) -> Tensor:
    """Take the colour of those views ``x [B, 3, H, W]`` that ``which [B]`` names."""
    luminance = torch.einsum("bchw,c->bhw", x, x.new_tensor(LUMA))[:, None]
    return torch.where(which.to(x.device)[:, None, None, None], luminance.expand_as(x), x)


def lit(x: Tensor, draw: Draw, *, light: float, noise: float) -> Tensor:
    """Change contrast, brightness and every pixel of ``x [B, C, H, W]`` a little."""
    contrast, brightness = (
        ((2 * draw.uniform(name) - 1) * light).to(x)[:, None, None, None]
        for name in ("contrast", "brightness")
    )
    grain = draw.normal("noise", x.shape[1:]).to(x)
    return x * (1 + contrast) + brightness + noise * grain


def windows(x: Tensor, places: Tensor, size: int) -> Tensor:
    """Windows ``[B, C, size, size]`` of ``x [B, C, H, W]`` at (row, column) ``[B, 2]``."""
    reach = torch.arange(size, device=x.device)
    rows = (places[:, 0, None].to(x.device) + reach)[:, :, None]
    columns = (places[:, 1, None].to(x.device) + reach)[:, None, :]
    batch = torch.arange(len(x), device=x.device)[:, None, None]
    return x.permute(0, 2, 3, 1)[batch, rows, columns].permute(0, 3, 1, 2).contiguous()


def hide(x: Tensor, covered: Tensor) -> Tensor:
    """Paint the 4x4 pixels of covered tokens ``[B, M]`` grey in ``x [B, C, H, W]``.

    iBOT puts a learned token there; the stem looks over a patch's edge, so pixels have to go.
    """
    side = x.shape[-1] // PATCH
    seen = torch.ones(len(x), side * side, device=x.device).scatter(1, covered.to(x.device), 0.0)
    seen = seen.view(-1, 1, side, side)
    return x * seen.repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)


def salient(x: Tensor, size: int, uniform: Tensor, sharpness: float) -> Tensor:
    """Places ``[B, 2]`` of windows, drawn in proportion to a power of their pixels' variance.

    Label-free, and what Peng et al. 2022 (arXiv 2202.03278) do for the same reason: most windows
    of a postcard show grain and nothing else.

    Args:
        x: pictures ``[B, C, H, W]``.
        size: of the windows.
        uniform: ``[B]`` in [0, 1), one number per picture.
        sharpness: the power; 0 draws all places alike.
    """
    mean, square = avg_pool2d(x, size, stride=1), avg_pool2d(x.square(), size, stride=1)
    spread = (square - mean.square()).sum(1).clamp_min(1e-6) ** sharpness
    total = spread.flatten(1).cpu().double().cumsum(1)
    index = torch.searchsorted(total, uniform[:, None].double() * total[:, -1:], right=True)[:, 0]
    columns = spread.shape[2]
    return torch.stack([index // columns, index % columns], dim=1)


def places(draw: Draw, free: int) -> Tensor:
    """Places ``[rows, 2]`` uniform in 0 .. free."""
    return torch.stack([draw.integers(axis, free + 1) for axis in ("row", "column")], dim=1)


def tokens_covered(draw: Draw, tokens: int, count: int) -> Tensor:
    """``count`` different tokens ``[rows, count]`` of each picture."""
    return draw.normal("cover", (tokens,)).argsort(dim=1)[:, :count]
