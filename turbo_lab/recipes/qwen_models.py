"""What a recipe for Qwen-Image is: a frozen, validated list of stages on the shared base."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from turbo_lab.adapters import QWEN_LINEARS, AdapterSize
from turbo_lab.errors import BadInput
from turbo_lab.methods import METHODS
from turbo_lab.methods.gan import Generates
from turbo_lab.recipes.models import Option, Pairs, Rates, check_derivative, check_game
from turbo_lab.testbeds.qwen_files import SCALE

Source = Literal["images", "pairs", "prompts"]

ADAPTER = AdapterSize(rank=64, alpha=64, targets=QWEN_LINEARS)
"""Rank 64 on 14 modules of every block, as the size of Wuli's file says; alpha as in TwinFlow."""
GUIDANCE = 4.0
DINO = "vit_small_patch14_dinov2.lvd142m"
"""DINOv2 by its name in timm; it sees 224 pixels as 16 x 16 tokens."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class QwenGan(_Frozen):
    """A GAN term beside the method of a stage, see `turbo_lab.methods.gan.WithGan`.

    ``features`` is what the critic looks through. ``dino`` is a vision transformer of timm, named
    by ``vit``, that sees pictures: of each sample a square of ``crop`` latents is cut out at
    random and decoded, and the ``view`` pixels in its middle are looked at, as those at the rim
    lack what lies outside. ``teacher`` and ``fake`` are blocks of the plain base, or of the fake
    score, that see whole latents. ``blocks`` are those that are tapped; none for all.

    ``rho`` is the share of real images on the critic's real side; the rest are samples of the
    guided teacher, drawn as ``pairs`` says. Either ``weight`` or ``balance`` is given. The
    optimiser of the heads is ``rates["critic"]`` of the stage.
    """

    features: Literal["dino", "teacher", "fake"] = "dino"
    vit: str = DINO
    blocks: tuple[int, ...] = ()
    width: int = Field(64, ge=1, le=1024)
    crop: int = Field(32, ge=1, le=512)
    view: int = Field(224, ge=8, le=4096)
    rho: float = Field(ge=0, le=1)
    pairs: Pairs | None = None
    weight: float | None = Field(None, ge=0, allow_inf_nan=False)
    balance: float | None = Field(None, gt=0, allow_inf_nan=False)
    loss: Literal["logistic", "hinge"] = "logistic"
    r1: float = Field(0.0, ge=0, allow_inf_nan=False)
    r1_step: float = Field(0.01, gt=0, le=1)
    augment: tuple[Literal["colour", "translation", "cutout"], ...] = ()
    noise_range: tuple[float, float] = (0.0, 0.0)

    @model_validator(mode="after")
    def _fits(self) -> QwenGan:
        check_game(self)
        if self.features == "dino" and self.view > SCALE * self.crop:
            allowed = f"a crop of {self.crop} latents has {SCALE * self.crop} pixels"
            raise BadInput("view", self.view, allowed)
        if self.features != "dino" and self.augment:
            raise BadInput("augment", self.augment, "it is for pictures; taps see latents")
        return self


class QwenStage(_Frozen):
    """One method, its options and its budget; ``micro_batches`` parts make one batch.

    A fake score starts as the plain base, or, by ``rivals_from``, as the fake score of the stage
    before ("fake") or as its student ("before"). ``gan`` adds a GAN term.
    """

    method: str
    options: Mapping[str, Option] = Field(default_factory=dict)
    steps: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    micro_batches: int = Field(1, ge=1)
    rates: Mapping[str, Rates]
    ema: float = Field(0.99, ge=0, lt=1)
    teacher: Literal["guided", "before"] | None = None
    rivals_from: Literal["fake", "before"] | None = None
    gan: QwenGan | None = None

    @field_validator("method")
    @classmethod
    def _known(cls, method: str) -> str:
        if method not in METHODS:
            raise BadInput("method", method, f"choose one of {', '.join(METHODS)}")
        return method

    @property
    def fields(self) -> set[str]:
        """Names of what the method can be given."""
        return {f.name for f in dataclasses.fields(METHODS[self.method])}

    @model_validator(mode="after")
    def _fits(self) -> QwenStage:
        """A GAN term needs a rate, and a method that makes clean samples; taps need their net."""
        check_derivative(self.options)  # the transformer is bfloat16
        if self.gan is None:
            return self
        features = self.gan.features
        if not issubclass(METHODS[self.method], Generates) or self.options.get("edges"):
            allowed = f"method {self.method!r} makes no clean samples in this stage"
            raise BadInput("gan", features, allowed)
        if features == "fake" and "fake" not in self.fields:
            raise BadInput("gan", features, f"method {self.method!r} has no fake score")
        if "critic" not in self.rates:
            raise BadInput("rates", sorted(self.rates), "gan needs one for player 'critic' too")
        return self


class QwenRecipe(_Frozen):
    """A list of stages; each becomes an artefact, and starts from the one before.

    ``source`` is what a batch holds: latents of images, samples of the teacher, or prompts alone.
    ``storage`` keeps the base in fewer bytes while players learn on it, see
    `turbo_lab.qwen_storage`; None as it was loaded, and then it is no part of the key. Samples of
    the teacher are drawn before. ``buckets`` keeps real images, and what goes with them, in about
    the ratio that they have, see `turbo_lab.testbeds.qwen_buckets`; None cuts squares.
    """

    name: str
    testbed: Literal["qwen_image"] = "qwen_image"
    version: Literal[1] = 1
    size: int = Field(ge=32, le=4096, multiple_of=16)
    seed: int = Field(0, ge=0)
    adapter: AdapterSize = ADAPTER
    guidance_scale: float = Field(GUIDANCE, ge=0, le=20)
    negative: str = " "
    source: Source
    pairs: Pairs | None = None
    storage: Literal["fp8"] | None = None
    buckets: Literal["aspect"] | None = None
    stages: tuple[QwenStage, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _goes_on(self) -> QwenRecipe:
        """A fake score says where it starts, unless it is the first; a crop fits its picture."""
        for k, stage in enumerate(self.stages):
            _check_fake(stage, self.stages[:k])
            if stage.gan is not None and SCALE * stage.gan.crop > self.size:
                allowed = f"use at most {self.size // SCALE} latents, the whole picture"
                raise BadInput("crop", stage.gan.crop, allowed)
        return self

    @property
    def tokens(self) -> int:
        """Image tokens of a picture."""
        return (self.size // 16) ** 2

    def until(self, stage: int) -> QwenRecipe:
        """The recipe up to and with a stage, from 0."""
        return self.model_copy(update={"stages": self.stages[: stage + 1]})

    def spec(self) -> dict[str, Any]:
        """What the key of the artefact is made of, as far as the recipe knows."""
        return self.model_dump(mode="json", exclude_none=True)


def _check_fake(stage: QwenStage, earlier: tuple[QwenStage, ...]) -> None:
    """Refuse a fake score that is to start from what is not there, or that does not say where."""
    has, before = "fake" in stage.fields, any("fake" in other.fields for other in earlier)
    there = {"before": bool(earlier), "fake": bool(earlier) and "fake" in earlier[-1].fields}
    if stage.rivals_from is not None and not (has and there[stage.rivals_from]):
        allowed = "this stage has no fake score, or the stage before has nothing it could start as"
        raise BadInput("rivals_from", stage.rivals_from, allowed)
    if has and before and stage.rivals_from is None:
        raise BadInput("rivals_from", None, "an earlier stage has a fake score; say fake or before")
