"""A teacher's row of LOG.md, from a command."""

from __future__ import annotations

import pytest

from turbo_lab.lab import open_lab
from turbo_lab.recipes import EARLY
from turbo_lab.studies import teacher_looks


@pytest.mark.slow
def test_guidance_makes_signs_follow_the_caption() -> None:
    lab = open_lab(device="cpu", teacher=EARLY)
    usual, none = (
        teacher_looks.look(lab, captions=48, guidance_scale=scale) for scale in (4.0, 1.0)
    )
    assert list(usual.index) == list(teacher_looks.LOOKED_AT)
    assert usual["sign_read"] > none["sign_read"] + 0.1
