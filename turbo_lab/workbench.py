"""What a stage on postcards works with: its student, teacher, rivals and data, as the method asks.

Here a recipe becomes players; `turbo_lab.training` makes them learn.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from turbo_lab.adapters import Host, Worn
from turbo_lab.atomic import save_tensors
from turbo_lab.critic import spawn_critic
from turbo_lab.errors import BadInput, MissingPiece
from turbo_lab.features import block_taps, normed
from turbo_lab.field import Field, frozen, guided
from turbo_lab.fit import Batch, Objective, Player
from turbo_lab.gan_pieces import GanPieces, gan_pieces
from turbo_lab.heads import FeatureCritic, spawn_heads
from turbo_lab.keys import key_of
from turbo_lab.methods import METHODS
from turbo_lab.methods.divergences import divergence_named, needs_ratio
from turbo_lab.methods.gan import Batches, Generates, mixed
from turbo_lab.methods.kinds import TrainableField
from turbo_lab.methods.transition import spawn_latent_head
from turbo_lab.postcards.captions import TOKENS, VOCABULARY, null_tokens
from turbo_lab.progress import progress
from turbo_lab.recipes import Pairs, Recipe, Stage
from turbo_lab.store import Artefact, Store
from turbo_lab.streams import Draw
from turbo_lab.testbeds.photos import load_photos, photo_batch
from turbo_lab.testbeds.postcards import (
    LATENT_CHANNELS,
    PairSource,
    PostcardNet,
    pair_batch,
    spawn_net,
    train_batch,
)

PAIRS = "postcards/pairs"
RIVAL_FILE = "rivals.safetensors"
_DRAWN: dict[tuple[str, str], dict[int, Tensor]] = {}
"""Pairs of this process by key and device: the replays of several students share them."""

FAKE = "fake"
"""The player that starts as the teacher, or as the stage before, and learns the student's score."""
CRITIC = "critic"
"""The player that tells two sides apart, where the options of a stage ask for it: teacher from
student for the ratio of a divergence, or consistency's two predictions; or where it has a GAN term.
Without it a stage is, to the bit, what it was before critics."""
HEAD = "head"
"""The player that learns the teacher's transitions, from which the student then learns."""


@dataclass(frozen=True, kw_only=True)
class Workbench:
    """What a stage works with: the student, its average, and everything a method may ask for.

    ``pieces`` go by the names of the methods' fields: student, average, teacher, plain, null, and
    the rivals, which learn along with the student and are not sampled: fake, critic, head. The
    critic of a GAN term is a rival but no piece. ``sources`` are the teacher's samples in use.
    """

    student: TrainableField
    average: TrainableField
    pieces: Mapping[str, object]
    batches: Callable[[Draw], Batch]
    rivals: Mapping[str, Player] = dataclasses.field(default_factory=dict)
    sources: Mapping[Pairs, PairSource] = dataclasses.field(default_factory=dict)
    gan: GanPieces | None = None

    def objective(self, stage: Stage) -> Objective:
        """Build the method of a stage from the pieces it has fields for, in a GAN term if asked."""
        kind = METHODS[stage.method]
        wanted = _fields_of(stage) & self.pieces.keys()
        method = kind(**{name: self.pieces[name] for name in wanted}, **stage.options)
        return method if self.gan is None else self.gan.around(method)


# --- what a stage asks for -----------------------------------------------------------------------


def rivals_of(stage: Stage) -> tuple[str, ...]:
    """Names of the players that learn beside the student of a stage."""
    has = _fields_of(stage)
    critic = stage.gan is not None or _asks_critic(stage)
    asked = {FAKE: FAKE in has, CRITIC: critic, HEAD: HEAD in has}
    return tuple(name for name, wanted in asked.items() if wanted)


def check_stages(recipe: Recipe) -> None:
    """Refuse, before any work, a stage that asks for what it has not been given.

    Raises:
        BadInput: it needs a critic and has no rate, or no samples of the teacher, for it; or a
            rival is to start from a stage before, and there is none, or no such rival; or a GAN
            term does not go with its method.
    """
    for k, stage in enumerate(recipe.stages):
        _check_critic(stage)
        _check_gan(recipe, stage)
        if stage.rivals_from is not None and FAKE not in _fields_of(stage):
            allowed = f"method {stage.method!r} has no rival to start; leave it out"
            raise BadInput("rivals_from", stage.rivals_from, allowed)
        if stage.rivals_from in ("before", FAKE):
            _check_rivals(stage, recipe.stages[k - 1] if k else recipe.start)


