"""Settings that make training on a CPU faster without changing a result."""

from __future__ import annotations

import ctypes
import os
import sys

RETURNED = 16 << 20
"""Bytes; no activation of the miniature is so large at the batches it trains with, and every matrix
of Qwen-Image's blocks is."""


def tune_allocator() -> bool:
    """Let glibc keep large freed blocks instead of returning them to the system.

    Activations of a training step are freed and taken again every step; each return to the
    system costs page faults (1.3x on the miniature transformer). Blocks of `RETURNED` bytes and
    more do go back: kept, the weights of a real network would leave a heap so large that the
    process could not fork. Linux with glibc only; ``TURBO_LAB_MALLOC=0`` opts out.

    Returns:
        Whether the settings were taken.
    """
    if not sys.platform.startswith("linux") or os.environ.get("TURBO_LAB_MALLOC") == "0":
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD of malloc.h
    return all(
        mallopt(key, value) for key, value in ((-3, RETURNED), (-1, 2**31 - 1), (-2, 256 << 20))
    )
