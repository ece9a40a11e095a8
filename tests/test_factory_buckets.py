"""Aspect buckets: shapes, who goes where, batches of one shape, and trainings on them."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factory_world import SMALL, changed, history, job, write_shaped
from PIL import Image
from test_factory_gan import GANS

from turbo_lab import factory, factory_data
from turbo_lab.errors import BadInput
from turbo_lab.factory_memory import described, memory_plan
from turbo_lab.factory_plan import Job
from turbo_lab.features import RANDOM
from turbo_lab.fit import Batch, Record
from turbo_lab.path import qwen_mu
from turbo_lab.store import Store
from turbo_lab.streams import Draw, rng
from turbo_lab.testbeds.qwen_buckets import (
    RATIOS,
    Buckets,
    Shape,
    bucket_batch,
    nearest,
    shapes_of,
    square,
)
from turbo_lab.testbeds.qwen_data import items
from turbo_lab.testbeds.qwen_files import load_vae
from turbo_lab.testbeds.qwen_pictures import Codec, assigned, fitted

WIDE, SQUARE, TALL = Shape(width=80, height=48), square(64), Shape(width=48, height=80)


# --- shapes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 4, 9, 32])
def test_shapes_are_the_best_of_all_that_are_no_larger(n: int) -> None:
    """The factor by which ratio and area are off together, over every pair of sides."""

    def off(w: int, h: int, ratio: Fraction) -> float:
        return abs(math.log(w / h / ratio)) + math.log(n * n / (w * h))

    pairs = [(w, h) for w in range(1, n * n + 1) for h in range(1, n * n // w + 1)]
    found = shapes_of(16 * n)
    best = [min(off(w, h, Fraction(*r)) for w, h in pairs) for r in RATIOS]
    for ratio, least in zip(RATIOS, best, strict=True):
        reached = [off(s.width // 16, s.height // 16, Fraction(*ratio)) for s in found]
        assert min(reached) == pytest.approx(least, abs=1e-12)
    assert found[0] == square(16 * n) and len(set(found)) == len(found)
    assert {(s.height, s.width) for s in found} == {(s.width, s.height) for s in found}


@pytest.mark.parametrize("size", [512, 1024, 1328])
def test_shapes_have_the_published_ratios_at_the_area_of_the_square(size: int) -> None:
    found = shapes_of(size)
    for shape, (w, h) in zip(found, RATIOS, strict=True):
        assert shape.width % 16 == shape.height % 16 == 0
        assert 0.98 * size**2 < shape.width * shape.height <= size**2
        assert shape.width / shape.height == pytest.approx(w / h, rel=0.04)
        assert shape.latent == (16, shape.height // 8, shape.width // 8)
        assert math.log(shape.shift) == pytest.approx(qwen_mu(shape.width * shape.height // 256))


def test_a_picture_goes_where_its_ratio_is_the_nearest() -> None:
    shapes = shapes_of(512)
    for w, h in rng(0, "sides").integers(100, 4000, (500, 2)).tolist():
        distances = [abs(math.log(w / h) - math.log(s.width / s.height)) for s in shapes]
        chosen = distances[shapes.index(nearest(w, h, shapes))]
        assert chosen == pytest.approx(min(distances), abs=1e-12)
    assert nearest(5000, 10, shapes).width == 672 and nearest(7, 7, shapes) == square(512)


# --- pictures -----------------------------------------------------------------------------------


def ramp(path: Path, width: int, height: int, **saved: Any) -> Path:
    """A picture that tells where a pixel is: red along its width, green along its height."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width)[None]
    pixels[..., 1] = np.linspace(0, 255, height)[:, None]
    Image.fromarray(pixels).save(path, **saved)
    return path


@pytest.mark.parametrize("sides", [(160, 90), (200, 81), (97, 150), (80, 48), (301, 300)])
def test_pictures_are_as_large_as_covers_their_bucket_and_cut_in_the_middle(
    tmp_path: Path, sides: tuple[int, int]
) -> None:
    """A pixel of the bucket is as many of the picture's either way, and one side stays whole."""
    width, height = sides
    file = ramp(tmp_path / "a.png", width, height)
    (shape,) = assigned([file], shapes_of(64))
    got = (fitted(file, shape) + 1) / 2
    assert got.shape == (3, shape.height, shape.width)
    step = min(width / shape.width, height / shape.height)  # closed form
    assert step >= 1
    across, down = got[0, :, 2:-2].mean(0), got[1, 2:-2].mean(1)  # filters end at the rim
    for line, whole in ((across, width), (down, height)):
        slope = float((line[-3] - line[2]) / (len(line) - 5))
        assert slope * (whole - 1) == pytest.approx(step, rel=0.05)
        assert float(line[2:-2].mean()) == pytest.approx(0.5, abs=0.02)


