"""One round of DMD2 on the full network, without and with a GAN term, on one shared base.

Students, fake and teacher are one base and its adapters; the critic looks at decoded squares of
the samples through a vision transformer of random weights.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from turbo_lab.adapters import AdapterSize, Host
from turbo_lab.bench import qwen_nets
from turbo_lab.bench.passes import counted_passes
from turbo_lab.bench.qwen_nets import TINY
from turbo_lab.bench.qwen_parts import Row, Setup, free, measured
from turbo_lab.factory import Bench
from turbo_lab.features import RANDOM
from turbo_lab.fit import Batch, Shadow, fit
from turbo_lab.gan_pieces import GanPieces
from turbo_lab.qwen_counts import Work, pass_flops
from turbo_lab.qwen_gan import opened_eye, qwen_gan_pieces
from turbo_lab.qwen_sizes import Model
from turbo_lab.recipes.qwen_image import PASS_TOKENS, QwenGan, QwenStage, resolve_qwen
from turbo_lab.schedules import BASE
from turbo_lab.streams import Draw
from turbo_lab.testbeds.qwen_data import prompt_batch
from turbo_lab.testbeds.qwen_files import CHANNELS, SCALE
from turbo_lab.testbeds.qwen_image import QwenImage, QwenNet, tokens_of

ENDLESS = 10**6
"""Steps that `fit` is promised; it is stopped long before."""
WITH_GAN = "dmd2 and gan"
TINY_EYE = {"vit": "vit_tiny_patch16_224", "blocks": (0, 1), "view": 32}
"""What a critic looks through in a dry run: two blocks of a network of 5 million parameters."""


@dataclass(frozen=True, kw_only=True)
class Round:
    """How much one round trains on.

    Args:
        size: pixels of the square pictures.
        batch: pictures of a turn; those of one pass are as many as the recipes allow.
        text: tokens of a prompt.
        checkpointing: recompute activations in the backward pass.
    """

    size: int
    batch: int = 1
    text: int = 64
    checkpointing: bool = True

    @property
    def micro_batches(self) -> int:
        """Parts of a batch, so that one pass has at most `PASS_TOKENS` image tokens."""
        return -(-self.batch // max(1, PASS_TOKENS // tokens_of(self.size)))


def training(setup: Setup, round_: Round) -> Iterator[Row]:
    """Time cycles of DMD2: one step of the student and all of the others' in between.

    The first row is the method alone, the second has a critic too. The optimisers, the averages
    and the guided teacher are in both.

    Args:
        setup: networks, device and repeats.
        round_: sizes.
    """
    for kind, stage in stages(setup, round_.size).items():
        name = f"{kind} {round_.size} px"
        try:
            row = _cycle(setup, round_, stage, name)
        except torch.OutOfMemoryError as error:
            row = Row(part="training", name=name, note=str(error).splitlines()[0][:160])
        free()
        yield row


def stages(setup: Setup, size: int) -> dict[str, QwenStage]:
    """The recipes' own stages: DMD2, and the last of ``turbo``, with a small eye in a dry run."""
    last = resolve_qwen("turbo", size=size).stages[-1]
    assert last.gan is not None
    changes = TINY_EYE if setup.settings.name == TINY.name else {}
    gan = last.gan.model_copy(update=changes)
    return {
        "dmd2": resolve_qwen("dmd2-2", size=size).stages[0],
        WITH_GAN: last.model_copy(update={"gan": gan}),
    }


