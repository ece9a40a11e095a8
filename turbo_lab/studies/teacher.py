"""Notebook 01: what a velocity field is, how good the teacher is, and what few steps do to it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from turbo_lab import claims as cl
from turbo_lab import figures
from turbo_lab.claims import Claim, Interval, Side
from turbo_lab.lab import Lab, Samples
from turbo_lab.methods.flow import FlowMatching
from turbo_lab.path import TerminalWarning, qwen_mu, shift_from_mu, time_grid
from turbo_lab.postcards.captions import GROUNDS
from turbo_lab.quality import TITLES, Yardstick, long_table, per_image
from turbo_lab.recipes import Recipe
from turbo_lab.sample import sample
from turbo_lab.sampling import TEACHER_GUIDANCE, TEACHER_STEPS, Sampling
from turbo_lab.streams import noise
from turbo_lab.testbeds.points import points

NOTEBOOK = "01_teacher"
NAIVE_STEPS = 2
PLAIN_GUIDANCE, STRONG_GUIDANCE = 1.0, 8.0
SHOWN = (
    "sign_read",
    "ghost_signs",
    "sign_lost",
    "whole_body",
    "pose_right",
    "hue_kl",
    "moss_energy",
    "fur_energy",
    "moss_patches",
    "saturation",
    "high_frequency_share",
    "chroma_w1",
)
"""Metrics of the small multiples, in reading order."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much a profile measures; the code is the same."""

    captions: int
    steps: tuple[int, ...]
    guidance: tuple[float, ...]
    guidance_captions: int
    oracle_scenes: int
    real: int


BUDGETS: Mapping[str, Budget] = MappingProxyType(
    {
        "smoke": Budget(
            captions=12,
            steps=(1, 2, 4),
            guidance=(PLAIN_GUIDANCE, STRONG_GUIDANCE),
            guidance_captions=12,
            oracle_scenes=60,
            real=96,
        ),
        "quick": Budget(
            captions=144,
            steps=(1, 2, 4, 8, 10, 20, 40, 50),
            guidance=(PLAIN_GUIDANCE, 2.0, 6.0, STRONG_GUIDANCE),
            guidance_captions=96,
            oracle_scenes=1000,
            real=1024,
        ),
        "paper": Budget(
            captions=2000,
            steps=(1, 2, 3, 4, 6, 8, 10, 14, 20, 28, 40, 50),
            guidance=(PLAIN_GUIDANCE, 1.5, 2.0, 3.0, 5.0, 6.0, STRONG_GUIDANCE, 12.0),
            guidance_captions=1000,
            oracle_scenes=5000,
            real=4096,
        ),
    }
)


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Samples along one axis, their table, and the real floor (rows with NaN on the axis)."""

    axis: str
    samples: Mapping[float, Samples]
    table: pd.DataFrame

    @property
    def keys(self) -> tuple[str, ...]:
        """Artefact keys of all samples."""
        return tuple(s.key for s in self.samples.values())

    def wide(self, metrics: Sequence[str] = SHOWN) -> pd.DataFrame:
        """One row per point, one column per metric, as ``value [low, high]``."""
        shown = self.table[self.table["metric"].isin(metrics)].copy()
        shown["text"] = [f"{r.value:.3g} [{r.low:.3g}, {r.high:.3g}]" for r in shown.itertuples()]
        shown[self.axis] = ["real" if np.isnan(v) else f"{v:g}" for v in shown[self.axis]]
        wide = shown.pivot(index=self.axis, columns="metric", values="text")
        order = [f"{v:g}" for v in sorted(self.samples)]
        return wide.loc[["real", *reversed(order)], list(metrics)].rename(columns=TITLES)

    def records(self) -> list[dict[str, object]]:
        """The table as plain records, for a figure's sidecar."""
        return list(self.table.to_dict("records"))


def exact_field(name: str = "ring8", *, seed: int = 0, paths: int = 60) -> Figure:
    """Portrait of an exact velocity field, and how 64, 8 and 2 Euler steps follow it."""
    world = points(name)
    z = noise((2,), seed=seed, stream="z", indices=range(paths))
    walks = {}
    for steps in (64, 8, NAIVE_STEPS):
        states = list(sample(world.teacher, time_grid(steps), z))
        walks[f"{steps} Euler steps"] = torch.stack([z, *(s.x for s in states)]).numpy()

    def velocity(at: np.ndarray, t: float) -> np.ndarray:
        x = torch.from_numpy(at).float()
        return np.asarray(world.teacher(x, torch.full((len(x),), t), None))

    data = world.real(400, seed=seed).x.numpy()
    reach = float(np.abs(data).max() * 1.25)
    return figures.field_portrait(velocity, walks, data, times=(0.9, 0.5, 0.1), reach=reach)


