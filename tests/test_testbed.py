"""The miniature against the factory: Qwen-Image's own packing, pipeline and guidance."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from turbo_lab.errors import BadInput
from turbo_lab.field import counted, guided
from turbo_lab.measure.palette import hue_mode, hue_shares, hue_truth
from turbo_lab.measure.views import hue_degrees
from turbo_lab.path import time_grid
from turbo_lab.postcards import draw_scenes, render
from turbo_lab.postcards.captions import null_tokens
from turbo_lab.sample import draw_samples, final, sample
from turbo_lab.streams import Draw, noise
from turbo_lab.testbeds.postcards import (
    LATENT_SHAPE,
    NetSize,
    PostcardNet,
    Postcards,
    decode,
    encode,
    grown,
    pack,
    spawn_net,
    train_batch,
    unpack,
)

TINY = NetSize(layers=2, heads=2, head_width=16, text_width=16)


@pytest.fixture(scope="module")
def net() -> PostcardNet:
    net = spawn_net(TINY, 0).eval()
    # A fresh network hardly depends on its caption; larger weights make every path count.
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(2.0)
    return net


def test_latents_and_tokens_are_exact_and_packed_as_qwen_does() -> None:
    from diffusers import QwenImagePipeline

    images = render(draw_scenes("eval", range(3)))
    latents = encode(images)
    assert latents.shape[1:] == LATENT_SHAPE
    assert torch.equal(decode(latents), images)
    theirs = QwenImagePipeline._pack_latents(latents, 3, 12, 16, 16)
    assert torch.equal(pack(latents), theirs)
    assert torch.equal(unpack(pack(latents)), latents)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_our_sampler_gives_what_a_stock_qwen_pipeline_gives(
    net: PostcardNet, guidance_scale: float
) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline

    pipeline = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        transformer=net.transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    tokens = draw_scenes("eval", range(2)).tokens
    z = noise(LATENT_SHAPE, seed=0, stream="z", indices=range(2))
    with torch.no_grad():
        ours = final(
            sample(guided(net, null_tokens(1), guidance_scale, "token"), time_grid(4), z, tokens)
        )
        mask = torch.ones(2, 5, dtype=torch.long)
        theirs = pipeline(
            prompt_embeds=net.captions(tokens),
            prompt_embeds_mask=mask,
            negative_prompt_embeds=net.captions(null_tokens(2)),
            negative_prompt_embeds_mask=mask,
            true_cfg_scale=guidance_scale,
            num_inference_steps=4,
            height=128,
            width=128,
            latents=pack(z),
            output_type="latent",
        ).images
    torch.testing.assert_close(ours, unpack(theirs), rtol=1e-4, atol=1e-5)


def test_teacher_costs_two_calls_per_step_and_is_frozen(net: PostcardNet) -> None:
    watched = counted(net)
    teacher = Postcards(net=watched).teacher  # type: ignore[arg-type]
    tokens = draw_scenes("eval", range(3)).tokens
    x = draw_samples(teacher, time_grid(5), LATENT_SHAPE, tokens, seed=0, indices=range(3))
    assert watched.per_image(3) == 10
    assert not x.requires_grad


def test_an_image_hardly_depends_on_its_batch(net: PostcardNet) -> None:
    teacher = Postcards(net=net).teacher
    tokens = draw_scenes("eval", range(5)).tokens
    draws = [
        draw_samples(
            teacher, time_grid(3), LATENT_SHAPE, tokens, seed=1, indices=range(5), batch=batch
        )
        for batch in (1, 2, 5)
    ]
    for draw in draws[1:]:
        torch.testing.assert_close(draws[0], draw, rtol=1e-4, atol=1e-5)


def test_training_data_never_repeats_and_slices_by_rows() -> None:
    first, second = (Draw(seed=0, step=k, total=6) for k in (0, 1))
    whole = train_batch(first, seed=0)
    parts = [train_batch(first.rows(a, b), seed=0) for a, b in ((0, 2), (2, 6))]
    torch.testing.assert_close(whole.x, torch.cat([p.x for p in parts]))
    assert torch.equal(whole.c, torch.cat([p.c for p in parts]))
    assert not torch.equal(whole.x, train_batch(second, seed=0).x)


def test_busts_are_garments_of_hues_that_postcards_have_and_slice_by_rows() -> None:
    draw = Draw(seed=3, step=1, total=64)
    images = decode(train_batch(draw, seed=0, busts=1.0).x)
    parts = [train_batch(draw.rows(a, b), seed=0, busts=1.0).x for a, b in ((0, 30), (30, 64))]
    torch.testing.assert_close(images, decode(torch.cat(parts)))
    # Only garments are so saturated and of these hues; moss and skin are neither.
    unit = (images + 1) / 2
    top, low = unit.amax(1), unit.amin(1)
    garment = ((top - low) / top.clamp_min(1e-6) > 0.6) & (top > 0.75)
    modes = hue_mode(hue_degrees(unit.permute(0, 2, 3, 1))[garment])
    shares = hue_shares(modes)
    assert (garment.sum((1, 2)) > 100).all()  # a postcard has about 25 such pixels
    assert float(shares[-1]) < 0.05  # edges, where colours mix
    assert float((shares[:-1] - hue_truth()).abs().max()) < 0.06


@pytest.mark.parametrize(("posters", "busts"), [(0.4, 0.3), (1.0, 0.0), (0.0, 1.0)])
def test_practice_takes_its_share_of_the_pictures(posters: float, busts: float) -> None:
    draw = Draw(seed=0, step=0, total=400)
    plain = train_batch(draw, seed=0).x
    mixed = train_batch(draw, seed=0, posters=posters, busts=busts).x
    changed = (mixed != plain).flatten(1).any(1)
    assert abs(float(changed.float().mean()) - posters - busts) < 0.06
    kept = train_batch(draw, seed=0, posters=posters).x
    assert torch.equal(kept[~changed], plain[~changed])


def test_a_network_comes_from_its_seed_and_a_spawn_is_a_copy() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a, b, other = spawn_net(TINY, 1), spawn_net(TINY, 1), spawn_net(TINY, 2)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.captions.weight, other.captions.weight)
    student = Postcards(net=a).spawn("student")
    with torch.no_grad():
        student.captions.weight.add_(1)
    assert torch.equal(a.captions.weight, b.captions.weight)


@pytest.mark.parametrize("layers", [2, 3, 4, 7])
def test_a_grown_network_computes_the_same_and_all_of_its_blocks_learn(
    net: PostcardNet, layers: int
) -> None:
    larger = spawn_net(TINY.model_copy(update={"layers": layers}), 1)
    larger.load_state_dict(grown(net.state_dict(), layers))
    x = noise(LATENT_SHAPE, seed=0, stream="x", indices=range(2))
    t, c = torch.tensor([0.2, 0.9]), draw_scenes("eval", range(2)).tokens
    torch.testing.assert_close(larger(x, t, c), net(x, t, c), rtol=0, atol=0)
    larger(x, t, c).square().sum().backward()
    blocks = larger.transformer.transformer_blocks
    assert len(blocks) == layers
    assert all(block.img_mod[1].weight.grad.abs().sum() > 0 for block in blocks)


def test_a_network_does_not_shrink(net: PostcardNet) -> None:
    with pytest.raises(BadInput, match="layers=1 is not allowed: use at least 2"):
        grown(net.state_dict(), 1)


def test_sizes_are_checked() -> None:
    with pytest.raises(ValidationError, match="head_width"):
        NetSize(head_width=24)
    with pytest.raises(ValidationError, match="layers"):
        NetSize(layers=0)
