"""Weights that are not those the settings ask for: one sentence, before a network is built."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from factory_world import job
from safetensors.torch import load_file, save_file

from turbo_lab import factory, qwen_sample
from turbo_lab.errors import MissingPiece
from turbo_lab.qwen_order import checked_order
from turbo_lab.store import Store
from turbo_lab.testbeds.qwen_files import check_weights, load_transformer, load_vae, located
from turbo_lab.testbeds.qwen_weights import misfit

FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny pipeline, to be spoilt."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def set_to(model: Path, part: str, **settings: Any) -> None:
    config = model / part / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **settings}))


def block_keys(model: Path, k: int) -> list[str]:
    tensors = load_file(model / "transformer" / FILE)
    return [key for key in tensors if key.startswith(f"transformer_blocks.{k}.")]


def said(model: Path) -> str:
    with pytest.raises(MissingPiece) as error:
        check_weights(located(str(model)), ("transformer", "text_encoder", "vae"))
    assert str(error.value).endswith(".") and "\n" not in str(error.value)
    return str(error.value)


def test_weights_that_fit_are_not_complained_about(model: Path) -> None:
    check_weights(located(str(model)), ("transformer", "text_encoder", "vae"))


def test_too_few_layers_are_counted_and_the_first_is_named(model: Path) -> None:
    have = load_file(model / "transformer" / FILE)
    set_to(model, "transformer", num_layers=3)
    lack = len(block_keys(model, 1))  # the third block is as the second
    assert said(model).startswith(
        f"The transformer of {model} does not fit its config.json: {FILE} lacks {lack} of "
        f"{len(have) + lack} tensors, first transformer_blocks.2."
    )


def test_too_many_layers_are_counted_and_the_first_is_named(model: Path) -> None:
    set_to(model, "transformer", num_layers=1)
    keys = block_keys(model, 1)
    text = said(model)
    assert f"{FILE} has tensors that are not used, {len(keys)} and first " in text
    assert text.removesuffix(".").rpartition(" ")[2] in keys


def test_other_shapes_are_counted_and_the_first_is_named(model: Path) -> None:
    set_to(model, "transformer", joint_attention_dim=24)
    assert said(model).endswith(
        f"{FILE} has tensors of other shapes, 2 and first txt_norm.weight of [16] where [24] is "
        "needed."
    )


def test_all_that_is_wrong_is_in_one_sentence_for_the_vae_too(model: Path) -> None:
    file = model / "vae" / FILE
    tensors = load_file(file)
    renamed = sorted(tensors)[0]
    tensors["another"] = tensors.pop(renamed)
    save_file(tensors, file)
    assert said(model) == (
        f"The vae of {model} does not fit its config.json: {FILE} lacks 1 of {len(tensors)} "
        f"tensors, first {renamed}; {FILE} has tensors that are not used, 1 and first another."
    )
    with pytest.raises(MissingPiece, match="does not fit its config"):
        load_vae(located(str(model)), "cpu")


def test_shards_are_read_as_their_index_names_them(model: Path) -> None:
    bundle, folder = located(str(model)), model / "transformer"
    net: Any = load_transformer(bundle, "cpu")
    shutil.rmtree(folder)
    net.save_pretrained(folder, max_shard_size="100KB")
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2
    check_weights(bundle, ("transformer",))
    again = load_transformer(bundle, "cpu").state_dict()
    assert all(torch.equal(again[key], value) for key, value in net.state_dict().items())
    tensors = load_file(shards[1])
    lost = sorted(tensors)[0]
    del tensors[lost]
    save_file(tensors, shards[1], {"format": "pt"})
    wanted = {key: tuple(value.shape) for key, value in net.state_dict().items()}
    assert misfit(folder, wanted) == (
        f"{FILE}.index.json lacks 1 of {len(wanted)} tensors, first {lost}"
    )


def _train(model: Path, world: Path, tmp_path: Path) -> None:
    factory.trained(job(world, "dmd2-2", model=str(model)), store=Store(cache=tmp_path / "cache"))


def _draw(model: Path, world: Path, tmp_path: Path) -> None:
    order = checked_order(prompts=["a cat"], model=str(model), width=64, height=64, steps=2)
    qwen_sample.drawn(order, Store(cache=tmp_path / "cache"))


@pytest.mark.parametrize("use", [_train, _draw])
def test_nothing_is_embedded_for_a_transformer_that_does_not_fit(
    model: Path,
    factory_world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    use: Callable[[Path, Path, Path], None],
) -> None:
    set_to(model, "transformer", num_layers=3)
    for module in (factory, qwen_sample):
        monkeypatch.setattr(module, "embedded", lambda *_, **__: pytest.fail("it was embedded"))
    with pytest.raises(MissingPiece, match=r"^The transformer of .* lacks \d+ of \d+ tensors"):
        use(model, factory_world, tmp_path)


def test_nothing_is_drawn_for_a_decoder_that_is_not_there(
    model: Path, factory_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model / "vae" / FILE).unlink()
    monkeypatch.setattr(qwen_sample, "embedded", lambda *_, **__: pytest.fail("it was embedded"))
    with pytest.raises(MissingPiece, match=r"^The vae of .* weights are missing"):
        _draw(model, factory_world, tmp_path)