def steps_sweep(lab: Lab, budget: Budget, *, guidance_scale: float, seed: int) -> Sweep:
    """Sample the same captions from the same noise at every number of steps."""
    samplings = {
        float(steps): Sampling(
            steps=steps, guidance_scale=guidance_scale, n=budget.captions, seed=seed
        )
        for steps in sorted({*budget.steps, NAIVE_STEPS, TEACHER_STEPS}, reverse=True)
    }
    return _sweep(lab, budget, "steps", samplings)


def guidance_sweep(lab: Lab, budget: Budget, *, guidance_scale: float, seed: int) -> Sweep:
    """Sample the same captions from the same noise at every guidance scale, at full steps."""
    wanted = {
        *budget.guidance,
        guidance_scale,
        *(PLAIN_GUIDANCE, TEACHER_GUIDANCE, STRONG_GUIDANCE),
    }
    samplings = {
        scale: Sampling(guidance_scale=scale, n=budget.guidance_captions, seed=seed)
        for scale in sorted(wanted)
    }
    return _sweep(lab, budget, "guidance", samplings)


def clock(sweep: Sweep) -> pd.DataFrame:
    """NFE and wall clock per image, and how many times fewer calls than the longest run."""
    rows = [
        {
            "steps": int(steps),
            "NFE": s.nfe,
            "ms per image": 1000 * s.seconds_per_image,
            "ms per network call": 1000 * s.seconds_per_image / s.nfe,
        }
        for steps, s in sorted(sweep.samples.items(), reverse=True)
    ]
    table = pd.DataFrame(rows).set_index("steps")
    table["fewer calls"] = table["NFE"].max() / table["NFE"]
    table["faster"] = table["ms per image"].max() / table["ms per image"]
    return table


def steps_figure(sweep: Sweep, *, columns: int = 10) -> Figure:
    """The picture to remember: one row per number of steps, one column per caption and noise."""
    shown = sorted({at for at in sweep.samples if at in (40, 20, 8, 4, 2, 1)}, reverse=True)

    def label(at: float) -> str:
        return f"{at:g} step{'s' * (at > 1)}\n{sweep.samples[at].nfe:g} NFE"

    return _strips(sweep, shown, columns, label)


def guidance_figure(sweep: Sweep, *, columns: int = 10) -> Figure:
    """One row per guidance scale, one column per caption and noise."""
    return _strips(sweep, sorted(sweep.samples), columns, lambda at: f"guidance {at:g}")


