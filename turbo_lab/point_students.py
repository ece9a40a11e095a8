"""Students on points: the same methods as on postcards, with an exact teacher to follow.

There is no guidance here: the teacher is the velocity of the mixture itself, whatever the class.
A student is a copy of a network that was fitted to this velocity, as an adapter starts from the
network it is worn on.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from turbo_lab.atomic import atomic_write_text, save_tensors
from turbo_lab.errors import BadInput, MissingPiece
from turbo_lab.field import NULL_LABEL, Field, frozen
from turbo_lab.fit import Batch, Objective, Player, Record, Shadow, fit
from turbo_lab.methods import METHODS
from turbo_lab.methods.gan import CRITIC, Generates, WithGan, mixed
from turbo_lab.methods.kinds import heun
from turbo_lab.methods.transition import spawn_point_head
from turbo_lab.path import grid_from_times, time_grid
from turbo_lab.point_recipes import (
    CALLS,
    PATH_STEPS,
    RIVAL_WIDTH,
    TRAJECTORY,
    PointGan,
    PointRecipe,
    base_recipe,
    gan_recipe,
    rival_recipe,
    student_recipe,
    warm_recipe,
)
from turbo_lab.recipes import Pairs, Profile, Stage
from turbo_lab.sample import draw_samples
from turbo_lab.stock_times import student_eta, student_times
from turbo_lab.store import Artefact, Store
from turbo_lab.streams import Draw, seed_for
from turbo_lab.testbeds.points import (
    PointCritic,
    PointField,
    points,
    spawn_point_critic,
    truth_of,
)
from turbo_lab.training import Workbench

__all__ = [
    "CALLS",
    "CLOUD",
    "PATH_STEPS",
    "RIVAL_WIDTH",
    "TRAJECTORY",
    "PointGan",
    "PointRecipe",
    "base_field",
    "base_recipe",
    "distilled",
    "exact_pairs",
    "gan_recipe",
    "load",
    "objective",
    "path_end",
    "rival_recipe",
    "sampled",
    "stage_samples",
    "student_recipe",
    "trained",
    "warm_recipe",
    "workbench",
]

RIVALS = frozenset({"fake", "head"})
"""Players beside the student; a stage that has a rate for one gets it."""
PATH_SHIFT = 1 / 3
"""Timestep shift of these steps, more of them near the data, where paths bend: on ring8, 99% of
the ends are within 0.0007 of those of 800 steps (evenly spaced, within 0.0024)."""
MARKS = (1 / 32, 1 / 8, 1 / 4, 1 / 2, 1)
"""Shares of a training with a rival after which a cloud of samples is kept."""
CLOUD = 1024
"""Samples in such a cloud."""
BINS = 32
"""Parts of such a training over which its records are averaged."""


# --- training -----------------------------------------------------------------------------------


def base_field(
    world: str = "ring8", *, seed: int = 0, profile: Profile = "quick", store: Store | None = None
) -> PointField:
    """Return the network fitted to the exact velocity, from the store or fitted now."""
    return distilled(base_recipe(profile, seed=seed, world=world), store=store)


def distilled(recipe: PointRecipe, *, store: Store | None = None) -> PointField:
    """Return the network of a recipe, frozen; trained first if it is not in the store."""
    return load(recipe, trained(recipe, store=store))


def trained(recipe: PointRecipe, *, store: Store | None = None, fresh: bool = False) -> Artefact:
    """Return the artefact of a recipe, trained now if it is not in the store.

    Each stage is an artefact and starts from the averaged weights of the one before. A stage is
    a matter of seconds, so a killed one begins again.

    Raises:
        BadInput: a stage asks for what there is not on points.
    """
    _check_stages(recipe)
    store = store or Store.default()
    if not fresh and (found := store.find(recipe.artefact, recipe.spec())):
        return found
    if recipe.base is not None:
        trained(recipe.base, store=store)  # fresh is for students
    if recipe.before is not None:
        trained(recipe.before, store=store, fresh=fresh)
    make = partial(_make, recipe, store)
    return store.get_or_make(recipe.artefact, recipe.spec(), make, fresh=fresh)


def _check_stages(recipe: PointRecipe) -> None:
    """Refuse, before any work, what there is not on points, and a fake that starts from nothing."""
    last = recipe.stages[-1]
    if recipe.gan is not None:
        if not issubclass(METHODS[last.method], Generates) or last.options.get("edges"):
            allowed = f"method {last.method!r} makes no clean samples in this stage"
            raise BadInput("gan", f"rho {recipe.gan.rho:g}", allowed)
        if CRITIC not in last.rates:
            raise BadInput("rates", sorted(last.rates), f"gan needs one for player {CRITIC!r} too")
    for k, stage in enumerate(recipe.stages):
        if stage.gan is not None:
            allowed = "it looks at pictures; points have the gan of their recipe"
            raise BadInput("gan", stage.gan.features, allowed)
        if stage.rivals_from == "fake":
            raise BadInput("rivals_from", "fake", "points keep no fakes: use before, or leave it")
        if weight := stage.options.get("adversarial_weight"):
            raise BadInput("adversarial_weight", weight, "points have no critic: leave it out")
        if stage.rivals_from == "before" and (k == 0 or "fake" not in stage.rates):
            allowed = "it needs a fake score and a stage before; leave it out"
            raise BadInput("rivals_from", "before", allowed)


def load(recipe: PointRecipe, artefact: Artefact) -> PointField:
    """Build the network of a recipe with the weights of an artefact, frozen."""
    net = _fresh(recipe)
    net.load_state_dict({k: v.float() for k, v in artefact.tensors().items()})
    return net.requires_grad_(False)


def workbench(recipe: PointRecipe, store: Store) -> Workbench:
    """Set up the last stage of a recipe, at its beginning.

    Raises:
        MissingPiece: what it starts from is not in the store.
    """
    stage = recipe.stages[-1]
    student = _start(recipe, store)
    average = copy.deepcopy(student).requires_grad_(False)
    pieces: dict[str, object] = {"student": student, "average": average}
    if stage.teacher == "guided":
        pieces["teacher"] = frozen(points(recipe.world).teacher)
    elif stage.teacher == "before":
        pieces["teacher"] = frozen(copy.deepcopy(student))
    rivals = {name: _rival(name, recipe, store, student) for name in RIVALS & stage.rates.keys()}
    pieces.update(rivals)
    if recipe.gan is not None:  # no piece: a method may have a critic of its own
        size = {"width": recipe.gan.width, "depth": recipe.gan.depth}
        rivals[CRITIC] = spawn_point_critic(seed=recipe.seed, **size)
    batches = partial(_real, recipe.world)
    if stage.pairs is not None:
        batches = partial(_paired, *exact_pairs(recipe.world, stage.pairs, store=store))
    return Workbench(
        student=student, average=average, pieces=pieces, batches=batches, rivals=rivals
    )


def objective(recipe: PointRecipe, bench: Workbench) -> Objective:
    """Build the method of a recipe's last stage, in its GAN term if it has one."""
    method, gan = bench.objective(recipe.stages[-1]), recipe.gan
    if gan is None:
        return method
    critic = bench.rivals[CRITIC]
    assert isinstance(critic, PointCritic)
    data, teacher = (partial(_real, w) for w in (truth_of(recipe.world), recipe.world))
    return WithGan(
        method=method,  # type: ignore[arg-type]  # WithGan looks
        critic=critic,
        real=mixed(data, teacher, gan.rho),
        weight=gan.weight or 0.0,
        balance=gan.balance,
        loss=gan.loss,
        r1=gan.r1,
        r1_step=gan.r1_step,
        noise_range=gan.noise_range,
    )


