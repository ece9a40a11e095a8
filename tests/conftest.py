"""What all unit tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from turbo_lab.store import Store

if TYPE_CHECKING:
    from sample_world import SampleWorld

    from turbo_lab.lab import Lab


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    """Make `os.fsync` return at once.

    It matters when the power is cut, which no test does: what a killed process has written is in
    the system's memory. Thousands of calls of some milliseconds each are saved.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture
def home(tmp_path: Path) -> Store:
    """An empty store, with a place for what is shipped."""
    shipped = tmp_path / "checkout" / "turbo_lab" / "artifacts"
    return Store(cache=tmp_path / "cache", shipped=(shipped,))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny Qwen-Image pipeline; copy it before changing anything."""
    import tiny_qwen  # and with it PyTorch, which not every test needs

    return tiny_qwen.write_pipeline(tmp_path_factory.mktemp("tiny_qwen"))


@pytest.fixture(scope="session")
def factory_world(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, two prompts and two images."""
    from factory_world import write_world  # likewise

    return write_world(tmp_path_factory.mktemp("factory"), tiny_model)


@pytest.fixture(scope="session")
def factory_caches(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store that the tests of the factory share, so that prompts are encoded once."""
    return Store(cache=tmp_path_factory.mktemp("factory_cache"))


@pytest.fixture(scope="session")
def sample_world(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> SampleWorld:
    """Orders of pictures from the tiny model, with two adapters and a store."""
    from sample_world import SampleWorld, write_loras  # likewise

    folder = tmp_path_factory.mktemp("sample")
    loras = write_loras(tiny_model, folder)
    return SampleWorld(model=tiny_model, loras=loras, store=Store(cache=folder / "cache"))


@pytest.fixture(scope="session")
def study_lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """The bench of the studies, which share its teacher and its students."""
    from small_lab import small_lab  # likewise

    return small_lab(tmp_path_factory.mktemp("studies"))
