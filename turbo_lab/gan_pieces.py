"""What the GAN term of a stage on postcards is made of: features, heads, and how a sample is shown.

Latents are shown as images to what looks at images; decoding is exact and has a gradient. What
looks at latents gets them back after the augmentation, which is for images either way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from turbo_lab.adapters import Worn
from turbo_lab.augment import augmented
from turbo_lab.features import Features, Pixels, block_taps, normed
from turbo_lab.fit import Objective, Player
from turbo_lab.heads import FeatureCritic, spawn_heads
from turbo_lab.methods.gan import Batches, WithGan
from turbo_lab.postcards.captions import TOKENS, VOCABULARY
from turbo_lab.recipes import Gan
from turbo_lab.recipes.qwen_models import QwenGan
from turbo_lab.store import Store
from turbo_lab.streams import Draw
from turbo_lab.testbeds.postcards import decode, encode

PIXELS = 8
"""Pixels of a side of a patch of ``pixels``: four periods of the finest grain."""
LATENT = ("teacher", "fake")
"""Features that look at latents; all others look at images."""


@dataclass(frozen=True, kw_only=True)
class GanPieces:
    """A critic and its real side, to be put around a method by `around`.

    Attributes:
        gan: what the recipe says.
        critic: heads on features.
        real: samples of the critic's real side, as latents.
        show: latents to what the features look at.
    """

    gan: Gan | QwenGan
    critic: FeatureCritic
    real: Batches
    show: Callable[[Tensor, Draw], Tensor]

    def around(self, method: Objective) -> WithGan:
        """Add the GAN term to a method.

        Raises:
            BadInput: it does not generate, or has a critic of its own.
        """
        gan = self.gan
        return WithGan(
            method=method,  # type: ignore[arg-type]  # WithGan looks
            critic=self.critic,
            real=self.real,
            weight=gan.weight or 0.0,
            balance=gan.balance,
            loss=gan.loss,
            r1=gan.r1,
            r1_step=gan.r1_step,
            noise_range=gan.noise_range,
            show=self.show,
        )


def gan_pieces(
    gan: Gan,
    *,
    real: Batches,
    players: Mapping[str, Player],
    store: Store,
    seed: int,
    device: str,
) -> GanPieces:
    """Build the critic of a GAN term.

    Args:
        gan: what the recipe says.
        real: the critic's real side, latents.
        players: the plain ``teacher``, and a ``fake`` where there is one, for taps.
        store: where the mini-DINO is.
        seed: of the heads, and of a random transformer.
        device: where all of it runs.

    Raises:
        BadInput: a block that is not there.
    """
    features = features_of(gan, players=players, store=store, seed=seed, device=device)
    captions = (VOCABULARY, TOKENS) if gan.heads == "caption" else None
    heads = spawn_heads(features.widths, seed=seed, width=gan.width, captions=captions)
    critic = FeatureCritic(features=features, heads=heads.to(device))
    return GanPieces(gan=gan, critic=critic, real=real, show=_showing(gan))


def features_of(
    gan: Gan, *, players: Mapping[str, Player], store: Store, seed: int, device: str
) -> Features:
    """Return what a critic looks through; tokens are normalised unless they are pixels."""
    if gan.features == "pixels":
        return Pixels(patch=PIXELS)
    if gan.features in LATENT:
        player = players[gan.features]
        assert isinstance(player, Worn)
        return normed(block_taps(player, gan.blocks or None))
    from turbo_lab.dino import dino_features, random_features

    blocks = gan.blocks or None
    tapped = (
        dino_features(store, blocks=blocks)
        if gan.features == "dino"
        else random_features(seed, blocks=blocks)
    )
    tapped.net.to(device)
    return normed(tapped)


def _showing(gan: Gan) -> Callable[[Tensor, Draw], Tensor]:
    change, latent = augmented(gan.augment), gan.features in LATENT

    def show(x: Tensor, draw: Draw) -> Tensor:
        images = change(decode(x), draw)
        return encode(images) if latent else images

    return show
