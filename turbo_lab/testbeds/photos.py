"""Photographs as postcards: squares cut from pictures of a folder, or from any picture in memory.

They are another real side for a critic. Nothing is known about them, neither caption nor truth:
their condition is the null caption.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from turbo_lab.errors import BadInput, MissingPiece
from turbo_lab.features import resized
from turbo_lab.fit import Batch
from turbo_lab.postcards import SIZE
from turbo_lab.postcards.captions import null_tokens
from turbo_lab.streams import Draw
from turbo_lab.testbeds.postcards import encode
from turbo_lab.testbeds.qwen_pictures import DAMAGED, file_hash, find_images, named

Place = Literal["random", "centre"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Photos:
    """Pictures, and how a square is cut from one.

    Args:
        pictures: ``[3, H, W]`` each, uint8, all in memory; both sides at least 32 and ``side``.
        side: pixels of the square before it comes to 32 by area; None for the shorter side of
            each picture, which shows most of it and has the finest texture averaged away.
        place: anywhere in the picture, or its centre.

    Raises:
        BadInput: no picture, or one that is smaller than the square or than 32 pixels.
    """

    pictures: tuple[Tensor, ...]
    side: int | None = None
    place: Place = "random"

    def __post_init__(self) -> None:
        least = max(SIZE, self.side or 0)
        if (self.side or SIZE) < SIZE:
            raise BadInput("side", self.side, f"use at least {SIZE} pixels")
        if not self.pictures or min(min(p.shape[1:]) for p in self.pictures) < least:
            shapes = [tuple(p.shape) for p in self.pictures]
            raise BadInput("pictures", shapes, f"use pictures of at least {least} pixels a side")

    def crops(self, draw: Draw) -> Tensor:
        """Squares ``[rows, 3, 32, 32]`` in [-1, 1]: which picture and where is from the draw."""
        chosen = draw.integers("picture", len(self.pictures))
        down, right = draw.uniform("down"), draw.uniform("right")
        rows = zip(chosen.tolist(), down.tolist(), right.tolist(), strict=True)
        return torch.cat([self._crop(self.pictures[k], y, x) for k, y, x in rows])

    def _crop(self, picture: Tensor, y: float, x: float) -> Tensor:
        """The square whose corner lies at these shares of the room there is, ``[1, 3, 32, 32]``."""
        side = self.side or min(picture.shape[1:])
        room = [n - side for n in picture.shape[1:]]
        if self.place == "centre":
            top, left = (n // 2 for n in room)
        else:
            top, left = int(y * (room[0] + 1)), int(x * (room[1] + 1))
        square = picture[None, :, top : top + side, left : left + side]
        return resized(square.float() / 127.5 - 1, SIZE)


def photo_batch(photos: Photos, draw: Draw, device: torch.device | str = "cpu") -> Batch:
    """Squares for the rows of a draw as latents ``[rows, 12, 16, 16]``, under the null caption."""
    x = encode(photos.crops(draw))
    return Batch(x.to(device), null_tokens(len(x)).to(device))


# --- a folder of them ---------------------------------------------------------------------------


def folder_digest(folder: Path, *, side: int | None = None) -> str:
    """Name the pictures of a folder by what is in them: 16 hex digits of SHA-256.

    Neither the folder's place nor the names of its files count.

    Raises:
        BadInput: no such folder, no picture in it, or one that cannot be read or is too small.
    """
    hashes = sorted(file_hash(file) for file in find_images(folder, size=side or SIZE))
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()[:16]


@lru_cache(maxsize=1)
def load_photos(folder: str, digest: str, side: int | None, place: Place) -> Photos:
    """Read all pictures of a folder (png, jpg, webp) into memory, in an order of their contents.

    Args:
        folder: where they are.
        digest: of `folder_digest`, what they have to be.
        side: of `Photos`.
        place: of `Photos`.

    Raises:
        MissingPiece: there is no such folder here.
        BadInput: a picture that cannot be read, or the contents are others than they were.
    """
    if not folder or not Path(folder).is_dir():
        raise MissingPiece(
            f"The real pictures {digest} are a folder that is not here ({folder or 'unnamed'}): "
            "name it again, see turbo_lab.recipes.with_folder."
        )
    if folder_digest(Path(folder), side=side) != digest:
        allowed = f"its pictures are no longer those of this recipe, {digest}; make it anew"
        raise BadInput("folder", folder, allowed)
    files = sorted(find_images(Path(folder), size=side or SIZE), key=file_hash)
    return Photos(pictures=_read_all(files), side=side, place=place)


def _read_all(files: Sequence[Path]) -> tuple[Tensor, ...]:
    return tuple(read_photo(file) for file in files)


def read_photo(file: Path) -> Tensor:
    """Read a picture as ``[3, H, W]`` uint8, upright, in RGB.

    Raises:
        BadInput: it cannot be read to its end.
    """
    import numpy as np
    from PIL import Image, ImageOps

    with named("folder", file, DAMAGED), Image.open(file) as opened:
        image = ImageOps.exif_transpose(opened).convert("RGB")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
