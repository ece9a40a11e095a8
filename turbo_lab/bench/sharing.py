r"""What one shared base saves: DMD2 with adapters, and with three whole networks.

DMD2 as it is usually run keeps student, fake and teacher as networks of their own, and for the
first two also gradients and the states of AdamW: with P bytes of weights, 3 P + P + 4 P = 8 P, one
gradient at a time. On a shared base only adapters of A bytes have any of this: P + 3 A + A + 4 A,
the average of the student included. A network of `LARGE`, one image at a time, weighs as at 20B:
weights far outweigh activations, and a rank-8 adapter is 2% of the base as a rank-64 one is of
Qwen-Image. At the size of the postcards activations are most of a step, and they are not saved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType

import torch
from torch import nn

from turbo_lab.bench.memory import peak_with
from turbo_lab.bench.processes import apart
from turbo_lab.bench.report import Holding, Sharing
from turbo_lab.bench.steps import Step, at_work, begun, example, planted
from turbo_lab.field import frozen, guided
from turbo_lab.fit import Batch
from turbo_lab.methods import METHODS
from turbo_lab.postcards.captions import null_tokens
from turbo_lab.progress import progress
from turbo_lab.recipes import Recipe
from turbo_lab.store import Store
from turbo_lab.streams import Draw
from turbo_lab.testbeds.postcards import NetSize, spawn_net
from turbo_lab.training import load_net

LARGE = NetSize(heads=8, head_width=64)
"""Four layers like Qwen-Image's, 512 wide: 39 million parameters."""
SMALL = NetSize(layers=1, heads=1, head_width=16, text_width=16)


def shares(of: Sequence[Recipe], *, device: str = "cpu") -> tuple[Sharing, ...]:
    """Compare the last case with a fake score, if any: at its own size, and where weights rule.

    Raises:
        TurboLabError: a process died.
    """
    rivals = [case for case in of if "fake" in case.stages[0].rates]
    sizes = [(case, sized(case, LARGE, 1)) for case in rivals[-1:]]
    return tuple(share(case, device=device) for pair in sizes for case in pair)


def share(case: Recipe, *, device: str = "cpu") -> Sharing:
    """Measure a one-stage recipe with a fake score on a shared base, and as three networks.

    Raises:
        TurboLabError: a process died.
    """
    held = {}
    with progress(2, f"measuring the copies of {case.name}") as tick:
        for form in FORMS:
            held[form] = apart(holding, case, form, device, what=case.name, device=device)
            tick(len(held), form)
    return Sharing(
        name=case.name,
        parameters=sum(p.numel() for p in spawn_net(case.net, 0).parameters()),
        batch_size=case.stages[0].batch_size,
        **held,
    )


def sized(case: Recipe, net: NetSize, batch_size: int) -> Recipe:
    """The same one-stage recipe on another network and batch."""
    assert case.teacher is not None
    (stage,) = case.stages
    teacher = case.teacher.model_copy(update={"net": net})
    stages = (stage.model_copy(update={"batch_size": batch_size}),)
    return case.model_copy(update={"net": net, "teacher": teacher, "stages": stages})


def on_shared_base(case: Recipe, store: Store, batch: Batch, device: str) -> Step:
    """Begin the training as its recipe says: adapters, one of them the student's average."""
    return at_work(case, store, batch, device)


def as_copies(case: Recipe, store: Store, batch: Batch, device: str) -> Step:
    """Begin the same training with three networks of their own, without an average."""
    assert case.teacher is not None
    (stage,) = case.stages
    artefact = store.find(case.teacher.artefact, case.teacher.spec())
    assert artefact is not None
    student, fake, net = (load_net(case.teacher, artefact).to(device) for _ in range(3))
    teacher = guided(frozen(net), null_tokens(1), stage.guidance)
    method = METHODS[stage.method](student=student, fake=fake, teacher=teacher, **stage.options)
    return begun(case, method, batch, networks=(student, fake, net))


FORMS: Mapping[str, Callable[[Recipe, Store, Batch, str], Step]] = MappingProxyType(
    {"shared": on_shared_base, "copies": as_copies}
)


def holding(case: Recipe, form: str, device: str) -> Holding:
    """Count and measure a training in one of the `FORMS`; for a process of its own."""
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        small = sized(case, SMALL, 1)
        first = at_work(small, planted(Path(folder) / "0", small), example(small, device), device)
        first()  # pages of code and the like, which are not to be counted
        first.close()
        store, batch = planted(Path(folder) / "1", case), example(case, device)
        made: list[Step] = []

        def build() -> Callable[[], object]:
            made.append(FORMS[form](case, store, batch, device))
            return lambda: (made[0](), made[0]())

        try:
            peak = peak_with(build, device)
            weights, gradients, optimiser = kept(made[0], batch)
        finally:
            for step in made:
                step.close()
    return Holding(weights=weights, gradients=gradients, optimiser=optimiser, peak=peak)


def kept(step: Step, batch: Batch) -> tuple[int, int, int]:
    """Bytes of weights, of the gradients of the largest turn, and of AdamW's states.

    What a loss does not reach, such as the last text stream of Qwen-Image, has neither gradient
    nor state; so every turn's loss is played once.
    """
    objective = step.objective
    learners = [p for p in objective.players.values() if isinstance(p, nn.Module)]
    modules = nn.ModuleList([*step.networks, *learners])  # each tensor is yielded once
    weights = sum(t.nbytes for t in (*modules.parameters(), *modules.buffers()))
    gradients, optimiser = [0], 0
    for turn in objective.turns():
        moved = [p for name in turn.moves for _, p in objective.players[name].named_parameters()]
        modules.requires_grad_(False)
        for parameter in moved:
            parameter.requires_grad_()
        draw = Draw(seed=0, step=0, total=len(batch.x), stream=turn.name)
        torch.stack([term.sum() for term in turn.loss(batch, draw).values()]).sum().backward()
        reached = [p.grad for p in moved if p.grad is not None]
        gradients.append(sum(g.nbytes for g in reached))
        optimiser += 2 * gradients[-1] + 4 * len(reached)  # two moments, a step count
        modules.zero_grad(set_to_none=True)
    return weights, max(gradients), optimiser
