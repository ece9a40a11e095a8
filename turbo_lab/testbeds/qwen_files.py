"""Where a Qwen-Image pipeline lies, how large it is, and how its parts are loaded.

A pipeline is a folder, or an id on a hub, as diffusers writes it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from turbo_lab.errors import BadInput, MissingPiece
from turbo_lab.memory import free_memory, gigabytes
from turbo_lab.places import expanded
from turbo_lab.progress import library_bars
from turbo_lab.testbeds.qwen_schedule import schedule_from
from turbo_lab.testbeds.qwen_weights import misfit

DEFAULT_MODEL = "Qwen/Qwen-Image-2512"
CHANNELS = 16
SCALE = 8
"""Pixels along one latent; a token is 2x2 latents."""
CLASSES: Mapping[str, str] = {
    "transformer": "QwenImageTransformer2DModel",
    "vae": "AutoencoderKLQwenImage",
    "text_encoder": "Qwen2_5_VLForConditionalGeneration",
    "scheduler": "FlowMatchEulerDiscreteScheduler",
}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SAMPLES, _SAMPLE_BYTES = 16, 65_536


# --- where a pipeline lies ----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A Qwen-Image pipeline on disk; build it with `located`.

    Attributes:
        model: what was asked for, a folder or an id.
        folder: where its settings lie, and the weights of a local pipeline.
        commit: of the hub; None for a local folder.
    """

    model: str
    folder: Path
    commit: str | None = None

    def config(self, part: str) -> dict[str, Any]:
        """Return the settings of a part.

        Raises:
            MissingPiece: they are missing or not JSON.
        """
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        return _json(self.folder / part / name)

    def identity(self, part: str) -> dict[str, str]:
        """Return what tells this part from any other: the hub's commit, or a hash of its files.

        Of a large file the hash covers size, both ends and 16 samples between them.

        Raises:
            MissingPiece: a local part has no weights.
        """
        if self.commit is not None:
            return {"part": part, "model": self.model, "commit": self.commit}
        folder = self.folder / part
        files = sorted(f for f in folder.glob("*") if f.suffix in (".json", ".safetensors", ".txt"))
        digest = hashlib.sha256()
        for file in files:
            digest.update(f"{file.name} {file.stat().st_size}\n".encode())
            digest.update(_sampled(file))
        return {"part": part, "sha256": digest.hexdigest()}

    def weights(self, part: str) -> Path:
        """Return the folder of a part with its weights, fetched from the hub if need be.

        Raises:
            MissingPiece: a file of weights is missing, or the hub does not answer.
        """
        if self.commit is not None:
            _fetched(self.model, [f"{part}/*"], revision=self.commit)
        folder = self.folder / part
        indices = list(folder.glob("*.safetensors.index.json"))
        named = {name for index in indices for name in _json(index)["weight_map"].values()}
        missing = sorted(name for name in named if not (folder / name).is_file())
        if missing or not any(folder.glob("*.safetensors")):
            what = f"{missing[0]} is" if missing else "its safetensors weights are"
            raise MissingPiece(f"The {part} of {self.model} is not complete: {what} missing.")
        return folder


def located(model: str) -> Bundle:
    """Find a pipeline and check that it is a Qwen-Image; no weights are fetched or read.

    Args:
        model: a folder written by ``save_pretrained``, or an id on the hub.

    Raises:
        BadInput: it is another kind of pipeline.
        MissingPiece: neither a folder nor the hub has it.
    """
    folder, commit = expanded(model, "model"), None
    if not (folder / "model_index.json").is_file():
        if folder.exists() or not _HUB_ID.fullmatch(model):
            raise _nowhere(model, "no model_index.json there" if folder.exists() else "no folder")
        folder = _fetched(model, ["*.json", "*/*.json", "tokenizer/*"])
        commit = folder.name
    bundle = Bundle(model=model, folder=folder, commit=commit)
    _check_parts(bundle)
    return bundle


