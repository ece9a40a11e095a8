"""Settings of the allocator."""

from __future__ import annotations

import subprocess
import sys

import pytest

FREE_AND_WEIGH = """
import numpy, sys
from turbo_lab.cpu import RETURNED, tune_allocator

def size():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmSize"))

assert tune_allocator()
before, kept = size(), []
blocks = []
for _ in range(100):
    blocks.append(numpy.empty(RETURNED, dtype="u1"))
    kept.append(numpy.empty(1 << 16, dtype="u1"))  # lies above it and would keep the heap up
grown = size() - before
del blocks
print(grown // RETURNED, (size() - before) // RETURNED)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the settings are glibc's")
def test_weights_of_a_real_network_leave_no_heap_behind() -> None:
    said = subprocess.run(
        [sys.executable, "-c", FREE_AND_WEIGH], capture_output=True, text=True, check=True
    )
    grown, left = map(int, said.stdout.split())
    assert grown >= 100
    assert left <= 17  # M_TOP_PAD: the heap grows by 256 MiB at a time