def _check_rivals(stage: Stage, before: Stage | Recipe | None) -> None:
    """A fake score that is to start from the stage before needs one there."""
    if before is None:
        allowed = "there is no stage before the first; use 'teacher' or leave it out"
        raise BadInput("rivals_from", stage.rivals_from, allowed)
    last = before.stages[-1] if isinstance(before, Recipe) else before
    if stage.rivals_from == FAKE and FAKE not in _fields_of(last):
        allowed = f"the stage before, {last.method!r}, has no fake score; use 'before' or 'teacher'"
        raise BadInput("rivals_from", FAKE, allowed)


def _fields_of(stage: Stage) -> set[str]:
    return {f.name for f in dataclasses.fields(METHODS[stage.method])}


def _asks_critic(stage: Stage) -> bool:
    """Whether the options of a stage ask for a critic."""
    return _is_adversarial(stage) or _asks_ratio(stage)


def _is_adversarial(stage: Stage) -> bool:
    """Whether a critic looks at the two predictions of a consistency stage."""
    if CRITIC not in _fields_of(stage):
        return False
    return float(str(stage.options.get("adversarial_weight", 0.0))) > 0


def _asks_ratio(stage: Stage) -> bool:
    """Whether the divergence of a stage weighs samples by a ratio."""
    if not {CRITIC, "divergence"} <= _fields_of(stage):
        return False
    name = str(stage.options.get("divergence", "rkl"))
    alpha = float(str(stage.options.get("alpha", 0.0)))
    divergence_named(name, alpha)
    return needs_ratio(name, alpha)


def _check_critic(stage: Stage) -> None:
    """A critic needs a rate; one that learns a ratio of densities, samples of the teacher too."""
    if not _asks_critic(stage):
        if stage.taps is not None:
            raise BadInput("taps", stage.taps, "this stage has no critic; leave it out")
        return
    why = "divergence" if _asks_ratio(stage) else "adversarial_weight"
    needs = f"{why}={stage.options[why]!r} needs"
    if _asks_ratio(stage) and stage.pairs is None:
        raise BadInput("pairs", None, f"{needs} samples of the teacher for its critic")
    if CRITIC not in stage.rates:
        raise BadInput("rates", sorted(stage.rates), f"{needs} one for player {CRITIC!r} too")


def _check_gan(recipe: Recipe, stage: Stage) -> None:
    """A GAN term needs a rate, a student, and a method with samples and no critic of its own."""
    if stage.gan is None:
        return
    method, features = stage.method, stage.gan.features
    if recipe.teacher is None:
        raise BadInput("gan", features, "it is for students; this recipe has no teacher")
    if not issubclass(METHODS[method], Generates) or stage.options.get("edges"):
        raise BadInput("gan", features, f"method {method!r} makes no clean samples in this stage")
    if _asks_critic(stage):
        raise BadInput("gan", features, f"method {method!r} has a critic of its own here")
    if features == FAKE and FAKE not in _fields_of(stage):
        raise BadInput("gan", features, f"method {method!r} has no fake score")
    if CRITIC not in stage.rates:
        raise BadInput("rates", sorted(stage.rates), f"gan needs one for player {CRITIC!r} too")


# --- the players ---------------------------------------------------------------------------------


def workbench(
    recipe: Recipe,
    store: Store,
    device: str = "cpu",
    *,
    weights: Mapping[str, Tensor] | None = None,
) -> Workbench:
    """Set up the last stage of a recipe, at its beginning.

    Args:
        recipe: whose last stage it is.
        store: where the teacher and the stage before are.
        device: where all of it runs.
        weights: of the student, if the stage before is not at hand; what starts from that stage
            then starts as this student or, a fake score, as the teacher.

    Raises:
        BadInput: the stage asks for what it has not been given, see `check_stages`.
        MissingPiece: the stage before it, or the teacher, is not in the store.
    """
    check_stages(recipe)
    before = None
    if weights is None and recipe.before is not None:
        before = _found(recipe.before, store)
        weights = floats(before.tensors())
    if recipe.teacher is None:
        return _net_bench(recipe, device, weights)
    return _adapter_bench(recipe, store, device, weights, before)


