"""Sampling: walk a field down a grid of times, one State per step.

``sample`` is a generator: whoever calls it owns progress bars, drawing and stopping.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from turbo_lab.errors import BadInput
from turbo_lab.field import Condition, Field, each
from turbo_lab.path import check_eta, check_falling, split, step
from turbo_lab.streams import noise

Renoise = Callable[[int], Tensor]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True, eq=False)
class State:
    """One step of a sampler: at (x_t, t) the field said v; the step led to (x, u)."""

    index: int
    t: float
    u: float
    x_t: Tensor
    v: Tensor
    x_hat: Tensor
    x: Tensor


def sample(
    field: Field,
    grid: Tensor,
    z: Tensor,
    c: Condition = None,
    *,
    eta: float = 0.0,
    renoise: Renoise | None = None,
) -> Iterator[State]:
    """Walk ``x_u = step(x_t, v(x_t, t, c), t, u, eta)`` down the grid; yields one State per step.

    Gradients follow the caller's setting; wrap the field in ``frozen`` to leave it out of them.

    eta > 0 suits students whose x̂ is a sample. With a teacher, whose x̂ is the mean E[x | x_t],
    every renoised step forgets part of the variance, and more steps do not bring it back.

    Args:
        field: v(x_t, t, c).
        grid: ``[n + 1]`` strictly falling times in [0, 1], as from ``time_grid``; it may end
            above 0, and then the last x is at that time.
        z: ``[B, ...]``, the state at ``grid[0]``; pure noise when that is 1.
        c: condition of the B rows.
        eta: 0 is Euler, 1 predicts and renoises.
        renoise: gives the fresh noise of step k, shaped like z; needed when eta > 0 and a step
            ends above 0.

    Raises:
        BadInput: the grid does not fall, eta is outside [0, 1], or renoise is missing; raised
            here, before any network call.

    Example:
        ``*_, last = sample(field, time_grid(2), z, c)`` and then ``last.x``.
    """
    check_falling(grid)
    check_eta(eta)
    if eta > 0 and renoise is None and bool((grid[1:] > 0).any()):
        raise BadInput("renoise", None, f"eta={eta} needs fresh noise for steps that end above 0")
    return _walk(field, grid, z, c, eta, renoise)


def _walk(
    field: Field, grid: Tensor, x: Tensor, c: Condition, eta: float, renoise: Renoise | None
) -> Iterator[State]:
    for index, (t, u) in enumerate(pairwise(grid.tolist())):
        x_t = x
        v = field(x_t, torch.full((len(x_t),), t, device=x.device), c)
        eps = renoise(index) if renoise is not None and eta > 0 and u > 0 else None
        x = step(x_t, v, t, u, eta, eps)
        x_hat, _ = split(x_t, v, t)
        yield State(index=index, t=t, u=u, x_t=x_t, v=v, x_hat=x_hat, x=x)


def final(states: Iterable[State]) -> Tensor:
    """Run the sampler to its end and return the last x.

    Raises:
        BadInput: there was no state.
    """
    last = None
    for state in states:
        last = state
    if last is None:
        raise BadInput("states", "nothing", "give a sampler that has not been used up")
    return last.x


def draw_samples(
    field: Field,
    grid: Tensor,
    shape: Sequence[int],
    c: Condition = None,
    *,
    seed: int,
    indices: Sequence[int],
    eta: float = 0.0,
    batch: int = 256,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Tensor:
    """Sample one image per index, in batches, without gradients.

    Image i starts from the stream ``"z"`` of its own index, and step k renoises it from
    ``"renoise/k"``: no batch size changes the noise of any image, so results differ at most by
    the rounding of the field itself.

    Args:
        field: v(x_t, t, c).
        grid: falling times, as for ``sample``.
        shape: shape of one image.
        c: condition with one row per index, or None.
        seed: base seed of the noise, at least 0.
        indices: which images, N of them.
        eta: 0 is Euler, 1 predicts and renoises.
        batch: images per forward, at least 1.
        device: where the field runs; noise is made on the CPU and moved there.
        progress: called as ``progress(done, total)`` after every batch.

    Returns:
        ``[N, *shape]`` on the CPU.

    Raises:
        BadInput: batch below 1, or a number of conditions other than N, and as in ``sample``.
    """
    if batch < 1:
        raise BadInput("batch", batch, "use an integer of at least 1")
    each(partial(_check_rows, total=len(indices)), c)
    done: list[Tensor] = [torch.empty(0, *shape)]
    for start in range(0, len(indices), batch):
        rows = slice(start, start + batch)
        draw = partial(_noise, shape=shape, seed=seed, indices=indices[rows], device=device)
        c_rows = each(partial(_rows, rows=rows, device=device), c)
        with torch.no_grad():
            states = sample(field, grid, draw("z"), c_rows, eta=eta, renoise=_renoise(draw))
            done.append(final(states).cpu())
        if progress is not None:
            progress(min(start + batch, len(indices)), len(indices))
    return torch.cat(done)


def _noise(
    stream: str, shape: Sequence[int], seed: int, indices: Sequence[int], device: torch.device | str
) -> Tensor:
    return noise(shape, seed=seed, stream=stream, indices=indices).to(device)


def _renoise(draw: Callable[[str], Tensor]) -> Renoise:
    return lambda k: draw(f"renoise/{k}")


def _rows(a: Tensor, rows: slice, device: torch.device | str) -> Tensor:
    return a[rows].to(device)


def _check_rows(a: Tensor, total: int) -> Tensor:
    if len(a) != total:
        raise BadInput("c", f"{len(a)} rows", f"give one condition per image, {total} in all")
    return a
