"""Continuous-time consistency distillation (sCM) in flow coordinates."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from turbo_lab.errors import BadInput
from turbo_lab.field import Field
from turbo_lab.fit import Batch, Player, Turn
from turbo_lab.methods.kinds import TrainableField, check_training_times, chosen, squared
from turbo_lab.path import expand, logit_normal_times, mix
from turbo_lab.streams import Draw

STEP = 2e-4
"""h of the central difference. Qwen's time embedding turns 1000 radians per unit of time, so h
must stay well below 1/1000; much smaller, and float32 rounding is divided by it."""

Derivative = Callable[[Field, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def forward_mode(
    field: Field, x_t: Tensor, t: Tensor, c: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """Value of the field and its derivative along (dx, dt) = (v, 1), by `torch.func.jvp`.

    Attention runs on torch's math backend, since the fused kernels have no forward mode.
    """
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        along = (v, torch.ones_like(t))
        value, change, *_ = torch.func.jvp(lambda x, s: field(x, s, c), (x_t, t), along)
    return value, change


@torch.no_grad()
def central_difference(
    field: Field, x_t: Tensor, t: Tensor, c: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """The same by a central difference: ``(v(x + h v, t + h) - v(x - h v, t - h)) / 2h``.

    Three calls of the field instead of one call and its tangent; near t = 0 and t = 1 the
    interval shrinks so that it stays inside.
    """
    h = torch.minimum(t, 1 - t).clamp(STEP / 10, STEP)
    wide = expand(h, x_t) * v
    after = field(x_t + wide, (t + h).clamp_max(1), c)
    before = field(x_t - wide, (t - h).clamp_min(0), c)
    return field(x_t, t, c), (after - before) / (2 * expand(h, x_t))


DERIVATIVES: Mapping[str, Derivative] = MappingProxyType(
    {"jvp": forward_mode, "difference": central_difference}
)


@dataclass(frozen=True, kw_only=True)
class ContinuousConsistency:
    r"""Drive the derivative of the consistency function along teacher paths to zero.

    With f(x_t, t) = x_t - t v_θ, along the teacher's path dx/dt = v_T,

    .. math:: D = \frac{df}{dt} = v_T - v_\theta - \rho\, t\,
              \Big( \frac{\partial v_\theta}{\partial x} v_T + \frac{\partial v_\theta}{\partial t}
              \Big), \qquad L = E\, \big\| v_\theta - \mathrm{sg}\big(v_\theta + \tfrac{D}
              {\mathrm{rms}(D) + \kappa}\big) \big\|^2

    (Lu & Song 2024, arXiv 2410.11081, eqs. 6-8 and their tangent normalisation, carried from
    TrigFlow to the straight path). D = 0 is consistency. ρ rises from 0 to 1 over ``warmup``
    steps; at ρ = 0 the student is pulled to the guided teacher itself. Because of the
    normalisation the value of the loss says nothing; the term ``tangent`` (rms of D, without a
    gradient) is the one to watch. Sampled by renoising, eta = 1.

    Args:
        student: the field that learns.
        teacher: the field whose paths are followed (guided, frozen).
        warmup: steps until ρ = 1, at least 0.
        kappa: softening of the normalisation, above 0.
        derivative: ``jvp`` (forward mode) or ``difference`` (central difference), which needs a
            network in float32: bfloat16 cannot tell t from t + h, and recipes refuse it there.
        time_mean, time_std: of the normal under the logistic of the training times.
        shift: timestep shift of the training times.
    """

    student: TrainableField
    teacher: Field
    warmup: int = 0
    kappa: float = 0.1
    derivative: str = "jvp"
    time_mean: float = 0.0
    time_std: float = 1.0
    shift: float = 1.0

    def __post_init__(self) -> None:
        chosen("derivative", self.derivative, DERIVATIVES)
        if self.warmup < 0:
            raise BadInput("warmup", self.warmup, "use an integer of at least 0")
        if not 0 < self.kappa < math.inf:
            raise BadInput("kappa", self.kappa, "use a finite number above 0")
        check_training_times(self.time_mean, self.time_std, self.shift)

    @property
    def players(self) -> Mapping[str, Player]:
        """One player: the student."""
        return {"student": self.student}

    def turns(self) -> Sequence[Turn]:
        """One turn per round."""
        return (Turn(name="continuous", loss=self.loss, moves=("student",)),)

    def tangent(self, x_t: Tensor, t: Tensor, c: Tensor, rho: float) -> Tensor:
        """D of the equation above, ``[B, ...]``, without a gradient."""
        with torch.no_grad():
            v_teacher = self.teacher(x_t, t, c)
        if rho == 0:
            with torch.no_grad():
                return v_teacher - self.student(x_t, t, c)
        v, change = DERIVATIVES[self.derivative](self.student, x_t, t, c, v_teacher)
        return (v_teacher - v - rho * expand(t, x_t) * change).detach()

    def loss(self, batch: Batch, draw: Draw) -> dict[str, Tensor]:
        """Surrogate and tangent size per sample ``[B]``, for clean latents ``[B, ...]``."""
        x, c = batch.x, batch.c
        z = draw.normal("z", x.shape[1:]).to(x)
        t = logit_normal_times(
            draw.normal("t", ()).to(x), mean=self.time_mean, std=self.time_std, shift=self.shift
        )
        x_t = mix(x, z, t)
        rho = min(1.0, draw.step / self.warmup) if self.warmup else 1.0
        change = self.tangent(x_t, t, c, rho)
        size = change.square().flatten(1).mean(1).sqrt()
        v = self.student(x_t, t, c)
        target = v.detach() + change / (expand(size, x_t) + self.kappa)
        return {"surrogate": squared(v, target), "tangent": size}
