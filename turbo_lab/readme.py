"""The headline of the README, written from what notebook 06 measured and from nothing else.

``turbo-lab readme`` puts a table, a sentence and a figure between two marks of ``README.md``; a
test compares them with the committed numbers. Without such numbers there is nothing between them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from turbo_lab import places
from turbo_lab.atomic import atomic_write_text
from turbo_lab.errors import BadInput, MissingPiece

SOURCE = Path("figures/06_two_step_turbo/headline.json")
"""Of the numbers, in a checkout."""
BEGIN, END = "<!-- headline:begin -->", "<!-- headline:end -->"

Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Column(_Part):
    """A metric that is shown: its key in the rows, its title, and digits after the point."""

    key: str
    title: str
    digits: Annotated[int, Field(ge=0, le=6)] = 2


class Row(_Part):
    """One sampler: network forwards per picture, if it has any; metrics as value, low, high."""

    title: str
    nfe: Annotated[Finite, Field(gt=0)] | None
    values: dict[str, tuple[Finite, Finite, Finite]]


class Headline(_Part):
    """The table, a sentence below it, and the name of a figure beside it, if there is one."""

    columns: tuple[Column, ...] = Field(min_length=1)
    rows: tuple[Row, ...] = Field(min_length=1)
    note: str
    figure: Annotated[str, Field(pattern=r"^[a-z0-9_]*$")] = ""


def headline(root: Path) -> Headline | None:
    """Read the numbers of a checkout; None if notebook 06 has left none.

    Raises:
        BadInput: the file is not what it should be.
    """
    path = root / SOURCE
    if not path.is_file():
        return None
    try:
        return Headline.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        said = json.dumps(first.get("input"), default=str)[:60]
        raise BadInput(f"{SOURCE.name}: {where}", said, first["msg"]) from None


def rendered(shown: Headline | None) -> str:
    """The block as Markdown, without its marks; empty for no numbers."""
    if shown is None:
        return ""
    heads = ("", "NFE", *(column.title for column in shown.columns))
    lines = [_line(heads), "|---|" + "---:|" * (len(heads) - 1)]
    lines += [
        _line(
            (
                row.title,
                "" if row.nfe is None else f"{row.nfe:g}",
                *(_cell(row, column) for column in shown.columns),
            )
        )
        for row in shown.rows
    ]
    blocks = ["\n".join(lines), shown.note]
    if shown.figure:
        blocks.insert(0, f"![{shown.note}]({SOURCE.parent.as_posix()}/{shown.figure}.png)")
    return "\n\n".join(block for block in blocks if block)


def block_of(text: str) -> str:
    """What stands between the marks of a README.

    Raises:
        BadInput: the marks are not there once each, in this order.
    """
    return _split(text)[1].strip()


def with_block(text: str, block: str) -> str:
    """The text with another block between its marks."""
    before, _, after = _split(text)
    inside = f"\n{block}\n" if block else "\n"
    return f"{before}{BEGIN}{inside}{END}{after}"


def write(root: Path | None = None) -> bool:
    """Bring the README of a checkout up to date; say whether it changed.

    Raises:
        BadInput: the marks, or the numbers, are not what they should be.
        MissingPiece: there is no README.
    """
    root = root or places.root()
    path = root / "README.md"
    if not path.is_file():
        raise MissingPiece(f"There is no README.md in {root}; run this in a checkout.")
    old = path.read_text(encoding="utf-8")
    new = with_block(old, rendered(headline(root)))
    if new != old:
        atomic_write_text(path, new)
    return new != old


def _split(text: str) -> tuple[str, str, str]:
    before, begin, rest = text.partition(BEGIN)
    inside, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after:
        raise BadInput("README.md", "its marks", f"write {BEGIN} and then {END}, once each")
    return before, inside, after


def _line(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _nfe(row: Row) -> str:
    return "" if row.nfe is None else f"{row.nfe:g}"


def _cell(row: Row, column: Column) -> str:
    if column.key not in row.values:
        return ""
    value, low, high = (f"{number:.{column.digits}f}" for number in row.values[column.key])
    return f"{value} [{low}, {high}]"
