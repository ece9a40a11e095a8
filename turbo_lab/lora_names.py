"""Names of LoRA tensors: the schemes that files of Qwen-Image use, told apart and translated.

A layer ``W x`` becomes ``W x + (alpha / rank) B A x``. Files call A "lora_A" or "lora_down", B
"lora_B" or "lora_up", put the layer's path in the transformer before that, and a prefix before the
path. The paths are diffusers' everywhere: ComfyUI's Qwen-Image has the same module names.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

from turbo_lab.errors import BadInput
from turbo_lab.lora_files import TensorFile, quoted

DOTTED = ("transformer.", "diffusion_model.", "model.diffusion_model.", "base_model.model.", "")
FLAT = ("lora_unet_", "lora_transformer_", "lycoris_")
"""Prefixes; after the flat ones the dots of a path are underscores."""
PAIRS = (
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_A.default.weight", ".lora_B.default.weight"),
    (".lora_down.weight", ".lora_up.weight"),
    (".lora.down.weight", ".lora.up.weight"),
)
ALPHA = ".alpha"
PEFT_KEY = "lora_adapter_metadata"
"""Where diffusers keeps the settings of PEFT's adapter, as JSON, in the metadata of a file."""
OTHERS = {
    "lokr": "LoKr",
    "hada": "LoHa",
    "oft": "OFT",
    "dora": "DoRA",
    "lora_magnitude": "DoRA",
    "diff": "a difference of whole weights",
}
"""Kinds of adapters that are no LoRA, by how a part of their tensors' names begins."""

Shapes = Mapping[str, tuple[int, int]]
"""Linear layers of a transformer: path to (rows, columns) of its weight."""


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How a file names its tensors: ``prefix + path + down``."""

    prefix: str
    down: str
    up: str

    @property
    def title(self) -> str:
        """For a person: who names tensors so, and how."""
        if self.prefix in FLAT:
            who = "kohya"
        elif self.down.startswith(".lora_A"):
            who = "diffusers" if self.prefix == "transformer." else "PEFT"
        else:
            who = "ComfyUI" if "diffusion_model" in self.prefix else "original"
        return f"{who} ({self.prefix}<layer>{self.down}, {self.up})"


DIFFUSERS = Scheme(prefix="transformer.", down=PAIRS[0][0], up=PAIRS[0][1])
COMFYUI = Scheme(prefix="", down=PAIRS[2][0], up=PAIRS[2][1])
"""As the files of Qwen-Image-Lightning are named; ComfyUI and diffusers read both schemes."""
OURS = Scheme(prefix="", down=PAIRS[0][0], up=PAIRS[0][1])
"""As in the artefacts of this package."""
SCHEMES: Mapping[str, Scheme] = {"diffusers": DIFFUSERS, "comfyui": COMFYUI}


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One adapted linear layer of a file: names of its tensors, and its rank.

    Attributes:
        down: name of A ``[rank, columns]``.
        up: name of B ``[rows, rank]``.
        alpha: name of its alpha; None where there is none.
        rank: of the layer.
    """

    down: str
    up: str
    alpha: str | None
    rank: int


def scheme_of(file: TensorFile) -> Scheme:
    """Tell the naming scheme of a file.

    Raises:
        BadInput: its tensors are no LoRA, or are named in two ways.
    """
    names = list(file.slots)
    pairs = {_pair(file, name) for name in names if not name.endswith(ALPHA)}
    if len(pairs) != 1:
        named = " and ".join(sorted(down for down, _ in pairs)) or "alphas alone"
        raise refused(file, f"it has {named}; a LoRA has one pair of names for all its layers")
    down, up = pairs.pop()
    prefix = next(p for p in (*FLAT, *DOTTED) if all(name.startswith(p) for name in names))
    return Scheme(prefix=prefix, down=down, up=up)


