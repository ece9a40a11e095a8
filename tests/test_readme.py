"""The README's headline is what the committed numbers say, and nothing while there are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from turbo_lab import cli, readme
from turbo_lab.errors import BadInput, MissingPiece

ROOT = Path(__file__).parents[1]
NUMBERS: dict[str, Any] = {
    "columns": [
        {"key": "read", "title": "signs | read", "digits": 2},
        {"key": "kl", "title": "hue KL", "digits": 3},
    ],
    "rows": [
        {"title": "teacher", "nfe": 80, "values": {"read": [0.9, 0.88, 0.917], "kl": [0, 0, 0.1]}},
        {"title": "student", "nfe": 2.0, "values": {"read": [0.5, 0.4, 0.6]}},
    ],
    "note": "1,000 captions.",
}
BLOCK = """\
|  | NFE | signs \\| read | hue KL |
|---|---:|---:|---:|
| teacher | 80 | 0.90 [0.88, 0.92] | 0.000 [0.000, 0.100] |
| student | 2 | 0.50 [0.40, 0.60] |  |

1,000 captions."""


def _checkout(folder: Path, numbers: Any) -> Path:
    text = f"# A\n\n{readme.BEGIN}\nold\n{readme.END}\n\nrest\n"
    (folder / "README.md").write_text(text)
    if numbers is not None:
        path = folder / readme.SOURCE
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(numbers))
    return folder


def test_the_committed_block_is_what_the_committed_numbers_say() -> None:
    block = readme.block_of((ROOT / "README.md").read_text("utf-8"))
    assert block == readme.rendered(readme.headline(ROOT))
    assert bool(block) == (ROOT / readme.SOURCE).is_file()


def test_the_figure_of_the_block_is_committed() -> None:
    shown = readme.headline(ROOT)
    named = shown.figure if shown else ""
    assert not named or (ROOT / readme.SOURCE).with_name(f"{named}.png").is_file()


def test_a_block_is_written_once(tmp_path: Path) -> None:
    root = _checkout(tmp_path, NUMBERS)
    assert readme.write(root) and not readme.write(root)
    text = (root / "README.md").read_text()
    assert text == f"# A\n\n{readme.BEGIN}\n{BLOCK}\n{readme.END}\n\nrest\n"


def test_a_figure_stands_above_the_table(tmp_path: Path) -> None:
    root = _checkout(tmp_path, NUMBERS | {"figure": "ladder"})
    readme.write(root)
    first = readme.block_of((root / "README.md").read_text()).splitlines()[0]
    assert first == "![1,000 captions.](figures/06_two_step_turbo/ladder.png)"


def test_without_numbers_the_block_is_emptied(tmp_path: Path) -> None:
    root = _checkout(tmp_path, None)
    assert readme.write(root)
    assert (root / "README.md").read_text() == f"# A\n\n{readme.BEGIN}\n{readme.END}\n\nrest\n"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rows": []}, "rows"),
        ({"rows": [{"title": "t", "nfe": 0, "values": {}}]}, r"rows\.0\.nfe"),
        ({"rows": [{"title": "t", "nfe": 2, "values": {"read": [1, 2]}}]}, r"values\.read"),
        ({"figure": "../../x"}, "figure"),
        ({"more": 1}, "more"),
    ],
)
def test_wrong_numbers_are_named(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    root = _checkout(tmp_path, NUMBERS | change)
    with pytest.raises(BadInput, match=named):
        readme.write(root)
    assert "old" in (root / "README.md").read_text()


def test_numbers_that_are_none_are_refused(tmp_path: Path) -> None:
    row = {"title": "t", "nfe": 2, "values": {"read": [float("nan"), 0, 1]}}
    root = _checkout(tmp_path, NUMBERS | {"rows": [row]})
    with pytest.raises(BadInput):
        readme.headline(root)


@pytest.mark.parametrize("text", ["", readme.BEGIN, f"{readme.END}{readme.BEGIN}", 2 * readme.END])
def test_marks_have_to_be_there_once(text: str) -> None:
    with pytest.raises(BadInput, match="marks"):
        readme.block_of(text)


def test_the_command_writes_the_checkout_it_is_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TURBO_LAB_ROOT", str(_checkout(tmp_path, NUMBERS)))
    with pytest.raises(SystemExit) as ended:
        cli.main(["readme"])
    assert ended.value.code == 0
    assert BLOCK in (tmp_path / "README.md").read_text()
    assert "README.md" in capsys.readouterr().out


def test_a_folder_without_a_readme_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(MissingPiece, match=r"README\.md"):
        readme.write(tmp_path)
