"""The postcards testbed: 32x32 scenes on a miniature of Qwen-Image's own transformer.

Pixels become "latents" by pixel-unshuffle, latents become tokens by Qwen's own 2x2 packing, so
the network is the stock ``QwenImageTransformer2DModel`` of diffusers, only smaller.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from dataclasses import field as dataclass_field
from itertools import product

import torch
from pydantic import BaseModel, ConfigDict
from pydantic import Field as Bound
from torch import Tensor, nn

from turbo_lab.errors import BadInput
from turbo_lab.field import Field, frozen, guided
from turbo_lab.fit import Batch
from turbo_lab.path import time_grid
from turbo_lab.postcards import SIZE, Caption, Scenes, caption_tokens, draw_scenes, render
from turbo_lab.postcards.captions import VOCABULARY, null_tokens
from turbo_lab.postcards.render import render_busts, render_posters
from turbo_lab.sample import draw_samples
from turbo_lab.streams import Draw, noise, seed_for

PATCH = 2  # of the pixel-unshuffle and of Qwen's packing: a token is a 4x4 pixel patch
LATENT_CHANNELS = 3 * PATCH**2
LATENT_SIZE = SIZE // PATCH
LATENT_SHAPE = (LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE)
BLOCKS = "transformer.transformer_blocks."
"""Names of the weights of the blocks begin so; the number of the block follows."""
BUSTS_FROM = 40
"""Figures of busts are scenes from 2^40 on: no training sees as many postcards."""


class NetSize(BaseModel):
    """Size of the miniature transformer; the proportions are Qwen-Image's to choose from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layers: int = Bound(4, ge=1, le=60)
    heads: int = Bound(4, ge=1, le=24)
    head_width: int = Bound(32, ge=16, le=128, multiple_of=16)
    text_width: int = Bound(64, ge=8)