def _cycle(setup: Setup, round_: Round, stage: QwenStage, name: str) -> Row:
    """Time a cycle of a stage."""
    critic = None if stage.gan is None else Critic.on(setup, round_, stage.gan)
    bench, net = _bench(setup, round_, critic)
    objective = bench.objective(stage)
    records = fit(
        objective,
        partial(bench.supply, 0),
        steps=ENDLESS,
        batch_size=round_.batch,
        micro_batches=round_.micro_batches,
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
        note = f"{round_.batch} pictures, passes per picture: {_said(passes)}"
        if critic is not None:
            looks = {mode: count / round_.batch / 2 for mode, count in critic.looks.items()}
            flops += round_.batch * critic.flops(bench.testbed.shape, looks)
            note += f"; critic: {_said(looks)}"
        row = measured(setup, "training", name, play, flops=flops)
    finally:
        cast(Any, records).close()
    return replace(row, note=note)


def _said(passes: Mapping[str, float]) -> str:
    return ", ".join(f"{count:g} {mode}" for mode, count in passes.items())


def round_flops(model: Model, round_: Round, passes: Mapping[str, float]) -> float:
    """Count the work of so many passes per picture, see `turbo_lab.qwen_counts.pass_flops`."""
    work = Work(height=round_.size, width=round_.size, batch=round_.batch, text=round_.text)
    each = pass_flops(model.transformer, work, checkpointing=round_.checkpointing)
    return sum(passes[mode] * flops for mode, flops in each.items())


def _bench(setup: Setup, round_: Round, critic: Critic | None) -> tuple[Bench, torch.nn.Module]:
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
    critics = None if critic is None else lambda gan, seed: critic.pieces
    return Bench(testbed=testbed, players=players, supply=supply, critics=critics), net


# --- the critic ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Critic:
    """A critic of random weights that knows how often it looked; build it with `on`.

    Attributes:
        pieces: of the GAN term, each picture that is shown counted.
        show: how, without being counted.
        device: where it is.
        looks: pictures that were shown, by whether they carried a gradient.
    """

    pieces: GanPieces
    show: Callable[[Tensor, Draw], Tensor]
    device: str
    looks: Counter[str] = field(default_factory=Counter)

    @staticmethod
    def on(setup: Setup, round_: Round, gan: QwenGan) -> Critic:
        """Make the recipe's critic of pictures, with noise in the place of real latents."""
        side = round_.size // SCALE
        pieces = qwen_gan_pieces(
            gan,
            real=partial(_noise, (CHANNELS, side, side), setup.place.device),
            players={},
            vae=partial(qwen_nets.vae, setup.settings, setup.place),
            eye=opened_eye(gan, RANDOM, seed=0),
            seed=0,
            device=setup.place.device,
        )
        looks: Counter[str] = Counter(forward=0, gradient=0)

        def counted(x: Tensor, draw: Draw) -> Tensor:
            looks["gradient" if x.requires_grad else "forward"] += len(x)
            return pieces.show(x, draw)

        return Critic(
            pieces=replace(pieces, show=counted),
            show=pieces.show,
            device=setup.place.device,
            looks=looks,
        )

    def flops(self, shape: tuple[int, int, int], looks: Mapping[str, float]) -> float:
        """Count so many looks at one picture of latents ``shape``: what PyTorch executes.

        One with a gradient decodes again most of what it decoded, and goes back to the latents.
        The heads, of 64 numbers where the eye has 384, are left out.
        """
        counts = {mode: self._executed(shape, mode) for mode in looks}
        return sum(counts[mode] * number for mode, number in looks.items())

    def _executed(self, shape: tuple[int, int, int], mode: str) -> int:
        """FLOP of one look."""
        gradient = mode == "gradient"
        x = torch.zeros(1, *shape, device=self.device, requires_grad=gradient)
        draw, t = Draw(seed=0, step=0, total=1), x.new_zeros(1)
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(gradient):
            taps = self.pieces.critic.features(self.show(x, draw), t, t)
            if gradient:
                torch.autograd.grad(torch.stack([tap.sum() for tap in taps]).sum(), x)
        return counter.get_total_flops()


def _noise(shape: tuple[int, ...], device: str, draw: Draw) -> Batch:
    """Latents that are not zeros, which a GPU would multiply faster."""
    x = draw.normal("latents", shape).to(device)
    return Batch(x, torch.zeros(len(x), dtype=torch.long, device=device))
