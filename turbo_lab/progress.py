"""Progress that suits where it runs: a bar for a person, a rare line for a log, else nothing."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from turbo_lab.errors import BadInput

VARIABLE = "TURBO_LAB_PROGRESS"
MODES = ("auto", "bar", "log", "off")
LOG_EVERY = 10.0
"""Seconds between two lines of a log."""

Tick = Callable[[int, str], None]
"""``tick(done, note)``: so many of the total are done."""


def progress(total: int, what: str, *, delay: float = 0.0) -> AbstractContextManager[Tick]:
    """Show progress over ``total`` units while the context is open.

    With a delay, a bar comes with the first tick after so many seconds: for what often turns out to
    be there already.

    ``TURBO_LAB_PROGRESS`` chooses: ``bar``, ``log`` (a line every 10 s on standard error), ``off``,
    or ``auto``: a bar in a terminal or a notebook a person has open, a log elsewhere.

    Raises:
        BadInput: the variable has another value.
    """
    mode = _mode()
    if mode == "off":
        return nullcontext(_silent)
    return _bar(total, what, delay) if mode == "bar" else _log(total, what)


@contextmanager
def library_bars() -> Iterator[None]:
    """Let diffusers and transformers show bars of their own only where `progress` shows one.

    Raises:
        BadInput: the variable has another value.
    """
    if _mode() == "bar":
        yield
        return
    from diffusers.utils import logging as diffusers
    from transformers.utils import logging as transformers

    shown = [one for one in (diffusers, transformers) if one.is_progress_bar_enabled()]
    for one in shown:
        one.disable_progress_bar()
    try:
        yield
    finally:
        for one in shown:
            one.enable_progress_bar()


def _mode() -> str:
    mode = os.environ.get(VARIABLE, "auto")
    if mode not in MODES:
        raise BadInput(VARIABLE, mode, f"use one of {', '.join(MODES)}")
    if mode == "auto":
        return "bar" if _watched() else "log"
    return mode


def _watched() -> bool:
    if "ipykernel" in sys.modules:
        return True
    return sys.stderr.isatty()


def _silent(done: int, note: str = "") -> None:
    """Show nothing."""


@contextmanager
def _bar(total: int, what: str, delay: float) -> Iterator[Tick]:
    from tqdm.auto import tqdm

    with tqdm(total=total, desc=what, leave=False, delay=delay) as bar:

        def tick(done: int, note: str = "") -> None:
            bar.set_postfix_str(note, refresh=False)
            bar.update(done - bar.n)

        yield tick


@contextmanager
def _log(total: int, what: str) -> Iterator[Tick]:
    said, before = time.monotonic(), 0

    def tick(done: int, note: str = "") -> None:
        nonlocal said, before
        now = time.monotonic()
        if now - said >= LOG_EVERY:
            # By the pace since the last line: what a resumed training had done took no time now.
            left = (now - said) * (total - done) / max(done - before, 1)
            said, before = now, done
            print(f"{what}: {done}/{total} {note} ({left:.0f} s left)", file=sys.stderr, flush=True)

    yield tick
