"""DINO: a student learns to say of its view what a teacher, its own average, says of another.

Caron et al. 2021 (arXiv 2104.14294), with the patch term of iBOT (Zhou et al. 2022, arXiv
2111.07832): without it only what identifies a whole picture is learnt.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn.functional import normalize

from turbo_lab.dino.net import VitSize, spawn_vit
from turbo_lab.dino.views import Cutter, hide
from turbo_lab.fit import Batch, Player, Turn
from turbo_lab.streams import Draw, seed_for


class HeadSize(BaseModel):
    """Size of the projection head."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    hidden: int = Field(256, ge=1)
    bottleneck: int = Field(64, ge=1)
    prototypes: int = Field(512, ge=2)


class Head(nn.Module):
    """Projection head of DINO: three layers to a unit vector, and its cosine to every prototype.

    The last layer is weight-normed with the norm fixed to 1, as in the authors' code.
    """

    def __init__(self, width: int, size: HeadSize) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(width, size.hidden),
            nn.GELU(),
            nn.Linear(size.hidden, size.hidden),
            nn.GELU(),
            nn.Linear(size.hidden, size.bottleneck),
        )
        self.prototypes = nn.Parameter(torch.randn(size.prototypes, size.bottleneck))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits ``[..., K]`` in [-1, 1] of tokens ``[..., D]``."""
        return normalize(self.mlp(tokens), dim=-1) @ normalize(self.prototypes, dim=-1).T


class Pupil(nn.Module):
    """Backbone and head; the class token and the patch tokens share the head, as in iBOT."""

    def __init__(self, vit: Any, head: Head) -> None:
        super().__init__()
        self.vit, self.head = vit, head

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return class token ``[B, D]`` and patch tokens ``[B, N, D]`` before the head."""
        tokens = self.vit.forward_features(x)
        return tokens[:, 0], tokens[:, 1:]


def spawn_pupil(vit: VitSize, head: HeadSize, seed: int) -> Pupil:
    """Build backbone and head from a seed without touching the global generator."""
    backbone = spawn_vit(vit, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(seed, "dino head"))
        return Pupil(backbone, Head(vit.width, head))


