"""The claims that notebooks leave behind, checked and gathered into one file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from turbo_lab.atomic import atomic_write_text
from turbo_lab.places import shown

#: What every claim says of itself.
CLAIM_KEYS = (
    "id",
    "notebook",
    "statistic",
    "value",
    "low",
    "high",
    "seeds",
    "profile",
    "verdict",
    "artefact_keys",
)


def claim_problem(path: Path) -> str:
    """Return what is wrong with one notebook's ``claims.json``, '' when nothing or no file."""
    if not path.exists():
        return ""
    try:
        claims = read_claims(path)
    except ValueError as error:
        return f"{shown(path)} is not JSON ({error})"
    if not isinstance(claims, list):
        return f"{shown(path)} is not a list of claims"
    for claim in claims:
        missing = [key for key in CLAIM_KEYS if not isinstance(claim, dict) or key not in claim]
        if missing:
            return f"{shown(path)} holds a claim without {', '.join(missing)}"
    return ""


def gather(figures: Path) -> Path | None:
    """Gather ``<figures>/*/claims.json`` into ``<figures>/claims.json``, atomically.

    Files that are not whole are left out: the run that wrote them has been told so. Returns the
    file, or None when no notebook has made a claim.
    """
    paths = sorted(figures.glob("*/claims.json"))
    if not paths:
        return None
    claims = [claim for path in paths if not claim_problem(path) for claim in read_claims(path)]
    target = figures / "claims.json"
    atomic_write_text(target, json.dumps(claims, indent=1, ensure_ascii=False) + "\n")
    return target


def read_claims(path: Path) -> Any:
    """The JSON of a file of claims; ValueError if it is none, or has a number that JSON lacks."""
    return json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON number")
