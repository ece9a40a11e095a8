"""Everything from nothing: the store that a run is given, and what it says of claims."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from turbo_lab import places, reproduce, runner
from turbo_lab.errors import BadInput, MissingPiece, StoreError
from turbo_lab.recipes import EARLY, resolve
from turbo_lab.run_one import Outcome
from turbo_lab.store import Store, atomic_folder


def claim(id_: str, verdict: str, notebook: str = "01_teacher") -> dict[str, Any]:
    return {
        **{"id": id_, "notebook": notebook, "verdict": verdict},
        **{"value": 0.5, "low": 0.25, "high": 0.75},
    }


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout whose notebooks leave a file in their store, and the claims they are told to."""
    (tmp_path / "figures").mkdir()
    before = [claim("T1", "holds"), claim("T2", "holds"), claim("B1", "holds", "02_blur")]
    (tmp_path / "figures" / "claims.json").write_text(json.dumps(before))
    notebooks = places.notebook_dir()
    monkeypatch.setattr(places, "root", lambda: tmp_path)
    monkeypatch.setattr(places, "notebook_dir", lambda: notebooks)
    return tmp_path


def notebooks(found: list[Store], problem: str = "", name: str = "01_teacher") -> Any:
    def run(*, parameters: dict[str, Any], **_: Any) -> list[Outcome]:
        store = Store.default()
        found.append(store)
        (store.cache / "trained").mkdir(parents=True, exist_ok=True)
        out = Path(parameters["out_dir"])
        out.mkdir(parents=True, exist_ok=True)
        after = [claim("T1", "inconclusive"), claim("T2", "holds"), claim("T3", "holds")]
        (out / "claims.json").write_text(json.dumps(after))
        return [Outcome(name=name, seconds=1, figures=1, copy=out, problem=problem)]

    return run


def test_nothing_shipped_is_behind_the_store_and_the_environment_is_put_back(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Store] = []
    monkeypatch.setattr(runner, "run", notebooks(found))
    usual = Store.default()
    _, changed = reproduce.reproduce(only=["01"])
    assert found[0].shipped == () and found[0].cache != usual.cache
    assert found[0].cache.is_relative_to(checkout) and Store.default() == usual
    assert [(c.id, c.same) for c in changed] == [("T1", False), ("T3", False), ("T2", True)]
    said = reproduce.report(changed)
    assert said.startswith("2 of 3 verdicts changed") and "not made -> holds" in said
    assert "holds 0.5 [0.25, 0.75] -> inconclusive 0.5 [0.25, 0.75]" in said


def test_a_run_that_broke_off_goes_on_and_one_that_ended_begins_again(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Store] = []
    monkeypatch.setattr(runner, "run", notebooks(found, problem="killed"))
    reproduce.reproduce()
    (found[0].cache / "checkpoint").touch()
    monkeypatch.setattr(runner, "run", notebooks(found))
    reproduce.reproduce()
    assert (found[1].cache / "checkpoint").exists()
    reproduce.reproduce()
    assert not (found[2].cache / "checkpoint").exists()


def test_notebooks_that_come_one_by_one_share_what_was_trained(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Store] = []
    for name in ("01_teacher", "02_blur"):
        monkeypatch.setattr(runner, "run", notebooks(found, name=name))
        reproduce.reproduce(only=[name[:2]])
        (found[-1].cache / name).touch()
    assert (found[1].cache / "01_teacher").exists()
    reproduce.reproduce(only=["01"])  # which has ended: nothing is left of either
    assert not (found[2].cache / "02_blur").exists()


@pytest.mark.parametrize("wrong", [{"device": "tpu"}, {"jobs": -3}, {"only": ["01", "99"]}])
def test_a_run_that_cannot_start_removes_nothing(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, wrong: dict[str, Any]
) -> None:
    found: list[Store] = []
    with monkeypatch.context() as patch:
        patch.setattr(runner, "run", notebooks(found))
        reproduce.reproduce(only=["01"])
    with pytest.raises(BadInput):
        reproduce.reproduce(**{"only": ["01"], **wrong})
    assert (found[0].cache / "trained").is_dir()


