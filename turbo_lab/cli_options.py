"""Options that several commands have, and how they are checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from turbo_lab.errors import BadInput

if TYPE_CHECKING:
    from turbo_lab.store import Artefact

ProfileOption = Annotated[str, typer.Option(help="smoke (seconds), quick (minutes) or paper.")]
SeedOption = Annotated[int, typer.Option(help="Base seed, at least 0.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
FreshOption = Annotated[bool, typer.Option("--fresh", help="Train again what is there already.")]


def only_for(testbed: str, chosen: str, options: Mapping[str, Any]) -> None:
    """Refuse options of a testbed that was not chosen."""
    for option, value in options.items():
        if given(value):
            shown = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            raise BadInput(option, shown, f"it is for {testbed}, not for {chosen}")


def given(value: object) -> bool:
    """Whether an option was given: 0 is a value like others, to be checked and not passed over."""
    return value is not None and value is not False and value not in ("", [], ())


def check_profile_and_seed(profile: str, seed: int) -> None:
    """Refuse a profile that there is not, and a seed below 0."""
    from turbo_lab.notebook_params import PROFILES

    if profile not in PROFILES:
        raise BadInput("profile", profile, "use one of " + ", ".join(map(repr, PROFILES)))
    if seed < 0:
        raise BadInput("seed", seed, "use an integer of at least 0")


def say(artefact: Artefact) -> None:
    """Name an artefact, its key and its folder."""
    typer.echo(f"{artefact.name}  {artefact.key}  {artefact.path}")
