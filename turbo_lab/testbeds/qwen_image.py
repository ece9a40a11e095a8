"""The Qwen-Image testbed: the stock transformer as a velocity field on latents.

The transformer is loaded once, frozen, and shared by teacher and students; text encoder and VAE
are only loaded to fill caches, see `turbo_lab.testbeds.qwen_data`. A condition is the number of a
prompt whose embeddings are cached, so that batches of prompts of any lengths can be cut, joined
and guided; padding and mask are made where the network is called.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from turbo_lab.adapters import AdapterSize, Host, Worn
from turbo_lab.field import Field, frozen, guided
from turbo_lab.testbeds.postcards import pack
from turbo_lab.testbeds.qwen_data import NULL, Prompts
from turbo_lab.testbeds.qwen_files import CHANNELS, SCALE, Bundle, load_transformer
from turbo_lab.testbeds.qwen_schedule import Schedule


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Qwen's tokens ``[B, HW/4, 4C]`` to latents ``[B, C, H, W]``: the inverse of `pack`."""
    b, _, wide = tokens.shape
    latents = tokens.view(b, height // 2, width // 2, wide // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return latents.reshape(b, wide // 4, height, width)


class QwenNet(nn.Module):
    """Velocity field of the stock transformer, with prompts by their numbers ``c [B]``."""

    def __init__(self, transformer: nn.Module, prompts: Prompts) -> None:
        super().__init__()
        self.transformer = transformer
        self.prompts = prompts
        self.dtype = next(transformer.parameters()).dtype  # now: adapters are float32

    def forward(self, x_t: Tensor, t: Tensor, c: Tensor) -> Tensor:
        """Return the velocity, float32, for ``x_t [B, 16, H, W]``, ``t [B]``, numbers ``c [B]``."""
        rows, _, height, width = x_t.shape
        embeds, mask = self.prompts.padded(c.tolist())
        tokens = self.transformer(
            hidden_states=pack(x_t.to(self.dtype)),
            encoder_hidden_states=embeds.to(x_t.device, self.dtype),
            encoder_hidden_states_mask=None if mask is None else mask.to(x_t.device),
            # The pipeline rounds times so; a student should learn at the times it is used at.
            timestep=(1000 * t.expand(rows)).to(self.dtype) / 1000,
            img_shapes=[[(1, height // 2, width // 2)]] * rows,
            return_dict=False,
        )[0]
        return unpack(tokens, height, width).float()


@dataclass(frozen=True, kw_only=True)
class QwenImage:
    """The testbed: one frozen base, its prompts, and the players that are adapters on it.

    Args:
        host: around a `QwenNet`, with adapters in its transformer.
        schedule: times of the teacher's sampler.
        size: pixels of the square images, a multiple of 16.
        guidance_scale: of the teacher.
        device: where the network is.
    """

    host: Host
    schedule: Schedule
    size: int
    guidance_scale: float = 4.0
    device: str = "cpu"

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one latent: channels, height, width."""
        return (CHANNELS, self.size // SCALE, self.size // SCALE)

    @property
    def prompts(self) -> int:
        """How many prompts there are."""
        return int(cast(QwenNet, self.host.net).prompts.n)

    @property
    def null(self) -> Tensor:
        """The null condition, the number of the negative prompt: ``[1]``."""
        return torch.tensor([NULL])

    @property
    def plain(self) -> Field:
        """The base without guidance, frozen."""
        return frozen(self.host.bare)

    @property
    def teacher(self) -> Field:
        """The guided teacher, rescaled per token as diffusers' QwenImagePipeline does."""
        return guided(self.plain, self.null, self.guidance_scale, rescale="token")

    def spawn(self, name: str, size: AdapterSize, *, seed: int) -> Worn:
        """A trainable field that starts as the base."""
        return self.host.add(name, size, seed=seed)

    def grid(self, steps: int) -> Tensor:
        """Times of the teacher's sampler ``[steps + 1]``."""
        return self.schedule.grid(steps, tokens_of(self.size))


def tokens_of(size: int) -> int:
    """Image tokens of a square picture of ``size`` pixels."""
    return (size // (2 * SCALE)) ** 2


def open_testbed(
    bundle: Bundle,
    prompts: Prompts,
    *,
    size: int,
    guidance_scale: float = 4.0,
    device: str = "cpu",
) -> QwenImage:
    """Load the transformer and make it the testbed.

    Raises:
        MissingPiece: weights are missing or damaged.
    """
    net = QwenNet(load_transformer(bundle, device), prompts)
    return QwenImage(
        host=Host(net, part="transformer"),
        schedule=Schedule.of(bundle),
        size=size,
        guidance_scale=guidance_scale,
        device=device,
    )
