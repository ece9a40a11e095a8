"""Read the sign back: template matching of the hundred plates over all positions.

Thresholds were chosen on the ``select`` stream (1,000 scenes), never on ``eval``:

- `CRISP`: the fit (R squared) of a fresh sign is 1.00, of one with noise of standard deviation
  0.04 at least 0.99; a half transparent sign reaches 0.72 at most (white on the palest sky), one
  blurred by 0.6 px 0.74, by 0.7 px 0.61.
- `CLEAR`: the best other number falls at least 0.061 behind on fresh signs, noise included; two
  numbers painted half over each other tie.
- `FOUND`: of 4,000 fresh scenes 4 have a place away from the sign that correlates at 0.60, none
  at 0.62; 99.9% of second signs of opacity 0.4 pasted anywhere have 0.64, all of opacity 0.5 at
  least 0.84. Smears without the shape of a plate are not counted: see the rate of no sign at all.
- `GLUED`: a plate one digit to the side of a fresh sign shares half of it and correlates at 0.78
  at most (4,000 scenes).
- `OPACITY`: keeps faint look-alikes of the grain out; a sign of opacity 0.4 has at least 0.25.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from turbo_lab.measure.views import unit
from turbo_lab.postcards.render import INK, PLATE, SIZE, glyphs, plates
from turbo_lab.postcards.scenes import SIGN_HEIGHT, SIGN_WIDTH

CRISP = 0.72
CLEAR = 0.03
FOUND = 0.64
GLUED = 0.80
OPACITY = 0.20
APART = (5, 4)
"""Plates closer than this in x and in y are one plate."""
MOST_SIGNS = 8
DIGIT = 4
"""Pixels from one digit of a plate to the next."""

_AREA = SIGN_HEIGHT * SIGN_WIDTH
_ROWS, _COLUMNS = SIZE - SIGN_HEIGHT + 1, SIZE - SIGN_WIDTH + 1


@dataclass(frozen=True, kw_only=True)
class SignReading:
    """What the signs say; every field has the batch first."""

    tens: Tensor  # [B] long
    units: Tensor  # [B] long
    x: Tensor  # [B] long, left column of the best plate
    y: Tensor  # [B] long, top row
    match: Tensor  # [B] normalised correlation with the best plate, at most 1
    margin: Tensor  # [B] score minus that of the best other number in the same place
    score: Tensor  # [B] R squared of the painted plate: blur, ghosting and fading lower it
    count: Tensor  # [B] long, separate plates, ghosts included
    third: Tensor  # [B] bool, another digit stands against the best plate, left or right of it
    cover: Tensor  # [B, 32, 32] bool, pixels of the best plate and of every other plate found

    @property
    def crisp(self) -> Tensor:
        """Whether the best plate is sharp, opaque and unmistakable enough to be read ``[B]``."""
        return (self.score >= CRISP) & (self.margin >= CLEAR)


def read_signs(images: Tensor) -> SignReading:
    """Find the sign that correlates best with one of the hundred plates, and count signs.

    With a window p, plates T_k, their centred versions p', T_k', over three channels:
    ``match = max_k <p', T_k'> / (|p'| |T_k'|)`` and ``score = 1 - |p - T_k|^2 / |T_k'|^2``.

    Args:
        images: ``[B, 3, 32, 32]`` in [-1, 1].

    Raises:
        BadInput: another shape, or values that are not finite.
    """
    picture = unit(images)
    match, number, opacity = _correlate(picture)
    best, place = match.flatten(1).max(1)
    x, y = place % _COLUMNS, place // _COLUMNS
    k = number.flatten(1).gather(1, place[:, None])[:, 0]
    score, margin = _fit(picture, x, y, k)
    opaque = torch.where(opacity >= OPACITY, match, 0.0)
    count, cover = _count(torch.where(match >= FOUND, opaque, 0.0))
    return SignReading(
        tens=k // 10,
        units=k % 10,
        x=x,
        y=y,
        match=best,
        margin=margin,
        score=score,
        count=count,
        third=_third(opaque, x, y),
        cover=cover | _box(x, y),
    )


def _spread(picture: Tensor) -> Tensor:
    """Norm ``[B, 26, 24]`` of every plate-sized window, channels centred one by one."""
    box = torch.ones(1, 1, SIGN_HEIGHT, SIGN_WIDTH)
    channels = picture.reshape(-1, 1, SIZE, SIZE)
    total, square = conv2d(channels, box), conv2d(channels**2, box)
    variance = (square - total**2 / _AREA).reshape(-1, 3, _ROWS, _COLUMNS)
    return variance.clamp_min(0).sum(1).add(1e-6).sqrt()


@cache
def _digit_filters() -> tuple[Tensor, Tensor]:
    """Centred filters of single digits ``[20, 1, 7, 9]`` and norms ``[10, 10]`` of their sums.

    A centred plate is the sum of one filter per digit: white minus ink, less its mean.
    """
    ink = torch.zeros(20, SIGN_HEIGHT, SIGN_WIDTH)
    ink[:10, 1:6, 1:4] = glyphs()
    ink[10:, 1:6, 5:8] = glyphs()
    filters = (PLATE - INK) * (ink.mean((1, 2), keepdim=True) - ink)
    pairs = filters[:10, None] + filters[None, 10:]
    return filters[:, None], pairs.flatten(2).norm(dim=2)


def _correlate(picture: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Best match at each place, its number and its opacity, each ``[B, 26, 24]``."""
    filters, norm = _digit_filters()
    single = conv2d(picture.reshape(-1, 1, SIZE, SIZE), filters)
    single = single.reshape(-1, 3, 20, _ROWS, _COLUMNS)
    joint = single.sum(1)
    pairs = joint[:, :10, None] + joint[:, None, 10:]
    pairs = pairs.div_((norm * 3**0.5)[..., None, None]).flatten(1, 2)
    product, number = pairs.max(1)
    tens, units = number // 10, number % 10 + 10
    chosen = single.gather(2, tens[:, None, None].expand(-1, 3, 1, -1, -1)) + single.gather(
        2, units[:, None, None].expand(-1, 3, 1, -1, -1)
    )
    # A plate is white and black: its weakest channel is as strong as the others.
    opacity = chosen[:, :, 0].amin(1) / norm.flatten()[number] ** 2
    return product / _spread(picture), number, opacity