def load_net(recipe: Recipe, artefact: Artefact) -> PostcardNet:
    """Build the network of a recipe with the weights of an artefact, frozen, in eval mode."""
    net = spawn_net(recipe.net, recipe.seed)
    net.load_state_dict(floats(artefact.tensors()))
    return net.eval().requires_grad_(False)


def floats(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in float32: artefacts keep halves."""
    return {k: v.float() for k, v in tensors.items()}


def _net_bench(recipe: Recipe, device: str, weights: Mapping[str, Tensor] | None) -> Workbench:
    """A whole network learns: from its seed, or from weights."""
    net = spawn_net(recipe.net, recipe.seed)
    if weights is not None:
        net.load_state_dict(weights)
    net = net.to(device).train()
    average = copy.deepcopy(net).requires_grad_(False)
    pieces = {"student": net, "null": null_tokens(1)}
    batches = _real(recipe, device)
    return Workbench(student=net, average=average, pieces=pieces, batches=batches)


def _adapter_bench(
    recipe: Recipe,
    store: Store,
    device: str,
    weights: Mapping[str, Tensor] | None,
    before: Artefact | None,
) -> Workbench:
    """An adapter on the teacher's network learns; the bare network, or a copy, teaches it."""
    assert recipe.teacher is not None and recipe.adapter is not None
    stage = recipe.stages[-1]
    artefact = _found(recipe.teacher, store)
    host = Host(load_net(recipe.teacher, artefact).to(device), part="transformer")
    student = host.add("student", recipe.adapter, seed=recipe.seed)
    if weights is not None:
        student.load_state_dict(weights)
    average = host.copy(student, "average")
    plain = frozen(host.bare)
    guide = guided(plain, null_tokens(1), stage.guidance_scale or 1.0)
    apart = {CRITIC} if stage.gan else set()
    rivals = {
        name: _rival(name, recipe, host, student, device)
        for name in rivals_of(stage)
        if name not in apart
    }
    if stage.rivals_from == FAKE and before is not None:
        rivals[FAKE].load_state_dict(rival_weights(before, FAKE))
    pieces: dict[str, object] = {
        "student": student,
        "average": average,
        "plain": plain,
        "null": null_tokens(1),
        **rivals,
    }
    if stage.teacher == "guided":
        pieces["teacher"] = guide
    elif stage.teacher == "before":
        pieces["teacher"] = frozen(host.copy(student, "before"))
    sources = {
        pairs: _pair_source(recipe, pairs, store, guide, device) for pairs in pairs_of(stage)
    }
    real = _real(recipe, device)
    gan = _gan(recipe, store, {"teacher": host.bare, **rivals}, real, sources, device)
    return Workbench(
        student=student,
        average=average,
        pieces=pieces,
        batches=partial(pair_batch, sources[stage.pairs]) if stage.pairs else real,
        rivals={**rivals, CRITIC: gan.critic} if gan else rivals,
        sources=sources,
        gan=gan,
    )


def _gan(
    recipe: Recipe,
    store: Store,
    players: Mapping[str, Player],
    real: Batches,
    sources: Mapping[Pairs, PairSource],
    device: str,
) -> GanPieces | None:
    """The critic of a stage's GAN term, and both of its real sides."""
    gan = recipe.stages[-1].gan
    if gan is None:
        return None
    if gan.folder is not None:
        of = gan.folder
        photos = load_photos(of.path, of.digest, of.side, of.place)
        real = partial(photo_batch, photos, device=device)
    teacher = real if gan.pairs is None else partial(pair_batch, sources[gan.pairs])
    return gan_pieces(
        gan,
        real=mixed(real, teacher, gan.rho),
        players=players,
        store=store,
        seed=recipe.seed,
        device=device,
    )


def rival_weights(artefact: Artefact, name: str) -> dict[str, Tensor]:
    """Weights of a rival as they were when the student of an artefact was finished."""
    found = floats(artefact.tensors(RIVAL_FILE))
    return {k.removeprefix(f"{name}/"): v for k, v in found.items() if k.startswith(f"{name}/")}


def _rival(name: str, recipe: Recipe, host: Host, student: Worn, device: str) -> Player:
    """A player beside the student, before either of them has learnt anything in this stage."""
    assert recipe.adapter is not None
    sizes = {"channels": LATENT_CHANNELS, "vocabulary": VOCABULARY, "tokens": TOKENS}
    if name == CRITIC and recipe.stages[-1].taps == "teacher":
        seen = normed(block_taps(host.bare))
        heads = spawn_heads(seen.widths, seed=recipe.seed, captions=(VOCABULARY, TOKENS))
        return FeatureCritic(features=seen, heads=heads.to(device))
    if name == CRITIC:
        return spawn_critic(**sizes, seed=recipe.seed).to(device)
    if name == HEAD:
        return spawn_latent_head(**sizes, seed=recipe.seed).to(device)
    if recipe.stages[-1].rivals_from == "before":
        return host.copy(student, name)
    return host.add(name, recipe.adapter, seed=recipe.seed)


# --- the data ------------------------------------------------------------------------------------


def _real(recipe: Recipe, device: str) -> Callable[[Draw], Batch]:
    """Postcards that no earlier stage has seen."""
    stage = recipe.stages[-1]
    return partial(
        train_batch,
        seed=recipe.seed if recipe.teacher is None else recipe.teacher.seed,
        skip=recipe.samples_seen - stage.steps * stage.batch_size,
        sign_grid=stage.sign_grid,
        posters=stage.posters,
        device=device,
    )


def pairs_of(stage: Stage) -> tuple[Pairs, ...]:
    """Samples of the teacher that a stage needs: the method's data, and a critic's real side."""
    wanted = (stage.pairs, stage.gan.pairs if stage.gan else None)
    return tuple(dict.fromkeys(pairs for pairs in wanted if pairs is not None))


def _pair_source(
    recipe: Recipe, pairs: Pairs, store: Store, guide: Field, device: str
) -> PairSource:
    """Pairs of a stage, kept in the store once all of them have been drawn."""
    assert recipe.teacher is not None
    spec = _pair_spec(recipe, pairs)
    source = PairSource(
        field=guide,
        n=pairs.n,
        steps=pairs.steps,
        seed=recipe.teacher.seed,
        device=device,
        known=_DRAWN.setdefault((key_of(spec), device), {}),
    )
    found = store.find(PAIRS, spec)
    if found is not None:
        source.known.update(_rows(found.tensors("pairs.safetensors")))
    return source


def _pair_spec(recipe: Recipe, pairs: Pairs) -> dict[str, object]:
    assert recipe.teacher is not None
    return {
        "teacher": recipe.teacher.spec(),
        "guidance_scale": recipe.stages[-1].guidance_scale,
        **pairs.model_dump(),
    }


def draw_all_pairs(recipe: Recipe, store: Store, device: str) -> None:
    """Draw the pairs of the last stage once and keep them, so that every student shares them."""
    for pairs in pairs_of(recipe.stages[-1]):
        make = partial(_draw_pairs, recipe, store, device, pairs)
        store.get_or_make(PAIRS, _pair_spec(recipe, pairs), make)


def _draw_pairs(recipe: Recipe, store: Store, device: str, pairs: Pairs, folder: Path) -> None:
    source = workbench(recipe, store, device).sources[pairs]
    with progress(source.n, f"{source.n} samples of the teacher") as tick:
        for first in range(0, source.n, 64):
            source.rows(range(first, min(first + 64, source.n)))
            tick(min(first + 64, source.n), "")
    samples = torch.stack([source.known[i] for i in range(source.n)])
    save_tensors(folder, "pairs.safetensors", {"x": samples})


def _rows(tensors: Mapping[str, Tensor]) -> dict[int, Tensor]:
    return dict(enumerate(tensors["x"]))


def _found(recipe: Recipe, store: Store) -> Artefact:
    found = store.find(recipe.artefact, recipe.spec())
    if found is None:
        raise MissingPiece(
            f"{recipe.artefact} is needed as a start and is not in the store; "
            f"run turbo-lab train {recipe.name} --fresh."
        )
    return found
