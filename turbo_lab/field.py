"""Fields: everything that gives a velocity, and the wrappers that are fields again.

A field is ``v(x_t, t, c) -> velocity`` with ``x_t [B, ...]``, ``t [B]`` and one condition per row.
A network, the exact mixture, a guided teacher: samplers and losses cannot tell them apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pixel_unshuffle

from turbo_lab.errors import BadInput
from turbo_lab.path import expand

Condition = Any
"""None, a tensor ``[B, ...]``, or a tuple of conditions (for example embeddings and their mask)."""

NULL_LABEL = -1
"""The class condition that means "any class"."""


class Field(Protocol):
    """``v(x_t, t, c)``: the velocity E[z - x | x_t] at ``x_t [B, ...]`` and times ``t [B]``."""

    def __call__(self, x_t: Tensor, t: Tensor, c: Condition, /) -> Tensor:
        """Return the velocity, shaped like ``x_t``."""
        ...


def each(change: Callable[..., Tensor], *conditions: Condition) -> Condition:
    """Apply ``change`` to every tensor of a condition, or to several conditions in parallel.

    Raises:
        BadInput: the conditions are built differently, or of something else than tensors.
    """
    first, kinds = conditions[0], {type(c) for c in conditions}
    if len(kinds) == 1 and first is None:
        return None
    if all(isinstance(c, Tensor) for c in conditions):
        return change(*conditions)
    if kinds == {tuple} and len({len(c) for c in conditions}) == 1:
        return tuple(each(change, *parts) for parts in zip(*conditions, strict=True))
    names = " and ".join(sorted(kind.__name__ for kind in kinds))
    raise BadInput("c", names, "use None, a tensor [B, ...] or a tuple of those, the same in all")


# --- guidance -----------------------------------------------------------------------------------


def token_norm(v: Tensor) -> Tensor:
    """Norm over each packed token, a 2x2 patch with all its channels, seen by its 4 pixels.

    ``[B, C, H, W]`` -> ``[B, 1, H, W]``.

    Raises:
        BadInput: v is not ``[B, C, H, W]`` with even H and W.
    """
    if v.ndim != 4 or v.shape[2] % 2 or v.shape[3] % 2:
        raise BadInput("rescale", "token", f"it needs [B, C, even, even], not {list(v.shape)}")
    norm = torch.linalg.vector_norm(pixel_unshuffle(v, 2), dim=1, keepdim=True)
    return norm.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


def sample_norm(v: Tensor) -> Tensor:
    """Norm over each whole sample: ``[B, ...]`` -> ``[B, 1, ...]``."""
    return torch.linalg.vector_norm(v, dim=tuple(range(1, v.ndim)), keepdim=True)


def _as_it_is(v: Tensor, v_cond: Tensor) -> Tensor:
    return v


def _with_norm_of(norm: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    def rescaled(v: Tensor, v_cond: Tensor) -> Tensor:
        return v * (norm(v_cond) / norm(v).clamp_min(1e-12))  # the clamp keeps v = 0 at 0

    return rescaled


RESCALES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = MappingProxyType(
    {
        "none": _as_it_is,
        "token": _with_norm_of(token_norm),
        "sample": _with_norm_of(sample_norm),
    }
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Guided:
    """Classifier-free guidance around a field; build it with ``guided``."""

    field: Field
    null: Condition
    scale: float
    rescale: str = "none"

    def __call__(self, x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
        """Return the guided velocity; one batched forward of 2B rows, or of B when scale = 1."""
        if self.scale == 1:
            return self.field(x_t, t, c)
        n = len(x_t)
        nulls = each(lambda row: row.expand(n, *row.shape[1:]), self.null)
        both = each(lambda a, b: torch.cat([a, b.to(a)]), c, nulls)
        t = t.expand(n)
        v_cond, v_null = self.field(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
        v = v_null + self.scale * (v_cond - v_null)
        return RESCALES[self.rescale](v, v_cond)


def guided(field: Field, null: Condition, scale: float, rescale: str = "none") -> Guided:
    """Wrap a field with guidance: ``v = v_null + w (v_cond - v_null)``, then ``v ‖v_cond‖ / ‖v‖``.

    Args:
        field: the field to ask twice; its NFE per image doubles unless scale is 1.
        null: the condition of the unguided branch, with a batch of one, shaped like one row of c.
        scale: w, at least 0; exactly 1 is the field itself.
        rescale: "none"; "token", the norm over each packed 2x2 patch of ``[B, C, H, W]``, as
            diffusers' QwenImagePipeline does; "sample", the norm over the whole sample.

    Raises:
        BadInput: scale or rescale is not allowed.

    Source: Ho and Salimans 2022; the rescaling is in diffusers' ``pipeline_qwenimage.py``.
    """
    if not 0 <= scale < math.inf:
        raise BadInput("scale", scale, "use a finite number of at least 0 (1 is unguided)")
    if rescale not in RESCALES:
        raise BadInput("rescale", rescale, f"use one of {', '.join(RESCALES)}")
    return Guided(field=field, null=null, scale=scale, rescale=rescale)


# --- small wrappers -----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Frozen:
    """A field outside of autograd; build it with ``frozen``."""

    field: Field

    def __call__(self, x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
        """Return the velocity without a graph."""
        with torch.no_grad():
            return self.field(x_t, t, c)


def frozen(field: Field) -> Frozen:
    """Wrap a field so that nothing flows back through it."""
    return Frozen(field=field)


@dataclass(frozen=True, kw_only=True, eq=False)
class Cast:
    """A field that computes in its own dtype and place; build it with ``cast``."""

    field: Field
    dtype: torch.dtype
    device: torch.device | str | None = None

    def __call__(self, x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
        """Return the velocity in float32 on the device of ``x_t``."""
        device = x_t.device if self.device is None else self.device
        v = self.field(x_t.to(device, self.dtype), t.to(device), each(self._inside(device), c))
        return v.to(x_t.device, torch.float32)

    def _inside(self, device: torch.device | str) -> Callable[[Tensor], Tensor]:
        return lambda a: a.to(device, self.dtype if a.is_floating_point() else a.dtype)


def cast(field: Field, dtype: torch.dtype, device: torch.device | str | None = None) -> Cast:
    """Cast once, at the border: x_t and c go in as ``dtype``, the velocity comes out as float32.

    Integer conditions keep their dtype, and times stay float32: in bfloat16 they would move.
    """
    return Cast(field=field, dtype=dtype, device=device)


@dataclass(kw_only=True, eq=False)
class Counter:
    """A field that counts the images it forwards; build it with ``counted``.

    Put it inside guidance, around the network: a guided call on B images forwards 2B.
    """

    field: Field
    images: int = 0

    def __call__(self, x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
        """Return the velocity and add the batch to ``images``."""
        self.images += len(x_t)
        return self.field(x_t, t, c)

    def per_image(self, n: int) -> float:
        """Return the NFE: network forwards per image, for n images sampled so far."""
        return self.images / n


def counted(field: Field) -> Counter:
    """Wrap a network so that its forwards are counted, from zero."""
    return Counter(field=field)


# --- the exact field ----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Mixture:
    """A mixture of isotropic Gaussians, its exact velocity field and densities at every time.

    With ``y_k = x_t - (1 - t) m_k`` and ``V_k = (1 - t)² s_k² + t²``:

        p_t(x_t) = Σ_k w_k N(y_k; 0, V_k I)                r_k = posterior of component k
        v(x_t, t) = E[z - x | x_t] = Σ_k r_k ((t - (1 - t) s_k²) / V_k · y_k - m_k)
        ∇ log p_t = -Σ_k r_k y_k / V_k

    All are finite for t in [0, 1], as s_k > 0. They are computed in float64; velocity and score
    come back in the dtype of ``x_t``. A class condition ``c [B]`` keeps, row by row, the
    components with that label; None or -1 keeps all.

    Attributes:
        means: ``[K, D]``; inputs ``[B, ...]`` have D numbers per row.
        stds: ``[K]``, above 0.
        weights: ``[K]``, at least 0; they are normalised where they are used.
        labels: ``[K]`` integers, at least 0, or None for a mixture without classes.
    """

    means: Tensor
    stds: Tensor
    weights: Tensor
    labels: Tensor | None = None

    def __call__(self, x_t: Tensor, t: Tensor, c: Condition = None) -> Tensor:
        """Return the exact velocity E[z - x | x_t, c], shaped like ``x_t``; t in [0, 1]."""
        y, var, t1 = self._centred(x_t, t)
        r = self.responsibilities(x_t, t, c)
        gain = (t1 - (1 - t1) * self.stds.to(y) ** 2) / var
        v = (r * gain)[..., None] * y - r[..., None] * self.means.to(y)
        return v.sum(1).reshape(x_t.shape).to(x_t.dtype)

    def score(self, x_t: Tensor, t: Tensor | float = 0.0, c: Condition = None) -> Tensor:
        """Return ``∇ log p_t(x_t | c)``, shaped like ``x_t``; finite at t = 0 too."""
        y, var, _ = self._centred(x_t, t)
        r = self.responsibilities(x_t, t, c)
        return -((r / var)[..., None] * y).sum(1).reshape(x_t.shape).to(x_t.dtype)

    def log_density(self, x_t: Tensor, t: Tensor | float = 0.0, c: Condition = None) -> Tensor:
        """Return ``log p_t(x_t | c)`` in nats, ``[B]``, at least float32."""
        wide = torch.promote_types(x_t.dtype, torch.float32)  # float16 ends at 65504 nats
        return self._joint(x_t, t, c).logsumexp(1).to(wide)

    def responsibilities(self, x_t: Tensor, t: Tensor | float = 0.0, c: Condition = None) -> Tensor:
        """Return the posterior of every component, ``[B, K]`` float64; rows sum to 1."""
        return self._joint(x_t, t, c).softmax(1)

    def log_weights(self, c: Condition = None) -> Tensor:
        """Return the log weights given c, ``[B, K]`` float64, or ``[1, K]`` for c = None.

        Raises:
            BadInput: a class in c has no component.
        """
        weights = self.weights.double().log()
        if c is None:
            return weights.log_softmax(0)[None]
        labels = self.labels if self.labels is not None else torch.full_like(weights, NULL_LABEL)
        c = torch.as_tensor(c, device=weights.device)[:, None]
        kept = (c == labels) | (c == NULL_LABEL)
        if not bool(kept.any(1).all()):
            strange = sorted(set(c[~kept.any(1)].flatten().tolist()))
            allowed = sorted(set(labels.long().tolist()) | {NULL_LABEL})
            raise BadInput("c", strange, f"the classes of this mixture are {allowed}")
        return weights.where(kept, -math.inf).log_softmax(1)

    def only(self, label: int) -> Mixture:
        """Return the mixture of the components with this label."""
        kept = self.log_weights(torch.tensor([label]))[0].isfinite()
        labels = None if self.labels is None else self.labels[kept]
        return Mixture(
            means=self.means[kept],
            stds=self.stds[kept],
            weights=self.weights[kept],
            labels=labels,
        )

    def place(self, uniforms: Tensor, normals: Tensor) -> tuple[Tensor, Tensor]:
        """Turn random numbers into exact samples: ``x = m_k + s_k n``, k by inverting the weights.

        Args:
            uniforms: ``[n]`` in [0, 1), choosing the component.
            normals: ``[n, D]`` standard normal.

        Returns:
            x ``[n, D]`` in the dtype of normals, and the component k of each, ``[n]`` int64.
        """
        edges = self.log_weights()[0].exp().cumsum(0)
        k = torch.searchsorted(edges, uniforms.double(), right=True).clamp(max=len(edges) - 1)
        x = self.means.to(normals)[k] + self.stds.to(normals)[k, None] * normals
        return x, k

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw n exact samples of the data, ``[n, D]`` float32."""
        uniforms = torch.rand(n, generator=generator)
        return self.place(uniforms, torch.randn(n, self.means.shape[1], generator=generator))[0]

    def _centred(self, x_t: Tensor, t: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
        """Return y ``[B, K, D]``, V ``[B, K]`` and t ``[B or 1, 1]``, all float64."""
        x = x_t.flatten(1).double()
        t1 = expand(t, x)
        y = x[:, None] - (1 - t1)[..., None] * self.means.to(x)
        return y, (1 - t1) ** 2 * self.stds.to(x) ** 2 + t1**2, t1

    def _joint(self, x_t: Tensor, t: Tensor | float, c: Condition) -> Tensor:
        """Return ``log w_k + log N(y_k; 0, V_k I)``, ``[B, K]``."""
        y, var, _ = self._centred(x_t, t)
        log_normal = -0.5 * (y.square().sum(-1) / var + y.shape[-1] * (2 * math.pi * var).log())
        return self.log_weights(c).to(y.device) + log_normal


def mixture(
    means: Tensor, stds: Tensor | float, weights: Tensor | None = None, labels: Tensor | None = None
) -> Mixture:
    """Check and build a Mixture; one std may serve all components, weights default to equal.

    Raises:
        BadInput: shapes that do not match, a std not above 0, or a weight below 0.
    """
    means = torch.as_tensor(means, dtype=torch.float64)
    if means.ndim != 2 or not len(means):
        raise BadInput("means", tuple(means.shape), "use [K, D] with at least one component")
    k = len(means)
    stds = torch.as_tensor(stds, dtype=torch.float64).expand(k)
    weights = torch.ones(k) if weights is None else torch.as_tensor(weights)
    if (
        weights.shape != (k,)
        or bool((weights < 0).any())
        or not 0 < float(weights.sum()) < math.inf
    ):
        raise BadInput("weights", weights.tolist(), f"use {k} numbers of at least 0, not all 0")
    if not bool((stds > 0).all()):
        raise BadInput("stds", stds.tolist(), "use numbers above 0")
    if labels is not None and (labels.shape != (k,) or bool((labels < 0).any())):
        raise BadInput("labels", labels.tolist(), f"use {k} integers of at least 0")
    return Mixture(means=means, stds=stds, weights=weights.double(), labels=labels)
