"""Photographs as the real side of a critic: cut as they should be, keyed by what is in them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_lab import small_lab
from test_gan_postcards import MIXED, student
from torch import Tensor
from typer.testing import CliRunner

from turbo_lab import recipes, training
from turbo_lab.cli import app
from turbo_lab.errors import BadInput, MissingPiece
from turbo_lab.lab import Lab
from turbo_lab.postcards.captions import null_tokens
from turbo_lab.recipes import Folder, Gan, real_folder, with_folder
from turbo_lab.streams import Draw
from turbo_lab.testbeds.photos import Photos, folder_digest, load_photos, photo_batch
from turbo_lab.testbeds.postcards import decode

SHAPES = {"a.png": (40, 52), "b.webp": (64, 33), "c.jpg": (48, 48)}
SEEN = MIXED.model_copy(update={"rho": 1.0, "pairs": None})


def pixels(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def filled(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for k, (name, shape) in enumerate(SHAPES.items()):
        options = {"lossless": True} if name.endswith("webp") else {}
        Image.fromarray(pixels(*shape, seed=k)).save(folder / name, **options)
    (folder / "notes.txt").write_text("not a picture")
    return folder


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return small_lab(tmp_path_factory.mktemp("store"))


def as_tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.copy()).permute(2, 0, 1)


# --- squares ------------------------------------------------------------------------------------


def test_the_centre_of_a_picture_is_its_square_averaged_by_area() -> None:
    array = pixels(64, 80)
    (crop,) = Photos(pictures=(as_tensor(array),), place="centre").crops(
        Draw(seed=0, step=0, total=1)
    )
    blocks = array[:, 8:72].astype(float).reshape(32, 2, 32, 2, 3).mean((1, 3)) / 127.5 - 1
    assert np.allclose(crop.permute(1, 2, 0).numpy(), blocks, atol=1e-5)


def test_random_squares_are_windows_of_all_pictures_and_reach_every_edge() -> None:
    arrays = [pixels(34, 35, seed=k) for k in range(2)]
    photos = Photos(pictures=tuple(as_tensor(a) for a in arrays), side=32)
    crops = photos.crops(Draw(seed=0, step=3, total=400))
    found = set()
    windows = {
        (a[y : y + 32, x : x + 32].tobytes()): (k, y, x)
        for k, a in enumerate(arrays)
        for y in range(3)
        for x in range(4)
    }
    for crop in crops:
        whole = ((crop + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
        found.add(windows[whole.tobytes()])
    assert found == set(windows.values())  # 24 places in 400 draws, and no other


def test_squares_are_their_seed_stream_and_step_row_by_row() -> None:
    photos = Photos(pictures=(as_tensor(pixels(90, 70)),), side=40)
    draw = Draw(seed=1, step=2, total=6)
    whole = photos.crops(draw)
    parts = [photos.crops(draw.rows(*rows)) for rows in ((0, 2), (2, 6))]
    assert torch.equal(torch.cat(parts), whole)
    for other in (draw.sub("else"), Draw(seed=2, step=2, total=6), Draw(seed=1, step=3, total=6)):
        assert not torch.equal(photos.crops(other), whole)
    batch = photo_batch(photos, draw)
    assert torch.equal(decode(batch.x), whole) and torch.equal(batch.c, null_tokens(6))


def test_squares_that_do_not_fit_are_refused() -> None:
    picture = as_tensor(pixels(40, 40))
    for options in ({"side": 41}, {"side": 31}):
        with pytest.raises(BadInput, match=r"at least (41|32) pixels"):
            Photos(pictures=(picture,), **options)
    with pytest.raises(BadInput, match="at least 32 pixels"):
        Photos(pictures=())


# --- folders ------------------------------------------------------------------------------------


def test_a_folder_is_what_is_in_it_wherever_it_is(tmp_path: Path) -> None:
    here, there = filled(tmp_path / "here"), filled(tmp_path / "there")
    (there / "a.png").rename(there / "z.PNG")
    assert folder_digest(here) == folder_digest(there)
    draw = Draw(seed=0, step=0, total=8)
    one, other = (
        load_photos(str(f), folder_digest(here), None, "random").crops(draw) for f in (here, there)
    )
    assert torch.equal(one, other) and len(one.flatten(1).unique(dim=0)) > 3
    (there / "c.jpg").unlink()
    assert folder_digest(here) != folder_digest(there)
    with pytest.raises(BadInput, match="no longer those of this recipe"):
        load_photos(str(there), folder_digest(here), None, "centre")
    with pytest.raises(MissingPiece, match=r"a folder that is not here .*gone"):
        load_photos(str(tmp_path / "gone"), folder_digest(here), None, "random")


def test_grey_pictures_come_as_rgb(tmp_path: Path) -> None:
    grey = pixels(32, 32)[..., 0]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    photos = load_photos(str(tmp_path), folder_digest(tmp_path), None, "centre")
    (crop,) = photos.crops(Draw(seed=0, step=0, total=1))
    known = torch.from_numpy(grey / 127.5 - 1).float().expand(3, -1, -1)
    assert torch.allclose(crop, known, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("bad.png", b"no picture at all", r"bad\.png' is not allowed: it is no image"),
        ("cut.png", "cut", r"cut\.png' is not allowed: it is damaged"),
        ("cut.jpg", "cut", r"cut\.jpg' is not allowed: it is damaged"),
        ("small.png", "small", r"small\.png' is not allowed: it has 31 x 40 pixels"),
    ],
)
def test_a_bad_file_is_named_in_one_sentence(
    name: str, content: bytes | str, said: str, tmp_path: Path
) -> None:
    file = filled(tmp_path / "pictures") / name
    Image.fromarray(pixels(*((40, 31) if content == "small" else (64, 64)))).save(file)
    if content == "cut":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    if isinstance(content, bytes):
        file.write_bytes(content)
    with pytest.raises(BadInput, match=said) as caught:
        folder = real_folder(file.parent)
        load_photos(folder.path, folder.digest, folder.side, folder.place)
    assert str(caught.value).count("\n") == 0


def test_no_folder_and_an_empty_one_are_refused(tmp_path: Path) -> None:
    for folder, said in ((tmp_path / "none", "name a folder"), (tmp_path, "it holds none of")):
        with pytest.raises(BadInput, match=said):
            real_folder(folder)


# --- in a recipe --------------------------------------------------------------------------------


def test_the_key_knows_the_contents_and_not_the_path(tmp_path: Path) -> None:
    plain = recipes.resolve("turbo")
    folders = [real_folder(filled(tmp_path / name)) for name in ("one", "two")]
    one, two = (with_folder(plain, folder).spec() for folder in folders)
    assert one == two != plain.spec() and str(tmp_path) not in str(one)
    assert recipes.Recipe.model_validate(one).spec() == one
    (tmp_path / "two" / "a.png").unlink()
    less = real_folder(tmp_path / "two")
    assert with_folder(plain, less).spec() != one
    centred = folders[0].model_copy(update={"place": "centre"})
    assert with_folder(plain, centred).spec() != one


def test_the_critic_sees_the_folder_and_the_student_its_own_prompts(
    bench: Lab, tmp_path: Path
) -> None:
    folder = real_folder(filled(tmp_path / "pictures"), side=32)
    recipe = with_folder(student(bench.recipe, SEEN), folder)
    work = training.workbench(recipe, bench.store)
    plain = training.workbench(student(bench.recipe, None), bench.store)
    draw = Draw(seed=0, step=1, total=4)
    assert work.gan is not None
    photos = load_photos(folder.path, folder.digest, 32, "random")
    real = work.gan.real(draw)
    assert torch.equal(decode(real.x), photos.crops(draw.sub("data")))
    assert torch.equal(real.c, null_tokens(4))
    assert torch.equal(work.batches(draw).x, plain.batches(draw).x)
    both = with_folder(student(bench.recipe, MIXED), folder)
    half = training.workbench(both, bench.store).gan
    assert half is not None
    rows = half.real(Draw(seed=0, step=0, total=64)).c
    share = (rows == null_tokens(1)).all(1).float().mean()
    assert 0.25 < share < 0.75  # rho is 0.5; the rest has the captions of the teacher's samples


def test_a_training_on_a_folder_replays_and_says_when_the_folder_is_gone(
    bench: Lab, tmp_path: Path
) -> None:
    pictures = filled(tmp_path / "pictures")
    recipe = with_folder(student(bench.recipe, SEEN), real_folder(pictures))
    artefact = training.trained(recipe, store=bench.store)
    assert training.replay(recipe, artefact, bench.store) == training.recorded(artefact)
    pictures.rename(tmp_path / "moved")
    load_photos.cache_clear()  # as in another process
    assert training.trained(recipe, store=bench.store).key == artefact.key  # it is there already
    with pytest.raises(MissingPiece, match="name it again"):
        training.replay(recipe, artefact, bench.store)
    again = with_folder(student(bench.recipe, SEEN), real_folder(tmp_path / "moved"))
    assert training.replay(again, artefact, bench.store) == training.recorded(artefact)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"heads": "caption"}, "heads='caption' is not allowed: .* no captions"),
        ({"features": "teacher"}, "features='teacher' is not allowed: .* no captions"),
        ({"features": "fake"}, "features='fake' is not allowed: .* no captions"),
        ({"rho": 0.0, "pairs": recipes.Pairs(n=2, steps=1)}, "shows no real picture"),
    ],
)
def test_a_critic_that_would_need_captions_is_refused(
    changed: dict[str, object], said: str
) -> None:
    folder = Folder(digest="0" * 16)
    with pytest.raises(ValueError, match=said):
        Gan(**{"rho": 1.0, "weight": 1.0, "folder": folder, **changed})
    gan = Gan(**{"rho": 1.0, "weight": 1.0, **changed})
    with pytest.raises(BadInput, match=said):
        with_folder(student(recipes.resolve("teacher"), gan), folder)
    with pytest.raises(BadInput, match="has no GAN term"):
        with_folder(recipes.resolve("dmd2-2"), folder)


def test_the_command_says_what_a_folder_is_not_for(tmp_path: Path) -> None:
    filled(tmp_path)
    cases = (("gan-teacher", "no captions"), ("dmd2-2", "no GAN term"), ("dino", "alone"))
    for name, said in cases:
        done = CliRunner().invoke(app, ["train", name, "--images", str(tmp_path)])
        assert done.exit_code != 0
        assert said in (done.output + str(done.exception))