def _rival(name: str, recipe: PointRecipe, store: Store, student: PointField) -> Player:
    """A head, or a fake that starts as the base, or as the stage before if the stage says so."""
    if name == "head":
        return spawn_point_head(seed=recipe.seed)
    if recipe.stages[-1].rivals_from == "before" or recipe.before is None:
        return copy.deepcopy(student)
    return _start(recipe.model_copy(update={"stages": recipe.stages[:1]}), store)


def _make(recipe: PointRecipe, store: Store, folder: Path) -> None:
    stage, bench = recipe.stages[-1], workbench(recipe, store)
    records = fit(
        objective(recipe, bench),
        bench.batches,
        steps=stage.steps,
        batch_size=stage.batch_size,
        seed=seed_for(recipe.seed, recipe.name, len(recipe.stages)),
        optimisers={name: rates.optimiser() for name, rates in stage.rates.items()},
        shadows=(Shadow(of="student", average=bench.average, decay=stage.ema),),
    )
    if "fake" in bench.rivals:
        marks = MARKS if recipe.gan is None else ()  # nobody looks at those of GAN students
        _watched(records, stage, bench.average, folder, marks=marks)
    for _ in records:
        pass
    weights = {k: v.half() for k, v in bench.average.state_dict().items()}
    save_tensors(folder, "weights.safetensors", weights)


