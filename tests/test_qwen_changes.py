"""Other numbers in a recipe: what is named changes, nothing else does, and the rest is refused."""

from __future__ import annotations

import pytest

from turbo_lab.errors import BadInput
from turbo_lab.recipes.qwen_changes import changed
from turbo_lab.recipes.qwen_image import resolve_qwen

TURBO = resolve_qwen("turbo", size=1024, images=True)


@pytest.mark.parametrize(
    ("change", "stages", "path", "value"),
    [
        ("2.options.rival_updates=1", (1,), "options.rival_updates", 1),
        ("all.options.times=1,0.5", (1, 2), "options.times", (1.0, 0.5)),
        ("1.options.edges=0.5", (0,), "options.edges", (0.5,)),
        ("3.rates.student.lr=1e-4", (2,), "rates.student.lr", 1e-4),
        ("3.gan.blocks=1,2", (2,), "gan.blocks", (1, 2)),
        ("all.steps=7", (0, 1, 2), "steps", 7),
        ("2.batch_size=32", (1,), "batch_size", 32),
    ],
)
def test_what_is_named_changes(
    change: str, stages: tuple[int, ...], path: str, value: object
) -> None:
    made = changed(TURBO, [change]).model_dump()
    before = TURBO.model_dump()
    for k, (new, old) in enumerate(zip(made["stages"], before["stages"], strict=True)):
        *above, last = path.split(".")
        inner, outer = new, old
        for name in above:
            inner, outer = (d[name] if d is not None else {} for d in (inner, outer))
        if k in stages:
            assert inner[last] == value and type(inner[last]) is type(value)
            inner[last] = outer[last]
        if path == "batch_size" and k in stages:
            assert new["micro_batches"] == 16  # 2 pictures of 1024 px in a pass
            new["micro_batches"] = old["micro_batches"]
    assert made == before


def test_changes_follow_each_other_and_make_another_key() -> None:
    assert changed(TURBO, []) is TURBO
    assert changed(TURBO, ["1.steps=5", "all.steps=7"]) == changed(TURBO, ["all.steps=7"])
    assert changed(TURBO, ["1.steps=5"]).spec() != TURBO.spec()
    assert changed(TURBO, ["1.steps=2000"]).spec() == TURBO.spec()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("steps", "write STAGE.NAME=VALUE"),
        ("2=1", "write STAGE.NAME=VALUE"),
        ("4.steps=1", "begin with a stage from 1 to 3"),
        ("0.steps=1", "begin with a stage from 1 to 3"),
        ("1.options.times=1,0.5", "no such value is there; choose one of batch_size, ema, "),
        ("1.method=dmd2", "no such value is there"),
        ("1.steps=many", "use an integer"),
        ("1.rates.student.lr=fast", "use a number"),
        ("1.options.edges=high", "with commas between them"),
        ("1.steps=0", "greater than or equal to 1"),
        ("1.rates.student.lr=nan", "less than or equal to 1"),
        ("2.batch_size=0", "greater than or equal to 1"),
        ("all.options.times=0.5,1", "times in [0, 1], each below the last"),
        ("2.options.rival_updates=0", "use an integer of at least 1"),
        ("3.gan.view=400", "a crop of 32 latents has 256 pixels"),
        ("3.gan.crop=512", "use at most 128 latents"),
    ],
)
def test_what_is_not_allowed_is_one_sentence(change: str, said: str) -> None:
    with pytest.raises(BadInput) as error:
        changed(TURBO, [change])
    assert str(error.value).startswith(f"set={change!r} is not allowed: ")
    assert said in str(error.value) and "\n" not in str(error.value)