def _check_parts(bundle: Bundle) -> None:
    index = _json(bundle.folder / "model_index.json")
    for part, wanted in CLASSES.items():
        found = index.get(part)
        found = found[-1] if isinstance(found, list) and found else found
        if found != wanted:
            raise BadInput("model", bundle.model, f"its {part} is {found}; it must be {wanted}")
    net, vae = bundle.config("transformer"), bundle.config("vae")
    scheduler = bundle.config("scheduler")
    facts = {
        "in_channels of the transformer": (net.get("in_channels", 64), 4 * CHANNELS),
        "out_channels of the transformer": (net.get("out_channels", 16), CHANNELS),
        "patch_size of the transformer": (net.get("patch_size", 2), 2),
        "z_dim of the vae": (vae.get("z_dim", 16), CHANNELS),
        "downsampling of the vae": (2 ** len(vae.get("temperal_downsample", [0, 1, 1])), SCALE),
        "model_type of the text_encoder": (
            bundle.config("text_encoder").get("model_type"),
            "qwen2_5_vl",
        ),
        "use_dynamic_shifting of the scheduler": (scheduler.get("use_dynamic_shifting"), True),
        "time_shift_type of the scheduler": (
            scheduler.get("time_shift_type", "exponential"),
            "exponential",
        ),
        **{
            f"{option} of the transformer": (bool(net.get(option, False)), False)
            for option in (
                *("guidance_embeds", "zero_cond_t"),
                *("use_additional_t_cond", "use_layer3d_rope"),
            )
        },
    }
    for what, (found, needed) in facts.items():
        if found != needed:
            raise BadInput("model", bundle.model, f"{what} is {found}; it must be {needed}")
    try:
        schedule_from(scheduler)
    except BadInput as error:
        why = f"{error.parameter} of the scheduler is {error.value!r}; {error.allowed}"
        raise BadInput("model", bundle.model, why) from None


def _fetched(model: str, patterns: list[str], revision: str | None = None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(model, allow_patterns=patterns, revision=revision))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise _nowhere(model, f"the hub says {type(error).__name__}") from error


def _nowhere(model: str, why: str) -> MissingPiece:
    return MissingPiece(
        f"There is no pipeline {model!r} ({why}): give a folder written by save_pretrained, or an "
        f"id such as {DEFAULT_MODEL} on a hub that can be reached."
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise MissingPiece(f"{path} is missing or not JSON ({type(error).__name__}).") from None
    if not isinstance(found, dict):
        raise MissingPiece(f"{path} holds no settings by name, as it should.")
    return found


def _sampled(file: Path) -> bytes:
    """Return the SHA-256 of a file, or of its ends and even samples if it is large."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        if size <= (_SAMPLES + 2) * _SAMPLE_BYTES:
            return hashlib.sha256(opened.read()).digest()
        digest = hashlib.sha256()
        for k in range(_SAMPLES + 2):
            opened.seek((size - _SAMPLE_BYTES) * k // (_SAMPLES + 1))
            digest.update(opened.read(_SAMPLE_BYTES))
        return digest.digest()


# --- how large it is ----------------------------------------------------------------------------


def empty(bundle: Bundle, part: str) -> nn.Module:
    """The transformer or the VAE, as its settings say, without memory."""
    import diffusers
    from accelerate import init_empty_weights

    with _loading(bundle, part), init_empty_weights():
        net: nn.Module = getattr(diffusers, CLASSES[part]).from_config(bundle.config(part))
    return net


def text_parameters(bundle: Bundle) -> int:
    """Count the parameters of the text encoder from its settings, without memory."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

    with _loading(bundle, "text_encoder"), init_empty_weights():
        config = AutoConfig.from_pretrained(bundle.folder / "text_encoder")
        return size_of(Qwen2_5_VLForConditionalGeneration(config))


def size_of(net: nn.Module) -> int:
    """Parameters of a network."""
    return sum(parameter.numel() for parameter in net.parameters())


# --- loading ------------------------------------------------------------------------------------


def check_weights(bundle: Bundle, parts: Sequence[str]) -> None:
    """Refuse a local pipeline that lacks weights; of those that are there, headers are read.

    A hub's are checked when they are loaded. The text encoder's may have other names than its
    network and are only asked whether they are there.

    Raises:
        MissingPiece: a file is missing, or its tensors are not those that the settings ask for.
    """
    for part in parts if bundle.commit is None else ():
        if part == "text_encoder":
            bundle.weights(part)
        else:
            _fitting(bundle, part)


def _fitting(bundle: Bundle, part: str) -> Path:
    """Return the folder of a part's weights, if their names and shapes are those of its network.

    Where tensors lack, torch would say so in words of its own, with the whole network in memory;
    tensors too many are left out by diffusers, which then draws with another network.

    Raises:
        MissingPiece: they are not, or a file is missing or damaged.
    """
    folder = bundle.weights(part)
    wanted = {key: tuple(one.shape) for key, one in empty(bundle, part).state_dict().items()}
    with _loading(bundle, part):
        why = misfit(folder, wanted)
    if why:
        raise MissingPiece(f"The {part} of {bundle.model} does not fit its config.json: {why}.")
    return folder


def dtype_on(device: str) -> torch.dtype:
    """Weights are bfloat16 on a GPU and float32 on a CPU."""
    return torch.bfloat16 if device == "cuda" else torch.float32


def load_transformer(bundle: Bundle, device: str, dtype: torch.dtype | None = None) -> nn.Module:
    """Load the transformer straight to its device, in eval mode.

    Args:
        bundle: the pipeline.
        device: cpu or cuda.
        dtype: of the weights; None for that of the device, see `dtype_on`.

    Raises:
        MissingPiece: weights are missing, damaged, or not those that the settings ask for.
    """
    from diffusers import QwenImageTransformer2DModel

    folder = _fitting(bundle, "transformer")
    with _loading(bundle, "transformer"):
        net: nn.Module = QwenImageTransformer2DModel.from_pretrained(
            folder,
            torch_dtype=dtype or dtype_on(device),
            device_map={"": device},
            use_safetensors=True,
        )
    return net.eval()


def load_vae(bundle: Bundle, device: str) -> Any:
    """Load the VAE, in eval mode.

    Raises:
        MissingPiece: weights are missing, damaged, or not those that the settings ask for.
    """
    from diffusers import AutoencoderKLQwenImage

    folder = _fitting(bundle, "vae")
    with _loading(bundle, "vae"):
        vae = AutoencoderKLQwenImage.from_pretrained(
            folder, torch_dtype=dtype_on(device), use_safetensors=True
        )
    return vae.to(device).eval()


def load_text(bundle: Bundle, device: str) -> Any:
    """Load a stock pipeline of text encoder and tokenizer alone.

    Raises:
        MissingPiece: weights are missing or damaged, or there is no room for them.
    """
    from diffusers import QwenImagePipeline
    from transformers import Qwen2_5_VLForConditionalGeneration

    folder = bundle.weights("text_encoder")
    tokenizer = load_tokenizer(bundle)
    _check_room(bundle, device)
    with _loading(bundle, "text_encoder"):
        encoder = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            folder, dtype=dtype_on(device), use_safetensors=True
        )
    parts = {"scheduler": None, "vae": None, "transformer": None}
    return QwenImagePipeline(**parts, text_encoder=encoder.to(device).eval(), tokenizer=tokenizer)


