"""Acceptance bars: every promised figure recomputed from the shipped artefacts, one line each.

``turbo-lab bars`` trusts no stored number: it loads the shipped weights, samples, measures, times
and compares. A new bar is a function and a line in `BARS`.
"""

from __future__ import annotations

import atexit
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from turbo_lab.acceptance import Bar, at_least, printed
from turbo_lab.claims import Interval, wilson
from turbo_lab.lab import Lab, Samples, open_lab
from turbo_lab.recipes import EARLY
from turbo_lab.sampling import TEACHER_STEPS, Sampling
from turbo_lab.store import Store

if TYPE_CHECKING:
    from turbo_lab.training import Trace

CAPTIONS = 1000
"""Held-out captions behind the teacher's bars."""


def teacher_quality() -> Iterator[Bar]:
    """The shipped teacher at 40 guided steps on 1,000 held-out captions."""
    rows = _teacher_table()
    yield at_least("teacher.signs_read", rows["sign_read"], 0.98)
    yield at_least("teacher.whole_body", rows["whole_body"], 0.90)
    kl = rows["hue_kl"]
    yield Bar(
        name="teacher.hue_kl",
        value=kl.value,
        side="at most",
        limit=0.05,
        unit="nats",
        interval=kl,
    )
    for ground in ("moss", "fur"):
        ratio = rows[f"{ground}_energy"]
        yield Bar(
            name=f"teacher.{ground}_energy_error",
            value=abs(ratio.value - 1),
            side="at most",
            limit=0.15,
            unit="of real",
        )


def teacher_speed() -> Iterator[Bar]:
    """Seconds for 256 images at 40 guided steps (80 NFE)."""
    lab = _lab()
    _, nfe, seconds = lab.draw(Sampling(steps=TEACHER_STEPS, n=256), "256 images, 80 NFE")
    yield Bar(name="teacher.seconds_256", value=seconds * 256, side="at most", limit=60, unit="s")
    yield Bar(name="teacher.nfe", value=nfe, side="at most", limit=2 * TEACHER_STEPS)


def teacher_size() -> Iterator[Bar]:
    """Size of the shipped weights."""
    size = _lab().artefact.file("weights.safetensors").stat().st_size / 1e6
    yield Bar(name="teacher.megabytes", value=size, side="at most", limit=12, unit="MB")


def teacher_replay() -> Iterator[Bar]:
    """Largest relative difference between the recorded and the replayed training losses."""
    from turbo_lab.training import recorded, replay

    lab = _lab()
    then, now = recorded(lab.artefact), replay(lab.recipe, lab.artefact, lab.store)
    yield Bar(name="teacher.replay_error", value=_apart(then, now), side="at most", limit=0.01)


def _apart(then: Trace, now: Trace) -> float:
    """Largest relative difference of two traces, of the halves that could be run again."""
    halves = (then.first, now.first), (then.last, now.last)
    pairs = [pair for a, b in halves if b for pair in zip(a, b, strict=True)]
    return max(abs(a - b) / a for a, b in pairs)


def students() -> Iterator[Bar]:
    """Shipped students: the largest file, and the worst replay of the first training of each."""
    from turbo_lab.recipes import RECIPES, resolve
    from turbo_lab.training import recorded, replay

    lab, sizes, errors = _lab(EARLY), [], []
    for name in RECIPES:
        recipe = resolve(name)
        if recipe.teacher is None:
            continue
        artefact = lab.trained(recipe)
        sizes.append(artefact.file("weights.safetensors").stat().st_size / 1e6)
        errors.append(_apart(recorded(artefact), replay(recipe, artefact, lab.store)))
    yield Bar(name="students.megabytes", value=max(sizes), side="at most", limit=2, unit="MB")
    yield Bar(name="students.replay_error", value=max(errors), side="at most", limit=0.01)


def dmd2_quality() -> Iterator[Bar]:
    """DMD2 at 4 steps, trained longer, three trainings, against their teacher: same captions."""
    from turbo_lab import measure
    from turbo_lab.claims import crossed_bootstrap
    from turbo_lab.studies.students import draw_students

    teacher = _teacher_samples(EARLY)
    fields = teacher.scenes.fields
    drawn = draw_students(_lab(EARLY), [("dmd2-long", 4, k) for k in range(3)], captions=CAPTIONS)
    reports = [measure.report(one.images, fields) for one in drawn.samples.values()]
    theirs, moss = measure.report(teacher.images, fields), fields[:, 2] == 0
    for name, metric, rows, limit in (
        ("signs_read", "sign_read", fields[:, 2] >= 0, 0.95),
        ("moss_energy", "band_energy", moss, 0.85),
    ):
        own = np.stack([r[metric][rows].float().numpy() for r in reports])
        of = np.repeat(theirs[metric][rows].float().numpy()[None], len(own), axis=0)
        ratio = crossed_bootstrap(own, of, statistic=lambda a, b: float(a.sum() / b.sum()))
        yield at_least(f"dmd2_4_steps.{name}", ratio, limit, unit="of the teacher's")


