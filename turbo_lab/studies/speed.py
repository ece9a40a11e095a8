"""C7: seconds of a 2-step student and of its guided teacher, in pairs, and where they go.

Both walk through the one sampler, from the same noise. A walk of the teacher is taken in blocks
of steps, and beside every block the student draws whole pictures: block, student, student, block.
Whatever slows the machine for longer than a block slows both sides of a pair.

The two rows of guidance can share one forward (as `turbo_lab.field.guided` has it) or take one
each (as diffusers' QwenImagePipeline has it). Both count as two; where a forward of two rows costs
less than two of one, the first is the harder one to beat.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from turbo_lab.adapters import Worn
from turbo_lab.claims import Claim, Interval, bootstrap
from turbo_lab.field import Field as VelocityField
from turbo_lab.field import Frozen, counted
from turbo_lab.lab import Lab, Student
from turbo_lab.progress import progress
from turbo_lab.recipes import Profile
from turbo_lab.sampling import TEACHER_GUIDANCE, Sampling
from turbo_lab.studies.matching import claim_row
from turbo_lab.studies.speed_clock import APART, PARTS, TEACHERS, TOGETHER, Run

STUDENT = "warm-second-0.5"
"""Family of the student that is timed unless another is named; all 2-step ones cost the same."""
STUDENT_STEPS = 2
SHARES: Mapping[int, float] = MappingProxyType({40: 35.0, 50: 44.0})
"""Steps of the teacher, and how many times as fast as that the student has to be."""
BLOCK = 5
"""Steps of the teacher beside which the student is timed."""
DRAWS = 3
"""Batches of pictures that the student draws beside a block: a side too short to be interrupted as
often as the other would look faster than it is."""
FUSED, ATTACHED = "fused", "attached"
WAYS = {FUSED: "student, adapter in the weights", ATTACHED: "student, adapter beside the weights"}


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Batch sizes, and how many whole walks of every teacher each is timed beside."""

    walks: Mapping[int, int]


BUDGETS: Mapping[str, Budget] = MappingProxyType(
    {
        "smoke": Budget(walks=MappingProxyType({1: 1})),
        "quick": Budget(walks=MappingProxyType({1: 2, 16: 1})),
        "paper": Budget(walks=MappingProxyType({1: 10, 16: 6})),
    }
)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A block of the teacher and pictures of the student beside it.

    Attributes:
        batch: pictures at a time.
        steps: of the teacher's walk.
        guidance: how the teacher is called, of `TEACHERS`.
        teacher: seconds of a whole walk at the pace of this block, by part.
        students: seconds of a whole batch of pictures, by way and part.
    """

    batch: int
    steps: int
    guidance: str
    teacher: Mapping[str, float]
    students: Mapping[str, Mapping[str, float]]

    def ratio(self, way: str) -> float:
        """How many times as fast as the teacher the student was."""
        return sum(self.teacher.values()) / sum(self.students[way].values())


@dataclass(frozen=True, kw_only=True)
class Speed:
    """All pairs, and network forwards per picture."""

    pairs: tuple[Pair, ...]
    nfe: Mapping[str, float]
    """Of ``student`` and of the teacher at so many steps, ``40`` and ``50``."""
    keys: tuple[str, ...]
    device: str
    threads: int

    @property
    def batches(self) -> tuple[int, ...]:
        """Batch sizes, rising."""
        return tuple(sorted({pair.batch for pair in self.pairs}))

    def of(self, batch: int, steps: int, guidance: str = TOGETHER) -> list[Pair]:
        """The pairs of a batch size and a teacher."""
        wanted = (batch, steps, guidance)
        return [p for p in self.pairs if (p.batch, p.steps, p.guidance) == wanted]

    def limit(self, steps: int) -> float:
        """How many times fewer network forwards the student needs."""
        return self.nfe[str(steps)] / self.nfe["student"]

    def ratio(self, batch: int, steps: int, way: str = FUSED, guidance: str = TOGETHER) -> Interval:
        """Median of the pairs' ratios, with its bootstrap interval."""
        ratios = [pair.ratio(way) for pair in self.of(batch, steps, guidance)]
        return bootstrap(np.asarray(ratios), statistic=np.median)