def test_no_picture_is_enlarged_and_a_turned_one_is_seen_upright(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    upright, lying = ramp(tmp_path / "a.png", 100, 60), tmp_path / "b.png"
    ramp(lying, 100, 60, exif=turned)
    assert assigned([upright, lying], shapes_of(64)) == (WIDE, TALL)
    assert fitted(lying, TALL).shape == (3, 80, 48)
    with pytest.raises(BadInput, match=r"c.png.*it has 79 x 48 pixels, and its bucket has 80 x 48"):
        assigned([ramp(tmp_path / "c.png", 79, 48)], shapes_of(64))
    (tmp_path / "d.png").write_bytes(b"no image")
    with pytest.raises(BadInput, match=r"d.png.*it is no image that can be read"):
        assigned([tmp_path / "d.png"], shapes_of(64))


# --- batches ------------------------------------------------------------------------------------

OF = (WIDE, SQUARE, WIDE, TALL, WIDE, WIDE, SQUARE, WIDE, TALL, WIDE)
"""Six wide pictures, two squares and two tall ones."""


def numbered(buckets: Buckets, seed: int, draw: Draw) -> Batch:
    """A batch whose samples are the numbers of its pictures, in their shape."""

    def supply(shape: Shape, seed: int, draw: Draw) -> Batch:
        places = items(draw, len(buckets.members[shape]), seed)
        numbers = torch.tensor([float(buckets.members[shape][k]) for k in places])
        return Batch(numbers[:, None, None, None].expand(-1, *shape.latent), torch.tensor(places))

    supplies = {s: lambda seed, draw, s=s: supply(s, seed, draw) for s in buckets.members}
    return bucket_batch(buckets, supplies, seed, draw)


def test_every_batch_has_one_bucket_and_each_comes_as_often_as_its_share() -> None:
    buckets = Buckets(of=OF)
    assert buckets.members == {WIDE: (0, 2, 4, 5, 7, 9), TALL: (3, 8), SQUARE: (1, 6)}
    for seed in (0, 1):
        seen, turns = Counter[int](), []
        for step in range(30):
            batch = numbered(buckets, seed, Draw(seed=9, step=step, total=4))
            shapes = {OF[k] for k in batch.c.tolist()}
            assert len(shapes) == 1 and batch.x.shape[1:] == next(iter(shapes)).latent
            assert torch.equal(batch.x[:, 0, 0, 0], batch.c.float())
            turns.append(next(iter(shapes)))
            seen.update(batch.c.tolist())
        for first in (0, 10, 20):
            assert Counter(turns[first : first + 10]) == Counter(OF)
        assert set(seen.values()) == {12} and len(seen) == 10  # no picture more than another
        assert turns[:10] != turns[10:20]
        places = [buckets.turn(step, seed) for step in range(30)]
        assert [shape for shape, _ in places] == turns
        for shape in buckets.members:  # the items of a bucket go on where its last batch ended
            assert [k for s, k in places if s == shape] == list(range(turns.count(shape)))
    other = [buckets.turn(step, 0)[0] for step in range(30)]
    assert other != turns


def test_a_batch_is_a_function_of_seed_and_step_and_slices_by_rows() -> None:
    buckets, draw = Buckets(of=OF), Draw(seed=9, step=17, total=6)
    whole = numbered(buckets, 3, draw)
    parts = [numbered(Buckets(of=OF), 3, draw.rows(a, b)) for a, b in ((0, 1), (1, 4), (4, 6))]
    assert torch.equal(torch.cat([part.c for part in parts]), whole.c)
    again = numbered(buckets, 3, Draw(seed=1, step=17, total=6, stream="another"))
    assert torch.equal(again.c, whole.c)  # all turns of a round see one batch, as without buckets


# --- trainings ----------------------------------------------------------------------------------


def bucketed(world: Path, recipe: str = "consistency", **options: Any) -> Job:
    images = write_shaped(world)
    given = {"size": 64, "buckets": "aspect", "images": images, "prompts": world / "five.txt"}
    return changed(job(world, recipe, **{**given, **options}), adapter=SMALL)


def test_latents_have_the_shapes_of_their_buckets_and_are_cached_by_them(
    factory_world: Path, tmp_path: Path
) -> None:
    work, store = bucketed(factory_world), Store(cache=tmp_path / "cache")
    assert work.shapes == (WIDE, SQUARE, WIDE, TALL, WIDE)
    supply = factory_data.image_supply(work, store)
    assert supply is not None
    codec, seen = Codec(vae=load_vae(work.bundle, "cpu")), set()
    for step in range(5):
        batch = supply(0, Draw(seed=0, step=step, total=3))
        for x, number in zip(batch.x, batch.c.tolist(), strict=True):
            picture = fitted(work.images[number], work.shapes[number])
            assert torch.equal(x, codec.encode(picture[None])[0])
            assert x.shape == work.shapes[number].latent
            seen.add(number)
    assert seen == set(range(5))
    folders = {path.name for path in (tmp_path / "cache" / "qwen_image").glob("latents-*")}
    assert len(folders) == 3
    (square_one,) = (k for k, shape in enumerate(work.shapes) if shape == SQUARE)
    one = [work.images[square_one]]
    factory_data.encoded(work.bundle, one, shape=SQUARE, store=store, device="cpu")
    assert {p.name for p in (tmp_path / "cache" / "qwen_image").glob("latents-*")} == folders


@pytest.mark.parametrize("recipe", ["progressive", "continuous", "pcm-dmd2-2"])
def test_methods_train_on_buckets(
    factory_world: Path, factory_caches: Store, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, shapes = bucketed(factory_world, recipe), set[tuple[int, ...]]()

    def spied(*given: Any) -> Batch:
        batch = bucket_batch(*given)
        shapes.add(tuple(batch.x.shape[1:]))
        return batch

    monkeypatch.setattr(factory_data, "bucket_batch", spied)
    artefact = factory.trained(work, store=factory_caches)
    for line in history(artefact):
        assert all(math.isfinite(value) for value in line["terms"].values())
        assert all(0 < norm < math.inf for norm in line["norms"].values())
    assert len(shapes) > 1 and shapes <= {shape.latent for shape in work.shapes}


def test_each_shape_has_the_shift_of_its_own_tokens(
    factory_world: Path, factory_caches: Store
) -> None:
    work = bucketed(factory_world)
    bench = factory._bench(work, factory_caches)
    objective: Any = bench.objective(work.recipe.stages[0])
    assert {k: m.shift for k, m in objective.copies.items()} == {
        shape.latent: math.exp(qwen_mu(shape.tokens)) for shape in (WIDE, SQUARE, TALL)
    }
    assert objective.copies[WIDE.latent].shift != objective.copies[SQUARE.latent].shift
    (stage,) = work.recipe.stages
    fixed = stage.model_copy(update={"options": {**stage.options, "shift": 3.0}})
    chosen: Any = bench.objective(fixed)
    assert {method.shift for method in chosen.copies.values()} == {3.0}
    x = torch.zeros(2, 16, 4, 4)
    with pytest.raises(BadInput, match=r"^batch=\(16, 4, 4\) is not allowed: the shapes are"):
        objective.turns()[0].loss(Batch(x, torch.arange(2)), Draw(seed=0, step=0, total=2))


def test_a_critic_sees_both_sides_in_the_shape_of_the_step(
    factory_world: Path, factory_caches: Store
) -> None:
    """Its teacher's samples are drawn in buckets too, with the prompts of the images in them."""
    work = bucketed(factory_world, "pcm-dmd2-2")
    last = work.recipe.stages[-1]
    rates = {**last.rates, "critic": last.rates["student"]}
    changes = {"gan": GANS["dino"], "rivals_from": None, "rates": rates, "steps": 3}
    stage = last.model_copy(update=changes)
    work = dataclasses.replace(changed(work, stages=(stage,)), vit=RANDOM)
    artefact = factory.trained(work, store=factory_caches)
    (line,) = history(artefact)
    assert {"critic/teacher", "student/gan"} <= line["terms"].keys()
    assert all(math.isfinite(value) for value in line["terms"].values())
    bench = factory._bench(work, factory_caches)
    objective: Any = bench.objective(stage)
    assert len({id(copy.critic) for copy in objective.copies.values()}) == 1
    real = next(iter(objective.copies.values())).real
    for step in range(5):
        draw = Draw(seed=0, step=step, total=8)
        own, shown = bench.supply(0, draw), real(draw.sub("real"))
        assert own.x.shape == shown.x.shape
        assert {work.shapes[k].latent for k in shown.c.tolist()} == {tuple(own.x.shape[1:])}


def test_samples_of_the_teacher_have_the_prompts_of_their_bucket(
    factory_world: Path, factory_caches: Store
) -> None:
    """A sample is drawn again from its noise, by the teacher asked by the prompt's own number."""
    from turbo_lab.recipes.models import Pairs
    from turbo_lab.sample import final, sample

    work = bucketed(factory_world)
    bench = factory._bench(work, factory_caches)
    supply = factory_data._taught(work, bench.testbed, Pairs(n=5, steps=2), factory_caches)
    found = {}
    for step in range(5):
        batch = supply(0, Draw(seed=0, step=step, total=1))
        found[tuple(batch.x.shape[1:])] = batch
    for shape in (WIDE, TALL):
        x, c, z = found[shape.latent]
        assert work.shapes[int(c)] == shape and z is not None
        grid = bench.testbed.schedule.grid(2, shape.tokens)
        torch.testing.assert_close(final(sample(bench.testbed.teacher, grid, z, c)), x)


def test_a_killed_training_on_buckets_ends_as_one_that_was_not(
    factory_world: Path, factory_caches: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = bucketed(factory_world)
    (stage,) = work.recipe.stages
    work = changed(work, stages=(stage.model_copy(update={"steps": 6}),))
    straight = factory.trained(work, store=factory_caches)
    killed: list[int] = []

    def trip(record: Record, done: int) -> None:
        if done == 4 and not killed:
            killed.append(done)
            raise RuntimeError("the power went out")

    monkeypatch.setattr(factory, "SAVE_SECONDS", 0.0)
    store = Store(cache=tmp_path)
    with pytest.raises(RuntimeError, match="power"):
        factory.trained(work, store=store, watch=trip)
    resumed = factory.trained(work, store=store, watch=trip)
    a, b = straight.tensors(), resumed.tensors()
    assert killed and a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --- what is checked before ---------------------------------------------------------------------


def test_buckets_are_in_the_key_only_where_they_are_asked_for(factory_world: Path) -> None:
    images = write_shaped(factory_world)
    given = {"images": images, "prompts": factory_world / "five.txt", "size": 48}
    plain, asked = (job(factory_world, "pcm", **given, buckets=b) for b in ("", "square"))
    assert plain.specs() == asked.specs() and plain.shapes == ()
    assert all("buckets" not in spec["recipe"] for spec in plain.specs())
    shaped = job(factory_world, "pcm", **given, buckets="aspect")
    ours, theirs = shaped.specs()[0], plain.specs()[0]
    assert ours["recipe"] == {**theirs["recipe"], "buckets": "aspect"}
    assert {k: v for k, v in ours.items() if k != "recipe"} == {
        k: v for k, v in theirs.items() if k != "recipe"
    }


def test_a_plan_shows_the_buckets(factory_world: Path) -> None:
    work = bucketed(factory_world)
    assert "buckets: 3 of 80 x 48, 1 of 48 x 80, 1 of 64 x 64\n" in described(work)
    assert all(shape.tokens <= work.recipe.tokens for shape in work.shapes)
    assert memory_plan(work) == memory_plan(changed(work, buckets=None))


@pytest.mark.parametrize(
    ("recipe", "options", "said"),
    [
        ("pcm", {"buckets": "round"}, "buckets='round' is not allowed: use aspect or square"),
        ("dmd2-2", {"images": None}, "buckets='aspect' is not allowed: dmd2-2 has no images here"),
        ("direct-2", {}, "images='given' is not allowed: direct-2 learns from samples"),
        ("turbo", {"vit": RANDOM}, "buckets='aspect' is not allowed: the critic's crops have 64"),
    ],
)
def test_buckets_that_cannot_be_are_one_sentence(
    factory_world: Path, recipe: str, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(BadInput) as error:
        bucketed(factory_world, recipe, **options)
    assert str(error.value).startswith(said)


def test_the_whole_recipe_takes_buckets_at_512(factory_world: Path, tmp_path: Path) -> None:
    ramp(tmp_path / "a.png", 700, 400)
    ramp(tmp_path / "b.png", 520, 520)
    given = {"images": tmp_path, "prompts": factory_world / "prompts.txt", "size": 512}
    work = job(factory_world, "turbo", **given, buckets="aspect", vit=RANDOM)
    assert work.shapes == (Shape(width=672, height=384), square(512))
    assert work.recipe.stages[-1].gan is not None
