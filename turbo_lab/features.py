"""Features: what a discriminator looks through, frozen networks tapped at some of their blocks.

A features value is asked like a field, ``features(x, t, c)``, and answers with the tokens of every
tapped block, ``[B, N_k, D_k]``. Its parameters never learn; the gradient goes through to x. Images
or latents: each says what x is. Times are for networks that were trained on noised inputs.

Sources: projected GAN (Sauer et al. 2021, arXiv 2111.01007) for the idea, StyleGAN-T (Sauer et al.
2023, arXiv 2301.09515) for a self-supervised vision transformer, LADD (Sauer et al. 2024, arXiv
2403.12015) for the teacher, DMD2 (arXiv 2405.14867) for the fake score.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, layer_norm, pixel_unshuffle

from turbo_lab.adapters import Worn
from turbo_lab.errors import BadInput, MissingPiece
from turbo_lab.field import Condition, Field
from turbo_lab.streams import seed_for

HUB = "hub"
RANDOM = "random"
"""Values of `vit_features`' ``weights`` that are no file."""
HUB_SECONDS = 4.0
"""How long a hub may take to answer at all; without a network its own client tries for a minute."""
_HUB_FILES = (
    *("model.safetensors", "pytorch_model.bin"),
    *("open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
)
"""Names that timm knows weights by."""


class Features(Protocol):
    """Frozen, differentiable in x: images or latents to tokens ``[B, N_k, D_k]`` per tap."""

    @property
    def widths(self) -> tuple[int, ...]:
        """D_k of every tap."""

    def __call__(self, x: Tensor, t: Tensor, c: Any) -> tuple[Tensor, ...]:
        """Return the tokens of every tap, for ``x [B, ...]``, ``t [B]`` and a condition."""


def check_blocks(blocks: Sequence[int], depth: int) -> None:
    """Refuse blocks that are not there, that come twice or not in rising order, or no block.

    Raises:
        BadInput: one of these.
    """
    rising = list(blocks) == sorted(set(blocks))
    if not blocks or not rising or not 0 <= blocks[0] <= blocks[-1] < depth:
        raise BadInput("blocks", tuple(blocks), f"name blocks 0 to {depth - 1} in rising order")


# --- simple ones --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Pixels:
    """Patches as they are: each token is the pixels of a square. No network, no opinion.

    Args:
        patch: pixels of a side, a divisor of the image's.
        channels: of the image.
    """

    patch: int = 4
    channels: int = 3

    @property
    def widths(self) -> tuple[int, ...]:
        """Pixels of a patch."""
        return (self.channels * self.patch**2,)

    def __call__(self, x: Tensor, t: Tensor, c: Condition) -> tuple[Tensor, ...]:
        """Return the patches ``[B, HW / patch², C patch²]`` of ``x [B, C, H, W]``."""
        return (pixel_unshuffle(x, self.patch).flatten(2).transpose(1, 2),)


@dataclass(frozen=True, kw_only=True, eq=False)
class Normed:
    """Features whose tokens have mean 0 and variance 1; build it with `normed`."""

    features: Features

    @property
    def widths(self) -> tuple[int, ...]:
        """Those of the features inside."""
        return self.features.widths

    def __call__(self, x: Tensor, t: Tensor, c: Condition) -> tuple[Tensor, ...]:
        """Return the tokens, each normalised over its own numbers."""
        return tuple(layer_norm(a, a.shape[-1:]) for a in self.features(x, t, c))


def normed(features: Features) -> Normed:
    """Normalise every token over its width, as a transformer's next block would.

    Blocks differ in scale by orders of magnitude, and heads of bounded gain would hear the loud
    ones alone. Not for `Pixels`, where the contrast of a patch is evidence.
    """
    return Normed(features=features)


# --- vision transformers ------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class VitFeatures:
    """Patch tokens of a frozen timm ``VisionTransformer``; build it with `vit_features`.

    Attributes:
        net: the transformer, in eval mode.
        blocks: that are tapped, from 0, rising.
        size: pixels of a side that it sees.
        fit: how an image comes to that size, see `FITS`.
        mean, std: what the transformer's own training normalised images in [0, 1] with.
    """

    net: Any
    blocks: tuple[int, ...]
    size: int
    fit: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of the transformer, once per tap."""
        return (int(self.net.embed_dim),) * len(self.blocks)

    def __call__(self, x: Tensor, t: Tensor, c: Condition) -> tuple[Tensor, ...]:
        """Return tokens ``[B, N, D]`` per tap for images ``x [B, 3, H, W]`` in [-1, 1]."""
        found = self.net.forward_intermediates(
            self.seen(x),
            indices=list(self.blocks),
            stop_early=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        return tuple(found)

    def seen(self, x: Tensor) -> Tensor:
        """Return the images as the transformer wants them, ``[B, 3, size, size]``."""
        mean, std = (x.new_tensor(a)[:, None, None] for a in (self.mean, self.std))
        return ((FITS[self.fit](x, self.size) + 1) / 2 - mean) / std


def resized(x: Tensor, size: int) -> Tensor:
    """Images ``[B, C, H, W]`` at ``[B, C, size, size]``: area when smaller, bicubic when larger.

    Neither aliases: area averages what falls into a pixel, bicubic only adds pixels.
    """
    if x.shape[2:] == (size, size):
        return x
    if min(x.shape[2:]) >= size:
        return interpolate(x, (size, size), mode="area")
    return interpolate(x, (size, size), mode="bicubic", align_corners=False)


def centre_cropped(x: Tensor, size: int) -> Tensor:
    """The central square of images ``[B, C, H, W]``, at the size that is wanted.

    The square is of ``size`` where the image has as much, so that texture keeps its scale; a
    smaller image is cropped to its shorter side and enlarged.
    """
    side = min(size, *x.shape[2:])
    top, left = ((n - side) // 2 for n in x.shape[2:])
    return resized(x[:, :, top : top + side, left : left + side], size)


FITS: dict[str, Callable[[Tensor, int], Tensor]] = {"resize": resized, "crop": centre_cropped}
"""How an image comes to the size of a transformer. A crop at random is
`turbo_lab.augment.random_crop`, before the features: randomness comes in."""


def vit_features(
    name: str,
    blocks: Sequence[int],
    *,
    size: int | None = None,
    weights: str | Path = HUB,
    fit: str = "resize",
    seed: int = 0,
) -> VitFeatures:
    """Tap any vision transformer of timm, by its name there.

    Args:
        name: for example ``vit_small_patch14_dinov2.lvd142m``.
        blocks: that are tapped, from 0, rising.
        size: pixels of a side that it sees; None for those it was trained at. timm resamples the
            position embedding.
        weights: ``hub``, ``random``, or a safetensors file with timm's own names.
        fit: ``resize`` or ``crop``, see `FITS`.
        seed: of random weights; stream ("vit",).

    Raises:
        BadInput: no such model, or not a vision transformer; a block, a fit or a file that does
            not fit.
        MissingPiece: weights that are neither on this machine nor to be had from the hub.
    """
    import timm
    from timm.models.vision_transformer import VisionTransformer

    if not timm.is_model(name):
        raise BadInput("name", name, "use a model of timm, see timm.list_models('vit*')")
    if fit not in FITS:
        raise BadInput("fit", fit, f"choose one of {', '.join(FITS)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(seed, "vit"))
        net = _created(name, size, weights)
    if not isinstance(net, VisionTransformer):
        raise BadInput("name", name, f"this is a {type(net).__name__}; use a VisionTransformer")
    check_blocks(blocks, len(net.blocks))
    return VitFeatures(
        net=net.eval().requires_grad_(False),
        blocks=tuple(blocks),
        size=int(net.patch_embed.img_size[0]),
        fit=fit,
        mean=tuple(net.pretrained_cfg["mean"]),
        std=tuple(net.pretrained_cfg["std"]),
    )


def _created(name: str, size: int | None, weights: str | Path) -> nn.Module:
    """A model of timm with its weights; timm fits their names and positions."""
    import timm
    from safetensors import SafetensorError

    options: dict[str, Any] = {} if size is None else {"img_size": size}
    if weights == HUB:
        _check_hub(name)
    elif weights != RANDOM:
        options["pretrained_cfg_overlay"] = {"file": str(_weight_file(Path(weights)))}
    try:
        return timm.create_model(name, pretrained=weights != RANDOM, num_classes=0, **options)
    except TypeError as error:  # img_size of a model that has none
        raise BadInput("name", name, "use a VisionTransformer of timm") from error
    except AssertionError as error:  # a size that is no multiple of the patch
        raise BadInput("size", size, str(error) or "use a multiple of the patch") from error
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if weights == RANDOM:
            raise
        raise _no_weights(name, weights, type(error).__name__) from error


def _weight_file(path: Path) -> Path:
    if path.suffix != ".safetensors":
        raise BadInput("weights", str(path), "use hub, random or a safetensors file")
    if not path.is_file():
        raise MissingPiece(f"There is no file {path} with the weights of a vision transformer.")
    return path


def _check_hub(name: str) -> None:
    """Refuse weights that are not in the hub's cache on this machine where no hub answers.

    Raises:
        MissingPiece: after `HUB_SECONDS` at most.
    """
    from huggingface_hub import hf_hub_url, try_to_load_from_cache
    from timm.models import get_pretrained_cfg

    known = get_pretrained_cfg(name)
    if known is None or not known.hf_hub_id:
        return
    repository, _, revision = known.hf_hub_id.partition("@")
    files = (known.hf_hub_filename or _HUB_FILES[0], *_HUB_FILES)
    at = {"repo_id": repository, "revision": revision or None}
    if any(isinstance(try_to_load_from_cache(filename=file, **at), str) for file in files):
        return
    said: list[str] = []
    # In a thread, because a name that is looked up heeds no timeout.
    asking = Thread(target=_ask, args=(hf_hub_url(filename=files[0], **at), said), daemon=True)
    asking.start()
    asking.join(HUB_SECONDS)
    why = said[0] if said else f"no answer in {HUB_SECONDS:g} seconds"
    if why:
        raise _no_weights(name, HUB, why)


def _ask(url: str, said: list[str]) -> None:
    """Ask a hub for a file's size, and add what went wrong: nothing if it answered anything."""
    from huggingface_hub import get_hf_file_metadata
    from huggingface_hub.errors import HfHubHTTPError

    try:
        get_hf_file_metadata(url, timeout=HUB_SECONDS)
        said.append("")
    except HfHubHTTPError as error:  # that there is no such file, say, is for timm to find out
        said.append(f"error {code}" if (code := error.response.status_code) >= 500 else "")
    except Exception as error:  # of the library that the hub's client has for HTTP, whichever it is
        said.append(type(error).__name__)


def _no_weights(name: str, weights: str | Path, why: str) -> MissingPiece:
    if weights == HUB:
        return MissingPiece(
            f"The weights of {name} are not on this machine and the hub does not give them ({why}):"
            " give weights= a safetensors file, or go online once."
        )
    return MissingPiece(f"The file {weights} does not hold the weights of {name} ({why}).")


# --- taps in a velocity field -------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Taps:
    """Hidden image tokens of a field's own blocks at ``(x_t, t, c)``; build it with `block_taps`.

    Attributes:
        field: that is called; one forward.
        modules: that are listened to during the call, and left alone after it.
        widths: of their tokens.
    """

    field: Field
    modules: tuple[nn.Module, ...]
    widths: tuple[int, ...]

    def __call__(self, x: Tensor, t: Tensor, c: Condition) -> tuple[Tensor, ...]:
        """Return the image tokens after every module, float32, for latents ``x [B, ...]`` at t."""
        kept: dict[int, Tensor] = {}
        with ExitStack() as stack:
            for k, module in enumerate(self.modules):
                stack.callback(module.register_forward_hook(_keeping(kept, k)).remove)
            self.field(x, t, c)
        return tuple(kept[k] for k in range(len(self.modules)))


def _keeping(kept: dict[int, Tensor], k: int) -> Callable[[nn.Module, Any, Any], None]:
    def keep(module: nn.Module, given: Any, answer: Any) -> None:
        # A dual-stream block returns (text, image). Heads are float32, a large base is bfloat16.
        kept[k] = answer[-1].float()

    return keep


def block_taps(player: Worn, blocks: Sequence[int] | None = None) -> Taps:
    """Tap a host's Qwen-Image transformer while it wears an adapter, or nothing.

    The teacher is ``host.bare``. A fake score that learns is frozen here by `turbo_lab.fit`, which
    lets only those learn whose turn it is; the features move with it from round to round.

    Args:
        player: who is asked.
        blocks: of the transformer, from 0, rising; None for all.

    Raises:
        BadInput: a block that is not there.
    """
    transformer: Any = player.host.net.get_submodule(player.host.part)
    depth = len(transformer.transformer_blocks)
    blocks = range(depth) if blocks is None else blocks
    check_blocks(blocks, depth)
    return Taps(
        field=player,
        modules=tuple(transformer.transformer_blocks[k] for k in blocks),
        widths=(int(transformer.inner_dim),) * len(blocks),
    )
