"""What a recipe is: a frozen, validated list of stages and everything a training depends on.

Each stage becomes an artefact of its own, whose key is the hash of the recipe up to that stage:
change a number and it is another artefact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from turbo_lab.adapters import AdapterSize
from turbo_lab.errors import BadInput
from turbo_lab.methods import METHODS
from turbo_lab.optimisers import Optimiser
from turbo_lab.postcards import SIZE
from turbo_lab.testbeds.postcards import NetSize

Profile = Literal["smoke", "quick", "paper"]
Option = float | int | str | tuple[float, ...]
"""Of a method; its own fields say what is allowed."""

WORLD = 1
"""Version of the postcards' renderer and streams; raised when a picture changes meaning."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Rates(_Frozen):
    """Optimiser of one player, see `turbo_lab.optimisers.Optimiser`."""

    lr: float = Field(gt=0, le=1)
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(0.01, ge=0)
    warmup: int = Field(0, ge=0)
    final: float = Field(1.0, ge=0, le=1)
    clip: float = Field(1.0, gt=0)
    muon: str | None = Field(None, min_length=1, exclude_if=lambda name: name is None)

    def optimiser(self) -> Optimiser:
        """The optimiser `fit` understands."""
        return Optimiser(**self.model_dump())


class Pairs(_Frozen):
    """Data drawn from the guided teacher: noise, and where Euler steps from it end."""

    n: int = Field(ge=1, le=1_000_000)
    steps: int = Field(ge=1, le=1000)


class Folder(_Frozen):
    """A folder of photographs as real pictures; make it with `turbo_lab.recipes.real_folder`.

    ``digest`` names its contents and goes into the key; ``path`` says where they are on this
    machine and does not. The rest is as in `turbo_lab.testbeds.photos.Photos`.
    """

    digest: str = Field(pattern="^[0-9a-f]{16}$")
    side: int | None = Field(None, ge=SIZE)
    place: Literal["random", "centre"] = "random"
    path: str = Field("", exclude=True, repr=False)


class Game(Protocol):
    """What every GAN term says, on whatever testbed."""

    @property
    def rho(self) -> float:
        """Share of real data on the critic's real side."""

    @property
    def pairs(self) -> Pairs | None:
        """Samples of the teacher there."""

    @property
    def weight(self) -> float | None:
        """Of the term."""

    @property
    def balance(self) -> float | None:
        """Of the gradients."""

    @property
    def noise_range(self) -> tuple[float, float]:
        """Times to which shown samples are noised."""


def check_derivative(options: Mapping[str, Option]) -> None:
    """Refuse a derivative by differences, for a network in bfloat16.

    It asks at two times 4e-4 apart (`turbo_lab.methods.continuous`), of which 8 bits make one.

    Raises:
        BadInput: naming the option.
    """
    if options.get("derivative") == "difference":
        raise BadInput("derivative", "difference", "use jvp where the network is in bfloat16")


def check_game(gan: Game) -> None:
    """Refuse a GAN term without a weight, or with two, and one without what it shows.

    Raises:
        BadInput: one of these, or times that are none.
    """
    if (gan.weight is None) == (gan.balance is None):
        raise BadInput("weight", gan.weight, "give either a weight or a balance")
    if gan.rho < 1 and gan.pairs is None:
        raise BadInput("pairs", None, f"rho={gan.rho} needs samples of the teacher")
    low, high = gan.noise_range
    if not 0 <= low <= high <= 1:
        raise BadInput("noise_range", gan.noise_range, "use two times, 0 to 1, not falling")


