"""What files of weights say they hold, against what a network asks for: headers alone are read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

_FILE = "diffusion_pytorch_model.safetensors"
_INDEX = f"{_FILE}.index.json"


def misfit(folder: Path, wanted: Mapping[str, Sequence[int]]) -> str:
    """Say how the tensors of a part differ from those wanted; empty if they do not.

    Args:
        folder: as diffusers writes it, one file or shards with an index.
        wanted: name to shape of every tensor of the network.

    Raises:
        OSError: a file is not there.
        SafetensorError: a file has no header, or is not as long as its header says.
    """
    files = _files(folder)
    found = {key: (file, shape) for file in files for key, shape in _held(folder / file).items()}
    missing = [key for key in wanted if key not in found]
    others = [key for key in found if key not in wanted]
    unlike = [key for key in wanted if key in found and found[key][1] != tuple(wanted[key])]
    said = []
    if missing:
        where = files[0] if len(files) == 1 else _INDEX
        said.append(f"{where} lacks {len(missing)} of {len(wanted)} tensors, first {missing[0]}")
    if others:
        where = found[others[0]][0]
        said.append(f"{where} has tensors that are not used, {len(others)} and first {others[0]}")
    if unlike:
        where, shape = found[unlike[0]]
        first = f"{unlike[0]} of {list(shape)} where {list(wanted[unlike[0]])} is needed"
        said.append(f"{where} has tensors of other shapes, {len(unlike)} and first {first}")
    return "; ".join(said)


def _files(folder: Path) -> list[str]:
    """Names of the files that diffusers would read; none where it will say so itself."""
    if (folder / _INDEX).is_file():
        index = json.loads((folder / _INDEX).read_text("utf-8"))
        return sorted(set(index["weight_map"].values()))
    return [_FILE]


def _held(file: Path) -> dict[str, tuple[int, ...]]:
    """Name to shape of the tensors of a file."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        return {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
