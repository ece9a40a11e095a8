"""Prompts that are longer than what is read of them: cut as diffusers cuts them, and said."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny_qwen
import torch
from factory_world import job

from turbo_lab.errors import MissingPiece
from turbo_lab.qwen_order import checked_order
from turbo_lab.store import Store
from turbo_lab.testbeds import qwen_data
from turbo_lab.testbeds.qwen_data import CutWarning, embedded, warn_of_cuts
from turbo_lab.testbeds.qwen_files import Bundle, located

FITS, OVER, LONG = "a" * 507, "b" * 508, "c" * 1100
"""A letter is a token of the tiny pipeline, and the end of Qwen's template has five."""


@pytest.fixture(scope="module")
def bundle(tiny_model: Path) -> Bundle:
    return located(str(tiny_model))


def test_prompts_are_cut_where_a_stock_pipeline_cuts_them(bundle: Bundle, tmp_path: Path) -> None:
    from diffusers import QwenImagePipeline

    stock: Any = QwenImagePipeline.from_pretrained(bundle.folder)
    found = embedded(bundle, [FITS, OVER, LONG], " ", store=Store(cache=tmp_path), device="cpu")
    for k, (prompt, length) in enumerate(((FITS, 512), (OVER, 513), (LONG, 1024))):
        with torch.no_grad():
            theirs, _ = stock.encode_prompt([prompt])
            kept, _ = stock.encode_prompt([prompt], max_sequence_length=512)
        assert theirs.shape[1] == length and found.rows[k].shape == kept[0].shape
        torch.testing.assert_close(found.rows[k], kept[0], rtol=1e-4, atol=1e-4)


def test_cut_prompts_are_counted_and_the_first_is_named(bundle: Bundle) -> None:
    with pytest.warns(CutWarning) as said:
        warn_of_cuts(bundle, ["a cat", FITS, OVER, LONG])
    (one,) = said
    assert str(one.message) == (
        "2 of 4 prompts have more than 512 tokens, the end of the template included, and are cut "
        "there as diffusers' QwenImagePipeline cuts them: the first has 513 and begins "
        f"{'b' * 40!r}."
    )


def test_nothing_is_said_of_prompts_that_fit_and_no_tokenizer_loaded_for_short_ones(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_cuts(bundle, [FITS])
        monkeypatch.setattr(qwen_data, "load_tokenizer", lambda _: pytest.fail("it was loaded"))
        warn_of_cuts(bundle, ["a" * 480, "a cat"])


def test_training_and_drawing_say_it_before_a_model_is_loaded(factory_world: Path) -> None:
    prompts = tiny_qwen.write_prompts(factory_world / "long.txt", "a cat", LONG)
    with pytest.warns(CutWarning, match="1 of 2 prompts"):
        job(factory_world, "dmd2-2", prompts=prompts)
    model = str(factory_world / "model")
    with pytest.warns(CutWarning, match="1 of 1 prompts"):
        checked_order(prompts=[OVER], model=model, width=64, height=64, batch=4)


def test_a_tokenizer_without_its_vocabulary_is_one_sentence(
    factory_world: Path, tmp_path: Path
) -> None:
    """transformers makes one of a single token of it, and prompts would be embedded as nothing."""
    model = tmp_path / "model"
    shutil.copytree(factory_world / "model", model)
    (model / "tokenizer" / "tokenizer.json").unlink()
    store = Store(cache=tmp_path / "cache")
    for read in (
        lambda bundle: warn_of_cuts(bundle, [LONG]),
        lambda bundle: embedded(bundle, ["a cat"], " ", store=store, device="cpu"),
    ):
        with pytest.raises(MissingPiece, match=r"^The tokenizer of .*model is not complete"):
            read(located(str(model)))


def test_a_tokenizer_that_cannot_be_read_is_one_sentence(
    factory_world: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(factory_world / "model", model)
    for file in (model / "tokenizer").iterdir():
        file.write_text("{")
    with pytest.raises(MissingPiece, match=r"^The tokenizer of .*model cannot be loaded"):
        warn_of_cuts(located(str(model)), [LONG])
