"""turbo-lab sample: a grid in a PNG that says how to draw it again; wrong input writes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_lab import TINY
from typer.testing import CliRunner

from turbo_lab import pictures
from turbo_lab.cli import app
from turbo_lab.lab import Lab
from turbo_lab.path import grid_from_times
from turbo_lab.pictures import checked_order, sample_images
from turbo_lab.postcards import caption_tokens
from turbo_lab.recipes import resolve
from turbo_lab.sample import draw_samples
from turbo_lab.sampling import Sampling
from turbo_lab.store import Artefact, Store
from turbo_lab.testbeds.postcards import Postcards, spawn_net

ONE = "a figure with arms raised, legs apart, on moss, the sign reads 42"
TWO = "a figure with arms lowered, legs together, on sky, the sign reads 07"


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    """A teacher of random weights, which the command opens instead of the shipped one."""
    net = spawn_net(TINY, 0).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.5)
    lab = Lab(
        recipe=resolve("teacher"),
        artefact=Artefact(
            path=tmp_path,
            key="0" * 12,
            name="postcards/teacher",
            spec={},
            digests={"weights.safetensors": "0" * 64},
        ),
        testbed=Postcards(net=net),
        store=Store(cache=tmp_path / "cache"),
        device="cpu",
    )
    monkeypatch.setattr(pictures, "open_lab", lambda **_: lab)
    return lab


def cells(path: Path, rows: int, columns: int) -> np.ndarray:
    """The pictures of a sheet at their own size: ``[rows * columns, 32, 32, 3]``."""
    sheet = np.asarray(Image.open(path))[::8, ::8]
    assert sheet.shape == (33 * rows - 1, 33 * columns - 1, 3)
    places = [(33 * r, 33 * c) for r in range(rows) for c in range(columns)]
    return np.stack([sheet[y : y + 32, x : x + 32] for y, x in places]).astype(int)


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["sample", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_grid_shows_every_caption_equally_often(bench: Lab, tmp_path: Path) -> None:
    out = tmp_path / "x.png"
    assert run(ONE, TWO, "--steps", "2", "--grid", "2x3", "--out", str(out)) == f"{out}\n"
    images, _, _ = bench.draw_for(caption_tokens([ONE] * 3 + [TWO] * 3), Sampling(steps=2))
    expected = ((images.clamp(-1, 1) + 1) * 127.5 + 0.5).to(torch.uint8).permute(0, 2, 3, 1)
    shown = cells(out, 2, 3)
    assert np.abs(shown - expected.numpy().astype(int)).max() <= 1
    assert len({cell.tobytes() for cell in shown}) == 6


def test_without_a_grid_there_is_one_picture_of_each_caption(bench: Lab, tmp_path: Path) -> None:
    run("--caption", ONE, "--caption", TWO, "--steps", "1", "--out", str(tmp_path / "x.png"))
    assert len(cells(tmp_path / "x.png", 1, 2)) == 2
    order = checked_order(captions=[ONE] * 11)
    assert (len(order.captions), order.columns) == (11, 8)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_a_picture_depends_on_its_number_and_not_on_its_batch(
    bench: Lab, batch: int, eta: float
) -> None:
    def drawn(first: int, n: int, batch: int) -> torch.Tensor:
        return draw_samples(
            bench.testbed.net,
            grid_from_times((1.0, 0.5)),
            bench.testbed.shape,
            caption_tokens([ONE] * n),
            seed=3,
            indices=range(first, first + n),
            eta=eta,
            batch=batch,
        )

    with torch.no_grad():
        whole = drawn(0, 5, 5)
        torch.testing.assert_close(drawn(0, 5, batch), whole, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(drawn(3, 1, 1)[0], whole[3], rtol=1e-4, atol=1e-5)
    assert (whole[3] - whole[2]).abs().max() > 0.1


def test_one_picture_of_a_grid_can_be_drawn_alone(bench: Lab, tmp_path: Path) -> None:
    grid, alone = tmp_path / "grid.png", tmp_path / "alone.png"
    run(ONE, "--steps", "2", "--seed", "7", "--grid", "2x2", "--out", str(grid))
    run(ONE, "--steps", "2", "--seed", "7", "--first", "3", "--out", str(alone))
    assert np.abs(cells(grid, 2, 2)[3] - cells(alone, 1, 1)[0]).max() <= 1
    run(ONE, "--steps", "2", "--seed", "8", "--first", "3", "--out", str(alone))
    assert np.abs(cells(grid, 2, 2)[3] - cells(alone, 1, 1)[0]).max() > 10


def test_the_png_says_how_to_draw_it_again(bench: Lab, tmp_path: Path) -> None:
    out = tmp_path / "x.png"
    run(ONE, TWO, "--steps", "3", "--seed", "5", "--grid", "1x2", "--out", str(out))
    said = Image.open(out).text  # type: ignore[attr-defined]
    assert said["prompt"] == f"{ONE}\n{TWO}"
    assert (said["recipe"], said["artefact"]) == ("teacher", "0" * 12)
    assert (said["seed"], said["steps"], said["grid"], said["first"]) == ("5", "3", "1x2", "0")
    assert json.loads(said["sigmas"]) == pytest.approx([1, 2 / 3, 1 / 3, 0], abs=1e-6)
    assert said["guidance_scale"] == "4" and said["Software"].startswith("turbo-lab ")
    again = tmp_path / "again.png"
    same = [*said["prompt"].split("\n"), "--steps", said["steps"], "--seed", said["seed"]]
    run(*same, "--grid", said["grid"], "--out", str(again))
    assert again.read_bytes() == out.read_bytes()


def test_a_family_and_the_key_of_its_artefact_draw_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what is shipped: a student of 2 steps, by name and by key."""
    monkeypatch.setenv("TURBO_LAB_CACHE", str(tmp_path / "cache"))
    by_name, by_key = tmp_path / "name.png", tmp_path / "key.png"
    run(ONE, "--student", "warm-second-0.5", "--grid", "1x2", "--out", str(by_name))
    said = Image.open(by_name).text  # type: ignore[attr-defined]
    assert said["recipe"] == "warm-second-0.5" and json.loads(said["sigmas"]) == [1, 0.5, 0]
    assert said["steps"] == "2" and said["guidance_scale"] == "1"
    run(ONE, "--student", said["artefact"], "--grid", "1x2", "--out", str(by_key))
    assert by_key.read_bytes() == by_name.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "caption='' is not allowed: give at least one caption"),
        (["a dog"], "arms raised|lowered"),
        ([ONE, "--testbed", "faces"], "testbed='faces'"),
        ([ONE, "--steps", "0"], "steps=0 is not allowed"),
        ([ONE, "--steps", "1001"], "steps=1001 is not allowed"),
        ([ONE, "--guidance", "-1"], "guidance_scale=-1.0 is not allowed"),
        ([ONE, "--guidance", "nan"], "guidance_scale=nan is not allowed"),
        ([ONE, "--seed", "-1"], "seed=-1 is not allowed"),
        ([ONE, "--first", "-1"], "first=-1 is not allowed"),
        ([ONE, "--grid", "4"], "grid='4' is not allowed: write ROWSxCOLUMNS"),
        ([ONE, "--grid", "0x4"], "grid='0x4' is not allowed"),
        ([ONE, "--grid", "-1x4"], "grid='-1x4' is not allowed"),
        ([ONE, "--grid", "33x1"], "each from 1 to 32"),
        ([ONE, "--grid", "4x4x4"], "grid='4x4x4' is not allowed"),
        ([ONE, TWO, "--grid", "3x1"], "its 3 places cannot show 2 captions equally often"),
        ([ONE, "--out", "picture.jpg"], "out='picture.jpg' is not allowed: name a .png file"),
        ([ONE, "--out", "nowhere/x.png"], "its folder must exist"),
        ([ONE, "--out", "folder.png"], "it is a folder"),
        ([ONE, "--out", f"{'a' * 260}.png"], "nothing can be written there (File name too long)"),
        ([ONE, "--out", "/proc/x.png"], "nothing can be written there"),
        ([ONE, "--student", "dmd9"], "student='dmd9' is not allowed"),
        ([ONE, "--student", "direct", "--steps", "3"], "steps=3 is not allowed"),
        ([ONE, "--student", "dmd2", "--guidance", "2"], "has its guidance distilled in"),
        ([ONE, "--student", "0123456789ab"], "no artefact has this key"),
        ([ONE, "--student", "77b68707efec"], "is a whole network"),
        ([ONE, "--device", "tpu"], "device='tpu' is not allowed"),
    ],
)
def test_wrong_input_is_one_sentence_before_anything_is_loaded(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TURBO_LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("turbo_lab.lab._trained", lambda *_, **__: pytest.fail("loaded"))
    (tmp_path / "folder.png").mkdir()
    before = sorted(tmp_path.rglob("*"))
    result = CliRunner().invoke(app, ["sample", *arguments])
    assert result.exit_code == 2, result.output
    assert said in result.stderr
    assert result.stderr.count("\n") == 1 and result.stdout == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_what_is_not_finite_is_no_picture(bench: Lab, tmp_path: Path) -> None:
    with torch.no_grad():
        next(bench.testbed.net.parameters()).fill_(torch.nan)
    result = CliRunner().invoke(
        app, ["sample", ONE, "--steps", "1", "--out", str(tmp_path / "x.png")]
    )
    assert result.exit_code == 1 and "not finite" in result.stderr
    assert not (tmp_path / "x.png").exists()


def test_a_picture_is_written_whole_or_not_at_all(
    bench: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "x.png"
    out.write_bytes(b"before")

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Lab, "draw_for", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sample_images(checked_order(captions=[ONE]), str(out))
    assert out.read_bytes() == b"before"
