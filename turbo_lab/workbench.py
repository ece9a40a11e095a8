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
from turbo_lab.errors import MissingPiece
from turbo_lab.features import block_taps, normed
from turbo_lab.field import Field, frozen, guided
from turbo_lab.fit import Batch, Objective, Player
from turbo_lab.gan_pieces import GanPieces, gan_pieces
from turbo_lab.heads import FeatureCritic, spawn_heads
from turbo_lab.keys import key_of
from turbo_lab.methods import METHODS
from turbo_lab.methods.gan import Batches, mixed
from turbo_lab.methods.kinds import TrainableField
from turbo_lab.methods.transition import spawn_latent_head
from turbo_lab.postcards.captions import TOKENS, VOCABULARY, null_tokens
from turbo_lab.precision import InBfloat16
from turbo_lab.progress import progress
from turbo_lab.recipes import Pairs, Recipe, Stage
from turbo_lab.stages import CRITIC, FAKE, HEAD, check_stages, fields_of, rivals_of
from turbo_lab.store import Artefact, Store
from turbo_lab.streams import Draw
from turbo_lab.testbeds.photos import load_photos, photo_batch
from turbo_lab.testbeds.postcards import (
    LATENT_CHANNELS,
    PairSource,
    PostcardNet,
    grown,
    pair_batch,
    spawn_net,
    train_batch,
)

PAIRS = "postcards/pairs"
RIVAL_FILE = "rivals.safetensors"
_DRAWN: dict[tuple[str, str], dict[int, Tensor]] = {}
"""Pairs of this process by key and device: the replays of several students share them."""


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
        wanted = fields_of(stage) & self.pieces.keys()
        method = kind(**{name: self.pieces[name] for name in wanted}, **stage.options)
        objective = method if self.gan is None else self.gan.around(method)
        return InBfloat16(objective=objective) if stage.precision == "bf16" else objective


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
        BadInput: the stage asks for what it has not been given, see `turbo_lab.stages`.
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
    net = spawn_net(recipe.size, recipe.seed)
    net.load_state_dict(floats(artefact.tensors()))
    return net.eval().requires_grad_(False)


def floats(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in float32: artefacts keep halves."""
    return {k: v.float() for k, v in tensors.items()}


def _net_bench(recipe: Recipe, device: str, weights: Mapping[str, Tensor] | None) -> Workbench:
    """A whole network learns: from its seed, or from weights, of fewer blocks if it is to grow."""
    net = spawn_net(recipe.size, recipe.seed)
    if weights is not None:
        net.load_state_dict(grown(weights, recipe.size.layers))
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
    guide = guided(plain, null_tokens(1), stage.guidance)
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
        busts=stage.busts or 0.0,
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
    spec = _pair_spec(recipe, pairs, store)
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


def _pair_spec(recipe: Recipe, pairs: Pairs, store: Store) -> dict[str, object]:
    assert recipe.teacher is not None
    return {
        "teacher": recipe.teacher.spec(),
        "weights": _found(recipe.teacher, store).weights_digest,  # those it is trained again to
        "guidance_scale": recipe.stages[-1].guidance_scale,
        **pairs.model_dump(),
    }


def draw_all_pairs(recipe: Recipe, store: Store, device: str) -> None:
    """Draw the pairs of the last stage once and keep them, so that every student shares them."""
    for pairs in pairs_of(recipe.stages[-1]):
        make = partial(_draw_pairs, recipe, store, device, pairs)
        store.get_or_make(PAIRS, _pair_spec(recipe, pairs, store), make)


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
