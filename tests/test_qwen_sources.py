"""Prompts from tables and pictures from tar shards."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import pytest
import tiny_qwen
import torch

from turbo_lab import factory_plan
from turbo_lab.errors import BadInput, MissingPiece
from turbo_lab.factory_plan import _texts
from turbo_lab.testbeds.qwen_buckets import square
from turbo_lab.testbeds.qwen_pictures import check_pictures, file_hash, fitted
from turbo_lab.testbeds.qwen_sources import is_sharded, read_column, read_prompts, read_shards


def pack(shard: Path, **files: bytes) -> Path:
    """Write a tar archive; a name's last underscore is its dot."""
    with tarfile.open(shard, "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo("train/" + ".".join(name.rsplit("_", 1)))
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return shard


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    return sorted(tiny_qwen.write_images(tmp_path / "loose", n=3).iterdir())


@pytest.fixture
def shards(tmp_path: Path, pictures: list[Path]) -> Path:
    """Two shards with three captioned pictures, and a file that belongs to none."""
    a, b, c = (file.read_bytes() for file in pictures)
    folder = tmp_path / "shards"
    folder.mkdir()
    pack(folder / "b.tar", z_png=c, z_txt=b"a  third\n")
    pack(folder / "a.tar", x_txt=b"a cat", x_png=a, y_png=b, y_txt=b"a dog", readme_md=b"no")
    return folder


def test_pictures_in_shards_are_those_that_were_packed(shards: Path, pictures: list[Path]) -> None:
    found = read_shards(shards)
    assert is_sharded(shards) and not is_sharded(pictures[0].parent)
    assert found.captions == ("a cat", "a dog", "a third")
    for packed, loose in zip(found.pictures, pictures, strict=True):
        assert file_hash(packed) == file_hash(loose)
        assert torch.equal(fitted(packed, square(32)), fitted(loose, square(32)))
    assert [p.name for p in read_shards(shards / "b.tar").pictures] == ["train/z.png"]
    with pytest.raises(BadInput, match=r"b.tar: train/z.png.*at least 512"):
        check_pictures(read_shards(shards / "b.tar").pictures, size=512)


def test_a_caption_that_lacks_means_none(shards: Path, pictures: list[Path]) -> None:
    pack(shards / "c.tar", w_png=pictures[0].read_bytes())
    assert read_shards(shards).captions == () and len(read_shards(shards).pictures) == 4


def test_shards_train_as_the_folder_does(
    factory_world: Path, shards: Path, pictures: list[Path], tmp_path: Path
) -> None:
    """The same pictures and texts give the same keys, whatever they lie in."""
    options: dict[str, Any] = {
        "recipe": "consistency",
        "model": str(factory_world / "model"),
        "size": 32,
        "profile": "smoke",
    }
    texts = tiny_qwen.write_prompts(tmp_path / "p.txt", "a cat", "a dog", "a third")
    loose = factory_plan.check(**options, prompts=texts, images=pictures[0].parent)
    packed = factory_plan.check(**options, images=shards)
    assert packed.specs() == loose.specs()
    with pytest.raises(BadInput, match=r"^column='x' is not allowed: p.txt is no table"):
        factory_plan.check(**options, prompts=texts, column="x")
    with pytest.raises(BadInput, match=r"^prompts=None"):
        factory_plan.check(**options)


def test_shards_that_are_none_are_one_sentence(tmp_path: Path, pictures: list[Path]) -> None:
    broken = tmp_path / "broken.tar"
    broken.write_bytes(b"no archive")
    with tarfile.open(tmp_path / "small.tar", "w:gz") as archive:
        archive.add(pictures[0], "a.png")
    for wrong in (broken, tmp_path / "small.tar", tmp_path / "nowhere.tar"):
        with pytest.raises(BadInput, match="it is no tar archive, uncompressed"):
            read_shards(wrong)
    with pytest.raises(BadInput, match="it holds none of"):
        read_shards(pack(tmp_path / "empty.tar", a_txt=b"a"))
    with pytest.raises(BadInput, match=r"train/a.jpg.*has a picture already"):
        read_shards(pack(tmp_path / "two.tar", a_png=b"", a_jpg=b""))


def test_a_caption_in_another_encoding_is_refused_and_not_repaired(tmp_path: Path) -> None:
    shard = pack(tmp_path / "latin.tar", a_png=b"", a_txt="ein dösender Hund".encode("latin-1"))
    with pytest.raises(BadInput) as error:
        read_shards(shard)
    assert str(error.value) == (
        f"images='{shard}: train/a.txt' is not allowed: "
        "it is not UTF-8 from byte 5 (0xF6, on line 1) on; write captions in UTF-8."
    )


def test_prompt_files_are_read_and_refused_in_one_sentence(tmp_path: Path) -> None:
    file = tiny_qwen.write_prompts(tmp_path / "prompts.txt", "a cat", "", "  a dög ")
    assert read_prompts(file) == ("a cat", "a dög")
    file.write_text("\n")
    with pytest.raises(BadInput, match="it is empty"):
        read_prompts(file)
    file.write_bytes("\ufeffa cat\n".encode())
    assert read_prompts(file) == ("a cat",)
    for wrong in (tmp_path / "nowhere.txt", tmp_path):
        with pytest.raises(BadInput, match="name a UTF-8 text file with one prompt per line"):
            read_prompts(wrong)


@pytest.mark.parametrize("name", ["p.txt", "p.csv", "p.jsonl"])
def test_other_encodings_are_refused_at_their_first_bad_byte(tmp_path: Path, name: str) -> None:
    """In Latin-1 ö is one byte, F6, that cannot be where it is in UTF-8."""
    file = tmp_path / name
    file.write_bytes("prompt\nzwei Hunde im Moos\nein dösender Hund\n".encode("latin-1"))
    with pytest.raises(BadInput) as error:
        read_prompts(file) if name == "p.txt" else read_column(file)
    assert str(error.value).startswith(
        f"prompts={str(file)!r} is not allowed: "
        "it is not UTF-8 from byte 31 (0xF6, on line 3) on; name a "
    )


def test_tables_are_told_by_their_names_whatever_the_case(tmp_path: Path) -> None:
    table = tmp_path / "T.CSV"
    table.write_text("prompt,x\na cat,1\n")
    assert _texts(table, "", ()) == ("a cat",)
    for name in ("t.tsv", "t.json"):
        (tmp_path / name).write_text("prompt\tx\na cat\t1\n")
        with pytest.raises(BadInput, match="make it a"):
            _texts(tmp_path / name, "", ())


def test_prompts_are_a_column(tmp_path: Path) -> None:
    csv = tmp_path / "p.csv"
    csv.write_text('id,prompt,other\n1,"a cat, asleep",x\n2,,y\n3,"two\nlines",NA\n')
    assert read_column(csv) == ("a cat, asleep", "two lines")
    assert read_column(csv, "other") == ("x", "y", "NA")
    lines = tmp_path / "p.jsonl"
    lines.write_text('{"prompt": "2024-01-02"}\n{"prompt": null}\n{"text": "b"}\n')
    assert read_column(lines) == ("2024-01-02",) and read_column(lines, "text") == ("b",)
    with pytest.raises(BadInput, match=r"columns of p\.csv are id, prompt, other"):
        read_column(csv, "text")
    (tmp_path / "none.csv").write_text("prompt\n\n")
    with pytest.raises(BadInput, match="its column prompt holds no text"):
        read_column(tmp_path / "none.csv")
    (tmp_path / "bad.jsonl").write_text("{")
    for wrong in ("bad.jsonl", "nowhere.csv"):
        with pytest.raises(
            BadInput, match=r"name a \.csv, \.jsonl, \.parquet file that can be read"
        ):
            read_column(tmp_path / wrong)


def test_parquet_is_read_by_pandas_or_says_what_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pandas as pd

    def lacks(file: Path) -> Any:
        raise ImportError("Unable to find a usable engine")

    monkeypatch.setattr(pd, "read_parquet", lambda file: pd.DataFrame({"prompt": [file.stem]}))
    assert read_column(tmp_path / "a cat.parquet") == ("a cat",)
    monkeypatch.setattr(pd, "read_parquet", lacks)
    with pytest.raises(MissingPiece, match=r"^Parquet needs pyarrow"):
        read_column(tmp_path / "a cat.parquet")
