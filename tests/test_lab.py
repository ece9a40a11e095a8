"""The bench: samples are drawn once, bars print one line each, bad input is one sentence."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_lab import small, small_lab, small_student

from turbo_lab import bars, lab, progress
from turbo_lab.acceptance import Bar
from turbo_lab.atomic import save_tensors
from turbo_lab.claims import Interval
from turbo_lab.errors import BadInput, MissingPiece
from turbo_lab.lab import Lab
from turbo_lab.path import time_grid
from turbo_lab.postcards import draw_scenes, render
from turbo_lab.quality import RATES, TITLES, Yardstick
from turbo_lab.recipes import EARLY, resolve
from turbo_lab.recipes.trajectory import progressive
from turbo_lab.sampling import Sampling, checked_sampling
from turbo_lab.store import Artefact, Store
from turbo_lab.testbeds.postcards import NetSize, Postcards, spawn_net

TINY = NetSize(layers=1, heads=1, head_width=16, text_width=16)


@pytest.fixture
def bench(tmp_path: Path) -> Lab:
    return Lab(
        recipe=resolve("teacher"),
        artefact=kept(Store(cache=tmp_path), 0),
        testbed=Postcards(net=spawn_net(TINY, 0).eval()),
        store=Store(cache=tmp_path),
        device="cpu",
    )


def kept(store: Store, seed: int) -> Artefact:
    """Weights of a tiny net under one key, whatever the seed: made again each time."""

    def make(folder: Path) -> None:
        save_tensors(folder, "weights.safetensors", spawn_net(TINY, seed).state_dict())

    return store.get_or_make("postcards/teacher", {"name": "tiny"}, make, fresh=True)


def test_samples_are_drawn_once_and_counted(bench: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    sampling = Sampling(steps=3, n=2)
    first = bench.samples(sampling)
    assert first.nfe == 6
    assert first.images.shape == (2, 3, 32, 32)
    assert first.scenes.captions == draw_scenes("eval", range(2)).captions
    monkeypatch.setattr(Lab, "draw", lambda *_: pytest.fail("drawn twice"))
    again = bench.samples(sampling)
    assert torch.equal(first.images, again.images) and first.key == again.key
    with pytest.raises(pytest.fail.Exception, match="drawn twice"):
        bench.samples(Sampling(steps=3, n=2, seed=1))


def test_samples_of_a_network_trained_again_are_drawn_again(bench: Lab) -> None:
    sampling = Sampling(steps=2, n=2)
    first = bench.samples(sampling)
    again = kept(bench.store, 1)
    assert again.key == bench.artefact.key
    other = Postcards(net=spawn_net(TINY, 1).eval())
    second = replace(bench, artefact=again, testbed=other).samples(sampling)
    assert not torch.equal(first.images, second.images)
    same = replace(bench, artefact=kept(bench.store, 0)).samples(sampling)
    assert same.key == first.key and torch.equal(same.images, first.images)


def test_a_student_trained_again_is_worn_anew(tmp_path: Path) -> None:
    small_bench = small_lab(tmp_path)
    recipe = small_student(small_bench, "dmd2", steps=2, profile="smoke", seed=0)
    before = small_bench.worn(recipe, small_bench.trained(recipe), family="dmd2", steps=2)

    def shifted(folder: Path) -> None:
        weights = {k: v + 1 for k, v in before.artefact.tensors().items()}
        save_tensors(folder, "weights.safetensors", weights)

    artefact = small_bench.store.get_or_make(recipe.artefact, recipe.spec(), shifted, fresh=True)
    after = small_bench.worn(recipe, artefact, family="dmd2", steps=2)
    assert after.artefact.key == before.artefact.key
    one, two = (small_bench.samples(s.sampling(n=2), "", s).images for s in (before, after))
    assert not torch.equal(one, two)


def test_a_shipped_student_on_a_teacher_trained_again_gives_a_warning(tmp_path: Path) -> None:
    first = small_lab(tmp_path / "shipped")
    recipe = small_student(first, "dmd2", steps=2, profile="smoke", seed=0)
    first.trained(recipe)
    store = Store(cache=tmp_path / "cache", shipped=(tmp_path / "shipped",))

    def again(shift: float) -> Lab:
        def make(folder: Path) -> None:
            weights = {k: v + shift for k, v in first.artefact.tensors().items()}
            save_tensors(folder, "weights.safetensors", weights)

        spec = first.recipe.spec()
        artefact = store.get_or_make(first.recipe.artefact, spec, make, fresh=True)
        return replace(first, artefact=artefact, store=store, hosts={}, others={})

    for same in (replace(first, store=store, hosts={}, others={}), again(0.0)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            same.worn(recipe, same.trained(recipe), family="dmd2", steps=2)
    other = again(0.5)
    with pytest.warns(UserWarning, match="postcards/dmd2-2 was distilled from the shipped"):
        other.worn(recipe, other.trained(recipe), family="dmd2", steps=2)


def test_a_student_whose_steps_differ_in_length_is_sampled_where_it_was_trained(
    tmp_path: Path,
) -> None:
    small_bench = small_lab(tmp_path)
    recipe = small(
        progressive("smoke", 0, teacher_steps=20, chain=(5, 2), name="uneven"), small_bench.recipe
    )
    student = small_bench.worn(recipe, small_bench.trained(recipe), family="progressive", steps=2)
    assert student.sampling(n=1).grid.tolist() == pytest.approx([1, 0.4, 0])


def test_a_student_is_worn_on_its_own_teacher_whichever_bench_is_asked(
    bench: Lab, tmp_path: Path
) -> None:
    store = Store(cache=tmp_path, shipped=Store.default().shipped)
    bench = replace(bench, store=store)
    student = bench.student("dmd2", steps=2)
    assert student.bench.recipe == resolve(EARLY) and bench.beside(resolve(EARLY)) is student.bench
    assert bench.beside(bench.recipe) is bench
    sampling = student.sampling(n=2)
    ours = bench.samples(sampling, "", student)
    assert ours.key == student.bench.samples(sampling, "", student).key
    own = lab.open_lab(device="cpu", store=store, teacher=EARLY)
    drawn, nfe, _ = own.draw(sampling, "", own.student("dmd2", steps=2))
    assert nfe == 2 and torch.equal(ours.images, drawn)


def test_a_bench_is_of_a_whole_network(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=f"teacher='dmd2-2' is not allowed.*{EARLY}"):
        lab.open_lab(device="cpu", store=Store(cache=tmp_path), teacher="dmd2-2")


def test_explicit_times_take_the_place_of_steps_and_shift() -> None:
    assert Sampling(steps=2, times=(1.0, 0.7155)).grid.tolist() == pytest.approx([1, 0.7155, 0])
    assert torch.equal(Sampling(steps=3, shift=2.0).grid, time_grid(3, shift=2.0))
    with pytest.raises(BadInput, match="one per step, 3"):
        checked_sampling({"steps": 3, "times": (1.0, 0.5)})
    for times, said in (
        ((0.5, 0.7), "times"),
        ((0.7, 0.5), "the first must be 1"),
        ((1.0, 0.0), "without the closing 0"),
    ):
        with pytest.raises(BadInput, match=said):
            checked_sampling({"steps": 2, "times": times})


def test_unguided_sampling_costs_one_call_per_step(bench: Lab) -> None:
    assert bench.samples(Sampling(steps=3, n=2, guidance_scale=1.0)).nfe == 3


def test_real_pictures_measure_as_real(bench: Lab) -> None:
    scenes = draw_scenes("eval", range(120))
    table = Yardstick(n=240).table(render(scenes), scenes, resamples=100).set_index("metric")
    assert set(table.index) == set(TITLES)
    assert bool((table["low"] <= table["value"]).all() and (table["value"] <= table["high"]).all())
    for rate in RATES:
        assert table.loc[rate, "value"] == (0.0 if rate in ("ghost_signs", "sign_lost") else 1.0)
    for ground in ("moss", "fur", "sky"):
        assert table.loc[f"{ground}_energy", "low"] < 1.1
        assert table.loc[f"{ground}_energy", "high"] > 0.9
    blurred = torch.nn.functional.avg_pool2d(render(scenes), 3, stride=1, padding=1)
    worse = Yardstick(n=240).table(blurred, scenes, resamples=100).set_index("metric")
    assert worse.loc["moss_energy", "high"] < table.loc["moss_energy", "low"]
    assert worse.loc["moss_patches", "low"] > table.loc["moss_patches", "high"]
    assert worse.loc["sign_read", "high"] < 0.5


def test_a_device_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert lab.chosen_device("auto") == lab.chosen_device("cpu") == "cpu"
    with pytest.raises(MissingPiece, match="cuda"):
        lab.chosen_device("cuda")
    with pytest.raises(BadInput, match="device='tpu'"):
        lab.chosen_device("tpu")


def test_bars_print_a_line_each_and_fail_when_one_is_short(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def good() -> Iterator[Bar]:
        rate = Interval(value=0.99, low=0.98, high=0.995)
        yield Bar(name="a", value=0.99, side="at least", limit=0.98, interval=rate)

    def short() -> Iterator[Bar]:
        yield Bar(name="b", value=0.2, side="at most", limit=0.05, unit="nats")

    monkeypatch.setattr(bars, "BARS", {"good": good, "short": short})
    assert bars.main("good") == 0
    assert bars.main() == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "a 0.99 [0.98, 0.995], at least 0.98 ok"
    assert lines[2] == "b 0.2 nats, at most 0.05 short"
    with pytest.raises(BadInput, match="good, short"):
        bars.main("nothing")


def test_progress_is_silent_when_off_and_refuses_other_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(progress.VARIABLE, "off")
    with progress.progress(3, "x") as tick:
        tick(3, "")
    monkeypatch.setenv(progress.VARIABLE, "log")
    monkeypatch.setattr(progress, "LOG_EVERY", 0.0)
    with progress.progress(4, "drawing") as tick:
        tick(1, "loss 2")
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("drawing: 1/4 loss 2")
    monkeypatch.setenv(progress.VARIABLE, "loud")
    with pytest.raises(BadInput, match="TURBO_LAB_PROGRESS"), progress.progress(1, "x"):
        pass


@pytest.mark.parametrize(("delay", "shown"), [(0, True), (60, False)])
def test_a_delayed_bar_is_not_shown_for_what_was_there(
    delay: float, shown: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(progress.VARIABLE, "bar")
    with progress.progress(3, "training", delay=delay) as tick:
        tick(1, "")
    assert ("training" in capsys.readouterr().err) == shown


@pytest.mark.parametrize(("mode", "shown"), [("off", False), ("log", False), ("bar", True)])
def test_libraries_show_bars_where_ours_are_shown(
    mode: str, shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers.utils import logging as diffusers
    from transformers.utils import logging as transformers

    monkeypatch.setenv(progress.VARIABLE, mode)
    with pytest.raises(KeyError), progress.library_bars():
        assert [one.is_progress_bar_enabled() for one in (diffusers, transformers)] == [shown] * 2
        raise KeyError
    assert diffusers.is_progress_bar_enabled() and transformers.is_progress_bar_enabled()
    monkeypatch.setenv(progress.VARIABLE, "loud")
    with pytest.raises(BadInput, match="TURBO_LAB_PROGRESS"), progress.library_bars():
        pass


def test_a_log_tells_the_time_left_by_the_pace_since_its_last_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A resumed training: 900 of 1,000 were there, and a step takes a second."""
    clock = iter([0.0, 10.0, 20.0, 30.0])
    monkeypatch.setenv(progress.VARIABLE, "log")
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress.progress(1000, "training") as tick:
        for done in (910, 920, 930):
            tick(done, "")
    lines = capsys.readouterr().err.splitlines()
    assert "(80 s left)" in lines[1] and "(70 s left)" in lines[2]