class Teacher(nn.Module):
    """The average of a student, and its age in steps; no loss moves it.

    Args:
        student: what it starts as a copy of.
    """

    age: Tensor

    def __init__(self, student: Pupil) -> None:
        super().__init__()
        self.pupil = copy.deepcopy(student).requires_grad_(False)
        self.register_buffer("age", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits of class token ``[B, K]`` and patch tokens ``[B, N, K]``."""
        whole, patches = self.pupil(x)
        return self.pupil.head(whole), self.pupil.head(patches)

    @torch.no_grad()
    def follow(self, student: Pupil, momentum: float) -> None:
        """Move towards the student: weights become m teacher + (1 - m) student."""
        now: list[Tensor] = list(student.parameters())
        then: list[Tensor] = list(self.pupil.parameters())
        torch._foreach_lerp_(then, now, 1 - momentum)
        self.age += 1


def momentum_at(step: int, steps: int, start: float) -> float:
    """The teacher's momentum: a cosine from ``start`` to 1 over the training (section 3.1)."""
    return 1 - (1 - start) * (1 + math.cos(math.pi * min(step, steps) / steps)) / 2


def cross_entropy(teacher: Tensor, student: Tensor) -> Tensor:
    r""":math:`H(P_t, P_s) = -\sum_k P_t^{(k)} \log P_s^{(k)}` (eq. 2): ``[..., K]`` -> ``[...]``.

    Args:
        teacher: probabilities, centred and sharpened.
        student: logits divided by their temperature.
    """
    return -(teacher * student.log_softmax(-1)).sum(-1)


def balanced(logits: Tensor, rounds: int = 3) -> Tensor:
    r"""Probabilities ``[N, K]`` that use every prototype about equally: Sinkhorn-Knopp.

    Rows and columns of exp(logits) are scaled in turns, to sums of 1 and of N / K (Caron et al.
    2020, arXiv 2006.09882, eq. 3); DINOv2 (arXiv 2304.07193) centres so.

    Args:
        logits: divided by their temperature.
        rounds: of scaling; the rows come last.
    """
    log_q = logits
    for _ in range(rounds):
        log_q = log_q.log_softmax(0)  # columns to equal sums
        log_q = log_q.log_softmax(1)  # rows to 1
    return log_q.exp()


@dataclass(frozen=True, kw_only=True)
class Dino:
    r"""Self-distillation without labels.

    .. math:: \sum_{x \in \{x_1, x_2\}} \sum_{x' \ne x} H(P_t(x), P_s(x')), \quad
        P_s = \mathrm{softmax}(g_s / \tau_s), \quad P_t = \mathrm{balanced}(g_t / \tau_t)

    averaged over its pairs (eq. 3); x are the two wide windows, x' all. The student sees the
    first window partly covered, and says of each covered token what the teacher says of it.
    Targets are sharpened by the lower temperature and centred by `balanced` over the batch, so
    micro-batches are centred each for itself.

    Args:
        student: what learns.
        teacher: its average; its backbone is what is kept.
        crops: how views are cut; every step draws one of them for its whole batch.
        steps: of the whole training, for the teacher's momentum.
        student_temperature, teacher_temperature: :math:`\tau_s` and the smaller :math:`\tau_t`.
        momentum: of the teacher, at first.
        patches: weight of the patch term.
    """

    student: Pupil
    teacher: Teacher
    crops: Sequence[Cutter]
    steps: int
    student_temperature: float = 0.1
    teacher_temperature: float = 0.04
    momentum: float = 0.99
    patches: float = 1.0

    @property
    def players(self) -> Mapping[str, Player]:
        """The student, and the teacher, which no loss moves."""
        return {"student": self.student, "teacher": self.teacher}

    def turns(self) -> Sequence[Turn]:
        """One turn per round; then the teacher follows."""
        return (Turn(name="dino", loss=self.loss, moves=("student",), then=self.follow),)

    def follow(self) -> None:
        """Let the teacher follow the student by one step."""
        momentum = momentum_at(int(self.teacher.age), self.steps, self.momentum)
        self.teacher.follow(self.student, momentum)

    def loss(self, batch: Batch, draw: Draw) -> dict[str, Tensor]:
        """Terms ``views`` and ``patches`` per sample ``[B]`` of pictures ``[B, 3, 32, 32]``."""
        crops = self.crops[draw.shared("crops", len(self.crops))]
        views = crops.cut(batch.x, draw)
        wide = torch.cat([views.first, views.second])
        whole, tokens = self.teacher(wide)
        seen = torch.cat([hide(views.first, views.covered), views.second])
        said, found = self.student(seen)
        classes = list(said.chunk(2))
        if views.narrow:
            classes += self.student(torch.cat(views.narrow))[0].chunk(len(views.narrow))
        sharp = self._sharpened(whole).chunk(2)
        soft = [self._softened(self.student.head(one)) for one in classes]
        pairs = [
            cross_entropy(p, q) for i, p in enumerate(sharp) for j, q in enumerate(soft) if i != j
        ]
        rows = torch.arange(len(batch.x))[:, None], views.covered
        target = self._sharpened(tokens.flatten(0, 1)).view_as(tokens)[: len(batch.x)][rows]
        guess = self._softened(self.student.head(found[: len(batch.x)][rows]))
        return {
            "views": torch.stack(pairs).mean(0),
            "patches": self.patches * cross_entropy(target, guess).mean(1),
        }

    def _sharpened(self, logits: Tensor) -> Tensor:
        """Sharpen the teacher's logits ``[N, K]`` and centre them to probabilities."""
        return balanced(logits / self.teacher_temperature)

    def _softened(self, logits: Tensor) -> Tensor:
        return logits / self.student_temperature
