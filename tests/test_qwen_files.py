"""The files of a pipeline: found, refused where they do not fit, and known by their bytes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from turbo_lab.errors import BadInput, MissingPiece
from turbo_lab.testbeds import qwen_files
from turbo_lab.testbeds.qwen_files import Bundle, located


@pytest.fixture(scope="module")
def bundle(tiny_model: Path) -> Bundle:
    return located(str(tiny_model))


def test_a_model_that_is_nowhere_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def unreachable(*_: Any, **__: Any) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    for model, why in (
        (str(tmp_path), "no model_index.json there"),
        (str(tmp_path / "nowhere"), "no folder"),
        ("somebody/some-model", "the hub says LocalEntryNotFoundError"),
    ):
        with pytest.raises(MissingPiece, match="There is no pipeline") as error:
            located(model)
        assert why in str(error.value) and str(error.value).count(".\n") == 0


def test_the_hub_is_asked_for_settings_first_and_for_weights_of_a_part_later(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked: list[Any] = []

    def served(model: str, *, allow_patterns: list[str], revision: str | None) -> str:
        asked.append((model, allow_patterns, revision))
        return str(bundle.folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", served)
    remote = located("somebody/some-model")
    assert not any("safetensors" in pattern for pattern in asked[0][1])
    remote.weights("transformer")
    assert asked[1] == ("somebody/some-model", ["transformer/*"], bundle.folder.name)
    assert remote.identity("vae")["commit"] == bundle.folder.name


def test_other_pipelines_and_settings_are_refused(bundle: Bundle, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(bundle.folder, folder)
    for file, key, value, said in (
        ("model_index.json", "transformer", ["diffusers", "FluxTransformer2DModel"], "Flux"),
        ("transformer/config.json", "zero_cond_t", True, "zero_cond_t of the transformer is True"),
        ("scheduler/scheduler_config.json", "use_dynamic_shifting", False, "use_dynamic_shifting"),
        (
            "scheduler/scheduler_config.json",
            "max_shift",
            "big",
            "max_shift of the scheduler is 'big'",
        ),
        ("scheduler/scheduler_config.json", "base_shift", 5000, "base_shift of .* is 5000"),
        ("scheduler/scheduler_config.json", "max_image_seq_len", 256, "must not be the base's"),
        ("text_encoder/config.json", "model_type", "t5", "model_type of the text_encoder is t5"),
        ("model_index.json", "vae", 3, "its vae is 3"),
    ):
        path = folder / file
        honest = path.read_text()
        path.write_text(json.dumps({**json.loads(honest), key: value}))
        with pytest.raises(BadInput, match=said):
            located(str(folder))
        path.write_text(honest)
    config = folder / "vae" / "config.json"
    config.write_text("[1, 2]")
    with pytest.raises(MissingPiece, match=r"vae.config.json holds no settings by name"):
        located(str(folder))
    config.unlink()
    with pytest.raises(MissingPiece, match=r"vae.config.json is missing"):
        located(str(folder))


def test_missing_and_damaged_weights_are_one_sentence(bundle: Bundle, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(bundle.folder, folder)
    copy = located(str(folder))
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(MissingPiece, match=r"The transformer of .* cannot be loaded"):
        qwen_files.load_transformer(copy, "cpu")
    weights.unlink()
    with pytest.raises(MissingPiece, match=r"its safetensors weights are missing"):
        qwen_files.load_transformer(copy, "cpu")
    index = {"weight_map": {"a": "part-1.safetensors"}}
    (weights.parent / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(MissingPiece, match=r"part-1.safetensors is missing"):
        copy.weights("transformer")


def test_a_text_encoder_without_tokenizer_or_room_is_not_loaded(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qwen_files, "free_memory", lambda device: 1000)
    with pytest.raises(MissingPiece, match=r"text encoder needs .* on cpu, and 0.01 GB are free"):
        qwen_files.load_text(bundle, "cpu")
    folder = tmp_path / "copy"
    shutil.copytree(bundle.folder, folder)
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(MissingPiece, match=r"The tokenizer of .* is missing"):
        qwen_files.load_text(located(str(folder)), "cpu")


def test_identity_follows_the_bytes_and_not_the_place(bundle: Bundle, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(bundle.folder, folder)
    copy = located(str(folder))
    assert copy.identity("transformer") == bundle.identity("transformer")
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-7] ^= 1
    weights.write_bytes(data)
    assert copy.identity("transformer") != bundle.identity("transformer")
    assert copy.identity("vae") == bundle.identity("vae")
