"""Training by several processes: two of them, over gloo, do what one does."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from rank_world import toy_run, toys, two_processes

from turbo_lab.errors import BadInput
from turbo_lab.ranks import ALONE, Ranks
from turbo_lab.store import Checkpoints


@pytest.mark.slow
def test_two_processes_train_as_one_and_the_first_alone_writes(tmp_path: Path) -> None:
    alone = toy_run(ALONE, None)
    first, second = two_processes(toys, tmp_path, tmp_path)
    for got in (first["whole"], second["whole"]):
        torch.testing.assert_close(got["terms"], alone["terms"], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(got["norms"], alone["norms"], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(got["average"], alone["average"], rtol=1e-5, atol=1e-7)
        for name, weights in got["weights"].items():
            torch.testing.assert_close(weights, alone["weights"][name], rtol=1e-5, atol=1e-7)
    assert first["whole"]["seen"] == second["whole"]["seen"]
    assert first["whole"]["seen"] == alone["seen"][::2]  # its two parts see one step
    for name, weights in first["whole"]["weights"].items():
        assert torch.equal(weights, second["whole"]["weights"][name])
        assert torch.equal(weights, second["resumed"]["weights"][name])
        assert torch.equal(weights, first["resumed"]["weights"][name])
    assert first["resumed"]["steps"] == second["resumed"]["steps"] == [6, 7, 8]
    assert first["left"] == second["left"] == 4
    assert Checkpoints(folder=tmp_path / "0" / "left").latest()[0] == 4  # type: ignore[index]
    assert first["wrote"] == ["half", "whole"] and second["wrote"] == []
    assert first["agreed"] == second["agreed"] == [True, False]
    assert first["any"] == second["any"] == [True, False]
    assert bool((first["whole"]["weights"]["asleep"] == 1).all())  # no loss, so no decay either


def test_rows_are_shared_out_and_none_is_left() -> None:
    for total, world in ((8, 1), (8, 3), (2, 2)):
        rows = [Ranks(rank=rank, world=world).rows(total) for rank in range(world)]
        assert rows[0][0] == 0 and rows[-1][1] == total
        assert all(a[1] == b[0] for a, b in pairwise(rows))
    assert Ranks(rank=1, world=2).parts(8, 8) == 4 and Ranks(rank=1, world=2).parts(8, 3) == 2
    with pytest.raises(BadInput, match="batch_size=2 is not allowed: use at least 3"):
        Ranks(world=3).check(2)
