"""A trained student as it is handed on: its adapter, and how it is sampled.

Both are read off the recipe of an artefact, so it is the same code for postcards, for Qwen-Image
and for a LoRA that was imported.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError
from torch import Tensor

from turbo_lab.adapters import AdapterSize
from turbo_lab.errors import BadInput, MissingPiece
from turbo_lab.recipes import Profile, Recipe, student_recipe
from turbo_lab.recipes.qwen_image import QwenRecipe
from turbo_lab.stock_times import student_eta, student_times
from turbo_lab.store import Artefact, Store, key_of

IMPORTED = "imported lora"
"""Kind, in its spec, of an artefact that was made from somebody's file."""
FEW = 2
"""Steps of a family's student where none are asked for."""
_KEY = re.compile(r"[0-9a-f]{12}")


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """A student and how it is sampled.

    Attributes:
        artefact: its weights.
        recipe: name of what made it.
        base: the network it changes: the key of a teacher, or a model.
        size: of the adapter.
        times: of its sampler, falling from 1, one per step; empty where they are not known.
        eta: of its sampler: 0 is Euler, 1 predicts and renoises.
    """

    artefact: Artefact
    recipe: str
    base: str
    size: AdapterSize
    times: tuple[float, ...]
    eta: float

    @property
    def testbed(self) -> str:
        """Name of the testbed."""
        return self.artefact.name.partition("/")[0]

    def tensors(self) -> dict[str, Tensor]:
        """The adapter's tensors, named as in `turbo_lab.adapters`, as they are stored."""
        return self.artefact.tensors()


def delivery(
    student: str,
    *,
    steps: int | None = None,
    profile: Profile = "quick",
    seed: int = 0,
    store: Store | None = None,
) -> Delivery:
    """Find a trained student.

    Args:
        student: a family of `turbo_lab.recipes.FAMILIES`, or the key of an artefact: 12 digits.
        steps: of its sampler, 2 if None; an artefact knows its own unless its method is for any.
        profile: of a family's training.
        seed: of a family's training.
        store: where artefacts live.

    Raises:
        BadInput: there is no such family, number of steps or artefact, or it is no adapter.
        MissingPiece: the family's student has not been trained.
    """
    store = store or Store.default()
    if is_key(student):
        return of_artefact(artefact_of(student, store), steps)
    steps = FEW if steps is None else steps
    recipe = student_recipe(student, steps=steps, profile=profile, seed=seed)
    found = store.find(recipe.artefact, recipe.spec())
    if found is None:
        which = f"{recipe.name} --profile {profile} --seed {seed}"
        raise MissingPiece(f"{student} is not trained: run turbo-lab train {which} first.")
    return of_artefact(found, steps)


def artefact_of(key: str, store: Store) -> Artefact:
    """Return the verified artefact of a key, from the cache or shipped.

    Raises:
        BadInput: there is none, or it is damaged.
    """
    why = "no artefact has this key; turbo-lab artifacts lists them"
    for root in (store.cache, *store.shipped):
        for path in root.glob(f"*/*-{key}"):
            name = f"{path.parent.name}/{path.name.removesuffix(f'-{key}')}"
            why = f"{path} is damaged; remove it, and make it again"
            try:
                spec = json.loads((path / "recipe.json").read_text("utf-8"))
                found = store.find(name, spec) if key_of(spec) == key else None
            except (OSError, ValueError):
                continue
            if found is not None:
                return found
    raise BadInput("student", key, why)


def of_artefact(artefact: Artefact, steps: int | None = None) -> Delivery:
    """Read off an artefact's recipe what is delivered and how it is sampled.

    Raises:
        BadInput: it is no adapter, or is not for so many steps.
    """
    spec = artefact.spec
    if spec.get("kind") == IMPORTED:
        return _imported(artefact, steps)
    testbed = artefact.name.partition("/")[0]
    if testbed not in ("postcards", "qwen_image"):
        raise BadInput("student", artefact.key, f"{artefact.name} is no adapter")
    try:
        recipe: Recipe | QwenRecipe
        if testbed == "qwen_image":
            recipe = QwenRecipe.model_validate(spec.get("recipe"))
            base = _model_name(artefact)
        else:
            recipe = Recipe.model_validate(spec)
            base = f"postcards/teacher {key_of(recipe.teacher.spec()) if recipe.teacher else ''}"
    except ValidationError:
        raise BadInput("student", artefact.key, f"{artefact.name} is no student") from None
    if recipe.adapter is None:
        raise BadInput("student", artefact.key, f"{artefact.name} is a whole network, no adapter")
    stage = recipe.stages[-1]
    return Delivery(
        artefact=artefact,
        recipe=recipe.name,
        base=base,
        size=recipe.adapter,
        times=student_times(stage, steps),
        eta=student_eta(stage),
    )


def _model_name(artefact: Artefact) -> str:
    """A model and what tells it from others; of a local one the folder's own name alone.

    It is written into files for others, who need not know how folders are named here.
    """
    identity = dict(artefact.spec.get("model", {}))
    model = str(artefact.card.get("model", ""))
    if "commit" in identity:
        return f"{model} {identity['commit'][:12]}"
    return f"{Path(model).name} sha256 {str(identity.get('sha256', ''))[:12]}"


def _imported(artefact: Artefact, steps: int | None) -> Delivery:
    spec = artefact.spec
    times = tuple(spec["times"])
    if steps is not None and times and steps != len(times):
        raise BadInput("steps", steps, f"this student has {len(times)}")
    return Delivery(
        artefact=artefact,
        recipe=spec["recipe"],
        base=spec["base"],
        size=AdapterSize.model_validate(spec["adapter"]),
        times=times,
        eta=spec["eta"],
    )


def is_key(student: str) -> bool:
    """Whether a name is the key of an artefact and not that of a family."""
    return _KEY.fullmatch(student) is not None