def load_tokenizer(bundle: Bundle) -> Any:
    """Load the tokenizer.

    Raises:
        MissingPiece: it is missing or damaged, or has no vocabulary.
    """
    from transformers import Qwen2Tokenizer

    folder = bundle.folder / "tokenizer"
    if not folder.is_dir():
        raise MissingPiece(f"The tokenizer of {bundle.model} is missing.")
    with _loading(bundle, "tokenizer"):
        tokenizer = Qwen2Tokenizer.from_pretrained(folder)
    stock = stock_template()
    # Without its files transformers 5 makes one of a single token and says nothing; the pipeline
    # then drops as many tokens as the template begins with, and of a prompt nothing is left.
    ids = tokenizer(stock.prompt_template_encode.format(""))["input_ids"]
    if len(ids) <= stock.prompt_template_encode_start_idx:
        raise MissingPiece(
            f"The tokenizer of {bundle.model} is not complete: it has no vocabulary to read a "
            "prompt with."
        )
    return tokenizer


def stock_template() -> Any:
    """A stock pipeline of nothing: it knows the text around a prompt."""
    from diffusers import QwenImagePipeline

    parts = dict.fromkeys(("scheduler", "vae", "text_encoder", "tokenizer", "transformer"))
    return QwenImagePipeline(**parts)


def _check_room(bundle: Bundle, device: str) -> None:
    needed = torch.empty((), dtype=dtype_on(device)).element_size() * text_parameters(bundle)
    free = free_memory(device)
    if free is not None and needed > free:
        raise MissingPiece(
            f"The text encoder needs {gigabytes(needed)} on {device}, and {gigabytes(free)} are "
            "free: embed the prompts where there is more."
        )


@contextmanager
def _loading(bundle: Bundle, part: str) -> Iterator[None]:
    """Say in one sentence what could not be loaded; lack of memory keeps its own words."""
    from safetensors import SafetensorError

    try:
        with library_bars():
            yield
    except (torch.OutOfMemoryError, MissingPiece, BadInput):
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        why = " ".join(str(error).split())[:200]
        raise MissingPiece(
            f"The {part} of {bundle.model} cannot be loaded ({type(error).__name__}: {why})."
        ) from error
