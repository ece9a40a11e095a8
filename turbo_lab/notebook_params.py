"""The parameters of each notebook, checked by the same model in the notebook and in the runner."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from turbo_lab.errors import BadInput
from turbo_lab.validation import allowed

Profile = Literal["smoke", "quick", "paper"]
Device = Literal["auto", "cpu", "cuda"]
PROFILES: tuple[str, ...] = get_args(Profile)


class NotebookParams(BaseModel):
    """What every notebook understands; the defaults are those of its ``parameters`` cell."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    profile: Profile = "quick"
    seed: Annotated[int, Field(ge=0)] = 0
    device: Device = "auto"
    fresh: bool = False
    out_dir: str = ""

    def check(self) -> None:
        """Refuse what no field alone shows, before a kernel starts; the notebook does so itself.

        Raises:
            BadInput: values that do not go together.
            MissingPiece: what they name is nowhere.
        """


class Teacher01(NotebookParams):
    """Parameters of ``01_teacher``; ``captions=0`` means as many as the profile says."""

    guidance_scale: Annotated[float, Field(ge=1, le=20)] = 4.0
    captions: Annotated[int, Field(ge=0, le=100_000)] = 0


class Blur02(NotebookParams):
    """Parameters of ``02_blur_...``; ``captions=0`` means as many as the profile says."""

    captions: Annotated[int, Field(ge=0, le=100_000)] = 0


class Dmd03(NotebookParams):
    """Parameters of ``03_dmd2_...``; ``captions=0`` means as many as the profile says."""

    captions: Annotated[int, Field(ge=0, le=100_000)] = 0


class Warm04(NotebookParams):
    """Parameters of ``04_pcm_...``; ``captions=0`` means as many as the profile says."""

    captions: Annotated[int, Field(ge=0, le=100_000)] = 0


class Gan05(NotebookParams):
    """Parameters of ``05_gan_...``; ``captions=0`` means as many as the profile says."""

    captions: Annotated[int, Field(ge=0, le=100_000)] = 0


class Turbo06(NotebookParams):
    """Parameters of ``06_two_...``; ``captions=0`` means as many as the profile says."""

    captions: Annotated[int, Field(ge=0, le=100_000)] = 0


class Factory07(NotebookParams):
    """Parameters of ``07_factory``; without ``model`` and ``lora`` a tiny pipeline is built."""

    model: str = ""
    lora: str = ""
    size: Annotated[
        str, Field(pattern=r"^(\d+(x\d+)?)?$", description="it as 1024 or 1024x768")
    ] = ""

    def check(self) -> None:
        """Refuse a model without an adapter or the reverse, and what cannot be drawn with them."""
        if self.model or self.lora or self.size:  # else nothing that takes seconds to import
            from turbo_lab.qwen_workshop import check_workshop

            check_workshop(self.model, self.lora, size=self.size, device=self.device)


#: Notebooks with parameters of their own; the others take ``NotebookParams``.
NOTEBOOKS: dict[str, type[NotebookParams]] = {
    "01_teacher": Teacher01,
    "02_blur_in_trajectory_distillation": Blur02,
    "03_dmd2_and_mode_collapse": Dmd03,
    "04_pcm_warm_start": Warm04,
    "05_gan_texture": Gan05,
    "06_two_step_turbo": Turbo06,
    "07_factory": Factory07,
}


def model_for(name: str) -> type[NotebookParams]:
    """Return the parameter model of a notebook."""
    return NOTEBOOKS.get(name, NotebookParams)


def validated(name: str, namespace: Mapping[str, Any]) -> NotebookParams:
    """Check the parameters a notebook runs with; its first code cell passes ``globals()``.

    Tables that the notebook displays are whole from then on: pandas would cut long statements and
    leave out the middle of long tables.

    Raises:
        BadInput: a parameter is missing from the namespace, or its value is not allowed.
    """
    import pandas as pd

    for option in ("max_rows", "max_columns", "max_colwidth"):
        pd.set_option(f"display.{option}", None)
    fields = model_for(name).model_fields
    missing = [field for field in fields if field not in namespace]
    if missing:
        raise BadInput(missing[0], None, f"the parameters cell of {name} must define it")
    return checked(name, {field: namespace[field] for field in fields})


def checked(name: str, values: Mapping[str, Any]) -> NotebookParams:
    """Check named values, typed as Python has them; what is not named keeps its default.

    Raises:
        BadInput: a name the notebook does not know, or a value of the wrong type or range.
    """
    plain = {key: plain_value(value) for key, value in values.items()}
    return _said(name, plain, lambda model: model.model_validate(plain, strict=True))


def parsed(name: str, texts: Mapping[str, str]) -> dict[str, Any]:
    """Turn ``name=value`` texts of the command line into typed values, only those named.

    Raises:
        BadInput: a name the notebook does not know, or a text that is not such a value.
    """
    params = _said(name, texts, lambda model: model.model_validate_strings(dict(texts)))
    return {key: getattr(params, key) for key in texts}


def plain_value(value: Any) -> Any:
    """Turn NumPy scalars and arrays, tuples and paths into what papermill can write down."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple | list):
        return [plain_value(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): plain_value(item) for key, item in value.items()}
    return value


def _said(
    name: str,
    values: Mapping[str, Any],
    validate: Callable[[type[NotebookParams]], NotebookParams],
) -> NotebookParams:
    model = model_for(name)
    try:
        return validate(model)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0])
        raise BadInput(key, values.get(key), _allowed(name, key)) from None


def _allowed(name: str, key: str) -> str:
    fields = model_for(name).model_fields
    if key in fields:
        return allowed(fields[key])
    near = difflib.get_close_matches(key, fields, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return f"{name} has no such parameter{hint}; it has {', '.join(fields)}"
