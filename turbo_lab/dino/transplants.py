"""Views of a small piece of a postcard, set anywhere into windows of other postcards.

Two windows of one picture are known for one by the grain of its ground. Here all that two views
share is the piece, at another place in each. Where the piece was cut is shared as well, unless
``shift`` hides it. Label-free, as every view.
"""

from __future__ import annotations

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from turbo_lab.dino.net import PATCH
from turbo_lab.dino.views import Views, greyed, lit, places, salient, tokens_covered, windows
from turbo_lab.errors import BadInput
from turbo_lab.postcards import SIZE
from turbo_lab.streams import Draw


class Transplants(BaseModel):
    """How pieces are cut and where they are set.

    The window around a piece is of the next picture of the batch for the first view, of the one
    after for the second, so a micro-batch is mixed within itself, as it is centred for itself.

    Args:
        wide: pixels of a side of the two views, a multiple of 4.
        piece: pixels of a side of what they share, at most ``wide``.
        sharpness: of the draw of pieces by brightness, see `salient`: signs.
        coloured: share of the pieces that are drawn by colour instead: garments.
        chroma: sharpness of that draw.
        shift: how far the cut of the second piece may lie from the first, along each axis.
        drift: how far the second place may lie from the first in its window; None for anywhere.
        cover: share of the tokens of the first view that are covered.
        light: largest change of brightness, and of contrast as a share.
        noise: standard deviation of pixel noise.
        grey: share of the views that lose their colour, each for itself, of pieces drawn by
            brightness: what two signs share must not be the ground at their edge, and pieces
            drawn by colour keep it, so hue is not forgotten.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    wide: int = Field(12, ge=PATCH, le=SIZE, multiple_of=PATCH)
    piece: int = Field(8, ge=2, le=SIZE)
    sharpness: float = Field(12.0, ge=0, le=20)
    coloured: float = Field(0.3, ge=0, le=1)
    chroma: float = Field(4.0, ge=0, le=20)
    shift: int = Field(0, ge=0)
    drift: int | None = Field(None, ge=0)
    cover: float = Field(0.1, gt=0, lt=1)
    light: float = Field(0.05, ge=0, lt=1)
    noise: float = Field(0.1, ge=0)
    grey: float = Field(0.5, ge=0, le=1)

    @model_validator(mode="after")
    def _fits(self) -> Transplants:
        if self.piece > self.wide:
            raise BadInput("piece", self.piece, f"use at most the window's {self.wide} pixels")
        return self

    @property
    def covered(self) -> int:
        """Tokens that are covered, at least 1."""
        return max(1, round(self.cover * (self.wide // PATCH) ** 2))

    def cut(self, x: Tensor, draw: Draw) -> Views:
        """Cut views of pictures ``[B, 3, 32, 32]``, the rows of a draw."""
        coloured = draw.uniform("kind") < self.coloured
        first = self._pieces(x, coloured, draw)
        moved = places(draw.sub("second"), 2 * self.shift) - self.shift
        second = (first + moved).clamp(0, SIZE - self.piece)
        here, there = self._seats(draw)
        return Views(
            first=self._view(x, first, here, coloured, draw.sub("first"), turn=1),
            second=self._view(x, second, there, coloured, draw.sub("second"), turn=2),
            covered=tokens_covered(draw, (self.wide // PATCH) ** 2, self.covered),
            narrow=(),
        )

    def _pieces(self, x: Tensor, coloured: Tensor, draw: Draw) -> Tensor:
        """Places ``[B, 2]`` of the pieces in their own pictures."""
        bright = salient(x, self.piece, draw.uniform("bright"), self.sharpness)
        colour = x - x.mean(1, keepdim=True)
        garments = salient(colour, self.piece, draw.uniform("colour"), self.chroma)
        return torch.where(coloured[:, None], garments, bright)

    def _seats(self, draw: Draw) -> tuple[Tensor, Tensor]:
        """Places ``[B, 2]`` of the two pieces in their windows."""
        free = self.wide - self.piece
        here = places(draw.sub("here"), free)
        if self.drift is None:
            return here, places(draw.sub("there"), free)
        moved = places(draw.sub("there"), 2 * self.drift) - self.drift
        return here, (here + moved).clamp(0, free)

    def _view(
        self, x: Tensor, cut: Tensor, seat: Tensor, coloured: Tensor, draw: Draw, *, turn: int
    ) -> Tensor:
        """The piece in a window of the picture ``turn`` rows on, ``[B, 3, wide, wide]``."""
        around = windows(x.roll(-turn, 0), places(draw.sub("around"), SIZE - self.wide), self.wide)
        view = planted(around, windows(x, cut, self.piece), seat)
        view = greyed(view, (draw.uniform("grey") < self.grey) & ~coloured)
        return lit(view, draw, light=self.light, noise=self.noise)


def planted(ground: Tensor, piece: Tensor, seats: Tensor) -> Tensor:
    """``ground [B, C, H, W]`` with ``piece [B, C, s, s]`` at (row, column) ``seats [B, 2]``."""
    reach = torch.arange(piece.shape[-1], device=ground.device)
    rows = (seats[:, 0, None].to(ground.device) + reach)[:, :, None]
    columns = (seats[:, 1, None].to(ground.device) + reach)[:, None, :]
    batch = torch.arange(len(ground), device=ground.device)[:, None, None]
    mixed = ground.permute(0, 2, 3, 1).clone()
    mixed[batch, rows, columns] = piece.permute(0, 2, 3, 1)
    return mixed.permute(0, 3, 1, 2).contiguous()