class PostcardNet(nn.Module):
    """Velocity field on latents ``[B, 12, 16, 16]`` with captions as token ids ``[B, 5]``.

    The caption table stands where Qwen-Image has its text encoder; the transformer is the stock
    class of diffusers.
    """

    def __init__(self, size: NetSize) -> None:
        from diffusers import QwenImageTransformer2DModel

        super().__init__()
        # The three axes of Qwen's rotary embedding: frame, row, column, in Qwen's 2:7:7 spirit.
        frame = size.head_width // 4
        side = (size.head_width - frame) // 2
        self.captions = nn.Embedding(VOCABULARY, size.text_width)
        self.transformer = QwenImageTransformer2DModel(
            patch_size=PATCH,
            in_channels=LATENT_CHANNELS * PATCH**2,
            out_channels=LATENT_CHANNELS,
            num_layers=size.layers,
            attention_head_dim=size.head_width,
            num_attention_heads=size.heads,
            joint_attention_dim=size.text_width,
            axes_dims_rope=(size.head_width - 2 * side, side, side),
        )

    def forward(self, x_t: Tensor, t: Tensor, c: Tensor) -> Tensor:
        """Return the velocity for ``x_t [B, 12, 16, 16]``, ``t [B]``, captions ``c [B, 5]``."""
        rows = x_t.shape[0]
        tokens = self.transformer(
            hidden_states=pack(x_t),
            encoder_hidden_states=self.captions(c),
            timestep=t.expand(rows),
            img_shapes=[[(1, LATENT_SIZE // PATCH, LATENT_SIZE // PATCH)]] * rows,
            return_dict=False,
        )[0]
        return unpack(tokens)


def encode(images: Tensor) -> Tensor:
    """Images ``[B, 3, 32, 32]`` in [-1, 1] to latents ``[B, 12, 16, 16]`` (exact)."""
    return nn.functional.pixel_unshuffle(images, PATCH)


def decode(latents: Tensor) -> Tensor:
    """Latents ``[B, 12, 16, 16]`` to images ``[B, 3, 32, 32]`` (exact, not clamped)."""
    return nn.functional.pixel_shuffle(latents, PATCH)


def pack(latents: Tensor) -> Tensor:
    """Latents ``[B, C, H, W]`` to Qwen's tokens ``[B, HW/4, 4C]``."""
    b, c, h, w = latents.shape
    tokens = latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return tokens.reshape(b, (h // 2) * (w // 2), c * 4)


def unpack(tokens: Tensor) -> Tensor:
    """Inverse of `pack` for the square latents of a postcard."""
    b, n, width = tokens.shape
    side = int(n**0.5)
    latents = tokens.view(b, side, side, width // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return latents.reshape(b, width // 4, side * 2, side * 2)


def spawn_net(size: NetSize, seed: int) -> PostcardNet:
    """Build a network from a seed without touching the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(seed, "init"))
        return PostcardNet(size)


def grown(weights: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Weights of a network of more blocks that computes the same.

    The new blocks are spread evenly between the old ones. Each is a copy of the one before it, but
    that its gates are zero: it is the identity, and learns from the first step on, since what is
    gated is not zero (as in LLaMA Pro, Wu et al. 2024, arXiv 2401.02415, where it is the matrices
    behind attention and MLP that are zeroed).

    Args:
        weights: of a `PostcardNet`, all of them, by name, of any shapes.
        layers: blocks that it is to have; as many as it has changes nothing.

    Returns:
        Weights of a `PostcardNet` of so many blocks, by name, of the same shapes.

    Raises:
        BadInput: fewer blocks than it has.
    """
    old = len({k.removeprefix(BLOCKS).split(".")[0] for k in weights if k.startswith(BLOCKS)})
    if layers < old:
        raise BadInput("layers", layers, f"use at least {old}")
    out = {k: v for k, v in weights.items() if not k.startswith(BLOCKS)}
    more, place = layers - old, 0
    for block in range(old):
        own = f"{BLOCKS}{block}."
        parts = {k.removeprefix(own): v for k, v in weights.items() if k.startswith(own)}
        copies = (block + 1) * more // old - block * more // old
        for copied in (False, *[True] * copies):
            new = {k: _ungated(k, v) for k, v in parts.items()} if copied else parts
            out.update({f"{BLOCKS}{place}.{k}": v for k, v in new.items()})
            place += 1
    return out


def _ungated(name: str, tensor: Tensor) -> Tensor:
    """A tensor of a block, with the gates zero if it makes shifts, scales and gates."""
    if not name.startswith(("img_mod.", "txt_mod.")):
        return tensor
    rows = tensor.clone().unflatten(0, (2, 3, -1))  # of attention and of the MLP
    rows[:, 2] = 0
    return rows.flatten(0, 2)


@dataclass(frozen=True, kw_only=True)
class Postcards:
    """The testbed: a trained network and everything around it.

    Args:
        net: the teacher's network (its EMA weights).
        guidance_scale: classifier-free guidance of `teacher`, 1 is none.
        rescale: how guidance is rescaled, see `turbo_lab.field.guided`.
        seed: base seed of data and captions.
    """

    net: PostcardNet
    guidance_scale: float = 4.0
    rescale: str = "none"
    seed: int = 0
    shape: tuple[int, int, int] = LATENT_SHAPE

    @property
    def null(self) -> Tensor:
        """The null condition, one row ``[1, 5]``."""
        return null_tokens(1)

    @property
    def teacher(self) -> Field:
        """The guided, frozen teacher: two network calls per evaluation."""
        return self.guided(self.guidance_scale)

    def guided(self, scale: float) -> Field:
        """The frozen network under another guidance scale."""
        return guided(frozen(self.net), self.null, scale, rescale=self.rescale)

    def spawn(self, name: str) -> PostcardNet:
        """A trainable copy of the network; ``name`` is for adapters, which share the base."""
        return copy.deepcopy(self.net)

    def batches(self, draw: Draw) -> Batch:
        """Training data for the rows of a draw."""
        return train_batch(draw, seed=self.seed)

    def prompts(self, n: int, stream: str = "eval") -> Scenes:
        """The first ``n`` held-out scenes: captions to sample and their ground truth."""
        return draw_scenes(stream, range(n), seed=self.seed)

    def real(self, n: int, stream: str = "critic", first: int = 0) -> Tensor:
        """Real images ``[n, 3, 32, 32]`` in [-1, 1]."""
        return render(draw_scenes(stream, range(first, first + n), seed=self.seed))

    def condition(self, captions: Iterable[str | Caption]) -> Tensor:
        """Token ids ``[B, 5]`` of caption strings."""
        return caption_tokens(captions)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents to images in [-1, 1]."""
        return decode(latents).clamp(-1, 1)


def train_batch(
    draw: Draw,
    *,
    seed: int,
    skip: int = 0,
    sign_grid: int = 1,
    posters: float = 0.0,
    busts: float = 0.0,
    device: torch.device | str = "cpu",
) -> Batch:
    """Scenes of the train stream for the rows of a draw; an endless supply, nothing repeats.

    Args:
        draw: its step and rows choose the scenes.
        seed: of the scenes, at least 0.
        skip: scenes that earlier stages of the training have used.
        sign_grid: see `draw_scenes`.
        posters: share of pictures that are six signs instead of a postcard, 0 to 1.
        busts: share of pictures that are eight figures without limbs, each in a garment of its own
            hue, instead of a postcard, 0 to 1; with ``posters`` at most 1.
        device: where the batch goes.
    """
    first = skip + draw.step * draw.total
    stop = draw.total if draw.stop is None else draw.stop
    rows = range(first + draw.start, first + stop)
    scenes = draw_scenes("train", rows, seed=seed, sign_grid=sign_grid)
    images = render(scenes)
    kind = draw.uniform("poster")
    if posters > 0:
        chosen = kind < posters
        images[chosen] = render_posters(scenes[chosen], _poster_places(draw)[chosen])
    if busts > 0:
        chosen = kind >= 1 - busts
        figures = _bust_garments([i for i, c in zip(rows, chosen, strict=True) if c], seed)
        heads = _bust_places(draw)[chosen].unbind(1)
        placed = [replace(f, head=head) for f, head in zip(figures, heads, strict=True)]
        images[chosen] = render_busts(scenes[chosen], placed)
    return Batch(encode(images).to(device), scenes.tokens.to(device))


@dataclass(frozen=True, kw_only=True)
class PairSource:
    """Noise and the samples a field makes of it, drawn when first asked for and then known.

    Args:
        field: the guided teacher.
        n: number of pairs; pair i has scene i of the train stream as its caption.
        steps: Euler steps of the teacher.
        seed: of scenes and noise.
        device: where the field runs.
    """

    field: Field
    n: int
    steps: int
    seed: int
    device: str = "cpu"
    known: dict[int, Tensor] = dataclass_field(default_factory=dict)

    @property
    def noise_seed(self) -> int:
        """Seed of the noise: never that of samples drawn for measuring."""
        return seed_for(self.seed, "pairs")

    def rows(self, indices: Sequence[int]) -> Batch:
        """Pairs as a batch: ``x`` samples and ``z`` noise ``[B, 12, 16, 16]``, captions ``c``."""
        tokens = draw_scenes("train", indices, seed=self.seed).tokens
        missing = [row for row, i in enumerate(indices) if i not in self.known]
        if missing:
            drawn = draw_samples(
                self.field,
                time_grid(self.steps),
                LATENT_SHAPE,
                tokens[missing],
                seed=self.noise_seed,
                indices=[indices[row] for row in missing],
                batch=64,
                device=self.device,
            )
            self.known.update(zip((indices[row] for row in missing), drawn, strict=True))
        x = torch.stack([self.known[i] for i in indices]).to(self.device)
        z = noise(LATENT_SHAPE, seed=self.noise_seed, stream="z", indices=indices).to(self.device)
        return Batch(x, tokens.to(self.device), z)


def pair_batch(source: PairSource, draw: Draw) -> Batch:
    """Pairs for the rows of a draw; after the last pair comes the first again."""
    first = draw.step * draw.total
    stop = draw.total if draw.stop is None else draw.stop
    return source.rows([i % source.n for i in range(first + draw.start, first + stop)])


def _poster_places(draw: Draw) -> Tensor:
    """Places ``[rows, 6, 2]`` of plates that do not overlap and take every offset in a token."""
    places = [
        torch.stack(
            [16 * column + draw.integers(f"x{k}", 8), 11 * row + draw.integers(f"y{k}", 4)], dim=1
        )
        for k, (row, column) in enumerate(product(range(3), range(2)))
    ]
    return torch.stack(places, dim=1)


def _bust_places(draw: Draw) -> Tensor:
    """Places ``[rows, 8, 2]`` of heads whose torsos do not overlap; some are cut by the edges."""
    places = []
    for column in range(4):
        x = 8 * column + 2.6 + 2.8 * draw.uniform(f"bust x{column}")
        y = 8 * draw.uniform(f"bust y{column}") - 1
        places += [torch.stack([x, y + 16 * row], dim=1) for row in range(2)]
    return torch.stack(places, dim=1)


def _bust_garments(indices: Sequence[int], seed: int) -> list[Scenes]:
    """Eight scenes for each index, of a part of the train stream that no postcard is from."""
    return [
        draw_scenes("train", [(k + 1 << BUSTS_FROM) + i for i in indices], seed=seed)
        for k in range(8)
    ]
