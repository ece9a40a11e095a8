"""Safetensors files from strangers: no claim of the header is believed before it is checked.

Eight bytes give the length of the header, which is JSON and gives name, dtype, shape and offsets of
each tensor; then come the numbers. All claimed sizes together must be the size of the file before
anything is read by them, so no claim allocates memory.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from turbo_lab.errors import BadInput

MAX_HEADER = 8 * 2**20
"""Bytes. The 2,520 tensors of a Qwen-Image adapter with alphas need about 0.4 million."""
MAX_TENSORS = 20_000
MAX_AXES = 2
DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_FIELDS = {"dtype", "shape", "data_offsets"}
_PICKLES = (b"PK\x03\x04", *(b"\x80" + bytes([protocol]) for protocol in range(2, 6)))


@dataclass(frozen=True, kw_only=True)
class Slot:
    """Where a tensor lies in the data of its file, in bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class TensorFile:
    """A safetensors file whose header has been checked; build it with `opened`.

    Attributes:
        path: of the file.
        slots: of the tensors, by name; they fill the data without gaps.
        metadata: text by name, as the file has it.
        data: byte at which the data start.
    """

    path: Path
    slots: Mapping[str, Slot]
    metadata: Mapping[str, str]
    data: int

    def tensor(self, name: str) -> Tensor:
        """Read one tensor, in the dtype it is stored in.

        Raises:
            BadInput: the file became shorter since it was opened, or cannot be read.
        """
        slot = self.slots[name]
        size = slot.stop - slot.start
        if size == 0:
            return torch.empty(slot.shape, dtype=slot.dtype)
        try:
            with self.path.open("rb") as file:
                file.seek(self.data + slot.start)
                read = bytearray(file.read(size))
        except OSError as error:
            _refuse(self.path, f"it cannot be read ({os.strerror(error.errno or 0).lower()})")
        if len(read) != size:
            _refuse(self.path, "it changed while it was read")
        return torch.frombuffer(read, dtype=slot.dtype).reshape(slot.shape)


def opened(path: str | Path) -> TensorFile:
    """Read and check the header of a safetensors file; no tensor is read.

    Raises:
        BadInput: it is no file, no safetensors, or its header says what cannot be; in one sentence.
    """
    path = Path(path)
    head, size = _head(path)
    length = int.from_bytes(head[:8], "little")
    _check_kind(path, head, size, length)
    data = 8 + length
    entries = _parsed(path, head[8:data])
    metadata = _texts(path, entries.pop("__metadata__", {}))
    if not entries:
        _refuse(path, "it holds no tensors")
    if len(entries) > MAX_TENSORS:
        _refuse(path, f"it lists {len(entries):,} tensors, and {MAX_TENSORS:,} are allowed")
    slots = {name: _slot(path, name, entry, size - data) for name, entry in entries.items()}
    _check_cover(path, slots, size - data)
    return TensorFile(path=path, slots=slots, metadata=metadata, data=data)


def quoted(text: str, limit: int = 60) -> str:
    """Text from a stranger for a sentence or a terminal: escaped, and cut to ``limit`` signs."""
    shown = repr(text if len(text) <= limit else text[: limit - 3] + "...")
    return shown if len(shown) <= 4 * limit else shown[: 4 * limit] + "...'"


def _refuse(path: Path, why: str) -> NoReturn:
    raise BadInput("file", path.name or str(path), why) from None


# --- the file -----------------------------------------------------------------------------------


