"""The bench a notebook works at: the trained testbed, cached samples and their measurements.

A notebook asks for samples of the teacher at some steps and guidance; the store answers if they
were drawn before, else they are drawn now with a progress bar. Measurements are recomputed.
"""

from __future__ import annotations

import copy
import json
import time
import warnings
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from turbo_lab import dino
from turbo_lab.adapters import AdapterSize, Host, Worn
from turbo_lab.atomic import atomic_write_text, save_tensors
from turbo_lab.cpu import tune_allocator
from turbo_lab.errors import BadInput, MissingPiece, StoreWarning
from turbo_lab.field import Field as VelocityField
from turbo_lab.field import counted, frozen, guided
from turbo_lab.fit import Record
from turbo_lab.postcards import Scenes
from turbo_lab.progress import progress
from turbo_lab.recipes import (
    EARLY,
    FAMILIES,
    Profile,
    Recipe,
    real_folder,
    resolve,
    student_recipe,
    with_folder,
)
from turbo_lab.sample import draw_samples
from turbo_lab.sampling import TEACHER_GUIDANCE, Sampling, Stream, checked_sampling
from turbo_lab.stock_times import student_times
from turbo_lab.store import Artefact, Store, key_of
from turbo_lab.testbeds.postcards import Postcards
from turbo_lab.training import load_net, trained


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Images drawn for the first ``n`` scenes of a stream, and what drawing them cost."""

    images: Tensor  # [n, 3, 32, 32] in [-1, 1]
    scenes: Scenes
    nfe: float
    seconds_per_image: float
    key: str


@dataclass(frozen=True, kw_only=True)
class Student:
    """A distilled student: its adapter, worn on its teacher's network, and how it is sampled."""

    bench: Lab
    """Of its teacher."""
    family: str
    steps: int
    eta: float
    artefact: Artefact
    field: VelocityField
    times: tuple[float, ...] = ()

    def sampling(
        self, *, n: int, noises: int = 1, seed: int = 0, stream: Stream = "eval"
    ) -> Sampling:
        """How this student is meant to be sampled: one network call per step.

        Raises:
            BadInput: a number is out of range.
        """
        return checked_sampling(
            {
                "steps": self.steps,
                "times": self.times,
                "eta": self.eta,
                "guidance_scale": 1.0,
                "n": n,
                "noises": noises,
                "seed": seed,
                "stream": stream,
            }
        )


