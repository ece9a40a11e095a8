"""What the GAN term of a stage on Qwen-Image is made of: features, heads, and decoded crops.

Decoding a whole picture with a gradient costs more memory than a student's own pass. So of each
sample a square is cut out at random, in latents, decoded by the collapsed decoder, and each layer
of it is computed again in the backward pass. Both sides of the critic are cut by one draw and go
through the same decoder, real images included: what the VAE adds to a picture is no evidence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from turbo_lab.adapters import Worn
from turbo_lab.augment import Augment, augmented, random_crop
from turbo_lab.errors import BadInput, MissingPiece
from turbo_lab.features import HUB, Features, VitFeatures, block_taps, normed, vit_features
from turbo_lab.fit import Player
from turbo_lab.gan_pieces import GanPieces
from turbo_lab.heads import FeatureCritic, Head, spawn_heads
from turbo_lab.methods.gan import Batches, as_it_is
from turbo_lab.recipes.qwen_models import QwenGan
from turbo_lab.streams import Draw
from turbo_lab.vae_decode import Decoder, picture_decoder


@dataclass(frozen=True, kw_only=True, eq=False)
class Crops:
    """Latents to pictures of a part of them, differentiable: the ``show`` of a GAN term.

    Attributes:
        decoder: the collapsed one, not compiled; its tiles and numbers at once do not count here.
        side: latents of a square.
        change: augmentation of the pictures.
    """

    decoder: Decoder
    side: int
    change: Augment = as_it_is

    def __call__(self, x: Tensor, draw: Draw) -> Tensor:
        """Latents ``[B, 16, h, w]`` to pictures ``[B, 3, 8 side, 8 side]``, float32.

        They are not clamped to [-1, 1]: a clamp has no gradient where it acts, and what is out of
        range is evidence that a picture is not real.
        """
        cut = random_crop(x, draw, self.side)
        mean, std = (a.float() for a in (self.decoder.mean, self.decoder.std))
        z = (cut * std + mean).to(self.decoder.mean.dtype)
        for layer in cast(nn.Sequential, self.decoder.net):
            again = z.requires_grad and torch.is_grad_enabled()
            z = checkpoint(layer, z, use_reentrant=False) if again else layer(z)
        return self.change(z.float(), draw)


def opened_eye(gan: QwenGan, weights: str | Path, *, seed: int) -> VitFeatures:
    """Load the vision transformer of a critic; small, and asked for before anything large.

    Args:
        gan: names it, the blocks that are tapped, and the pixels that it sees.
        weights: ``hub``, ``random``, or a safetensors file with timm's own names.
        seed: of random weights.

    Raises:
        BadInput: no such model or block, or a number of pixels that it cannot see.
        MissingPiece: weights that are neither on this machine nor to be had from the hub.
    """
    blocks = gan.blocks or tuple(range(depth_of(gan.vit)))
    try:
        return vit_features(gan.vit, blocks, size=gan.view, weights=weights, fit="crop", seed=seed)
    except MissingPiece as error:
        if weights != HUB:
            raise
        raise MissingPiece(
            f"The critic looks through {gan.vit}, whose weights are neither on this machine nor to "
            "be had from the hub: name a safetensors file of them by --vit, or go online once."
        ) from error


def qwen_gan_pieces(
    gan: QwenGan,
    *,
    real: Batches,
    players: Mapping[str, Player],
    vae: Callable[[], Any],
    eye: VitFeatures | None,
    seed: int,
    device: str,
) -> GanPieces:
    """Build the critic of a GAN term.

    Args:
        gan: what the recipe says.
        real: the critic's real side, latents.
        players: the plain ``teacher``, and a ``fake`` where there is one, for taps.
        vae: loads the VAE for a critic that looks at pictures; its decoder is kept.
        eye: see `opened_eye`; None for taps.
        seed: of the heads.
        device: where all of it runs.

    Raises:
        BadInput: a block that is not there.
    """
    features: Features
    if gan.features == "dino":
        assert eye is not None
        eye.net.to(device)
        features, decoder = eye, picture_decoder(vae())
        show: Any = Crops(decoder=decoder, side=gan.crop, change=augmented(gan.augment))
    else:
        features, show = block_taps(cast(Worn, players[gan.features]), gan.blocks or None), as_it_is
    heads = spawn_heads(features.widths, seed=seed, width=gan.width)
    critic = FeatureCritic(features=normed(features), heads=heads.to(device))
    return GanPieces(gan=gan, critic=critic, real=real, show=show)


# --- how large it is ----------------------------------------------------------------------------


def depth_of(vit: str) -> int:
    """Blocks of a vision transformer of timm.

    Raises:
        BadInput: there is no such model, or it is another kind.
    """
    return len(_empty(vit).blocks)


def critic_bytes(gan: QwenGan, *, width: int, depth: int, decoder: int, each: int) -> int:
    """Bytes that a critic holds: what it looks through, and its heads with their optimiser.

    Args:
        gan: what the recipe says.
        width: of the transformer, for taps.
        depth: its blocks.
        decoder: parameters of the collapsed decoder.
        each: bytes of one of them.
    """
    frozen = 0
    if gan.features == "dino":
        vit = _empty(gan.vit)
        width, depth = int(vit.embed_dim), len(vit.blocks)
        frozen = 4 * sum(p.numel() for p in vit.parameters()) + each * decoder
    with torch.device("meta"):
        head = sum(p.numel() for p in Head(width, gan.width, False).parameters())
    return frozen + 4 * 4 * head * (len(gan.blocks) or depth)  # and gradients, and two moments


def _empty(vit: str) -> Any:
    """A vision transformer without memory."""
    import timm
    from accelerate import init_empty_weights
    from timm.models.vision_transformer import VisionTransformer

    if not timm.is_model(vit):
        raise BadInput("vit", vit, "use a model of timm, see timm.list_models('vit*')")
    with init_empty_weights():
        net = timm.create_model(vit, pretrained=False, num_classes=0)
    if not isinstance(net, VisionTransformer):
        raise BadInput("vit", vit, f"this is a {type(net).__name__}; use a VisionTransformer")
    return net