class Gan(_Frozen):
    """A GAN term beside the method of a stage, see `turbo_lab.methods.gan.WithGan`.

    ``features`` is what the critic looks through: the mini-``dino``, blocks of the plain
    ``teacher`` or of the ``fake`` score, raw ``pixels``, or a ``random`` transformer of the
    mini-DINO's shape; ``eye`` is the key of the mini-DINO, so that a student of another has another
    key. ``blocks`` are those that are tapped; none for all. ``rho`` is the share of
    real postcards on the critic's real side; the rest are samples of the guided teacher, drawn as
    ``pairs`` says. With a ``folder`` its photographs stand where postcards do; they have no
    captions, so neither heads nor features may ask for any. Either ``weight`` or ``balance`` is
    given. The optimiser of the heads is ``rates["critic"]`` of the stage.
    """

    features: Literal["dino", "teacher", "fake", "pixels", "random"] = "dino"
    eye: str | None = None
    blocks: tuple[int, ...] = ()
    heads: Literal["plain", "caption"] = "plain"
    width: int = Field(64, ge=1, le=1024)
    rho: float = Field(ge=0, le=1)
    pairs: Pairs | None = None
    folder: Folder | None = None
    weight: float | None = Field(None, ge=0, allow_inf_nan=False)
    balance: float | None = Field(None, gt=0, allow_inf_nan=False)
    loss: Literal["logistic", "hinge"] = "logistic"
    r1: float = Field(0.0, ge=0, allow_inf_nan=False)
    r1_step: float = Field(0.01, gt=0, le=1)
    augment: tuple[Literal["colour", "translation", "cutout"], ...] = ()
    noise_range: tuple[float, float] = (0.0, 0.0)

    @model_validator(mode="after")
    def _fits(self) -> Gan:
        check_game(self)
        if self.features == "pixels" and self.blocks:
            raise BadInput("blocks", self.blocks, "pixels have no blocks; leave them out")
        if self.folder is not None:
            self.check_folder()
        return self

    def check_folder(self) -> None:
        """Refuse a critic that is told a caption for one side alone: it would need no picture.

        Raises:
            BadInput: heads or features that ask for captions, or no real side.
        """
        if self.rho == 0:
            raise BadInput("rho", self.rho, "it shows no real picture; leave the folder out")
        if self.heads == "caption":
            raise BadInput("heads", self.heads, "a folder's pictures have no captions; use 'plain'")
        if self.features in ("teacher", "fake"):
            allowed = "a folder's pictures have no captions; use 'dino', 'pixels' or 'random'"
            raise BadInput("features", self.features, allowed)


class Stage(_Frozen):
    """One method, its options and its budget.

    ``teacher`` is the guided teacher or the student of the stage before; ``pairs`` replaces real
    postcards by the teacher's samples. A fake score starts as the plain teacher, or, by
    ``rivals_from``, as the student of the stage before ("before") or as its fake score ("fake"). A
    critic that the options ask for is a small network of its own, or, with ``taps``, heads on all
    blocks of the plain teacher. ``posters`` and ``busts`` are shares of practice pictures, see
    `turbo_lab.testbeds.postcards.train_batch`; ``precision`` "bf16" multiplies matrices in
    bfloat16, see `turbo_lab.precision`. A whole network has ``layers`` blocks from this stage on,
    where it had fewer: see `turbo_lab.testbeds.postcards.grown`.
    ``gan`` adds a GAN term, whose pairs are its own. What is None is left out of the key, and of a
    training: there is no reason to write "teacher" on postcards.
    """

    method: str
    options: Mapping[str, Option] = Field(default_factory=dict)
    steps: int = Field(ge=1)
    batch_size: int = Field(64, ge=1)
    rates: Mapping[str, Rates]
    ema: float = Field(0.999, ge=0, lt=1)
    sign_grid: int = Field(1, ge=1, le=4)
    posters: float = Field(0.0, ge=0, le=1)
    busts: float | None = Field(None, gt=0, le=1)
    version: int = Field(1, ge=1)
    teacher: Literal["guided", "before"] | None = None
    guidance_scale: float | None = Field(None, ge=0, le=20)
    pairs: Pairs | None = None
    rivals_from: Literal["teacher", "before", "fake"] | None = None
    gan: Gan | None = None
    taps: Literal["teacher"] | None = None
    precision: Literal["bf16"] | None = None
    layers: int | None = Field(None, ge=2, le=60)

    @property
    def guidance(self) -> float:
        """The teacher's guidance scale; 1, where none is given, is the plain teacher."""
        return 1.0 if self.guidance_scale is None else self.guidance_scale

    @model_validator(mode="after")
    def _bf16_has_its_derivative(self) -> Stage:
        if self.precision == "bf16":
            check_derivative(self.options)
        return self

    @model_validator(mode="after")
    def _shares_fit(self) -> Stage:
        if self.busts is not None and self.posters + self.busts > 1:
            raise BadInput("busts", self.busts, f"use at most {1 - self.posters:g} beside posters")
        return self

    @field_validator("method")
    @classmethod
    def _known(cls, method: str) -> str:
        if method not in METHODS:
            raise BadInput("method", method, f"choose one of {', '.join(METHODS)}")
        return method