def _watched(
    records: Iterable[Record],
    stage: Stage,
    average: Field,
    folder: Path,
    *,
    marks: Sequence[float],
) -> None:
    """Train to the end, keeping clouds of the averaged student on the way, and what was measured.

    ``clouds.safetensors`` holds one cloud ``[CLOUD, 2]`` per mark, named by its round, and is left
    out if there are no marks; ``history.json`` the terms, averaged over `BINS` parts, and the round
    at the end of each.
    """
    rounds = {max(1, round(share * stage.steps)) for share in marks}
    clouds: dict[str, Tensor] = {}
    parts: dict[int, list[Record]] = {}
    for record in records:
        parts.setdefault((record.step - 1) * BINS // stage.steps, []).append(record)
        if record.step in rounds:
            clouds[str(record.step)] = stage_samples(stage, average, n=CLOUD, seed=0).half()
    lines = [{"round": part[-1].step, **_mean_terms(part)} for part in parts.values()]
    if clouds:
        save_tensors(folder, "clouds.safetensors", clouds)
    atomic_write_text(folder / "history.json", json.dumps(lines))


def _mean_terms(records: Iterable[Record]) -> dict[str, float]:
    """Mean of every term over the rounds that have it, to 4 digits."""
    found: dict[str, list[float]] = {}
    for record in records:
        for name, value in record.terms.items():
            found.setdefault(name, []).append(value)
    return {name: float(f"{sum(v) / len(v):.4g}") for name, v in sorted(found.items())}


def _start(recipe: PointRecipe, store: Store) -> PointField:
    earlier = recipe.before or recipe.base
    if earlier is None:
        return _fresh(recipe)
    found = store.find(earlier.artefact, earlier.spec())
    if found is None:
        raise MissingPiece(f"{earlier.artefact} is needed as a start and is not in the store.")
    net = load(earlier, found)
    return net.requires_grad_(True)


def _fresh(recipe: PointRecipe) -> PointField:
    bed = points(recipe.world, width=recipe.width, depth=recipe.depth, seed=recipe.seed)
    return bed.spawn(recipe.name)


def _real(world: str, draw: Draw) -> Batch:
    """Exact data, of any class."""
    x, c, _ = points(world).batches(draw)
    return Batch(x, torch.full_like(c, NULL_LABEL))


def _paired(z: Tensor, x: Tensor, draw: Draw) -> Batch:
    """Pairs of a pool, of any class."""
    k = draw.integers("pair", len(z))
    return Batch(x[k], torch.full_like(k, NULL_LABEL), z[k])


# --- exact paths, and samples -------------------------------------------------------------------


def path_end(field: Field, z: Tensor, *, steps: int = PATH_STEPS) -> Tensor:
    """Follow the path of a field from noise z at t = 1 to its end x_T(z) at t = 0, by Heun steps.

    Args:
        field: the field, asked for any class.
        z: ``[N, ...]``, float64 where it matters.
        steps: how many, at least 1.
    """
    x = z
    for t, u in pairwise(time_grid(steps, shift=PATH_SHIFT).to(z.dtype)):
        x = heun(field, x, t.expand(len(x)), u.expand(len(x)), None)
    return x


def exact_pairs(world: str, pairs: Pairs, *, store: Store | None = None) -> tuple[Tensor, Tensor]:
    """Noise z and the ends of the exact paths from it, ``[n, 2]`` each, kept in the store.

    All students of a world draw from one pool: a path of its own for every sample of every batch
    would cost more than the training.
    """

    def make(folder: Path) -> None:
        z = Draw(seed=0, step=0, total=pairs.n, stream="pairs").normal("z", (2,))
        x = path_end(points(world).teacher, z.double(), steps=pairs.steps).float()
        save_tensors(folder, "pairs.safetensors", {"z": z, "x": x})

    spec = {"world": world, **pairs.model_dump(), "shift": PATH_SHIFT}
    artefact = (store or Store.default()).get_or_make("points/pairs", spec, make)
    found = artefact.tensors("pairs.safetensors")
    return found["z"], found["x"]


def stage_samples(stage: Stage, field: Field, *, n: int, seed: int) -> Tensor:
    """Draw samples ``[n, 2]`` of any class with the sampler that a stage was trained for."""
    grid, eta = grid_from_times(student_times(stage)), student_eta(stage)
    return draw_samples(field, grid, (2,), seed=seed, indices=range(n), eta=eta, batch=max(n, 1))


def sampled(field: Field, *, steps: int, eta: float, n: int, seed: int) -> Tensor:
    """Draw samples ``[n, 2]`` of any class, from the same noise for every field and every eta.

    Args:
        field: student, base or mixture.
        steps: network calls per sample.
        eta: 0 is Euler, 1 predicts and renoises.
        n: samples.
        seed: of the noise.
    """
    grid = time_grid(steps)
    return draw_samples(field, grid, (2,), seed=seed, indices=range(n), eta=eta, batch=max(n, 1))
