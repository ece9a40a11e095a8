"""Heads: what a discriminator learns on top of features that it does not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu, linear

from turbo_lab.errors import BadInput
from turbo_lab.features import Features
from turbo_lab.field import Condition
from turbo_lab.streams import seed_for

SLOPE = 0.2
"""Of the leaky rectifier below 0, as in StyleGAN-T's heads."""


class SpectralLinear(nn.Linear):
    """A linear layer of spectral norm 1: ``W / σ(W) x + b`` (Miyato et al. 2018, 1802.05637).

    σ is computed exactly, from the eigenvalues of the smaller Gram matrix. The usual power
    iteration keeps a state that every forward changes: micro-batches would then change the loss.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[..., out]`` for ``x [..., in]``."""
        w = self.weight
        gram = w @ w.T if len(w) <= w.shape[1] else w.T @ w
        # Autocast leaves the product in bfloat16, for which eigenvalues are not implemented. On a
        # CPU it would lift them itself, to the same bits; on a GPU it does not.
        norm = torch.linalg.eigvalsh(gram.float())[-1].clamp_min(1e-12).sqrt()
        return linear(x, w / norm, self.bias)


class CaptionTable(nn.Module):
    """Token ids ``[B, tokens]`` to one vector ``[B, width]``: a table and a linear layer.

    Args:
        vocabulary: number of token ids.
        tokens: of one caption.
        width: of the vector.
    """

    def __init__(self, *, vocabulary: int, tokens: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, width)
        self.mix = nn.Linear(tokens * width, width)

    def forward(self, c: Tensor) -> Tensor:
        """Return ``[B, width]``."""
        return self.mix(self.table(c).flatten(1))


class Head(nn.Module):
    r"""One vote per token of one block: two pointwise layers and a score.

    .. math:: h = \phi(W_1 a), \quad h' = h + \phi(W_2 h), \quad
              \ell = w \cdot h' + \langle e(c), U h' \rangle / \sqrt{D_h}

    with W, w and U of spectral norm 1; the last part, a projection of the caption (Miyato & Koyama
    2018, arXiv 1802.05637), is there if e is. Pointwise, so a token votes on what the frozen
    transformer put into it, and nothing is normalised over the batch or the image.

    Args:
        features: width of the tokens.
        width: D_h.
        captions: whether the caption is asked; its vector then has the same width.
    """

    def __init__(self, features: int, width: int, captions: bool) -> None:
        super().__init__()
        self.first = SpectralLinear(features, width)
        self.second = SpectralLinear(width, width)
        self.score = SpectralLinear(width, 1)
        self.projection = SpectralLinear(width, width, bias=False) if captions else None

    def forward(self, tokens: Tensor, e: Tensor | None) -> Tensor:
        """Return logits ``[B, N]`` for ``tokens [B, N, features]`` and ``e [B, width]``."""
        h = leaky_relu(self.first(tokens), SLOPE)
        h = h + leaky_relu(self.second(h), SLOPE)
        votes = self.score(h)[..., 0]
        if self.projection is None or e is None:
            return votes
        return votes + (self.projection(h) @ e[:, :, None])[..., 0] / e.shape[1] ** 0.5


class Heads(nn.Module):
    """A `Head` for every tap, and a vector of the caption that they share.

    Args:
        widths: of the taps.
        width: of the heads.
        captions: the condition to a vector ``[B, width]``; None for heads that do not ask it.
    """

    def __init__(self, widths: Sequence[int], *, width: int, captions: nn.Module | None) -> None:
        super().__init__()
        self.captions = captions
        asked = captions is not None
        self.blocks = nn.ModuleList(Head(features, width, asked) for features in widths)

    def forward(self, taps: Sequence[Tensor], c: Condition) -> Tensor:
        """Return the votes of all tokens of all taps, ``[B, sum of N_k]``."""
        e = None if self.captions is None else self.captions(c)
        votes = [head(tokens, e) for head, tokens in zip(self.blocks, taps, strict=True)]
        return torch.cat(votes, dim=1)


@dataclass(frozen=True, kw_only=True, eq=False)
class FeatureCritic:
    """Heads on frozen features: a `turbo_lab.critic.TrainableCritic` whose heads alone learn.

    Every token of every tap has one vote, and the critic's logit is their mean. Its losses are
    taken vote by vote (`turbo_lab.critic.votes_of`), as in projected GAN and StyleGAN-T: a texture
    that is wrong in one corner is punished there, where a loss of the mean could be bought off by
    the other corners. The price is that the mean is no calibrated log ratio of whole images; for
    that there is `turbo_lab.critic.LatentCritic`.

    Attributes:
        features: see `turbo_lab.features`; never a player.
        heads: what learns.
    """

    features: Features
    heads: Heads

    def __call__(self, x_t: Tensor, t: Tensor, c: Any) -> Tensor:
        """Return logits ``[B]``: the mean of the votes."""
        return self.votes(x_t, t, c).mean(1)

    def votes(self, x_t: Tensor, t: Tensor, c: Any) -> Tensor:
        """Return one logit per token and tap, ``[B, V]``."""
        return self.heads(self.features(x_t, t, c), c)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters of the heads."""
        yield from self.heads.named_parameters()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors of the heads."""
        return dict(self.heads.state_dict())

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Take back what `state_dict` gave."""
        self.heads.load_state_dict(state_dict)


def spawn_heads(
    widths: Sequence[int], *, seed: int, width: int = 64, captions: tuple[int, int] | None = None
) -> Heads:
    """Build heads from a seed without touching the global generator.

    Args:
        widths: of the features' taps.
        seed: stream ("heads",).
        width: of the heads, at least 1.
        captions: size of the vocabulary and token ids of one caption; None for heads without it.

    Raises:
        BadInput: the width is below 1, or there is no tap.
    """
    if width < 1 or not widths:
        name, value = ("width", width) if width < 1 else ("widths", tuple(widths))
        raise BadInput(name, value, "use at least 1")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(seed, "heads"))
        table = None
        if captions is not None:
            table = CaptionTable(vocabulary=captions[0], tokens=captions[1], width=width)
        return Heads(widths, width=width, captions=table)
