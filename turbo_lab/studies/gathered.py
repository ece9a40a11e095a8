"""The claims of all notebooks side by side, as they were last written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from turbo_lab.claims_file import claim_problem, read_claims

PARTS = {
    "C1": "trajectory distillation blurs at few steps",
    "C2": "DMD2 brings details back at 4 and 8 steps",
    "C3": "DMD2 at 2 steps loses diversity, over-saturates, breaks bodies",
    "C4": "a PCM warm start keeps bodies whole",
    "C5": "DMD2 loses fine texture",
    "C6": "a GAN term brings texture back and can pass the teacher",
    "C7": "2 network forwards for 80 to 100, near the teacher's quality",
}
"""What the recipe claims, by the first letters of the ids."""
VERDICTS = ("holds", "not reproduced", "inconclusive")


def claims_of(figures: Path) -> list[dict[str, Any]]:
    """Claims in ``<figures>/*/claims.json``; files that are not whole are left out."""
    paths = [p for p in sorted(figures.glob("*/claims.json")) if not claim_problem(p)]
    return [claim for path in paths for claim in read_claims(path)]


def table(found: list[dict[str, Any]]) -> pd.DataFrame:
    """One row for each of `PARTS`: its notebooks, how its claims fared, and which did not hold.

    Args:
        found: claims as plain JSON, see `claims_of`.
    """
    rows = []
    for part, statement in PARTS.items():
        own = [c for c in found if c["id"].split("-")[0] == part]
        counts = {v: sum(c["verdict"] == v for c in own) for v in VERDICTS}
        rest = [c["id"].removeprefix(f"{part}-") for c in own if c["verdict"] != "holds"]
        where = ", ".join(sorted({c["notebook"][:2] for c in own}))
        rows.append(
            {"claim": part, "statement": statement, "notebook": where, **counts}
            | {"not held": ", ".join(rest)}
        )
    return pd.DataFrame(rows).set_index("claim")