def measure(
    lab: Lab,
    budget: Budget,
    *,
    family: str = STUDENT,
    student_seed: int = 0,
    seed: int = 0,
    profile: Profile = "quick",
) -> Speed:
    """Time a student and its teacher.

    Args:
        lab: with the teacher.
        budget: batch sizes and walks.
        family: of the student.
        student_seed: of its training.
        seed: of the noise.
        profile: of its training.
    """
    student = lab.student(family, steps=STUDENT_STEPS, seed=student_seed, profile=profile)
    timer = Timer(lab=lab, student=student, seed=seed)
    teachers = [(steps, guidance) for steps in SHARES for guidance in TEACHERS]
    wanted = [(b, *one) for b, n in budget.walks.items() for _ in range(n) for one in teachers]
    pairs: list[Pair] = []
    with progress(len(wanted), "timing") as tick:
        for done, (batch, steps, guidance) in enumerate(wanted, start=1):
            pairs += timer.walk(batch, steps, guidance)
            tick(done, f"batch {batch}, {steps} steps")
    nfe = {"student": timer.nfe(STUDENT_STEPS), **{str(s): timer.nfe(s) for s in SHARES}}
    return Speed(
        pairs=tuple(pairs),
        nfe=nfe,
        keys=(lab.artefact.key, student.artefact.key),
        device=lab.device,
        threads=torch.get_num_threads(),
    )