def _head(path: Path) -> tuple[bytes, int]:
    """The length, and of the header as much as one may have; and the size of the file."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        _refuse(path, f"it cannot be read ({os.strerror(error.errno or 0).lower()})")
    except ValueError:  # a zero byte in the name
        _refuse(path, "no file can have this name")
    if not stat.S_ISREG(mode):  # to open a pipe would wait for ever
        kind = "a folder; name the file in it" if stat.S_ISDIR(mode) else "no plain file"
        _refuse(path, f"it is {kind}")
    try:
        with path.open("rb") as file:
            first = file.read(8)
            length = min(int.from_bytes(first, "little"), MAX_HEADER)
            return first + file.read(length), os.fstat(file.fileno()).st_size
    except OSError as error:
        _refuse(path, f"it cannot be read ({os.strerror(error.errno or 0).lower()})")


def _check_kind(path: Path, head: bytes, size: int, length: int) -> None:
    """Tell what is no safetensors file, or only the beginning of one, by its first bytes."""
    if head.startswith(_PICKLES):
        _refuse(path, "it is a pickle, which can run code; convert it to safetensors where it is")
    if size == 0:
        _refuse(path, "it is empty")
    if size < 8 or head[8:9] != b"{":
        _refuse(path, "it is no safetensors file")
    if length > size - 8:
        claims = f"its header claims {length:,} bytes and {size - 8:,} follow"
        _refuse(path, f"it is cut off or damaged: {claims}")
    if length > MAX_HEADER:
        _refuse(path, f"its header has {length:,} bytes, and {MAX_HEADER:,} are allowed")


# --- the header ---------------------------------------------------------------------------------


def _parsed(path: Path, header: bytes) -> dict[str, Any]:
    try:
        entries = json.loads(
            header.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_number
        )
    except UnicodeDecodeError:
        _refuse(path, "its header is not UTF-8")
    except _Twice as error:
        _refuse(path, f"its header has {quoted(str(error))} twice")
    except (ValueError, RecursionError):
        _refuse(path, "its header is not JSON")
    if not isinstance(entries, dict):
        _refuse(path, "its header is no table of tensors")
    return entries


class _Twice(Exception):
    """A name that an object of the header has twice."""


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for name, value in pairs:
        if name in table:
            raise _Twice(name)
        table[name] = value
    return table


def _no_number(text: str) -> NoReturn:
    raise ValueError(text)


def _texts(path: Path, metadata: Any) -> dict[str, str]:
    plain = isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())
    if not plain:
        _refuse(path, "its metadata are not text by name")
    return dict(metadata)


def _slot(path: Path, name: str, entry: Any, size: int) -> Slot:
    """Check one entry of the header against itself and against the bytes there are."""
    what = f"tensor {quoted(name)}"
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        _refuse(path, f"{what} is not described by dtype, shape and data_offsets alone")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        _refuse(path, f"{what} has dtype {quoted(str(dtype))}; allowed are {', '.join(DTYPES)}")
    if not _counts(shape) or len(shape) > MAX_AXES:
        _refuse(path, f"{what} has no shape of at most {MAX_AXES} sizes")
    if not _counts(offsets) or len(offsets) != 2:
        _refuse(path, f"the offsets of {what} are not two positions")
    start, stop = offsets
    if not start <= stop <= size:
        _refuse(path, f"{what} lies outside of the file, which may be cut off")
    needed = math.prod(shape) * DTYPES[dtype].itemsize
    if needed != stop - start:
        _refuse(path, f"{what} claims another size than its {stop - start:,} bytes")
    return Slot(dtype=DTYPES[dtype], shape=tuple(shape), start=start, stop=stop)


def _counts(values: Any) -> bool:
    """Whether this is a list of whole numbers of at least 0; True and 2.0 are none."""
    return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)


def _check_cover(path: Path, slots: Mapping[str, Slot], size: int) -> None:
    """Tensors follow on one another and fill the data; so none shares bytes with another."""
    spans = sorted((slot.start, slot.stop) for slot in slots.values())
    ends = chain([0], (stop for _, stop in spans))
    for (start, _), end in zip(spans, ends, strict=False):
        if start != end:
            what = "overlap" if start < end else "leave a gap"
            _refuse(path, f"tensors {what} at byte {min(start, end):,}")
    if spans[-1][1] != size:
        _refuse(path, f"{size - spans[-1][1]:,} bytes follow the last tensor")