def test_a_run_without_its_device_or_beside_another_removes_nothing(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Store] = []
    monkeypatch.setattr(runner, "run", notebooks(found))
    reproduce.reproduce(only=["01"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MissingPiece, match="cuda"):
        reproduce.reproduce(only=["01"], device="cuda")
    with (
        reproduce._alone(places.run_dir("reproduce") / "quick"),
        pytest.raises(StoreError, match="Another process is reproducing quick"),
    ):
        reproduce.reproduce(only=["01"])
    assert (found[0].cache / "trained").is_dir()
    reproduce.reproduce(only=["01"])  # once the other has ended


def test_where_nothing_can_be_written_one_sentence_says_so(checkout: Path) -> None:
    (checkout / "runs").write_text("a file where the folder should be")
    with pytest.raises(StoreError, match="reproduce cannot be written: "):
        reproduce.reproduce(only=["01"])


def test_claims_of_a_notebook_that_failed_are_not_called_changed(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "run", notebooks([], problem="killed"))
    _, changed = reproduce.reproduce(only=["01"])
    assert changed == []


def test_what_is_kept_lies_in_the_store_as_it_was_shipped(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    early = resolve(EARLY)
    found: list[Store] = []
    monkeypatch.setattr(runner, "run", notebooks(found))
    reproduce.reproduce(kept=reproduce.kept_as_shipped(["postcards/progressive"]))
    assert {entry.name for entry in found[0].entries()} == {"postcards/progressive"}
    reproduce.reproduce(kept=reproduce.kept_as_shipped([early.artefact]))
    kept = found[1].find(early.artefact, early.spec())
    assert kept is not None and kept.path.is_relative_to(checkout)
    assert {entry.name for entry in found[1].entries()} == {"postcards/teacher"}


def names(folders: list[Path]) -> set[str]:
    return {folder.name.rpartition("-")[0] for folder in folders}


def test_what_is_kept_is_named_whole_or_by_a_pattern_of_it_or_of_its_key() -> None:
    teachers = reproduce.kept_as_shipped(["postcards/teacher"])
    assert len(teachers) == 2 and names(teachers) == {"teacher"}
    assert reproduce.kept_as_shipped(["postcards/teache?", "postcards/teacher"]) == teachers
    assert reproduce.kept_as_shipped([f"*/{teachers[1].name}"]) == [teachers[1]]
    assert names(reproduce.kept_as_shipped(["points/dmd2*"])) == {"dmd2-1", "dmd2-2"}
    assert reproduce.kept_as_shipped() == []
    for wrong in ("nobody", "teacher", "postcards/"):  # a part of a name is none
        with pytest.raises(BadInput, match=f"keep='{wrong}'"):
            reproduce.kept_as_shipped([wrong])


def test_a_notebook_alone_keeps_what_those_before_it_were_made_from(checkout: Path) -> None:
    (plane,), (tilted,), (dino,) = (
        reproduce.kept_as_shipped([name])
        for name in ("points/plane", "points/tilted", "postcards/dino")
    )
    for notebook, made_from in (
        ("01_teacher", [plane]),
        ("02_blur_in_trajectory_distillation", [plane, tilted]),
        ("03_dmd2_and_mode_collapse", [dino]),
    ):
        folder = checkout / "figures" / notebook
        folder.mkdir()
        keys = [one.name.rpartition("-")[2] for one in made_from]
        (folder / "one.json").write_text(json.dumps({"artefact_keys": [*keys, "0" * 12]}))
        (folder / "claims.json").write_text(json.dumps([claim("T1", "holds", notebook)]))
    assert reproduce.kept_as_shipped(alone=True, only=["01"]) == []
    assert reproduce.kept_as_shipped(alone=True, only=["02"]) == [plane]
    assert reproduce.kept_as_shipped(alone=True, only=["05", "03"]) == sorted([plane, tilted])
    assert set(reproduce.kept_as_shipped(["points/base"], alone=True, only=["04"])) > {dino, plane}


def test_the_figures_as_they_are_name_what_a_notebook_alone_needs() -> None:
    kept = reproduce.kept_as_shipped(alone=True, only=["05"])
    assert {"teacher", "warm", "pcm-six", "dmd2-2"} <= names(kept)
    assert not {"dino", "turbo", "gan-none", "turbo-six"} & names(kept)


def as_trained_again(folder: Path, *, other_bits: bool) -> None:
    """Another processor's card, and weights with a byte more if asked."""
    copy = folder.parent / "copy"
    shutil.copytree(folder, copy)
    shutil.rmtree(folder)
    card = json.loads((copy / "card.json").read_text())
    card["machine"] |= {"cpu": "another", "isa": "AVX2"}
    (copy / "card.json").write_text(json.dumps(card))
    with (copy / "clouds.safetensors").open("ab") as weights:
        weights.write(b"0" * other_bits)
    with atomic_folder(folder) as target:
        shutil.copytree(copy, target, dirs_exist_ok=True)
    shutil.rmtree(copy)


def test_weights_trained_again_are_held_against_the_shipped_ones(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "run", notebooks([]))
    kept = reproduce.kept_as_shipped(["points/plane", "points/tilted", "points/base"])
    reproduce.reproduce(kept=kept)
    assert reproduce.retrained() == []  # copies, with their cards
    points = places.run_dir("reproduce") / "quick" / "store" / "points"
    (plane,), (tilted,) = points.glob("plane-*"), points.glob("tilted-*")
    as_trained_again(plane, other_bits=False)
    as_trained_again(tilted, other_bits=True)
    found = reproduce.retrained()
    assert {one.artefact for one in found} == {f"points/{plane.name}", f"points/{tilted.name}"}
    assert [one.artefact for one in found if not one.same] == [f"points/{tilted.name}"]
    said = reproduce.report([], found).splitlines()
    assert said[1] == f"1 of {len(found)} files of weights have other bits (*)"
    assert said[2].startswith(f"* points/{tilted.name}/clouds.safetensors: ")
    assert said[2].endswith(" -> another, AVX2") and len(said) == 3


def test_only_profiles_that_train_are_taken_and_the_variable_is_checked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(BadInput, match="profile"):
        reproduce.reproduce(profile="smoke")
    monkeypatch.setenv("TURBO_LAB_SHIPPED", "no")
    with pytest.raises(BadInput, match="TURBO_LAB_SHIPPED"):
        Store.default()


def test_hours_are_those_of_stages_once_each_and_of_cards_where_no_history_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = Store(cache=tmp_path / "shipped")
    store = Store(cache=tmp_path / "cache", shipped=(shipped.cache,))
    monkeypatch.setattr(Store, "default", lambda: store)
    made = shipped.get_or_make("points/plane", {"kind": "plane"}, lambda folder: None)
    (made.path / "card.json").write_text(json.dumps({"seconds": 5400}))
    late, early = resolve("teacher"), resolve(EARLY)
    for teacher in (late, early):  # the later one goes on from the early one's last stage
        lines = [
            {"stage": depth, "step": step, "seconds": seconds}
            for depth, stage in enumerate(teacher.stages, start=1)
            for step, seconds in ((20, 3.0), (stage.steps, 0.5))
        ]
        made = shipped.get_or_make(teacher.artefact, teacher.spec(), lambda folder: None)
        (made.path / "history.jsonl").write_text("\n".join(map(json.dumps, lines)))
    kept = [made.path]  # the early one
    seconds = [20 * 3.0 + (stage.steps - 20) * 0.5 for stage in late.stages]
    new = seconds[len(early.stages) :]
    assert 0 < len(new) < len(seconds)
    assert reproduce.training_hours() == pytest.approx(1.5 + sum(seconds) / 3600)
    assert reproduce.training_hours(kept) == pytest.approx(1.5 + sum(new) / 3600)
    plane = reproduce.kept_as_shipped(["points/plane"])
    assert reproduce.training_hours(plane) == pytest.approx(sum(seconds) / 3600)
