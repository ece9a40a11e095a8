"""Work in a fresh process, whose memory is its own."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from turbo_lab.errors import TurboLabError

T = TypeVar("T")


def apart(work: Callable[..., T], *arguments: object, what: str, device: str = "cpu") -> T:
    """Return what some work returns in a process of its own.

    Args:
        work: a function of a module.
        arguments: of the work.
        what: is measured, for the message.
        device: where the work is done.

    Raises:
        TurboLabError: the process died.
    """
    # A fork of a server that has only imported starts in a moment; after CUDA was asked for
    # devices, as imports do, nothing forked can use it.
    forks = device == "cpu" and "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if forks else "spawn")
    if forks:
        qwen = "diffusers.models.transformers.transformer_qwenimage"
        context.set_forkserver_preload(["turbo_lab.bench.train", qwen])
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        try:
            return pool.submit(work, *arguments).result()
        except BrokenProcessPool:
            raise TurboLabError(
                f"The process that measured the memory of {what} died; "
                "is there enough memory for the batch?"
            ) from None