def warm_quality() -> Iterator[Bar]:
    """2-step students: PCM alone, of either teacher, and what it does for DMD2 at equal calls."""
    from turbo_lab import measure
    from turbo_lab.claims import crossed_bootstrap
    from turbo_lab.recipes import six_blocks
    from turbo_lab.recipes.warm import STEPS, TIMES
    from turbo_lab.studies.students import Key, draw_students

    def seen(images: Tensor, metric: str) -> np.ndarray:
        return measure.report(images, fields)[metric].float().numpy()

    def rows(family: str, metric: str) -> np.ndarray:
        found = [s.images for (name, _, _), s in drawn.samples.items() if name == family]
        return np.stack([seen(images, metric) for images in found])

    pairs = {"": ("warm", "dmd2"), "_second_0.5": ("warm-second-0.5", "dmd2-second-0.5")}
    families = ["pcm", *(family for pair in pairs.values() for family in pair)]
    wanted: list[Key] = [(family, STEPS, k) for family in families for k in range(3)]
    drawn = draw_students(_lab(EARLY), [*wanted, (six_blocks.PCM, STEPS, 0)], captions=CAPTIONS)
    fields = next(iter(drawn.samples.values())).scenes.fields  # the same for everyone
    alone = {"pcm": (_lab(EARLY), TIMES), six_blocks.PCM: (_lab(), (1.0, six_blocks.EDGE))}
    for family, (lab, times) in alone.items():
        naive = lab.samples(Sampling(steps=STEPS, times=times, n=CAPTIONS), "naive 2 steps")
        bar = f"{family.replace('-', '_')}_2_steps"
        yield at_least(f"{bar}.signs_read", crossed_bootstrap(rows(family, "sign_read")), 0.95)
        bodies, of = rows(family, "whole_body"), seen(naive.images, "whole_body")[None]
        gained = crossed_bootstrap(
            bodies,
            np.repeat(of, len(bodies), axis=0),
            statistic=lambda a, b: float(a.sum() / max(b.sum(), 1)),
        )
        unit = "of 2 Euler steps of the teacher"
        yield at_least(f"{bar}.whole_body", gained, 2.0, unit=unit)
    for name, (warm, direct) in pairs.items():
        gain = crossed_bootstrap(rows(warm, "whole_body") - rows(direct, "whole_body"))
        yield Bar(
            name=f"warm_start.whole_body_gain{name}",
            value=gain.low,
            side="at least",
            limit=0.0,
            unit="over direct DMD2, low end",
            interval=gain,
        )


def gan_quality() -> Iterator[Bar]:
    """The 2-step student with a GAN term, six trainings, against DMD2 with as many steps.

    ``_term`` is against as many more calls of DMD2 from the same start.
    """
    from turbo_lab.claims import crossed_bootstrap
    from turbo_lab.studies import adversarial
    from turbo_lab.studies.textures import TEXTURES, nearer

    compared = (adversarial.GAN, adversarial.DIRECT, adversarial.CONTROL)
    budget = adversarial.Budget(captions=CAPTIONS, seeds=6, sweep=(), real=4096, main=compared)
    comparison = adversarial.compare(_lab(EARLY), budget, seed=0)
    found = comparison.measured
    ours = found[adversarial.GAN]
    for suffix, name in (("", adversarial.DIRECT), ("_term", adversarial.CONTROL)):
        other = found[name]
        for ground in TEXTURES:
            gap = nearer(comparison.real, ours, other, [ground])
            yield Bar(
                name=f"gan.{ground}_patches{suffix}",
                value=gap.high,
                side="at most",
                limit=0.0,
                unit="minus DMD2, high end",
                interval=gap,
            )
        more = ours.values["sign_read"] - other.values["sign_read"]
        yield at_least(f"gan.signs_read{suffix}", crossed_bootstrap(more), -0.02)


def mini_dino() -> Iterator[Bar]:
    """Errors of the linear probe on the mini-DINO, of those on the same network untrained."""
    from turbo_lab.studies import dino_probe

    for name, interval in dino_probe.bars(_lab().store):
        yield Bar(
            name=f"dino.{name}_errors",
            value=interval.value,
            side="at most",
            limit=0.5,
            unit="of a random network's",
            interval=interval,
        )


def factory() -> Iterator[Bar]:
    """Ours against stock diffusers on a tiny pipeline, counts, files of strangers, notebook 07."""
    from turbo_lab.studies.factory_bars import factory_bars

    for name, value, side, limit in factory_bars():
        yield Bar(name=name, value=value, side=side, limit=limit)


def renderer_speed() -> Iterator[Bar]:
    """Postcards rendered per second, the best of five passes of 2,048."""
    from turbo_lab.postcards import draw_scenes, render

    rates = []
    for _ in range(5):
        began = time.perf_counter()
        render(draw_scenes("train", range(2048)))
        rates.append(2048 / (time.perf_counter() - began))
    yield Bar(
        name="renderer.images_per_second", value=max(rates), side="at least", limit=5000, unit="/s"
    )


