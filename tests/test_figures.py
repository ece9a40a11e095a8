"""Figures: the same data give the same bytes, and every file says where it comes from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from turbo_lab import figures


def draw(folder: Path) -> figures.Picture:
    table = pd.DataFrame(
        [
            {"steps": s, "metric": m, "value": v, "low": v - 0.1, "high": v + 0.1}
            for s in (float("nan"), 1.0, 2.0, 40.0)
            for m, v in (("a", 0.5), ("b", 0.7))
        ]
    )
    figure = figures.small_multiples(
        table, x="steps", metrics={"a": "first", "b": "second"}, xlabel="steps", columns=2
    )
    return figures.save(
        figure,
        "demo",
        folder,
        data={"table": table.to_dict("records")},
        parameters={"seed": 3},
        artefact_keys=["abc"],
    )


def test_a_rerun_writes_the_same_bytes_even_in_another_process(tmp_path: Path) -> None:
    shown = draw(tmp_path / "a")
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from pathlib import Path; from test_figures import draw\n"
        f"draw(Path({str(tmp_path / 'b')!r}))"
    )
    env = {k: v for k, v in os.environ.items() if k != "SOURCE_DATE_EPOCH"}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)
    for kind in ("png", "svg", "json"):
        first, second = ((tmp_path / f / f"demo.{kind}").read_bytes() for f in "ab")
        assert first == second, kind
    assert shown._repr_png_() == (tmp_path / "a" / "demo.png").read_bytes()


def test_a_sidecar_holds_data_parameters_artefacts_and_maker(tmp_path: Path) -> None:
    draw(tmp_path)
    side = json.loads((tmp_path / "demo.json").read_text())
    assert side["parameters"] == {"seed": 3}
    assert side["artefact_keys"] == ["abc"]
    assert {"commit", "dirty", "machine", "versions"} == side["made_by"].keys()
    assert side["data"]["table"][0]["steps"] is None  # NaN is not JSON
    assert side["data"]["table"][-1]["value"] == 0.7


def test_a_contact_sheet_keeps_pixels_in_place() -> None:
    images = -torch.ones(3, 3, 2, 2)
    images[1, 0] = 1.0  # the second image is red
    sheet = figures.contact_sheet(images, columns=2, enlarge=2, gap=1)
    assert sheet.shape == (10, 10, 3) and sheet.dtype == np.uint8
    assert (sheet[:4, :4] == 0).all()
    assert (sheet[:4, 6:] == [255, 0, 0]).all()
    assert (sheet[:4, 4:6] == 255).all() and (sheet[6:, 6:] == 255).all()


@pytest.mark.parametrize("value", [1.23456789, np.float32(1.2345678)])
def test_numbers_are_rounded_to_six_digits(value: float) -> None:
    assert figures.rounded({"a": [value, 3, "x", None]}) == {"a": [1.23457, 3, "x", None]}
