"""The table of published adapters against diffusers' own scheduler, and what files may say."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from turbo_lab.errors import BadInput
from turbo_lab.path import TerminalWarning, time_grid
from turbo_lab.schedules import (
    BASE,
    PUBLISHED,
    Published,
    Wanted,
    fixed,
    of_file,
    published,
    schedule_from,
    scheduler_config,
    spoiled,
    stock_sigmas,
    table,
    wanted_by,
)
from turbo_lab.studies.factory_schedules import sigma_figure
from turbo_lab.studies.hostile_loras import UNTIMED
from turbo_lab.testbeds.qwen_image import tokens_of

ROWS = pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: row.name)


@ROWS
def test_published_times_follow_from_their_settings(row: Published) -> None:
    stock = stock_sigmas(row.schedule, row.steps)
    torch.testing.assert_close(stock, torch.tensor([*row.sigmas, 0.0]), atol=6e-5, rtol=0)


@ROWS
@pytest.mark.parametrize("size", [512, 2048])
def test_ours_are_diffusers_times_at_any_size(row: Published, size: int) -> None:
    ours = row.schedule.grid(row.steps, tokens_of(size))
    torch.testing.assert_close(ours, stock_sigmas(row.schedule, row.steps, size=size))


def test_a_stock_pipelines_own_formula_for_mu_gives_the_same_shift() -> None:
    """A fixed shift is written as base_shift = max_shift, so that no size changes it."""
    from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift

    config = scheduler_config(fixed(2.5, terminal=0.7155))
    names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    for tokens in (1024, 6889, 16384):
        assert calculate_shift(tokens, *(config[n] for n in names)) == pytest.approx(math.log(2.5))


def test_the_models_own_terminal_spoils_every_adapter() -> None:
    """methods: [1.0, 0.02] for two steps and [1.0, 0.767, 0.456, 0.02] for four at 1024 px."""
    for row in PUBLISHED:
        for times in spoiled(row).values():
            assert float(times[-1]) == pytest.approx(0.02, abs=1e-6)
    own = spoiled(published("lightning-4"))["the model's own"]
    torch.testing.assert_close(own, torch.tensor([1.0, 0.7667, 0.4557, 0.02]), atol=2e-3, rtol=0)


@pytest.mark.parametrize("steps", [2, 8])
def test_few_steps_with_the_models_own_settings_warn(steps: int) -> None:
    with pytest.warns(TerminalWarning, match="no"):
        BASE.grid(steps, tokens_of(1024))


@pytest.mark.filterwarnings("error")
def test_one_step_begins_at_1_whatever_the_terminal() -> None:
    for schedule in (BASE, *(row.schedule for row in PUBLISHED)):
        assert schedule.grid(1, tokens_of(1024)).tolist() == [1.0, 0.0]


@pytest.mark.filterwarnings("error")
def test_nobody_is_warned_of_a_published_row_or_of_many_steps() -> None:
    for row in PUBLISHED:
        row.schedule.grid(row.steps, tokens_of(1024))
    BASE.grid(9, tokens_of(1024))


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("Wuli-Qwen-Image-2512-Turbo-LoRA-2steps-V1.0-bf16.safetensors", "wuli-2"),
        ("Qwen-Image-Lightning-4steps-V2.0.safetensors", "lightning-4"),
        ("qwen-image-2512-lightning-8steps-v1.0-bf16.safetensors", "lightning-8"),
        ("Wuli-Qwen-Image-2512-Turbo-LoRA-4steps-V3.0-bf16.safetensors", None),
        ("my_style.safetensors", None),
    ],
)
def test_adapters_are_known_by_the_names_of_their_files(file: str, name: str | None) -> None:
    row = of_file(file)
    assert (row.name if row else None) == name


def test_an_unknown_name_is_told_the_known_ones() -> None:
    with pytest.raises(BadInput, match="choose one of wuli-2,"):
        published("wuli")


# --- what a file says ---------------------------------------------------------------------------


@ROWS
def test_settings_survive_a_file(row: Published) -> None:
    config = json.dumps(scheduler_config(row.schedule))
    found = wanted_by({"scheduler": config, "steps": str(row.steps)})
    assert found == Wanted(steps=row.steps, schedule=row.schedule)


def test_times_survive_a_file() -> None:
    assert wanted_by({"sigmas": "[1.0, 0.7155, 0.0]"}) == Wanted(steps=2, sigmas=(1.0, 0.7155))
    assert wanted_by({"format": "pt"}).silent
    assert wanted_by({"steps": "20000"}).silent  # of somebody's training


def test_a_fixed_shift_is_read_as_diffusers_reads_it() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    ours = schedule_from(dict(scheduler.config)).grid(4, tokens_of(1024))
    torch.testing.assert_close(ours, scheduler.sigmas)
    torch.testing.assert_close(ours, time_grid(4, shift=3.0))


@pytest.mark.parametrize(
    "metadata",
    [
        {"scheduler": "["},
        {"scheduler": "[1]"},
        {"scheduler": '{"use_karras_sigmas": true}'},
        {"scheduler": '{"time_shift_type": "linear"}'},
        {"scheduler": '{"shift": "3"}'},
        {"scheduler": '{"shift": NaN}'},
        {"scheduler": '{"shift": 0}'},
        {"scheduler": '{"use_dynamic_shifting": true, "max_shift": Infinity}'},
        {"scheduler": '{"use_dynamic_shifting": true, "max_image_seq_len": 256}'},
        {"scheduler": '{"shift_terminal": 1.5}'},
        {"sigmas": "0.5"},
        {"sigmas": "[1.0, 1.0]"},
        {"sigmas": '[1.0, "0.5"]'},
        {"sigmas": "[true]"},
        {"sigmas": "[NaN]"},
        {"sigmas": "[" * 100_000},
        {"scheduler": "{}", "steps": "0"},
        {"scheduler": "{}", "steps": "2.5"},
        {"scheduler": "{}", "steps": "1000000"},
        {"scheduler": '{"shift_terminal": 1%s}' % ("0" * 400)},
        {"scheduler": '{"use_dynamic_shifting": true, "base_shift": null}'},
        *(UNTIMED[name] for name in ("sigmas-huge", "shift-huge", "mu-overflows", "mu-of-30")),
    ],
    ids=lambda metadata: str(metadata)[:80],
)
def test_a_file_that_makes_no_sense_is_one_sentence(metadata: dict[str, str]) -> None:
    with pytest.raises(BadInput) as error:
        wanted_by(metadata)
    assert len(str(error.value)) < 200


@pytest.mark.parametrize(
    ("name", "said"),
    [("mu-steep", "mu=36864"), ("times-equal-in-float32", "times="), ("terminal-0-in", "times=")],
)
def test_settings_without_falling_times_are_refused_when_they_are_asked(
    name: str, said: str
) -> None:
    (metadata,) = (words for key, words in UNTIMED.items() if key.startswith(name))
    wanted = wanted_by(metadata)
    assert wanted.schedule is not None and wanted.steps == 2
    with pytest.raises(BadInput, match=said):
        wanted.schedule.grid(wanted.steps, tokens_of(1024))


def test_a_time_that_is_0_in_float32_is_the_closing_one() -> None:
    assert wanted_by({"sigmas": "[1.0, 1e-50]"}) == Wanted(steps=1, sigmas=(1.0,))


# --- for a reader -------------------------------------------------------------------------------


def test_the_table_shows_every_row_and_its_mistakes() -> None:
    found = table()
    assert list(found.index) == [row.name for row in PUBLISHED]
    assert found.loc["wuli-2", "sigmas"] == "1, 0.7155"
    assert found.loc["wuli-2", "with terminal 0.02"] == "1, 0.02"
    assert replace(BASE, terminal=None).shift(6889) == pytest.approx(2.30, abs=0.01)


def test_the_figure_marks_each_time_of_each_adapter() -> None:
    figure = sigma_figure()
    assert isinstance(figure, Figure)
    (axis,) = figure.axes
    drawn = sum(np.size(line.get_xdata()) for line in axis.lines if line.get_marker() == "o")
    assert drawn == sum(row.steps for row in PUBLISHED)
