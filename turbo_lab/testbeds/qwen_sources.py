"""Where a training's pictures and texts may lie: folders, tar shards, and columns of tables."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from turbo_lab.errors import BadInput, MissingPiece

IMAGES = (".jpeg", ".jpg", ".png", ".webp")
TABLES = (".csv", ".jsonl", ".parquet")
OTHER_TABLES = (".tsv", ".json", ".xls", ".xlsx", ".ods")
"""Not read; as a text file of prompts each would give a list of something else."""
COLUMN = "prompt"
"""Of a table, where none is named."""


# --- pictures -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A file inside of a tar archive, read where it lies: nothing is unpacked."""

    shard: Path
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.shard}: {self.name}"

    def read(self) -> bytes:
        """Return its bytes."""
        with self.shard.open("rb") as opened:
            opened.seek(self.offset)
            return opened.read(self.size)


Picture = Path | Packed


def opened(picture: Picture) -> BinaryIO:
    """Open a picture's file for reading, to be closed by who asks."""
    return picture.open("rb") if isinstance(picture, Path) else io.BytesIO(picture.read())


@dataclass(frozen=True, kw_only=True)
class Shards:
    """Pictures of tar archives, in WebDataset's layout, and the captions beside them.

    Attributes:
        pictures: in the order of the archives' names, then of their members.
        captions: one for each picture; empty unless every picture has one.
    """

    pictures: tuple[Packed, ...]
    captions: tuple[str, ...]


def is_sharded(place: Path) -> bool:
    """Whether this is a tar archive, or a folder that holds some."""
    return place.suffix == ".tar" or (place.is_dir() and any(place.glob("*.tar")))


def read_shards(place: Path) -> Shards:
    """List the pictures of a tar archive, or of all in a folder.

    A sample is what has one name up to its first dot: ``0012.jpg`` and its caption ``0012.txt``.

    Raises:
        BadInput: an archive that cannot be read, is compressed, or has two pictures in a sample or
            a caption that is not UTF-8; no picture in any.
    """
    files = [place] if place.suffix == ".tar" else sorted(place.glob("*.tar"))
    samples = [sample for file in files for sample in _samples(file)]
    if not samples:
        raise BadInput("images", str(place), f"it holds none of {', '.join(IMAGES)}")
    captions = [_caption(text) for _, text in samples]
    whole = tuple(text for text in captions if text)
    return Shards(
        pictures=tuple(picture for picture, _ in samples),
        captions=whole if len(whole) == len(samples) else (),
    )


def _samples(file: Path) -> Iterator[tuple[Packed, Packed | None]]:
    """Pictures of an archive with their captions' files."""
    try:
        with tarfile.open(file, "r:") as archive:
            members = [m for m in archive.getmembers() if m.isreg() and not m.issparse()]
    except (OSError, tarfile.TarError) as error:
        why = f"it is no tar archive, uncompressed, that can be read ({type(error).__name__})"
        raise BadInput("images", str(file), why) from None
    pictures: dict[str, Packed] = {}
    texts: dict[str, Packed] = {}
    for member in members:
        folder, _, last = member.name.rpartition("/")
        sample, _, kind = last.partition(".")
        found = Packed(shard=file, name=member.name, offset=member.offset_data, size=member.size)
        key, kinds = f"{folder}/{sample}", {f".{kind.lower()}"}
        if kinds & set(IMAGES):
            if key in pictures:
                raise BadInput("images", str(found), "its sample has a picture already")
            pictures[key] = found
        elif kind == "txt":
            texts[key] = found
    for key, picture in pictures.items():
        yield picture, texts.get(key)


def _caption(text: Packed | None) -> str:
    if text is None:
        return ""
    return " ".join(_decoded(text.read(), "images", str(text), "write captions in UTF-8").split())


# --- texts --------------------------------------------------------------------------------------


def read_prompts(path: Path) -> tuple[str, ...]:
    """Read a text file with one prompt per line; blank lines are left out.

    Raises:
        BadInput: there is no such file, it is not UTF-8, or no prompt is in it.
    """
    lines = _utf8(path, "a UTF-8 text file with one prompt per line").splitlines()
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise BadInput("prompts", str(path), "it is empty; write one prompt per line")
    return prompts


def _utf8(path: Path, wanted: str) -> str:
    """Text of a file that holds prompts."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadInput("prompts", str(path), f"name {wanted} ({type(error).__name__})") from None
    return _decoded(data, "prompts", str(path), f"name {wanted}")


def _decoded(data: bytes, parameter: str, where: str, wanted: str) -> str:
    """UTF-8 as text; of another encoding, say where it shows first."""
    try:
        return data.decode("utf-8-sig")  # some editors begin a file with a mark
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        place = f"byte {error.start} (0x{data[error.start]:02X}, on line {line})"
        raise BadInput(parameter, where, f"it is not UTF-8 from {place} on; {wanted}") from None


def read_column(table: Path, column: str = "") -> tuple[str, ...]:
    """Read the prompts of a table; rows without one are left out.

    Args:
        table: csv with a header, jsonl (an object per line) or parquet.
        column: its name; empty for ``prompt``.

    Raises:
        BadInput: no such table or column, one that cannot be read or is not UTF-8, or no prompt
            in it.
        MissingPiece: parquet without a library for it.
    """
    rows, column = _table(table), column or COLUMN
    if column not in rows.columns:
        named = ", ".join(map(str, rows.columns))
        raise BadInput("column", column, f"the columns of {table.name} are {named}")
    texts = [" ".join(text.split()) for text in rows[column] if isinstance(text, str)]
    prompts = tuple(text for text in texts if text)
    if not prompts:
        raise BadInput("prompts", str(table), f"its column {column} holds no text")
    return prompts


def _table(table: Path) -> Any:
    import pandas as pd

    wanted, kind = f"a {', '.join(TABLES)} file that can be read", table.suffix.lower()
    text = io.StringIO("" if kind == ".parquet" else _utf8(table, wanted), newline="")
    try:
        if kind == ".csv":
            return pd.read_csv(text, dtype=str, keep_default_na=False)
        if kind == ".jsonl":
            return pd.read_json(text, lines=True, dtype=False, convert_dates=False)
        return pd.read_parquet(table)
    except ImportError as error:
        raise MissingPiece("Parquet needs pyarrow: install it, or use csv or jsonl.") from error
    except (OSError, ValueError, pd.errors.ParserError) as error:
        raise BadInput("prompts", str(table), f"name {wanted} ({type(error).__name__})") from None