@dataclass(frozen=True, kw_only=True)
class Lab:
    """A testbed with its artefact, on a device, with a store behind it."""

    recipe: Recipe
    artefact: Artefact
    testbed: Postcards
    store: Store
    device: str
    hosts: dict[AdapterSize, Host] = dataclass_field(default_factory=dict)
    others: dict[str, Lab] = dataclass_field(default_factory=dict)

    def beside(self, teacher: Recipe) -> Lab:
        """Return the bench of a teacher, which is this one or has its store and device."""
        if teacher == self.recipe:
            return self
        key = key_of(teacher.spec())
        if key not in self.others:
            self.others[key] = lab_of(teacher, store=self.store, device=self.device)
        return self.others[key]

    def student(
        self,
        family: str,
        *,
        steps: int,
        seed: int = 0,
        profile: Profile = "quick",
    ) -> Student:
        """Return a family's student for a number of steps, trained first if it is nowhere.

        It is worn on its own teacher, whichever this bench is of.

        Raises:
            BadInput: unknown family, or one that has no student for so many steps.
        """
        recipe = student_recipe(family, steps=steps, profile=profile, seed=seed)
        assert recipe.teacher is not None
        bench = self.beside(recipe.teacher)
        return bench.worn(recipe, self.trained(recipe), family=family, steps=steps)

    def trained(self, recipe: Recipe, *, fresh: bool = False) -> Artefact:
        """Return the artefact of a recipe, trained on this bench's device if it is nowhere."""
        return _trained(recipe, store=self.store, fresh=fresh, device=self.device)

    def worn(self, recipe: Recipe, artefact: Artefact, *, family: str, steps: int) -> Student:
        """Put the adapter of an artefact on a copy of the teacher's network, once.

        Warns:
            StoreWarning: it is shipped, and the teacher has been trained to other weights since.
        """
        assert recipe.adapter is not None
        if not self.store.fits(artefact, on=self.artefact):
            warnings.warn(
                f"{artefact.name} was distilled from the shipped {self.artefact.name} and is worn"
                f" on other weights, those of {self.artefact.path}; remove that folder, or train"
                " the student on it with fresh.",
                StoreWarning,
                stacklevel=2,
            )
        return Student(
            bench=self,
            family=family,
            steps=steps,
            eta=FAMILIES[family].eta,
            artefact=artefact,
            field=self.dressed(recipe.adapter, artefact),
            times=student_times(recipe.stages[-1], steps),
        )

    def dressed(self, size: AdapterSize, artefact: Artefact) -> VelocityField:
        """Return the teacher's network in an adapter of this size, frozen."""
        host = self.hosts.get(size)
        if host is None:
            host = Host(copy.deepcopy(self.testbed.net), part="transformer")
            self.hosts[size] = host
        name = f"a{artefact.weights_digest[:16]}"
        if name not in host.sizes:
            adapter = host.add(name, size, seed=0)
            adapter.load_state_dict({k: v.float() for k, v in artefact.tensors().items()})
        return frozen(Worn(host=host, name=name))

    def samples(
        self, sampling: Sampling, what: str = "", student: Student | None = None
    ) -> Samples:
        """Return samples from the store, drawing them first if they are not there.

        They go by the weights of who is sampled: a student trained again has others.

        Args:
            sampling: how to sample; its guidance is of the teacher, a student has none.
            what: for the progress bar.
            student: who is sampled; the teacher if None.
        """
        spec = {
            "kind": "samples",
            "version": 2,
            "world": self.recipe.world,
            "teacher": (self if student is None else student.bench).artefact.weights_digest,
            "device": self.device,
            **sampling.model_dump(),
        }
        what = what or f"{sampling.steps} steps, guidance {sampling.guidance_scale:g}"
        if student is not None:
            spec["student"] = student.artefact.weights_digest
        make = partial(self._draw_into, sampling, what, student)
        artefact = self.store.get_or_make("postcards/samples", spec, make)
        cost = artefact.json("cost.json")
        return Samples(
            images=artefact.tensors("images.safetensors")["images"],
            scenes=self.scenes(sampling),
            nfe=cost["nfe"],
            seconds_per_image=cost["seconds_per_image"],
            key=artefact.key,
        )

    def scenes(self, sampling: Sampling) -> Scenes:
        """The scenes whose captions are sampled, one row per image."""
        captions = self.testbed.prompts(sampling.n // sampling.noises, sampling.stream)
        return captions[torch.arange(sampling.n) // sampling.noises]

    def draw(
        self, sampling: Sampling, what: str, student: Student | None = None
    ) -> tuple[Tensor, float, float]:
        """Draw samples now; return images ``[n, 3, 32, 32]``, NFE and seconds per image."""
        return self.draw_for(self.scenes(sampling).tokens, sampling, what, student)

    def draw_for(
        self,
        tokens: Tensor,
        sampling: Sampling,
        what: str = "",
        student: Student | None = None,
        *,
        first: int = 0,
        batch: int = 64,
    ) -> tuple[Tensor, float, float]:
        """Draw one image for each row of tokens ``[n, 5]``, from noise ``first`` on; see `draw`."""
        net = counted(self.testbed.net if student is None else student.field)
        scale = sampling.guidance_scale if student is None else 1.0
        field = guided(frozen(net), self.testbed.null, scale, rescale=sampling.rescale)
        began = time.perf_counter()
        with progress(len(tokens), what or "sampling") as tick:
            latents = draw_samples(
                field,
                sampling.grid,
                self.testbed.shape,
                tokens,
                seed=sampling.seed,
                indices=range(first, first + len(tokens)),
                eta=sampling.eta,
                batch=batch,
                device=self.device,
                progress=lambda done, _: tick(done, ""),
            )
        seconds = (time.perf_counter() - began) / len(tokens)
        return self.testbed.decode(latents), net.per_image(len(tokens)), seconds

    def _draw_into(
        self, sampling: Sampling, what: str, student: Student | None, folder: Path
    ) -> None:
        images, nfe, seconds = self.draw(sampling, what, student)
        save_tensors(folder, "images.safetensors", {"images": images})
        cost = {"nfe": nfe, "seconds_per_image": seconds}
        atomic_write_text(folder / "cost.json", json.dumps(cost))


def open_lab(
    *,
    profile: Profile = "quick",
    seed: int = 0,
    device: str = "auto",
    fresh: bool = False,
    store: Store | None = None,
    teacher: str = "teacher",
) -> Lab:
    """Open the postcards with their trained teacher.

    Args:
        profile: with ``fresh``, whose budget to train by; otherwise the shipped teacher (the one
            of ``quick``) serves every profile, since profiles scale how much is measured.
        seed: of the teacher's training when ``fresh``.
        device: ``cpu``, ``cuda`` or ``auto``.
        fresh: train again.
        store: where artefacts live.
        teacher: name of its recipe; most students wear theirs on `turbo_lab.recipes.EARLY`.

    Raises:
        BadInput: the recipe is of a student, or there is none of this name.
        MissingPiece: CUDA was asked for and is not there.
    """
    tune_allocator()
    store = store or Store.default()
    place = chosen_device(device)
    recipe = resolve(teacher, profile=profile if fresh else "quick", seed=seed if fresh else 0)
    if recipe.teacher is not None:
        raise BadInput("teacher", teacher, f"a student's recipe; use teacher or {EARLY}")
    return lab_of(recipe, store=store, device=place, fresh=fresh)


def lab_of(recipe: Recipe, *, store: Store, device: str, fresh: bool = False) -> Lab:
    """Open the postcards with the teacher of a recipe, trained first if it is nowhere.

    Args:
        recipe: of a whole network.
        store: where artefacts live.
        device: ``cpu`` or ``cuda``.
        fresh: train again.
    """
    artefact = _trained(recipe, store=store, fresh=fresh, device=device)
    net = load_net(recipe, artefact).to(device)
    testbed = Postcards(net=net, guidance_scale=TEACHER_GUIDANCE)
    return Lab(recipe=recipe, artefact=artefact, testbed=testbed, store=store, device=device)


def chosen_device(device: str) -> str:
    """Resolve ``auto`` to the GPU where there is one.

    Raises:
        BadInput: not one of auto, cpu, cuda.
        MissingPiece: cuda without a GPU.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise BadInput("device", device, "choose auto, cpu or cuda")
    found = torch.cuda.is_available()
    if device == "cuda" and not found:
        raise MissingPiece("device='cuda' needs a CUDA GPU, and torch sees none; use cpu or auto.")
    return "cuda" if found and device != "cpu" else "cpu"


def train(
    name: str,
    *,
    profile: Profile = "quick",
    seed: int = 0,
    fresh: bool = False,
    device: str = "auto",
    ship: bool = False,
    images: Path | None = None,
) -> Artefact:
    """Train a recipe unless it is there already; ``ship`` copies it into the package's source.

    ``dino`` is the feature extractor of the adversarial term; every other name is of `RECIPES`.
    ``images`` is a folder of photographs that its critic sees instead of real postcards.

    Raises:
        BadInput: the recipe has no critic that could, see `turbo_lab.recipes.with_folder`.
    """
    store, place = Store.default(), chosen_device(device)
    if name == dino.NAME:
        if images is not None:
            raise BadInput("images", str(images), f"{name} learns from postcards alone")
        features = dino.dino_recipe(profile, seed=seed)
        artefact = dino.trained_with_progress(features, store=store, fresh=fresh, device=place)
    else:
        recipe = resolve(name, profile=profile, seed=seed)
        if images is not None:
            recipe = with_folder(recipe, real_folder(images))
        artefact = _trained(recipe, store=store, fresh=fresh, device=place)
    if ship:
        store.ship(artefact)
    return artefact


def _trained(recipe: Recipe, *, store: Store, fresh: bool, device: str) -> Artefact:
    total = recipe.steps_before + recipe.stages[-1].steps
    with progress(total, f"training {recipe.name}", delay=1) as tick:

        def watch(record: Record, done: int) -> None:
            tick(done, f"loss {sum(record.terms.values()):.3f}")

        return trained(recipe, store=store, fresh=fresh, device=device, watch=watch)