class Recipe(_Frozen):
    """A named list of stages on a testbed.

    A student has a ``teacher``, the recipe of the network it starts from, and is an ``adapter``
    on it. It may go on from the student of another recipe, ``start``, on the same teacher and of
    the same size: many recipes then share the artefact of that one.
    """

    name: str
    testbed: Literal["postcards"] = "postcards"
    world: int = WORLD
    net: NetSize = NetSize()
    seed: int = Field(0, ge=0)
    stages: tuple[Stage, ...] = Field(min_length=1)
    teacher: Recipe | None = None
    adapter: AdapterSize | None = None
    start: Recipe | None = None

    @model_validator(mode="after")
    def _goes_on(self) -> Recipe:
        if self.start is None:
            return self
        same = (self.start.teacher, self.start.adapter) == (self.teacher, self.adapter)
        if self.teacher is None or not same:
            raise BadInput("start", self.start.name, "use a student of this teacher and size")
        return self

    @model_validator(mode="after")
    def _grows(self) -> Recipe:
        layers = self.net.layers
        for asked in (stage.layers for stage in self.stages if stage.layers is not None):
            if self.teacher is not None:
                raise BadInput("layers", asked, "an adapter keeps its network; leave it out")
            if asked <= layers:
                raise BadInput("layers", asked, f"a network grows; use more than {layers}")
            layers = asked
        return self

    @property
    def size(self) -> NetSize:
        """Of the network after the last stage."""
        asked = [stage.layers for stage in self.stages if stage.layers is not None]
        return self.net.model_copy(update={"layers": asked[-1]}) if asked else self.net

    @property
    def artefact(self) -> str:
        """Name of the artefact in the store."""
        return f"{self.testbed}/{self.name}"

    @property
    def before(self) -> Recipe | None:
        """The recipe of what the last stage starts from, if anything."""
        kept = self.stages[:-1]
        return self.model_copy(update={"stages": kept}) if kept else self.start

    @property
    def depth(self) -> int:
        """Stages from the teacher, or from nothing, to the end."""
        return len(self.stages) + (self.start.depth if self.start else 0)

    def spec(self) -> dict[str, Any]:
        """What the key of the artefact is made of."""
        return self.model_dump(mode="json", exclude_none=True)

    @property
    def steps_before(self) -> int:
        """Training steps of all stages before the last."""
        before = self.before
        return before.steps_before + before.stages[-1].steps if before else 0

    @property
    def times(self) -> tuple[float, ...]:
        """Times that the student is trained to be sampled at; empty for any grid."""
        options = self.stages[-1].options
        times, edges = options.get("times", ()), options.get("edges", ())
        assert isinstance(times, tuple) and isinstance(edges, tuple)
        return (1.0, *sorted(edges, reverse=True)) if edges else times

    @property
    def samples_seen(self) -> int:
        """Training samples used in all stages, in those of the start and of the teacher."""
        own = sum(stage.steps * stage.batch_size for stage in self.stages)
        earlier = self.start or self.teacher
        return own + (earlier.samples_seen if earlier else 0)


@dataclass(frozen=True, kw_only=True)
class Family:
    """How a method's students are reached and sampled.

    Args:
        title: for tables and figures.
        eta: of the sampler: 0 is Euler, 1 predicts and renoises.
        recipe: ``(steps, profile, seed)`` to the recipe of the student for that many steps.
    """

    title: str
    eta: float
    recipe: Callable[[int, Profile, int], Recipe]