def qwen_schedules() -> dict[str, list[float]]:
    """Times of Qwen-Image's own schedule and of published few-step adapters, at 1328 x 1328.

    Shift and terminal of Qwen-Image's scheduler; Lightning's and Wuli's from their loaders.
    """
    shift = shift_from_mu(qwen_mu((1328 // 16) ** 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TerminalWarning)  # the trap is what this figure shows
        grids = {
            "Qwen-Image, 50 steps": time_grid(50, shift=shift, terminal=0.02),
            "Qwen-Image's settings, 4 steps": time_grid(4, shift=shift, terminal=0.02),
            "Qwen-Image's settings, 2 steps": time_grid(2, shift=shift, terminal=0.02),
            "Lightning, 8 steps (shift 3)": time_grid(8, shift=3.0),
            "Lightning, 4 steps (shift 3)": time_grid(4, shift=3.0),
            "Wuli, 2 steps (shift 2.5)": time_grid(2, shift=2.5, terminal=0.7155),
        }
    return {name: [round(t, 4) for t in grid.tolist()] for name, grid in grids.items()}


def curriculum(recipe: Recipe) -> pd.DataFrame:
    """What each stage of a teacher's training draws: one row per stage, shares of its pictures.

    Posters are full of signs, busts of garments, see `turbo_lab.testbeds.postcards.train_batch`;
    ``shift`` is that of the training times, ``blocks`` are the network's.
    """
    rows, blocks = [], recipe.net.layers
    for number, stage in enumerate(recipe.stages, start=1):
        blocks = stage.layers or blocks
        practice = {"posters": stage.posters, "busts": stage.busts or 0.0}
        shares = {"postcards": 1 - sum(practice.values()), **practice}
        rows.append(
            {
                "stage": number,
                "steps": stage.steps,
                **{name: f"{share:.0%}" if share else "" for name, share in shares.items()},
                "signs on a grid of": f"{stage.sign_grid} pixels" if stage.sign_grid > 1 else "",
                "shift": stage.options.get("shift", FlowMatching.shift),
                "blocks": blocks,
            }
        )
    return pd.DataFrame(rows).set_index("stage")


def rates(sweep: Sweep, at: float) -> str:
    """The three rates that name a failure, as one short text."""
    found = sweep.table[sweep.table[sweep.axis] == at].set_index("metric")["value"]
    return (
        f"signs read {found['sign_read']:.0%}\n"
        f"ghost signs {found['ghost_signs']:.0%}, lost {found['sign_lost']:.0%}\n"
        f"whole bodies {found['whole_body']:.0%}\n"
        f"moss energy {found.get('moss_energy', 0):.0%} of real"
    )


def claims(steps: Sweep, guidance: Sweep, *, profile: str, keys: Sequence[str]) -> list[Claim]:
    """The claims of notebook 01, each paired by caption and noise."""
    few, many = (_values(steps, float(s)) for s in (NAIVE_STEPS, TEACHER_STEPS))
    plain, strong = (_values(guidance, g) for g in (PLAIN_GUIDANCE, STRONG_GUIDANCE))
    usual = _values(guidance, _usual(guidance))
    for values in (few, many):
        values["sign_wrong"] = values["ghost_signs"] | values["sign_lost"]
    moss = steps.samples[float(NAIVE_STEPS)].scenes.fields[:, 2].numpy() == GROUNDS.index("moss")
    energies = [values["band_energy"][moss] for values in (few, many)]
    flat = cl.bootstrap(*energies, statistic=_ratio)
    euler = "Euler on an undistilled teacher"
    cfg = "Ho & Salimans 2022, arXiv 2207.12598"
    imagen = "Saharia et al. 2022, arXiv 2205.11487"

    def less(name: str) -> Interval:
        return cl.paired_difference(few[name], many[name])

    def more(name: str, values: Mapping[str, np.ndarray]) -> Interval:
        return cl.paired_difference(values[name], plain[name])

    rows: list[tuple[str, str, str, str, Interval, Side, float, int]] = [
        ("T1", "Two naive steps lose the small text", euler,
         "signs read, 2 minus 40 steps", less("sign_read"), "below", -0.1, len(moss)),
        ("T2", "Two naive steps break bodies", euler,
         "whole bodies, 2 minus 40 steps", less("whole_body"), "below", -0.1, len(moss)),
        ("T3", "Two naive steps lose the sign", euler,
         "not exactly one sign, 2 minus 40 steps", less("sign_wrong"), "above", 0.1, len(moss)),
        ("T4", "Two naive steps flatten fine texture", euler,
         "moss band energy, 2 over 40 steps", flat, "below", 0.5, int(moss.sum())),
        ("T5", "Guidance makes signs follow the caption", cfg,
         "signs read, usual guidance minus none", more("sign_read", usual), "above", 0.0,
         len(plain["sign_read"])),
        ("T6", "Strong guidance saturates colours", imagen,
         "mean saturation, guidance 8 minus none", more("saturation", strong), "above", 0.0,
         len(plain["saturation"])),
    ]  # fmt: skip
    return [
        Claim(
            id=id_,
            notebook=NOTEBOOK,
            statement=statement,
            source=source,
            statistic=statistic,
            interval=interval,
            side=side,
            threshold=threshold,
            seeds=1,
            samples=n,
            profile=profile,
            artefact_keys=tuple(keys),
        )
        for id_, statement, source, statistic, interval, side, threshold, n in rows
    ]


def _usual(guidance: Sweep) -> float:
    """The guidance nearest to the teacher's own among the scales between none and strong."""
    between = [g for g in guidance.samples if PLAIN_GUIDANCE < g < STRONG_GUIDANCE]
    return min(between, key=lambda g: abs(g - TEACHER_GUIDANCE))


def _strips(
    sweep: Sweep, shown: Sequence[float], columns: int, label: Callable[[float], str]
) -> Figure:
    rows = {label(at): sweep.samples[at].images[:columns] for at in shown}
    notes = {label(at): rates(sweep, at) for at in shown}
    scenes = sweep.samples[shown[0]].scenes[:columns]
    return figures.image_rows(
        rows, columns=[f"sign {c.number}" for c in scenes.captions], notes=notes
    )


def _ratio(a: np.ndarray, b: np.ndarray) -> float:
    return float(a.mean() / b.mean())


def _values(sweep: Sweep, at: float) -> dict[str, np.ndarray]:
    samples = sweep.samples[at]
    return per_image(samples.images, samples.scenes)


def _sweep(lab: Lab, budget: Budget, axis: str, samplings: Mapping[float, Sampling]) -> Sweep:
    yard = Yardstick(n=budget.real)
    samples = {at: lab.samples(sampling) for at, sampling in samplings.items()}
    tables: list[tuple[float | None, pd.DataFrame]] = [
        (at, yard.table(s.images, s.scenes)) for at, s in samples.items()
    ]
    n = len(next(iter(samples.values())).images)
    table = long_table([(None, yard.floor(n)), *tables], axis)
    return Sweep(axis=axis, samples=samples, table=table)
