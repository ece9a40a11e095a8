"""One round of DMD2 on the full network: student, fake and teacher on one shared base."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch

from turbo_lab.adapters import AdapterSize, Host
from turbo_lab.bench import qwen_nets
from turbo_lab.bench.passes import counted_passes
from turbo_lab.bench.qwen_parts import Row, Setup, measured
from turbo_lab.factory import Bench
from turbo_lab.fit import Objective, Shadow, fit
from turbo_lab.qwen_counts import Model, Work, transformer_counts
from turbo_lab.recipes.qwen_image import resolve_qwen
from turbo_lab.schedules import BASE
from turbo_lab.testbeds.qwen_data import prompt_batch
from turbo_lab.testbeds.qwen_image import QwenImage, QwenNet

ENDLESS = 10**6
"""Steps that `fit` is promised; it is stopped long before."""
BACKWARD = 2.5
"""Work of attention's backward pass, in forward passes: five products for two."""


@dataclass(frozen=True, kw_only=True)
class Round:
    """How much one round trains on.

    Args:
        size: pixels of the square pictures.
        batch: pictures of a turn.
        text: tokens of a prompt.
        checkpointing: recompute activations in the backward pass.
    """

    size: int
    batch: int = 1
    text: int = 64
    checkpointing: bool = True


def training(setup: Setup, round_: Round) -> Iterator[Row]:
    """Time a cycle of DMD2's recipe: one step of the student and all of the fake in between.

    The optimiser, the averages and the guided teacher are in it; the critic is not.

    Args:
        setup: networks, device and repeats.
        round_: sizes.
    """
    stage = resolve_qwen("dmd2-2", size=round_.size).stages[0]
    bench, net = _bench(setup, round_)
    objective: Objective = bench.objective(stage)
    records = fit(
        objective,
        partial(bench.supply, 0),
        steps=ENDLESS,
        batch_size=round_.batch,
        seed=0,
        optimisers={name: rates.optimiser() for name, rates in stage.rates.items()},
        shadows=(Shadow(of="student", average=bench.players["average"], decay=stage.ema),),
    )
    cycle = math.lcm(*(turn.every for turn in objective.turns()))

    def play() -> None:
        for _ in range(cycle):
            next(records)

    try:
        with counted_passes(round_.batch, [net]) as tally:
            play()
            play()
        passes = {mode: 0.0 for mode in ("forward", "gradient")}
        for kind, count in tally.items():
            passes[kind.mode] += count / 2
        flops = round_flops(setup.settings.model, round_, passes)
        row = measured(setup, "training", f"dmd2 {round_.size} px", play, flops=flops)
    finally:
        cast(Any, records).close()
    note = ", ".join(f"{count:g} {mode}" for mode, count in passes.items())
    yield replace(row, note=f"{round_.batch} pictures, passes per picture: {note}")


def round_flops(model: Model, round_: Round, passes: dict[str, float]) -> float:
    """Count the work of so many passes per picture.

    A pass with a gradient is a forward, the same again if it is recomputed, and a backward pass
    that makes no gradients of the base's weights: once the linear layers, 2.5 times attention.
    """
    work = Work(height=round_.size, width=round_.size, batch=round_.batch, text=round_.text)
    counts = transformer_counts(model.transformer, work)
    forward = sum(count.flops for count in counts)
    attention = sum(count.flops for count in counts if count.component == "attention")
    backward = forward + (BACKWARD - 1) * attention
    trained = (2 if round_.checkpointing else 1) * forward + backward
    return passes["forward"] * forward + passes["gradient"] * trained


def _bench(setup: Setup, round_: Round) -> tuple[Bench, torch.nn.Module]:
    """The testbed of `turbo_lab.factory` around random weights."""
    place = setup.place
    prompts = qwen_nets.random_prompts(setup.settings, place, n=round_.batch, tokens=round_.text)
    net = QwenNet(qwen_nets.transformer(setup.settings, place), prompts)
    testbed = QwenImage(
        host=Host(net, part="transformer"),
        schedule=BASE,
        size=round_.size,
        device=place.device,
    )
    size = AdapterSize(rank=setup.rank, alpha=setup.rank)
    student = testbed.spawn("student", size, seed=0)
    players = {
        "student": student,
        "average": testbed.host.copy(student, "average"),
        "fake": testbed.spawn("fake", size, seed=0),
    }
    if round_.checkpointing:
        testbed.host.checkpointing()
    supply = partial(prompt_batch, round_.batch, testbed.shape, place.device)
    return Bench(testbed=testbed, players=players, supply=supply), net
