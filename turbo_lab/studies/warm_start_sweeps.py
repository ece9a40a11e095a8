"""Notebook 04: how much of the calls a warm start gets, which start, and what trainings cost."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd

from turbo_lab import claims as cl
from turbo_lab.history import seconds_by_stage
from turbo_lab.progress import progress
from turbo_lab.recipes import FAMILIES, Stage
from turbo_lab.recipes.distribution import calls_per_round
from turbo_lab.recipes.warm import PER_SAMPLE, STARTS, STEPS
from turbo_lab.store import Artefact
from turbo_lab.studies import matching
from turbo_lab.studies.warm_start import (
    ALL_METRICS,
    ALONE,
    DIRECT,
    TEACHER,
    TITLES,
    WARM,
    Comparison,
    direct_of,
)
from turbo_lab.training import history

SWEPT = ("whole_body", "ghost_signs", "sign_read", "hue_kl", "diversity", "high_frequency_share")


def shares() -> dict[str, float]:
    """Share of the network calls that the warm start spends, by family; 0 is DMD2 directly."""
    main = STARTS[WARM]
    own = {
        n: s.share for n, s in STARTS.items() if replace(main, share=s.share, title=s.title) == s
    }
    return dict(sorted({DIRECT: 0.0, **own, ALONE: 1.0}.items(), key=lambda pair: pair[1]))


def second_times() -> dict[str, str]:
    """Families that differ in the second time, direct beside warm, with their labels."""
    main, out = STARTS[WARM], {}
    for name, start in sorted(STARTS.items(), key=lambda pair: pair[1].second):
        moved = replace(main, edges=start.edges, second=start.second, title=start.title)
        if start == moved and start.edges == (start.second,):
            out[direct_of(name)] = f"{start.second:g}, DMD2 directly"
            out[name] = f"{start.second:g}, PCM, then DMD2"
    return out


def sweeps(comparison: Comparison) -> dict[str, dict[str, str]]:
    """Families of each sweep with their labels; the main student is in all of them."""
    there, by_share = comparison.families, {f: f"{p:.0%} of the calls" for f, p in shares().items()}
    by_share |= {DIRECT: "none, DMD2 directly", ALONE: "all, PCM alone"}
    by_second = second_times()
    rest = {n: s.title for n, s in STARTS.items() if n not in {**by_share, **by_second}}
    other = {WARM: f"{STARTS[WARM].title}, the main one", **rest}
    found = {"warm start": by_share, "second time": by_second, "other starts": other}
    return {
        title: {family: label for family, label in group.items() if family in there}
        for title, group in found.items()
    }


def sweep(comparison: Comparison) -> pd.DataFrame:
    """Metrics of every training of direct, warm and swept students, each by itself, and teacher.

    Long form ``family, training, metric, value, low, high``, intervals over captions. The metric
    ``gain`` is the rate of whole bodies minus that of direct DMD2 of the same second time and seed.
    """
    rows = []
    wanted = {TEACHER, *(family for group in sweeps(comparison).values() for family in group)}
    teacher = comparison.measured[TEACHER]
    with progress(len(wanted), "intervals of the sweep") as tick:
        for done, family in enumerate(sorted(wanted), start=1):
            found = comparison.measured[family]
            direct = comparison.measured[_direct(family)].values["whole_body"]
            for k, bodies in enumerate(found.values["whole_body"]):
                own = matching.intervals(found.training(k), teacher, comparison.real_cdf)
                own["gain"] = cl.paired_difference(bodies, direct[k])
                rows += [
                    {"family": family, "training": k, "metric": m, **vars(own[m])} for m in own
                ]
            tick(done, family)
    return pd.DataFrame(rows)


def _direct(family: str) -> str:
    return family if family.startswith(DIRECT) else direct_of(family)


def sweep_table(comparison: Comparison, rows: pd.DataFrame, *metrics: str) -> pd.DataFrame:
    """The first training of each sweep's students as ``value [low, high]``.

    Args:
        comparison: of all students.
        rows: of `sweep`.
        metrics: the columns; ``gain`` is whole bodies minus those of direct DMD2.
    """
    titles = {**ALL_METRICS, "gain": "whole bodies, minus direct"}
    first = rows[rows["training"] == 0].set_index(["family", "metric"])
    out = {}
    for title, group in sweeps(comparison).items():
        for family, label in group.items():
            found = (first.loc[family, metric] for metric in metrics)
            out[title, label] = [f"{r.value:.3f} [{r.low:.3f}, {r.high:.3f}]" for r in found]
    columns = [titles[metric] for metric in metrics]
    index = pd.MultiIndex.from_tuples(out, names=["sweep", "student"])
    return pd.DataFrame(list(out.values()), index=index, columns=columns)


# --- what it cost -------------------------------------------------------------------------------


def stages_of(artefact: Artefact) -> list[Stage]:
    """The stages a student was trained by."""
    return [Stage.model_validate(stage) for stage in artefact.json("recipe.json")["stages"]]


def calls_per_sample(stage: Stage) -> float:
    """Network calls of a stage per sample and step; three where a gradient is taken."""
    if stage.method == "dmd2":
        return calls_per_round(STEPS, int(str(stage.options["rival_updates"])))
    return PER_SAMPLE[stage.method]


def curves(comparison: Comparison) -> pd.DataFrame:
    """History of the DMD2 stage after each share of warm start, against the calls of all stages.

    First trainings. Columns ``student``, ``calls`` (network calls per sample of the batch so far),
    ``term``, ``value``.
    """
    rows = []
    for family, label in sweeps(comparison)["warm start"].items():
        artefact = comparison.drawn.students[family, STEPS, 0].artefact
        *before, last = stages_of(artefact)
        if last.method != "dmd2":
            continue
        spent = sum(stage.steps * calls_per_sample(stage) for stage in before)
        for line in history(artefact):
            if line["stage"] == len(before) + 1:
                at = spent + line["step"] * calls_per_sample(last)
                rows += [
                    {"student": label, "calls": at, "term": term, "value": value}
                    for term, value in line["terms"].items()
                ]
    return pd.DataFrame(rows)


def training_cost(comparison: Comparison) -> pd.DataFrame:
    """What a training took: network calls of the warm start and of DMD2, seconds, megabytes."""
    groups: dict[str, list[Artefact]] = {}
    for (family, _, _), student in comparison.drawn.students.items():
        groups.setdefault(family, []).append(student.artefact)
    rows = []
    for family, found in groups.items():
        thousands = {"before": 0.0, "dmd2": 0.0}
        for stage in stages_of(found[0]):
            which = "dmd2" if stage.method == "dmd2" else "before"
            thousands[which] += stage.steps * stage.batch_size * calls_per_sample(stage) / 1000
        rows.append(
            {
                "student": TITLES.get(family, FAMILIES[family].title),
                "trainings": len(found),
                "1000 calls before DMD2": round(thousands["before"], 1),
                "1000 calls of DMD2": round(thousands["dmd2"], 1),
                "seconds each": round(sum(map(seconds, found)) / len(found)),
                "MB each": round(found[0].file("weights.safetensors").stat().st_size / 1e6, 2),
            }
        )
    return pd.DataFrame(rows).set_index("student")


def seconds(artefact: Artefact) -> float:
    """Of training, all stages."""
    return sum(seconds_by_stage(history(artefact)).values())