def oracles() -> Iterator[Bar]:
    """Every oracle on 1,000 fresh and 1,000 edited postcards."""
    from turbo_lab.measure import edited_truth, fresh_truth

    for row in fresh_truth(n=1000).itertuples():
        name = f"oracle.fresh.{row.oracle}".replace(" ", "_")
        yield at_least(name, wilson(row.right, row.n), 0.995)
    for row in edited_truth(n=1000).itertuples():
        name = f"oracle.edited.{row.edit}.{row.oracle}".replace(", ", "_").replace(" ", "_")
        yield at_least(name, wilson(row.right, row.n), 0.99)


def speed() -> Iterator[Bar]:
    """The 2-step student against its guided teacher, in pairs through the same sampler."""
    from turbo_lab.studies import speed

    for name, ratio, limit in speed.bars(_lab(EARLY)):
        yield at_least(name, ratio, limit)


def turbo_quality() -> Iterator[Bar]:
    """The 2-step turbo student of six blocks, beside its own teacher."""
    from turbo_lab.studies.turbo_claims import bars

    for name, interval, side, limit in bars(_lab(), _teacher_samples()):
        yield Bar(name=name, value=interval.value, side=side, limit=limit, interval=interval)


def training_step() -> Iterator[Bar]:
    """Steps with a guided teacher, as multiples of their network passes alone.

    A step of DMD2 is one of the student and all that its rivals take meanwhile.
    """
    from turbo_lab.bench.steps import cases
    from turbo_lab.bench.train import measure

    for name, case in (("consistency", "consistency"), ("dmd2", "dmd2-2")):
        row = measure(cases(case), repeats=16).rows[-1]
        yield Bar(
            name=f"bench.{name}_step",
            value=row.to_passes.value,
            side="at most",
            limit=1.10,
            unit="of its passes",
            interval=row.to_passes,
        )


def shared_base() -> Iterator[Bar]:
    """Memory of DMD2 on one shared base, where weights outweigh activations as at 20B."""
    from turbo_lab.bench.sharing import LARGE, share, sized
    from turbo_lab.bench.steps import cases

    shares = share(sized(cases("dmd2-2")[-1], LARGE, 1))
    for name, value in (("kept", shares.exact), ("peak", shares.peak)):
        if value is not None:  # no peak is known on Windows
            yield Bar(
                name=f"bench.dmd2_memory_{name}",
                value=value,
                side="at most",
                limit=0.45,
                unit="of three copies",
            )


def import_time() -> Iterator[Bar]:
    """Seconds that ``import turbo_lab`` takes, median of seven processes."""
    code = "import time; t = time.perf_counter(); import turbo_lab; print(time.perf_counter() - t)"
    command = [sys.executable, "-c", code]
    times = [float(subprocess.check_output(command, text=True)) for _ in range(7)]
    yield Bar(
        name="package.import_seconds",
        value=statistics.median(times),
        side="at most",
        limit=0.3,
        unit="s",
    )


BARS: Mapping[str, Callable[[], Iterator[Bar]]] = MappingProxyType(
    {
        "package": import_time,
        "renderer": renderer_speed,
        "oracle": oracles,
        "teacher.size": teacher_size,
        "teacher.replay": teacher_replay,
        "teacher.speed": teacher_speed,
        "teacher.quality": teacher_quality,
        "students": students,
        "dmd2": dmd2_quality,
        "warm": warm_quality,
        "gan": gan_quality,
        "dino": mini_dino,
        "factory": factory,
        "speed": speed,
        "turbo": turbo_quality,
        "bench": training_step,
        "bench.memory": shared_base,
    }
)


def main(only: str | None = None) -> int:
    """Print one line per bar; return 1 if one is short.

    Raises:
        BadInput: ``only`` begins no name of `BARS`.
    """
    return printed(BARS, only)


@cache
def _lab(teacher: str = "teacher") -> Lab:
    """A shipped teacher, behind an empty cache: nothing stored is used but the artefacts."""
    empty = Path(tempfile.mkdtemp(prefix="turbo-lab-bars-"))
    atexit.register(shutil.rmtree, empty, ignore_errors=True)
    store = Store(cache=empty, shipped=Store.default().shipped)
    return open_lab(device="cpu", store=store, teacher=teacher)


@cache
def _teacher_samples(teacher: str = "teacher") -> Samples:
    what = f"{CAPTIONS} captions, {TEACHER_STEPS} guided steps"
    return _lab(teacher).samples(Sampling(steps=TEACHER_STEPS, n=CAPTIONS), what)


@cache
def _teacher_table() -> dict[str, Interval]:
    from turbo_lab.quality import Yardstick

    drawn = _teacher_samples()
    table = Yardstick().table(drawn.images, drawn.scenes)
    return {r.metric: Interval(value=r.value, low=r.low, high=r.high) for r in table.itertuples()}
