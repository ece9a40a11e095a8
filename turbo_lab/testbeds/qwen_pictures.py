"""Real images for Qwen-Image: its VAE, and a folder of pictures as cached latents."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from turbo_lab.errors import BadInput
from turbo_lab.store import Store
from turbo_lab.testbeds.qwen_buckets import Shape, nearest
from turbo_lab.testbeds.qwen_data import PER_SHARD, Make, Rows, cached_rows, chunks, release
from turbo_lab.testbeds.qwen_files import Bundle, load_vae
from turbo_lab.testbeds.qwen_sources import IMAGES, Picture, opened

DAMAGED = "it is damaged: it cannot be read to its end"


@dataclass(frozen=True, kw_only=True)
class Codec:
    """The VAE between images and normalised latents."""

    vae: Any

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images ``[B, 3, H, W]`` in [-1, 1] to latents ``[B, 16, H/8, W/8]``, float32.

        ``(mode - mean) / std`` with the VAE's own mean and std per channel.
        """
        frames = images.to(self.vae.device, self.vae.dtype)[:, :, None]
        mode = self.vae.encode(frames).latent_dist.mode()[:, :, 0].float()
        mean, std = self._moments(mode)
        return (mode - mean) / std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents ``[B, 16, h, w]`` to images ``[B, 3, 8h, 8w]`` in [-1, 1], float32."""
        latents = latents.to(self.vae.device)
        mean, std = self._moments(latents)
        frames = (latents * std + mean).to(self.vae.dtype)[:, :, None]
        images: Tensor = self.vae.decode(frames, return_dict=False)[0][:, :, 0]
        return images.float()

    def _moments(self, like: Tensor) -> tuple[Tensor, Tensor]:
        config = self.vae.config
        both = (torch.tensor(numbers) for numbers in (config.latents_mean, config.latents_std))
        mean, std = (numbers.to(like).view(1, -1, 1, 1) for numbers in both)
        return mean, std


def find_images(folder: Path, *, size: int) -> tuple[Path, ...]:
    """Return the images of a folder in the order of their names.

    Raises:
        BadInput: see `list_images` and `check_pictures`.
    """
    files = list_images(folder)
    check_pictures(files, size=size)
    return files


def list_images(folder: Path) -> tuple[Path, ...]:
    """Return the images of a folder in the order of their names, and look into none.

    Raises:
        BadInput: there is no such folder, or no image in it.
    """
    kinds = ", ".join(IMAGES)
    if not folder.is_dir():
        raise BadInput("images", str(folder), f"name a folder with {kinds} files")
    files = tuple(sorted(f for f in folder.iterdir() if f.suffix.lower() in IMAGES))
    if not files:
        raise BadInput("images", str(folder), f"it holds none of {kinds}")
    return files


def check_pictures(pictures: Sequence[Picture], *, size: int) -> None:
    """Refuse pictures that cannot be read, or are smaller than ``size`` pixels on a side.

    Raises:
        BadInput: naming the first of them.
    """
    for picture in pictures:
        width, height = _looked(picture, _sides)
        if min(width, height) < size:
            shape = f"it has {width} x {height} pixels, and both must be at least {size}"
            raise BadInput("images", str(picture), shape)


def assigned(pictures: Sequence[Picture], shapes: Sequence[Shape]) -> tuple[Shape, ...]:
    """Return the bucket of each picture; none is enlarged to fill its bucket.

    Raises:
        BadInput: naming the first picture that cannot be read, or is smaller than its bucket.
    """
    found = []
    for picture in pictures:
        width, height = _looked(picture, _upright)
        shape = nearest(width, height, shapes)
        if width < shape.width or height < shape.height:
            small = f"it has {width} x {height} pixels, and its bucket has {shape}"
            raise BadInput("images", str(picture), small)
        found.append(shape)
    return tuple(found)


def _looked(picture: Picture, look: Callable[[Any], tuple[int, int]]) -> tuple[int, int]:
    """What a look at an image says of it.

    Raises:
        BadInput: it cannot be read.
    """
    from PIL import Image

    with (
        named("images", picture, "it is no image that can be read"),
        opened(picture) as raw,
        Image.open(raw) as image,
    ):
        return look(image)


@contextmanager
def named(parameter: str, picture: Picture, why: str) -> Iterator[None]:
    """Say in one sentence which picture cannot be read.

    Raises:
        BadInput: Pillow finds it damaged, or too large to be opened.
    """
    from PIL.Image import DecompressionBombError

    try:
        yield
    except DecompressionBombError:
        raise BadInput(parameter, str(picture), "it has more pixels than can be opened") from None
    except (OSError, SyntaxError, ValueError):  # what Pillow says of a damaged one
        raise BadInput(parameter, str(picture), why) from None


def _sides(image: Any) -> tuple[int, int]:
    """Width and height as stored, from its first bytes."""
    width, height = image.size
    return width, height


def _upright(image: Any) -> tuple[int, int]:
    """Width and height as it is shown. Of a PNG all is read: the note may stand behind pixels."""
    from PIL import ExifTags

    width, height = image.size
    turned = image.getexif().get(ExifTags.Base.Orientation, 1) in range(5, 9)
    return (height, width) if turned else (width, height)


def file_hash(file: Picture) -> str:
    """Return the SHA-256 of a file."""
    with opened(file) as raw:
        # What its annotation asks for is more than what it uses.
        return hashlib.file_digest(raw, "sha256").hexdigest()  # type: ignore[arg-type]


def encoded(
    bundle: Bundle, files: Sequence[Picture], *, shape: Shape, store: Store, device: str
) -> Rows:
    """Return the latents ``[16, height/8, width/8]`` of images, from the store.

    Args:
        bundle: the pipeline; its VAE is loaded only if a shard is missing, and freed.
        files: images, each as large as covers the shape, and cut to its middle.
        shape: pixels.
        store: where shards live.
        device: where the VAE runs.
    """
    sides = {"size": shape.width} if shape.width == shape.height else asdict(shape)
    settings = {**sides, "device": device, "vae": bundle.identity("vae")}
    hashes = [file_hash(file) for file in files]
    shards = [list(some) for some in chunks(hashes, PER_SHARD["latents"])]
    specs = [{**settings, "images": some} for some in shards]
    rows = cached_rows(
        "latents", specs, len(files), partial(_encoder_of, bundle, device, files, shape), store
    )
    release()
    return rows


def _encoder_of(bundle: Bundle, device: str, files: Sequence[Picture], shape: Shape) -> Make:
    codec = Codec(vae=load_vae(bundle, device))
    return lambda numbers: {
        k: codec.encode(fitted(files[k], shape)[None])[0].cpu() for k in numbers
    }


def fitted(file: Picture, shape: Shape) -> Tensor:
    """Read an image: the middle of it of this ratio, resized, ``[3, height, width]`` in [-1, 1].

    Raises:
        BadInput: it cannot be read to its end.
    """
    import numpy as np
    from PIL import Image, ImageOps

    with named("images", file, DAMAGED), opened(file) as raw, Image.open(raw) as stored:
        image = ImageOps.exif_transpose(stored).convert("RGB")
    sides = (shape.width, shape.height)
    cut = ImageOps.fit(image, sides, method=Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(cut)).permute(2, 0, 1).float() / 127.5 - 1
