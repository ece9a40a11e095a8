"""How much memory is free on a device, and how bytes are written for a person."""

from __future__ import annotations

import math
from pathlib import Path

import torch


def free_memory(device: str) -> int | None:
    """Free bytes of the GPU, or of the machine; None where that cannot be asked."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    except OSError:
        return None
    kilobytes = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return 1024 * int(kilobytes[0]) if kilobytes else None


def gigabytes(size: int) -> str:
    """Bytes as text, rounded up in the last digit: a plan must not promise too little."""
    return f"{math.ceil(size / 1e7) / 100:,.2f} GB"
