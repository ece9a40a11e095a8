"""How much memory some work needs at its worst moment."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def peak_above(work: Callable[[], object], device: str = "cpu") -> int | None:
    """Bytes by which memory in use rose at the worst moment of some work.

    What the process held before and freed to its own allocator is reused unseen, so a fresh
    process answers best. Elsewhere than on Linux, work that stays below an earlier peak is 0.

    Args:
        work: what to do.
        device: ``cuda`` for the memory of the GPU, else that of the process.

    Returns:
        The bytes; None where the platform does not tell (Windows).
    """
    if device == "cuda":
        return _peak_on_gpu(work)
    if sys.platform == "win32":
        return None
    before = _resident("VmRSS")
    with suppress(OSError):  # man 5 proc: 5 forgets the peak so far
        Path("/proc/self/clear_refs").write_text("5")
    work()
    return max(0, _resident("VmHWM") - before)


def peak_with(build: Callable[[], Callable[[], object]], device: str = "cpu") -> int | None:
    """Bytes in use at the worst moment of some work, what was built for it included.

    What building needed only for itself is not counted, where the platform can forget a peak
    (Linux, CUDA). As `peak_above`, for a fresh process.

    Args:
        build: makes the work.
        device: ``cuda`` for the memory of the GPU, else that of the process.

    Returns:
        The bytes; None where the platform does not tell (Windows).
    """
    if device == "cuda":
        import torch

        before = torch.cuda.memory_allocated()
        work = build()
        held = torch.cuda.memory_allocated() - before
    elif sys.platform == "win32":
        return None
    else:
        _give_back()
        before = _resident("VmRSS")
        work = build()
        _give_back()
        held = _resident("VmRSS") - before
    rise = peak_above(work, device)
    return None if rise is None else held + rise


def _give_back() -> None:
    """Return what is free to the system, where the C library knows how (glibc)."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _peak_on_gpu(work: Callable[[], object]) -> int:
    import torch

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    return torch.cuda.max_memory_allocated() - before


def _resident(key: str) -> int:
    """Resident memory in bytes: now (VmRSS) or at most (VmHWM); without /proc always at most."""
    # Not ru_maxrss where there is a choice: across exec it remembers the peak of the parent.
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024
