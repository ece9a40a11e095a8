"""The factory on two processes, over gloo."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from factory_world import SMALL, changed, job, write_shaped
from rank_world import two_processes
from test_factory_gan import GANS, turbo
from torch import Tensor

from turbo_lab import factory
from turbo_lab.factory_plan import Job
from turbo_lab.ranks import Ranks
from turbo_lab.store import Store


def small(world: Path, kind: str) -> Job:
    """A short training: the whole chain of two stages, or DMD2 with a critic."""
    if kind == "gan":
        fixed = GANS["dino"].model_copy(update={"balance": None, "weight": 0.01})
        work = turbo(world, fixed)  # what balances is a norm over the rows at hand
    elif kind == "buckets":
        options = {"size": 64, "buckets": "aspect", "prompts": world / "five.txt"}
        work = changed(job(world, "consistency", images=world / "shaped", **options), adapter=SMALL)
    else:
        work = changed(job(world, kind), adapter=SMALL)
    stages = tuple(s.model_copy(update={"steps": 2}) for s in work.recipe.stages)
    return changed(work, stages=stages)


def factories(ranks: Ranks, world: Path, folder: Path) -> dict[str, dict[str, Tensor]]:
    """What the processes find in their one store."""
    store = Store(cache=folder / "together")
    out = {}
    for kind in ("pcm-dmd2-2", "gan", "buckets"):
        out[kind] = factory.trained(small(world, kind), store=store, ranks=ranks).tensors()
        again = factory.trained(small(world, kind), store=store, ranks=ranks)
        assert all(torch.equal(v, out[kind][k]) for k, v in again.tensors().items())
    return out


@pytest.mark.slow
def test_the_factory_trains_the_same_adapter_on_two_processes(
    factory_world: Path, factory_caches: Store, tmp_path: Path
) -> None:
    """AdamW divides by the size of a gradient, so rounding shows at the size of a step."""
    write_shaped(factory_world)
    both = two_processes(factories, tmp_path, factory_world, tmp_path)
    for kind in ("pcm-dmd2-2", "gan", "buckets"):
        work = small(factory_world, kind)
        alone = factory.trained(work, store=factory_caches).tensors()
        rate = max(stage.rates["student"].lr for stage in work.recipe.stages)
        for got in both:
            assert got[kind].keys() == alone.keys()
            for name, weights in got[kind].items():
                torch.testing.assert_close(weights, alone[name], rtol=1e-6, atol=0.02 * rate)
        moved = [bool(v.any()) for k, v in alone.items() if "lora_B" in k]
        assert all(moved)
        keys = {s.find(work.artefact, work.specs()[-1]).key for s in (  # type: ignore[union-attr]
            factory_caches, Store(cache=tmp_path / "together"))}  # fmt: skip
        assert len(keys) == 1  # how many processes there were is no part of it
