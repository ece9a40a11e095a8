"""Set up pytest for the unit tests and for nbval over the committed notebooks."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings

# A backend named in the environment silently drops every figure of a notebook.
os.environ.pop("MPLBACKEND", None)
os.environ["TURBO_LAB_PROGRESS"] = "off"  # a bar never looks the same twice

# Shared machines are slow at times: examples are fixed and carry no deadline.
settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")


def pytest_collectstart(collector: pytest.Collector) -> None:
    """Keep nbval from comparing what differs by nature: rendered tables, vectors, log lines."""
    skipped = getattr(collector, "skip_compare", None)
    if skipped is not None:
        extra = ("text/html", "image/svg+xml", "application/pdf", "stderr")
        collector.skip_compare = (*skipped, *extra)  # type: ignore[attr-defined]
