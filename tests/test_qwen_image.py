"""The factory's testbed against diffusers' own pipeline, on random weights of kilobytes."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_qwen
import torch
from PIL import Image
from torch import Tensor

from turbo_lab.adapters import AdapterSize
from turbo_lab.errors import BadInput
from turbo_lab.recipes.qwen_image import ADAPTER
from turbo_lab.sample import final, sample
from turbo_lab.store import Store
from turbo_lab.streams import Draw, noise
from turbo_lab.testbeds import qwen_data, qwen_files, qwen_pictures
from turbo_lab.testbeds.photos import read_photo
from turbo_lab.testbeds.postcards import pack
from turbo_lab.testbeds.qwen_buckets import Shape, square
from turbo_lab.testbeds.qwen_data import NULL, Prompts, embedded, items
from turbo_lab.testbeds.qwen_files import Bundle, load_vae, located
from turbo_lab.testbeds.qwen_image import QwenImage, Schedule, open_testbed, tokens_of
from turbo_lab.testbeds.qwen_pictures import Codec, assigned, encoded, find_images, fitted
from turbo_lab.testbeds.qwen_sizes import counted_parameters

TEXTS = ("a cat", "two dogs on the moss, the sign reads 42")
SIZE = 64


@pytest.fixture(scope="module")
def bundle(tiny_model: Path) -> Bundle:
    return located(str(tiny_model))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(cache=tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def prompts(bundle: Bundle, store: Store) -> Prompts:
    return embedded(bundle, TEXTS, " ", store=store, device="cpu")


@pytest.fixture(scope="module")
def stock(bundle: Bundle) -> Any:
    from diffusers import QwenImagePipeline

    pipeline = QwenImagePipeline.from_pretrained(bundle.folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def testbed(bundle: Bundle, prompts: Prompts) -> QwenImage:
    return open_testbed(bundle, prompts, size=SIZE)


# --- the field ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "scale"),
    [
        (square(SIZE), 1.0),
        (square(SIZE), 4.0),
        (Shape(width=112, height=64), 4.0),
        (Shape(width=64, height=112), 4.0),
    ],
    ids=str,
)
def test_guided_samples_and_pictures_are_those_of_a_stock_pipeline(
    testbed: QwenImage, bundle: Bundle, stock: Any, shape: Shape, scale: float
) -> None:
    """At the times of so many tokens, and with the rotations of such sides."""
    z = noise(shape.latent, seed=0, stream="z", indices=range(2))
    teacher = replace(testbed, guidance_scale=scale).teacher
    grid = testbed.schedule.grid(10, shape.tokens)
    ours = final(sample(teacher, grid, z, torch.arange(2)))
    if shape == square(SIZE):
        assert testbed.shape == shape.latent and torch.equal(testbed.grid(10), grid)
    call = {
        "prompt": list(TEXTS),
        "negative_prompt": [" ", " "],
        "true_cfg_scale": scale,
        "num_inference_steps": 10,
        "height": shape.height,
        "width": shape.width,
        "latents": pack(z),
    }
    theirs = stock(**call, output_type="latent").images
    torch.testing.assert_close(pack(ours), theirs, rtol=1e-4, atol=1e-4)
    pictures = Codec(vae=load_vae(bundle, "cpu")).decode(ours) / 2 + 0.5
    torch.testing.assert_close(pictures, stock(**call, output_type="pt").images, atol=1e-4, rtol=0)


def test_guidance_and_prompts_matter_in_the_tiny_world(testbed: QwenImage) -> None:
    z = noise(testbed.shape, seed=0, stream="z", indices=range(2))
    t = torch.full((2,), 0.7)
    plain, teacher = testbed.plain(z, t, torch.arange(2)), testbed.teacher(z, t, torch.arange(2))
    other = testbed.plain(z, t, torch.tensor([1, 0]))
    for v in (teacher, other):
        assert (v - plain).abs().mean() > 0.02 * plain.abs().mean()


def test_pictures_need_not_be_square(testbed: QwenImage) -> None:
    x = torch.randn(1, 16, 4, 8)
    net = testbed.host.net
    v = net(x, torch.ones(1), torch.tensor([0]))
    assert v.shape == x.shape
    turned = net(x.transpose(2, 3), torch.ones(1), torch.tensor([0]))
    assert not torch.allclose(v, turned.transpose(2, 3), atol=1e-3)


def test_times_are_rounded_as_the_pipeline_rounds_them(
    bundle: Bundle, prompts: Prompts, stock: Any
) -> None:
    """In bfloat16, where it shows: what reaches the time embedding is compared."""
    from diffusers import QwenImagePipeline

    net = open_testbed(bundle, prompts, size=SIZE).host.net.to(torch.bfloat16)
    net.dtype = torch.bfloat16  # type: ignore[assignment]
    seen: list[Tensor] = []
    net.transformer.time_text_embed.register_forward_pre_hook(  # type: ignore[union-attr]
        lambda _, inputs: seen.append(inputs[0])
    )
    pipeline = QwenImagePipeline(**{**stock.components, "transformer": net.transformer})
    pipeline.set_progress_bar_config(disable=True)
    embeds, mask = prompts.padded([0, 1])
    z = torch.randn(2, 16, 8, 8, dtype=torch.bfloat16)
    pipeline(
        prompt_embeds=embeds.bfloat16(),
        prompt_embeds_mask=mask,
        num_inference_steps=12,
        height=SIZE,
        width=SIZE,
        latents=pack(z),
        output_type="latent",
    )
    theirs = [float(t[0]) for t in seen]
    seen.clear()
    grid = Schedule.of(bundle).grid(12, tokens_of(SIZE))
    with torch.no_grad():
        for t in grid[:-1]:
            net(z, t.expand(2), torch.arange(2))
    assert [float(t[0]) for t in seen] == theirs


@pytest.mark.parametrize("size", [512, 1024, 1328])
@pytest.mark.parametrize("steps", [10, 50])
def test_the_schedule_is_the_schedulers(bundle: Bundle, stock: Any, size: int, steps: int) -> None:
    from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift

    mu = calculate_shift((size // 16) ** 2, 256, 8192, 0.5, 0.9)
    stock.scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=mu)
    ours = Schedule.of(bundle).grid(steps, tokens_of(size))
    torch.testing.assert_close(ours, stock.scheduler.sigmas, rtol=1e-5, atol=1e-6)


# --- prompts ------------------------------------------------------------------------------------


def test_embeddings_are_those_of_the_stock_pipeline(prompts: Prompts, stock: Any) -> None:
    with torch.no_grad():
        theirs, their_mask = stock.encode_prompt(list(TEXTS))
        null, null_mask = stock.encode_prompt([" "])
    embeds, mask = prompts.padded([0, 1])
    torch.testing.assert_close(embeds, theirs, rtol=1e-4, atol=1e-4)
    assert mask is not None and torch.equal(mask, their_mask.bool())
    assert null_mask is None
    embeds, mask = prompts.padded([NULL, NULL])
    torch.testing.assert_close(embeds, null.expand(2, -1, -1), rtol=1e-4, atol=1e-4)
    assert mask is None


def test_a_longer_list_reuses_whole_shards_and_a_known_one_loads_nothing(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(cache=tmp_path)
    monkeypatch.setattr(qwen_data, "PER_SHARD", {"prompts": 2})
    sizes: list[int] = []
    honest = qwen_data._embed

    def counting(pipeline: Any, texts: Any, numbers: Any) -> dict[int, Tensor]:
        sizes.append(len(numbers))
        return honest(pipeline, texts, numbers)

    monkeypatch.setattr(qwen_data, "_embed", counting)
    short = embedded(bundle, ["a", "b", "c"], " ", store=store, device="cpu")
    assert sizes == [2, 1, 1]  # and the negative prompt
    sizes.clear()
    longer = embedded(bundle, ["a", "b", "c", "d"], " ", store=store, device="cpu")
    assert sizes == [2]
    assert torch.equal(short.rows[1], longer.rows[1])
    monkeypatch.setattr(qwen_data, "load_text", lambda *_: pytest.fail("it was loaded again"))
    again = embedded(bundle, ["a", "b", "c"], " ", store=store, device="cpu")
    assert torch.equal(again.rows[2], short.rows[2])


def test_items_come_in_a_new_order_each_time_and_slice_by_rows() -> None:
    rounds = [items(Draw(seed=0, step=k, total=4), 6, seed=3) for k in range(6)]
    flat = [i for some in rounds for i in some]
    epochs = [flat[k : k + 6] for k in range(0, 24, 6)]
    assert all(sorted(epoch) == list(range(6)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    whole = Draw(seed=0, step=2, total=4)
    parts = [items(whole.rows(a, b), 6, seed=3) for a, b in ((0, 1), (1, 4))]
    assert parts[0] + parts[1] == rounds[2]


# --- pictures -----------------------------------------------------------------------------------


def test_latents_are_normalised_as_the_edit_pipeline_does(bundle: Bundle) -> None:
    from diffusers import QwenImageEditPipeline

    codec = Codec(vae=load_vae(bundle, "cpu"))
    images = torch.rand(2, 3, 32, 48) * 2 - 1
    with torch.no_grad():
        theirs = QwenImageEditPipeline._encode_vae_image(
            SimpleNamespace(vae=codec.vae, latent_channels=16), images[:, :, None], generator=None
        )
    torch.testing.assert_close(codec.encode(images), theirs[:, :, 0], rtol=1e-5, atol=1e-5)
    assert codec.encode(images).shape == (2, 16, 4, 6)


def test_pictures_are_cut_to_the_middle_and_upright(tmp_path: Path) -> None:
    stripes = np.zeros((32, 64, 3), dtype=np.uint8)
    stripes[:, 16:48] = 255  # the middle square is white
    image = Image.fromarray(stripes)
    image.save(tmp_path / "wide.png")
    assert torch.equal(fitted(tmp_path / "wide.png", square(32)), torch.ones(3, 32, 32))
    half = np.zeros((32, 32, 3), dtype=np.uint8)
    half[:, :16] = 255  # white on the left; turned by the camera's note it is white on top
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(half).save(tmp_path / "turned.png", exif=turned)
    got = fitted(tmp_path / "turned.png", square(32))
    assert (got[:, :16] == 1).all() and (got[:, 16:] == -1).all()


def test_encoding_goes_on_where_it_was_killed(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = find_images(tiny_qwen.write_images(tmp_path / "images", n=5), size=32)
    monkeypatch.setattr(qwen_pictures, "PER_SHARD", {"latents": 2})
    monkeypatch.setattr(qwen_data, "PER_SHARD", {"latents": 2})
    seen: list[str] = []
    honest = qwen_pictures.fitted

    def trip(file: Path, shape: Shape) -> Tensor:
        if len(seen) == 3:
            seen.append("killed")
            raise KeyboardInterrupt
        seen.append(file.name)
        return honest(file, shape)

    monkeypatch.setattr(qwen_pictures, "fitted", trip)
    store = Store(cache=tmp_path / "cache")
    with pytest.raises(KeyboardInterrupt):
        encoded(bundle, files, shape=square(32), store=store, device="cpu")
    rows = encoded(bundle, files, shape=square(32), store=store, device="cpu")
    assert seen == ["00.png", "01.png", "02.png", "killed", "02.png", "03.png", "04.png"]
    codec = Codec(vae=load_vae(bundle, "cpu"))
    assert torch.equal(rows[4], codec.encode(honest(files[4], square(32))[None])[0])


def test_folders_of_images_are_checked_before_anything_is_loaded(tmp_path: Path) -> None:
    folder = tiny_qwen.write_images(tmp_path / "images", n=2)
    assert [file.name for file in find_images(folder, size=64)] == ["00.png", "01.png"]
    with pytest.raises(BadInput, match=r"80 x 64 pixels, and both must be at least 512"):
        find_images(folder, size=512)
    (folder / "02.png").write_bytes(b"no image")
    with pytest.raises(BadInput, match=r"02.png.*it is no image that can be read"):
        find_images(folder, size=64)
    for wrong in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(BadInput, match=r"^images="):
            find_images(wrong, size=64)


@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_a_picture_that_is_cut_off_is_named(tmp_path: Path, kind: str) -> None:
    """Its head is whole, so nothing before the decoding of its pixels notices."""
    file = tmp_path / f"cut.{kind}"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert find_images(tmp_path, size=64) == (file,)
    with pytest.raises(BadInput, match=rf"^images='.*cut\.{kind}' is not allowed: it is damaged"):
        fitted(file, square(64))


def test_a_picture_with_too_many_pixels_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_qwen.write_images(tmp_path, n=1)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow refuses twice as many
    for read in (
        lambda: find_images(folder, size=64),
        lambda: assigned([folder / "00.png"], [square(64)]),
        lambda: fitted(folder / "00.png", square(64)),
        lambda: read_photo(folder / "00.png"),
    ):
        with pytest.raises(BadInput, match=r"00\.png' is not allowed: it has more pixels"):
            read()


# --- sizes --------------------------------------------------------------------------------------


def test_parameters_are_counted_without_weights(bundle: Bundle, testbed: QwenImage) -> None:
    size = AdapterSize(rank=3, alpha=3, targets=("to_q", "img_mod.1", "txt_mlp.net.2"))
    counts = counted_parameters(bundle, size)
    assert counts.transformer == sum(p.numel() for p in testbed.host.net.parameters())
    assert counts.vae == sum(p.numel() for p in load_vae(bundle, "cpu").parameters())
    assert counts.text_encoder == sum(
        p.numel() for p in qwen_files.load_text(bundle, "cpu").text_encoder.parameters()
    )
    fresh = open_testbed(bundle, testbed.host.net.prompts, size=SIZE)  # type: ignore[arg-type]
    student = fresh.spawn("student", size, seed=0)
    assert counts.adapter == sum(p.numel() for _, p in student.named_parameters())
    with pytest.raises(BadInput, match="targets='to_w'"):
        counted_parameters(bundle, AdapterSize(targets=("to_w",)))


def test_the_real_transformer_has_the_published_size(bundle: Bundle, tmp_path: Path) -> None:
    """20.43 billion, and 18.43 MB in bfloat16 for each rank of an adapter on 14 modules."""
    folder = tmp_path / "settings"
    shutil.copytree(bundle.folder, folder)
    (folder / "transformer" / "config.json").write_text("{}")  # the defaults of diffusers
    counts = counted_parameters(located(str(folder)), ADAPTER)
    assert counts.transformer == pytest.approx(20.43e9, rel=1e-3)
    assert 2 * counts.adapter / ADAPTER.rank == pytest.approx(18.43e6, rel=1e-3)
