"""LoRA files as strangers may send them: hostile ones, and the pieces of good ones."""

from __future__ import annotations

import io
import json
import pickle
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

LAYER = "transformer_blocks.0.attn.to_q"
OTHER = "transformer_blocks.1.img_mlp.net.2"
SIDE, WIDE = 128, 512
"""Sizes of these layers in the postcards' transformer: 128 x 128 and 128 x 512."""
RANK = 2


def weights(layer: str = LAYER, rank: int = RANK, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A and B of a layer."""
    numbers = torch.Generator().manual_seed(seed)
    columns = WIDE if layer == OTHER else SIDE
    return (
        torch.randn(rank, columns, generator=numbers),
        torch.randn(SIDE, rank, generator=numbers),
    )


def pair(layer: str = LAYER, rank: int = RANK, seed: int = 0) -> dict[str, Tensor]:
    """A layer in diffusers' names."""
    a, b = weights(layer, rank, seed)
    return {
        f"transformer.{layer}.lora_A.weight": a,
        f"transformer.{layer}.lora_B.weight": b,
    }


def packed(header: bytes | Mapping[str, Any], data: bytes = b"") -> bytes:
    """A safetensors file of a header and data, whatever they say."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    """One entry of a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def one(**fields: Any) -> bytes:
    """A file of eight bytes of data and one entry with these fields."""
    return packed({"x": entry(**fields)}, bytes(8))


def changed(**fields: Any) -> bytes:
    """One pair of tensors with some replaced: A, B, and others by whole names."""
    tensors = pair()
    for name, value in fields.items():
        tensors[f"transformer.{LAYER}.{name}"] = value
    return save(tensors)


def named(*names: str) -> bytes:
    """Tensors of ones by these names."""
    return save({name: torch.ones(RANK, SIDE) for name in names})


def alpha(value: Any) -> bytes:
    """A pair in Lightning's names with this alpha."""
    a, b = weights()
    tensors = {f"{LAYER}.lora_down.weight": a, f"{LAYER}.lora_up.weight": b}
    return save({**tensors, f"{LAYER}.alpha": torch.as_tensor(value)})


def spoilt(part: str, value: float) -> bytes:
    """A pair with one value that is no number, or infinite."""
    tensors = pair()
    tensors[f"transformer.{LAYER}.{part}"][0, 0] = value
    return save(tensors)


def with_settings(settings: str, **more: Tensor) -> bytes:
    """A pair with these settings of PEFT's in its metadata."""
    tensors = {**pair(), **{f"transformer.{LAYER}.{k}": v for k, v in more.items()}}
    return save(tensors, {"lora_adapter_metadata": settings})


def torch_zip() -> bytes:
    """What torch.save writes."""
    buffer = io.BytesIO()
    torch.save(pair(), buffer)
    return buffer.getvalue()


def million() -> bytes:
    """A header of a million names."""
    rows = b",".join(
        b'"k%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(10**6)
    )
    return packed(b"{" + rows + b"}")


def many() -> bytes:
    """A header within the limit, with too many names."""
    rows = {f"k{i}": entry(shape=[0], offsets=[0, 0]) for i in range(20_001)}
    return packed(rows)


def _dynamic(**settings: float) -> dict[str, str]:
    """Two steps by a scheduler with a dynamic shift."""
    said = json.dumps({"use_dynamic_shifting": True, **settings})
    return {"scheduler": said, "steps": "2"}


GOOD = save(pair())
Maker = Callable[[], bytes]
HOSTILE: Mapping[str, tuple[Maker, str]] = {
    # no safetensors
    "empty": (lambda: b"", "it is empty"),
    "seven-bytes": (lambda: GOOD[:7], "no safetensors"),
    "length-alone": (lambda: GOOD[:8], "no safetensors"),
    "picture": (lambda: b"\x89PNG\r\n\x1a\n" + bytes(100), "no safetensors"),
    "text": (lambda: b"hello, this is a LoRA\n", "no safetensors"),
    "pickle": (lambda: pickle.dumps({"x": [1.0]}), "it is a pickle"),
    "torch-zip": (torch_zip, "it is a pickle"),
    # cut off, or claiming more than there is
    "header-cut": (lambda: GOOD[:60], "it is cut off or damaged: its header claims"),
    "body-cut": (lambda: GOOD[:-5], "lies outside of the file"),
    "header-huge": (lambda: struct.pack("<Q", 2**63) + b"{}" + bytes(50), "header claims"),
    "header-million": (million, "8,388,608 are allowed"),
    "header-many": (many, "it lists 20,001 tensors"),
    "trailing": (lambda: GOOD + b"more", "4 bytes follow the last tensor"),
    # headers
    "not-json": (lambda: packed(b"{'x': 1}"), "its header is not JSON"),
    "not-utf8": (lambda: packed(b'{"\xff\xfe": 1}'), "not UTF-8"),
    "nan-in-json": (lambda: packed(b'{"x": NaN}'), "not JSON"),
    "deep": (lambda: packed(b'{"x":' * 100_000), "not JSON"),
    "long-number": (lambda: packed(b'{"x":' + b"9" * 5000 + b"}"), "not JSON"),
    "twice": (lambda: packed(b'{"x": 1, "x": 2}'), "has 'x' twice"),
    "no-tensors": (lambda: packed({"__metadata__": {"a": "b"}}), "no tensors"),
    "metadata-list": (lambda: packed({"__metadata__": ["a"]}), "metadata are not text"),
    "metadata-number": (lambda: packed({"__metadata__": {"rank": 4}}), "metadata are not text"),
    "entry-number": (lambda: packed({"x": 3}), "is not described by"),
    "entry-short": (lambda: packed({"x": {"dtype": "F32"}}), "is not described by"),
    "entry-more": (lambda: packed({"x": {**entry(), "file": "/etc/passwd"}}), "is not described"),
    # entries
    "dtype-unknown": (lambda: one(dtype="F8_E4M3"), "has dtype 'F8_E4M3'"),
    "dtype-integer": (lambda: one(dtype="I32"), "has dtype 'I32'"),
    "dtype-list": (lambda: one(dtype=["F32"]), "has dtype"),
    "shape-negative": (lambda: one(shape=[-1, -2]), "has no shape"),
    "shape-fraction": (lambda: one(shape=[2.0]), "has no shape"),
    "shape-true": (lambda: one(shape=[True, 2]), "has no shape"),
    "shape-text": (lambda: one(shape="2"), "has no shape"),
    "shape-bomb": (lambda: one(shape=[2**40, 2**40]), "claims another size"),
    "shape-wraps": (lambda: one(shape=[2**62, 4]), "claims another size"),
    "shape-long": (lambda: one(shape=[1] * 100_000), "has no shape"),
    "offsets-negative": (lambda: one(offsets=[-8, 0]), "not two positions"),
    "offsets-backwards": (lambda: one(offsets=[8, 0]), "lies outside"),
    "offsets-beyond": (lambda: one(shape=[2**40], offsets=[0, 2**42]), "lies outside"),
    "offsets-three": (lambda: one(offsets=[0, 4, 8]), "not two positions"),
    "overlap": (
        lambda: packed({"x": entry(), "y": entry(offsets=[4, 12])}, bytes(12)),
        "tensors overlap at byte 4",
    ),
    "gap": (
        lambda: packed({"x": entry(), "y": entry(offsets=[12, 20])}, bytes(20)),
        "tensors leave a gap at byte 8",
    ),
    # names
    "path-like": (lambda: named("../../etc/passwd"), "'../../etc/passwd' is no name of a LoRA"),
    "path-in-layer": (lambda: named("transformer./etc/x.lora_A.weight"), "no linear layer"),
    "escapes": (lambda: named("\x1b[2Jboo\u202e"), r"'\x1b[2Jboo\u202e' is no name"),
    "long-name": (lambda: named("x" * 100_000), "xxx...' is no name"),
    "other-model": (lambda: named("lora_unet_down_blocks_0.lora_down.weight"), "no linear layer"),
    "text-encoder": (lambda: named("text_encoder.x.lora_A.weight"), "no linear layer"),
    "block-too-high": (
        lambda: named("transformer.transformer_blocks.4.attn.to_q.lora_A.weight"),
        "no linear layer",
    ),
    "norm": (lambda: named("transformer.txt_norm.lora_A.weight"), "no linear layer"),
    "two-schemes": (
        lambda: save({**pair(), f"{OTHER}.lora_down.weight": weights()[0]}),
        "one pair",
    ),
    "alphas-alone": (lambda: save({f"{LAYER}.alpha": torch.tensor(1.0)}), "alphas alone"),
    "lokr": (lambda: named(f"{LAYER}.lokr_w1"), "is of LoKr"),
    "dora": (lambda: changed(dora_scale=torch.ones(SIDE)), "is of DoRA"),
    "whole-weights": (lambda: named(f"diffusion_model.{LAYER}.diff"), "of whole weights"),
    "bias": (lambda: changed(**{"lora_B.bias": torch.ones(SIDE)}), "is no name of a LoRA"),
    # layers
    "no-b": (lambda: named(f"transformer.{LAYER}.lora_A.weight"), "has no lora_B.weight"),
    "no-a": (lambda: named(f"transformer.{LAYER}.lora_B.weight"), "has no lora_A.weight"),
    "ranks-differ": (
        lambda: changed(**{"lora_B.weight": torch.ones(SIDE, 3)}),
        "has shapes [2, 128] and [128, 3]",
    ),
    "rank-0": (
        lambda: changed(
            **{"lora_A.weight": torch.ones(0, SIDE), "lora_B.weight": torch.ones(SIDE, 0)}
        ),
        "has shapes [0, 128] and [128, 0]",
    ),
    "rank-257": (lambda: save(pair(rank=257)), "it has rank 257"),
    "scalar": (lambda: changed(**{"lora_A.weight": torch.tensor(1.0)}), "has shapes []"),
    "vector": (lambda: changed(**{"lora_A.weight": torch.ones(SIDE)}), "has shapes [128]"),
    "transposed": (lambda: changed(**{"lora_A.weight": torch.ones(SIDE, 2)}), "has shapes"),
    "wide": (lambda: changed(**{"lora_A.weight": torch.ones(2, 3072)}), "has shapes [2, 3072]"),
    # values
    "nan": (lambda: spoilt("lora_A.weight", float("nan")), "not finite"),
    "infinite": (lambda: spoilt("lora_B.weight", float("inf")), "not finite"),
    "too-large": (
        lambda: changed(**{"lora_A.weight": torch.full((2, SIDE), 1e300, dtype=torch.float64)}),
        "not finite",
    ),
    "alpha-0": (lambda: alpha(0.0), "alpha is 0.0"),
    "alpha-negative": (lambda: alpha(-4.0), "alpha is -4.0"),
    "alpha-nan": (lambda: alpha(float("nan")), "alpha is nan"),
    "alpha-infinite": (lambda: alpha(float("inf")), "alpha is inf"),
    "alpha-huge": (lambda: alpha(1e29), "alpha / rank is 5e+28 in"),
    "alpha-integer": (lambda: alpha(4), "has dtype 'I64'"),
    "alpha-vector": (lambda: alpha([1.0, 2.0]), "is not one number"),
    "alpha-twice": (
        lambda: with_settings('{"transformer.lora_alpha": 4}', alpha=torch.tensor(4.0)),
        "both give alphas",
    ),
    "settings-not-json": (lambda: with_settings("{"), "is not JSON"),
    "settings-list": (lambda: with_settings("[1]"), "is not JSON with settings"),
    "settings-dora": (lambda: with_settings('{"transformer.use_dora": true}'), "sets use_dora"),
    "settings-alpha": (lambda: with_settings('{"transformer.lora_alpha": -1}'), "lora_alpha in"),
    "settings-nan": (lambda: with_settings('{"transformer.lora_alpha": NaN}'), "lora_alpha in"),
}
"""Name to (what makes the bytes, a part of the sentence)."""

_HUGE = "1" + "0" * 400
UNTIMED: Mapping[str, Mapping[str, str]] = {
    "sigmas-huge": {"sigmas": f"[{_HUGE}]"},
    "sigmas-of-another-scale": {"sigmas": "[14.6, 3.0]"},
    "sigmas-0-in-float32": {"sigmas": "[1e-50, 1e-60]"},
    "shift-huge": {"scheduler": f'{{"shift": {_HUGE}}}', "steps": "2"},
    "shift-tiny": {"scheduler": '{"shift": 1e-300}', "steps": "2"},
    "mu-overflows": _dynamic(base_shift=5000, max_shift=5000),
    "mu-of-30": _dynamic(base_shift=30, max_shift=30),
    "times-equal-in-float32": _dynamic(base_shift=19, max_shift=19),
    "mu-steep": _dynamic(base_image_seq_len=0, max_image_seq_len=1, base_shift=0, max_shift=9),
    "terminal-0-in-float32": _dynamic(base_shift=1, max_shift=1, shift_terminal=1e-300),
    "steps-of-a-training": {"scheduler": "{}", "steps": "20000"},
}
"""Name to metadata whose words for times no sampler can follow. They may be another tool's, so a
file of good weights with them is read as one that says nothing of times."""


def write(folder: Path, name: str, data: bytes) -> Path:
    """Write a file of the corpus."""
    path = folder / f"{name}.safetensors"
    path.write_bytes(data)
    return path
