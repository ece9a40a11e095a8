"""Randomness is a function of its name: not of order, batch size, micro-batches or processes."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from scipy import stats

from turbo_lab.errors import BadInput
from turbo_lab.streams import Draw, generator, noise, rng, seed_for


def test_names_give_different_seeds_and_the_same_name_the_same_in_any_process() -> None:
    names = [(0, "a"), (0, "b"), (1, "a"), (0, "a", 1), (0, "a", "1"), (0, "a/1"), (0,)]
    assert len({seed_for(*name) for name in names}) == len(names)
    code = "from turbo_lab.streams import seed_for; print(seed_for(5, 'train', 7))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(other.stdout) == seed_for(5, "train", 7)
    with pytest.raises(BadInput, match="seed=-1"):
        seed_for(-1)


def test_global_state_is_neither_read_nor_changed() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    a = noise((2, 2), seed=0, stream="z", indices=[3])
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(99)
    b = noise((2, 2), seed=0, stream="z", indices=[3])
    assert torch.equal(a, b)


def test_an_image_keeps_its_noise_in_every_batch() -> None:
    whole = noise((3, 4), seed=2, stream="z", indices=range(10))
    assert torch.equal(whole[4:6], noise((3, 4), seed=2, stream="z", indices=[4, 5]))
    assert not torch.equal(whole, noise((3, 4), seed=2, stream="renoise/0", indices=range(10)))


def test_micro_batches_see_the_rows_of_one_draw() -> None:
    draw = Draw(seed=1, step=9, total=10)
    for parts in (
        [draw.rows(k, k + 5).normal("z", (2,)) for k in (0, 5)],
        [draw.rows(k, k + 1).normal("z", (2,)) for k in range(10)],
    ):
        assert torch.equal(torch.cat(parts), draw.normal("z", (2,)))
    assert draw.rows(0, 5).shared("index", 100) == draw.rows(5, 10).shared("index", 100)
    assert not torch.equal(draw.uniform("t"), draw.sub("rival").uniform("t"))


def test_the_numbers_have_their_distributions() -> None:
    normal = noise((50,), seed=0, stream="z", indices=range(200)).flatten().numpy()
    assert stats.kstest(normal, "norm").pvalue > 1e-3
    uniform = Draw(seed=0, step=0, total=10_000).uniform("t").numpy()
    assert stats.kstest(uniform, "uniform").pvalue > 1e-3
    assert stats.kstest(rng(0, "a").random(10_000), "uniform").pvalue > 1e-3
    firsts = [float(torch.rand((), generator=generator(0, "s", k))) for k in range(5_000)]
    assert stats.kstest(firsts, "uniform").pvalue > 1e-3
