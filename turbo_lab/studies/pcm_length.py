"""How far phased consistency alone comes at two steps, and which of its phases loses the signs.

``python -m turbo_lab.studies.pcm_length`` prints it for the student of notebook 04, with
``--student pcm-six`` for that of six blocks, and with ``turbo-six`` for what becomes of it; with
``--calls 560000 --rank 32`` one is trained by so many network calls first, in an adapter of that
rank, and with ``--teacher teacher`` on six blocks.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping

import pandas as pd
import torch
from torch import Tensor

from turbo_lab.adapters import AdapterSize
from turbo_lab.errors import BadInput
from turbo_lab.field import Field, frozen, guided
from turbo_lab.lab import Lab, open_lab
from turbo_lab.methods import Consistency
from turbo_lab.recipes import EARLY, GUIDANCE, Profile, Recipe, Stage, resolve
from turbo_lab.recipes.distribution import SECOND
from turbo_lab.recipes.models import Rates
from turbo_lab.recipes.trajectory import student
from turbo_lab.recipes.warm import GRID_STEPS, PER_SAMPLE, STEPS, Start, warm_stage
from turbo_lab.sample import final, sample
from turbo_lab.streams import noise
from turbo_lab.studies.every_metric import find, reference

LOOKED_AT = ("sign_read", "ghost_signs", "sign_lost", "whole_body", "hue_kl", "moss_patches")
CRITIC_CALLS = 9
"""More network calls per sample where a critic looks, through blocks of the plain teacher: its own
turn makes both predictions without a gradient (4) and sees them (2), and the student's sees one
with a gradient (3)."""


def longer(
    calls: float,
    *,
    rank: int,
    rate: float = 1e-3,
    warmup: int = 100,
    solver: str = "euler",
    grid_steps: int = GRID_STEPS,
    adversarial: float = 0.0,
    judged: float = 0.0,
    teacher: str = EARLY,
    profile: Profile = "quick",
    seed: int = 0,
) -> Recipe:
    """The PCM student of notebook 04 by other calls, in an adapter of another size.

    Args:
        calls: network calls of the whole training, above 0.
        rank: of the adapter, and its alpha.
        rate: learning rate, which falls to 2% of itself.
        warmup: steps over which it rises before, at least 0.
        solver: of the teacher, ``euler`` or ``heun``.
        grid_steps: of the teacher's grid.
        adversarial: weight of the term by which a critic on the teacher's blocks is to be fooled;
            0 for none.
        judged: network calls of a second stage, at half the student's rate, to which the critic
            is kept, and there to the first phase; 0 for one stage, where it judges both.
        teacher: name of the recipe whose network it follows and wears its adapter on.
        profile: whose batch it has.
        seed: of the training.

    Raises:
        BadInput: calls that are none, a rate or a rank out of range, a second stage without a
            critic, or no such teacher.
    """
    if not 0 < calls < math.inf:
        raise BadInput("calls", calls, "use a finite number above 0")
    if not 0 <= judged < math.inf or (judged and not adversarial):
        raise BadInput("judged", judged, "use a finite number, above 0 only with adversarial")

    def stage(calls: float, slower: float, weight: float, above: float = 0.0) -> Stage:
        plain = warm_stage(profile, Start(title="PCM", share=1.0))
        per_sample = PER_SAMPLE["consistency"] + (CRITIC_CALLS if weight else 0)
        per_sample += 2 if solver == "heun" else 0  # the guided teacher once more
        steps = max(2, int(calls / (per_sample * plain.batch_size)))
        options = {**plain.options, "solver": solver, "grid_steps": grid_steps}
        changed: dict[str, object] = {"precision": "bf16", "options": options}
        if weight:
            options["adversarial_weight"] = weight
            changed["taps"] = "teacher"
        if above:
            options["adversarial_above"] = above
        one = Rates(lr=rate, warmup=min(warmup, steps), final=0.02)
        rates = {"student": one.model_copy(update={"lr": slower * rate})}
        rates |= {"critic": one} if weight else {}
        return plain.model_copy(update={**changed, "steps": steps, "rates": rates})

    stages = [stage(calls, 1.0, 0.0 if judged else adversarial)]
    if judged:
        stages.append(stage(judged, 0.5, adversarial, above=SECOND))
    size = AdapterSize(rank=rank, alpha=rank)
    recipe, base = student("pcm-longer", seed, tuple(stages), adapter=size), resolve(teacher)
    return recipe.model_copy(update={"teacher": base, "net": base.net})


@torch.no_grad()
def walked(field: Field, grid: Tensor, x: Tensor, tokens: Tensor, *, batch: int = 64) -> Tensor:
    """Euler steps down a grid ``[n + 1]`` from x ``[B, ...]`` at its first time to its last."""
    rows = zip(x.split(batch), tokens.split(batch), strict=True)
    return torch.cat([final(sample(field, grid, a, c)) for a, c in rows])


def by_phase(
    lab: Lab, pupil: Field, *, captions: int, edge: float = SECOND, steps: int = GRID_STEPS
) -> pd.DataFrame:
    """Measure pictures whose two phases are walked by the student or by its teacher.

    Args:
        lab: of the teacher.
        pupil: the student, a velocity field on ``[B, 12, 16, 16]``, one step per phase.
        captions: of the stream ``select``.
        edge: time between the phases.
        steps: of the guided teacher's grid from 1 to 0.

    Returns:
        One row for each who walks the first phase and the second; columns and their units are
        those of `turbo_lab.studies.every_metric.METRICS`.
    """
    scenes, null = lab.testbed.prompts(captions, "select"), lab.testbed.null
    guide = guided(frozen(lab.testbed.net), null, GUIDANCE)
    grid = Consistency(student=pupil, teacher=guide, grid_steps=steps, edges=(edge,)).grid  # type: ignore[arg-type]
    middle = int((grid - edge).abs().argmin())
    first: Mapping[str, tuple[Field, Tensor]] = {
        "teacher": (guide, grid[: middle + 1]),
        "student": (pupil, torch.tensor([1.0, edge])),
    }
    second = {"teacher": (guide, grid[middle:]), "student": (pupil, torch.tensor([edge, 0.0]))}
    z = noise(lab.testbed.shape, seed=0, stream="z", indices=range(captions))
    rows, real = {}, reference(1024)
    for before, (one, down) in first.items():
        at_edge = walked(one, down, z, scenes.tokens)
        for after, (other, on) in second.items():
            images = lab.testbed.decode(walked(other, on, at_edge, scenes.tokens))
            rows[before, after] = find(images, scenes, real).all_values(LOOKED_AT)
    return pd.DataFrame(rows).T.rename_axis(["to the edge", "from it"])


if __name__ == "__main__":
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--calls", type=float, help="network calls of a student of its own")
    asked.add_argument("--rank", type=int, default=32, help="of its adapter")
    asked.add_argument("--rate", type=float, default=1e-3, help="its learning rate")
    asked.add_argument("--warmup", type=int, default=100, help="steps over which the rate rises")
    asked.add_argument("--solver", default="euler", help="of the teacher, euler or heun")
    asked.add_argument("--grid-steps", type=int, default=GRID_STEPS, help="of the teacher's grid")
    asked.add_argument("--adversarial", type=float, default=0.0, help="weight of a critic's term")
    asked.add_argument(
        "--judged", type=float, default=0.0, help="calls more with it, in the first phase alone"
    )
    asked.add_argument("--teacher", default=EARLY, help="whom it follows")
    asked.add_argument("--seed", type=int, default=0, help="of the training")
    asked.add_argument("--captions", type=int, default=512, help="of select that are sampled")
    shown = asked.add_argument_group("a student that is there, without --calls")
    shown.add_argument("--student", default="pcm", help="its recipe, of two steps")
    shown.add_argument("--stages", type=int, help="only so many of its stages")
    shown.add_argument("--edge", type=float, help="between the phases, if not where it was trained")
    given = vars(asked.parse_args())
    name, stages, edge, captions = (given.pop(k) for k in ("student", "stages", "edge", "captions"))
    if given["calls"] is not None:
        recipe = longer(**given)
    elif given["teacher"] != EARLY:
        asked.error(f"--teacher {given['teacher']}: it is for --calls; choose a --student")
    else:
        recipe = resolve(name, seed=given["seed"])
        recipe = recipe.model_copy(update={"stages": recipe.stages[:stages]})
    if recipe.adapter is None or recipe.teacher is None or len(recipe.times) != STEPS:
        asked.error(f"--student {name}: choose one of two steps, such as pcm or pcm-six")
    bench = open_lab(device="cpu").beside(recipe.teacher)
    pupil = bench.dressed(recipe.adapter, bench.trained(recipe))
    edge = recipe.times[1] if edge is None else edge
    print(by_phase(bench, pupil, captions=captions, edge=edge).round(4).to_string())