def _fit(picture: Tensor, x: Tensor, y: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
    """R squared of the plate, and how far the best other number's falls behind, both ``[B]``."""
    rows = (y[:, None] + torch.arange(SIGN_HEIGHT))[:, :, None]
    columns = (x[:, None] + torch.arange(SIGN_WIDTH))[:, None, :]
    window = picture.permute(0, 2, 3, 1)[torch.arange(len(x))[:, None, None], rows, columns]
    error = (window[:, None] - plates()[..., None]).square().sum((2, 3, 4))
    template = plates()[number]
    spread = 3 * (template - template.mean((1, 2), keepdim=True)).square().sum((1, 2))
    own = error.gather(1, number[:, None])[:, 0]
    other = error.scatter(1, number[:, None], torch.inf).amin(1)
    return 1 - own / spread, (other - own) / spread


def _count(strength: Tensor) -> tuple[Tensor, Tensor]:
    """Take the strongest plate, silence its neighbourhood, repeat."""
    count = torch.zeros(len(strength), dtype=torch.long)
    cover = torch.zeros(len(strength), SIZE, SIZE, dtype=torch.bool)
    columns, rows = torch.arange(_COLUMNS), torch.arange(_ROWS)
    for _ in range(MOST_SIGNS):
        peak, place = strength.flatten(1).max(1)
        found = peak > 0
        if not bool(found.any()):
            break
        x, y = place % _COLUMNS, place // _COLUMNS
        count += found
        cover |= _box(x, y) & found[:, None, None]
        near_x = (columns - x[:, None]).abs() < APART[0]
        near_y = (rows - y[:, None]).abs() < APART[1]
        strength = strength.masked_fill(near_y[:, :, None] & near_x[:, None, :], 0.0)
    return count, cover


def _third(match: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Whether there is a plate one digit to the left or right of the best one, too ``[B]``.

    `_count` takes both for one: fresh signs have weaker echoes of themselves there. ``match`` is
    ``[B, 26, 24]``, 0 where a plate is not opaque; ``x`` and ``y`` are the best one's corner.
    """
    row = match[torch.arange(len(y)), y]
    beside = pad(row, (DIGIT, DIGIT))
    either = [beside.gather(1, (x + DIGIT + side)[:, None])[:, 0] for side in (-DIGIT, DIGIT)]
    return torch.stack(either).amax(0) >= GLUED


def _box(x: Tensor, y: Tensor) -> Tensor:
    grid = torch.arange(SIZE)
    wide = (grid >= x[:, None]) & (grid < x[:, None] + SIGN_WIDTH)
    high = (grid >= y[:, None]) & (grid < y[:, None] + SIGN_HEIGHT)
    return high[:, :, None] & wide[:, None, :]
