r"""Phases of the path, and the adversarial term of phased consistency.

The prediction f of a phase lies at its edge s_m. To compare two of them as distributions, both are
noised from there to a time u inside the phase, by the kernel of the path itself:

.. math:: x_u = a f + b\, \varepsilon, \qquad a = \frac{1 - u}{1 - s_m}, \qquad
          b = \sqrt{u^2 - (a\, s_m)^2}

so that f ~ p_{s_m} gives x_u ~ p_u: f already carries noise s_m, of which a s_m is left, and b adds
what u lacks. The code of PCM (Wang et al. 2024, arXiv 2405.18407) adds (u - s_m) / (1 - s_m)
instead, which is b in the first phase alone (s_m = 0); elsewhere its samples are too clean for the
time that the critic is told. What the critic and the student minimise is
`turbo_lab.critic.ADVERSARIES`; `turbo_lab.methods.Consistency` puts the pieces together.
"""

from __future__ import annotations

from torch import Tensor

from turbo_lab.errors import BadInput
from turbo_lab.path import Time, expand, shift_time
from turbo_lab.streams import Draw


def phase_edges(phases: int, shift: float = 1.0) -> tuple[float, ...]:
    """Return the inner edges of phases evenly spaced before the timestep shift, rising.

    These are the times at which a sampler of so many steps and this shift stops on its way: one
    phase has none, two at shift 2.5 have 0.7143, beside the 0.7155 of a published 2-step schedule.

    Args:
        phases: how many, at least 1.
        shift: s of `turbo_lab.path.shift_time`, above 0.

    Raises:
        BadInput: a number is out of its range.
    """
    if phases < 1:
        raise BadInput("phases", phases, "use an integer of at least 1")
    return tuple(shift_time(m / phases, shift) for m in range(1, phases))


def push_scales(s: Time, u: Time, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return a and b of the equation above, shaped for arithmetic with ``like [B, ...]``.

    Args:
        s: time of the edge, a number or ``[B]``, in [0, 1).
        u: time to go to, a number or ``[B]``, in [s, 1].
        like: the images.
    """
    s, u = expand(s, like), expand(u, like)
    a = (1 - u) / (1 - s)
    return a, (u**2 - (a * s) ** 2).clamp_min(0).sqrt()  # rounding at u = s may leave -1e-9


def push(x: Tensor, s: Time, u: Time, eps: Tensor) -> Tensor:
    """Noise samples ``[B, ...]`` of time s to time u: ``a x + b ε``, distributed as p_u.

    Args:
        x: samples at time s.
        s: a number or ``[B]``, in [0, 1).
        u: a number or ``[B]``, in [s, 1].
        eps: ``[B, ...]`` standard normal noise, independent of x.
    """
    a, b = push_scales(s, u, x)
    return a * x + b * eps


def pushed(x: Tensor, s: Tensor, top: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
    """Noise samples at their edges to times of their own, uniform in (s, top].

    Args:
        x: ``[B, ...]`` at the times s.
        s: ``[B]`` lower edges of their phases.
        top: ``[B]`` upper edges.
        draw: randomness; each side of a comparison takes another.

    Returns:
        x_u ``[B, ...]`` and u ``[B]``.
    """
    u = top - (top - s) * draw.uniform("u").to(s)
    return push(x, s, u, draw.normal("eps", x.shape[1:]).to(x)), u