def layers_of(file: TensorFile, scheme: Scheme, shapes: Shapes, base: str) -> dict[str, Layer]:
    """Find the layers of a file by their paths in the transformer, and check their shapes.

    Args:
        file: with a checked header.
        scheme: of its names.
        shapes: of the linear layers of the transformer it is for.
        base: name of that transformer, for sentences.

    Raises:
        BadInput: a tensor belongs to no layer, or its shape does not fit; it is named.
    """
    paths = _paths(scheme, shapes)
    parts: dict[str, dict[str, str]] = {}
    for name in file.slots:
        role = next(end for end in (scheme.down, scheme.up, ALPHA) if name.endswith(end))
        path = paths.get(name.removeprefix(scheme.prefix).removesuffix(role))
        if path is None:
            raise refused(file, f"{quoted(name)} belongs to no linear layer of {base}")
        parts.setdefault(path, {})[role] = name
    return {path: _layer(file, scheme, path, parts[path], shapes[path]) for path in sorted(parts)}


def renamed(path: str, scheme: Scheme) -> tuple[str, str]:
    """Return the names of A and B of a layer in a dotted scheme."""
    return scheme.prefix + path + scheme.down, scheme.prefix + path + scheme.up


def peft_alpha(file: TensorFile) -> float | None:
    """Return the alpha that diffusers' metadata give for all layers, or None.

    Raises:
        BadInput: they are no JSON, or ask for more than ``(alpha / rank) B A``.
    """
    text = file.metadata.get(PEFT_KEY)
    if text is None:
        return None
    try:
        settings = json.loads(text)
        plain = {str(k).removeprefix("transformer."): v for k, v in settings.items()}
    except (ValueError, AttributeError, RecursionError):
        raise refused(file, f"its {PEFT_KEY} is not JSON with settings by name") from None
    for option in ("use_dora", "use_rslora", "alpha_pattern", "lora_bias"):
        if plain.get(option):
            raise refused(file, f"its {PEFT_KEY} sets {option}, which is not known here")
    alpha = plain.get("lora_alpha")
    if alpha is not None and (type(alpha) not in (int, float) or not 0 < alpha < 1e30):
        raise refused(file, f"lora_alpha in its {PEFT_KEY} is no finite number above 0")
    return None if alpha is None else float(alpha)


def refused(file: TensorFile, why: str) -> BadInput:
    """The error that says why a file is refused."""
    return BadInput("file", file.path.name, why)


def _pair(file: TensorFile, name: str) -> tuple[str, str]:
    parts = name.split(".")
    for start, kind in OTHERS.items():
        if any(part == start or part.startswith(f"{start}_") for part in parts):
            raise refused(file, f"{quoted(name)} is of {kind}, and only LoRA is known here")
    for pair in PAIRS:
        if name.endswith(pair):
            return pair
    raise refused(file, f"{quoted(name)} is no name of a LoRA, such as <layer>{PAIRS[0][0]}")


def _paths(scheme: Scheme, shapes: Shapes) -> dict[str, str]:
    """Layers by what stands for their path in a name."""
    if scheme.prefix in FLAT:
        return {path.replace(".", "_"): path for path in shapes}
    return {path: path for path in shapes}


def _layer(
    file: TensorFile, scheme: Scheme, path: str, parts: Mapping[str, str], shape: tuple[int, int]
) -> Layer:
    for role in (scheme.down, scheme.up):
        if role not in parts:
            raise refused(file, f"layer {path} has no {role.lstrip('.')}")
    a, b = file.slots[parts[scheme.down]].shape, file.slots[parts[scheme.up]].shape
    rows, columns = shape
    rank = a[0] if len(a) == 2 else 0
    if rank < 1 or a != (rank, columns) or b != (rows, rank):
        wanted = f"[rank, {columns}] and [{rows}, rank]"
        raise refused(file, f"layer {path} has shapes {list(a)} and {list(b)} and not {wanted}")
    alpha = parts.get(ALPHA)
    if alpha is not None and math.prod(file.slots[alpha].shape) != 1:
        raise refused(file, f"{quoted(alpha)} is not one number")
    return Layer(down=parts[scheme.down], up=parts[scheme.up], alpha=alpha, rank=rank)
