"""What moves the parameters of a player: AdamW, Muon on chosen matrices, and the rate over time."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from turbo_lab.errors import BadInput


@dataclass(frozen=True, kw_only=True)
class Optimiser:
    """AdamW with a linear warm-up, then a cosine from ``lr`` to ``lr * final``.

    Matrices with ``muon`` in their names are moved by Muon instead: momentum, made orthogonal by
    five Newton-Schulz iterations, at the same rate times 0.2 sqrt(larger side), so that a step is
    about as long as AdamW's (Jordan 2024; Liu et al. 2025, arXiv 2502.16982, eq. 4).
    """

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    warmup: int = 0
    final: float = 1.0
    clip: float = 1.0
    muon: str | None = None

    def over(self, named: Iterable[tuple[str, nn.Parameter]]) -> dict[str, torch.optim.Optimizer]:
        """Return what moves named parameters: ``adam`` and, where asked for, ``muon``.

        Raises:
            BadInput: no matrix has such a name, or nothing is left for AdamW.
        """
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, p in named:
            chosen = self.muon is not None and self.muon in name and p.ndim == 2
            (matrices if chosen else others).append(p)
        if self.muon is not None and not (matrices and others):
            allowed = "give a part of the names of some matrices, not of all parameters"
            raise BadInput("muon", self.muon, allowed)
        lr, decay = self.lr, self.weight_decay
        adam = torch.optim.AdamW(others, lr=lr, betas=self.betas, weight_decay=decay, fused=True)
        if not matrices:
            return {"adam": adam}
        muon = torch.optim.Muon(matrices, lr=lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
        return {"adam": adam, "muon": muon}

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of step ``step`` (from 0) of ``steps``."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        part = (step - self.warmup) / max(1, steps - self.warmup)
        return self.lr * (self.final + (1 - self.final) * (1 + math.cos(math.pi * part)) / 2)