# --- the two sides -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Timer:
    """A student, attached and fused, and its teacher."""

    lab: Lab
    student: Student
    seed: int = 0
    fields: dict[str, VelocityField] = dataclass_field(init=False)

    def __post_init__(self) -> None:
        """Fuse the adapter once."""
        worn = self.student.field
        assert isinstance(worn, Frozen) and isinstance(worn.field, Worn)
        ways: dict[str, VelocityField] = {FUSED: worn.field.fused(), ATTACHED: worn.field}
        object.__setattr__(self, "fields", ways)

    def walk(self, batch: int, steps: int, guidance: str = TOGETHER) -> list[Pair]:
        """One walk of the teacher: a pair for each of its blocks, in the order A, B, B, A."""
        self._warm(batch)
        teacher = self._teacher(self.lab.testbed.net, batch, steps, guidance)
        blocks, students = [], []
        for k in range(steps // BLOCK):
            if k % 2:
                students.append(self._pictures(batch, (ATTACHED, FUSED)))
            before = teacher.parts()
            teacher.advance(BLOCK)
            blocks.append({part: s - before[part] for part, s in teacher.parts().items()})
            if not k % 2:
                students.append(self._pictures(batch, (FUSED, ATTACHED)))
        teacher.end(self.lab)
        ends = teacher.parts()["ends"]
        return [
            Pair(
                batch=batch,
                steps=steps,
                guidance=guidance,
                teacher={p: s * steps / BLOCK for p, s in block.items()} | {"ends": ends},
                students=ways,
            )
            for block, ways in zip(blocks, students, strict=True)
        ]

    def pictures(self, way: str, batch: int) -> tuple[Tensor, dict[str, float]]:
        """Pictures ``[B, 3, 32, 32]`` of the student, and their seconds by part."""
        run = self._student(self.fields[way], batch)
        run.advance(STUDENT_STEPS)
        return run.end(self.lab), run.parts()

    def nfe(self, steps: int) -> float:
        """Network forwards per picture, counted: of the student at its own steps."""
        ours = steps == STUDENT_STEPS
        net = counted(self.fields[FUSED] if ours else self.lab.testbed.net)
        run = self._student(net, 1) if ours else self._teacher(net, 1, steps, TOGETHER)
        run.advance(steps)
        return net.per_image(1)

    def _pictures(self, batch: int, ways: Sequence[str]) -> dict[str, dict[str, float]]:
        """Mean seconds of a batch of pictures, by way and part."""
        out = {}
        for way in ways:
            drawn = [self.pictures(way, batch)[1] for _ in range(DRAWS)]
            out[way] = {part: sum(d[part] for d in drawn) / DRAWS for part in PARTS}
        return out

    def _teacher(self, net: VelocityField, batch: int, steps: int, guidance: str) -> Run:
        grid = Sampling(steps=steps).grid
        return self._begun(net, batch, grid, TEACHER_GUIDANCE, guidance)

    def _student(self, net: VelocityField, batch: int) -> Run:
        return self._begun(net, batch, self.student.sampling(n=1).grid, 1.0, TOGETHER)

    def _begun(
        self, net: VelocityField, batch: int, grid: Tensor, scale: float, guidance: str
    ) -> Run:
        testbed = self.lab.testbed
        run = Run(
            field=net,
            scale=scale,
            null=testbed.null,
            device=self.lab.device,
            guidance=guidance,
        )
        run.begin(grid, testbed.shape, testbed.prompts(batch).tokens, self.seed)
        return run

    def _warm(self, batch: int) -> None:
        """One step of everyone, untimed: memory is taken and code is ready afterwards."""
        for guidance in TEACHERS:
            self._teacher(self.lab.testbed.net, batch, STUDENT_STEPS, guidance).advance(1)
        self._pictures(batch, (FUSED, ATTACHED))


# --- tables and claims --------------------------------------------------------------------------


def table(speed: Speed) -> pd.DataFrame:
    """Ratios: columns ``batch, steps, guidance, way, value, low, high, limit, pairs``."""
    return pd.DataFrame(
        [
            {
                **{"batch": batch, "steps": steps, "guidance": guidance, "way": way},
                **vars(speed.ratio(batch, steps, way, guidance)),
                **{"limit": speed.limit(steps), "pairs": len(speed.of(batch, steps, guidance))},
            }
            for batch in speed.batches
            for steps in SHARES
            for guidance in TEACHERS
            for way in WAYS
        ]
    )


def parts(speed: Speed, steps: int = 40) -> pd.DataFrame:
    """Milliseconds per picture: columns ``batch, who, network, guidance, sampler, ends``.

    ``who`` is a way of the student, or of calling the teacher. The teacher's milliseconds are
    divided by the ratio of network forwards: were they the student's, the student would be as fast
    as the counts allow.
    """
    rows = []
    for batch in speed.batches:
        beside = {guidance: speed.of(batch, steps, guidance) for guidance in TEACHERS}
        spent = {g: [p.teacher for p in pairs] for g, pairs in beside.items()}
        spent |= {w: [p.students[w] for ps in beside.values() for p in ps] for w in WAYS}
        for who, seconds in spent.items():
            unit = 1e3 / batch / (speed.limit(steps) if who in TEACHERS else 1.0)
            mean = {part: unit * float(np.median([s[part] for s in seconds])) for part in PARTS}
            rows.append({"batch": batch, "who": who, **mean})
    return pd.DataFrame(rows)


def missing(speed: Speed, steps: int = 40) -> pd.DataFrame:
    """Where the share of the limit goes that is not reached, with guidance in one forward.

    With S_p the student's and T_p the teacher's milliseconds of part p as in `parts`, the missing
    share is ``1 - ratio / limit = Σ_p (S_p - T_p) / Σ_p S_p``, a sum over parts. That of the
    network is told apart: ``shared``, what the teacher saves by passing both rows of a guided
    picture through the network at once, and ``adapter``, what layers beside the weights cost.

    Returns:
        Index ``batch, way`` (a value of `WAYS`), columns ``missing, shared, adapter, other network,
        guidance, sampler, ends``.
    """
    found = parts(speed, steps).set_index(["batch", "who"])
    rows = []
    for batch in speed.batches:
        own = {who: found.loc[(batch, who)] for who in (*TEACHERS, *WAYS)}
        together, apart = own[TOGETHER], own[APART]
        for way in WAYS:
            whole = own[way].sum()
            lost = (own[way] - together) / whole
            shared = (apart["network"] - together["network"]) / whole
            adapter = (own[way]["network"] - own[FUSED]["network"]) / whole
            rest = lost.drop("network")
            network = {"shared": shared, "adapter": adapter}
            network["other network"] = lost["network"] - shared - adapter
            where = {"batch": batch, "way": WAYS[way]}
            rows.append({**where, "missing": lost.sum(), **network, **rest})
    return pd.DataFrame(rows).set_index(["batch", "way"])


def claims(speed: Speed, *, notebook: str, profile: str) -> list[Claim]:
    """C7: the student is nearly as many times as fast as it needs fewer network forwards."""
    common: dict[str, Any] = {
        "notebook": notebook,
        "source": "the claim of 2-step LoRAs: 80 to 100 network calls become 2",
        "profile": profile,
        "seeds": 1,
        "artefact_keys": speed.keys,
    }
    return [
        Claim(
            **claim_row(
                f"C7-{steps}-batch-{batch}{'-apart' * (guidance == APART)}",
                f"{STUDENT_STEPS} steps are at least {SHARES[steps]:g} times as fast as {steps} "
                f"guided steps, {TEACHERS[guidance]}, of {speed.limit(steps):g} times fewer calls",
                f"seconds of the teacher / seconds of the student, {batch} pictures at a time",
                speed.ratio(batch, steps, guidance=guidance),
                "above",
                SHARES[steps],
            ),
            **common,
            samples=len(speed.of(batch, steps, guidance)),
        )
        for steps in SHARES
        for batch in speed.batches
        for guidance in TEACHERS
    ]


def bars(lab: Lab) -> Iterator[tuple[str, Interval, float]]:
    """Name, ratio and limit of each acceptance figure of speed."""
    speed = measure(lab, BUDGETS["quick"])
    for steps, limit in SHARES.items():
        for batch in speed.batches:
            for guidance in TEACHERS:
                name = f"speed.{steps}_steps.batch_{batch}.{guidance}"
                yield name, speed.ratio(batch, steps, guidance=guidance), limit
