"""The GAN term of the factory: crops, critics and their real side, on the tiny pipeline."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from factory_world import SMALL, changed, history, job
from torch import Tensor

from turbo_lab import factory
from turbo_lab.augment import random_crop
from turbo_lab.errors import BadInput, MissingPiece
from turbo_lab.factory_memory import memory_plan
from turbo_lab.factory_plan import Job
from turbo_lab.features import RANDOM
from turbo_lab.fit import Record, fit
from turbo_lab.methods.gan import WithGan
from turbo_lab.qwen_gan import Crops, opened_eye
from turbo_lab.recipes.models import Pairs
from turbo_lab.recipes.qwen_image import QwenGan, QwenRecipe, resolve_qwen
from turbo_lab.store import Store
from turbo_lab.streams import Draw
from turbo_lab.testbeds import qwen_files, qwen_image
from turbo_lab.testbeds.qwen_buckets import square
from turbo_lab.testbeds.qwen_files import load_vae, located
from turbo_lab.testbeds.qwen_pictures import encoded
from turbo_lab.vae_decode import picture_decoder

VIT = "vit_tiny_patch16_224"
PAIRS = Pairs(n=4, steps=2)
GANS = {
    "dino": QwenGan(vit=VIT, blocks=(2, 5), crop=3, view=16, rho=0.5, pairs=PAIRS, balance=0.5),
    "teacher": QwenGan(
        features="teacher", blocks=(1,), rho=0, pairs=PAIRS, weight=0.01, r1=0.1,
        noise_range=(0.0, 0.3), loss="hinge",
    ),
    "fake": QwenGan(features="fake", rho=1, balance=1.0, noise_range=(0.0, 0.3)),
}  # fmt: skip


def turbo(world: Path, gan: QwenGan = GANS["dino"], **options: Any) -> Job:
    """The recipe's last stage alone, with a critic that is small enough."""
    work = job(world, "turbo", vit=RANDOM, images=world / "images", **options)
    last = work.recipe.stages[-1].model_copy(update={"gan": gan, "rivals_from": None})
    return changed(work, stages=(last,), adapter=SMALL)


# --- crops --------------------------------------------------------------------------------------


def stock_decoded(vae: Any, z: Tensor) -> Tensor:
    """What diffusers' own decoder makes of latents of the VAE's scale."""
    config = vae.config
    mean, std = (
        torch.tensor(a).view(1, -1, 1, 1) for a in (config.latents_mean, config.latents_std)
    )
    decoded: Tensor = vae.decode((z * std + mean)[:, :, None], return_dict=False)[0][:, :, 0]
    return decoded


def test_crops_are_the_stock_decoders_pictures_with_their_gradient(factory_world: Path) -> None:
    vae = load_vae(located(str(factory_world / "model")), "cpu").double()
    show = Crops(decoder=picture_decoder(vae), side=3)
    numbers = torch.Generator().manual_seed(0)
    x = (0.1 * torch.randn(3, 16, 6, 8, generator=numbers)).double().requires_grad_()
    draw = Draw(seed=0, step=3, total=3)
    ours, theirs = show(x, draw), stock_decoded(vae, random_crop(x, draw, 3))
    assert ours.shape == (3, 3, 24, 24) and bool((theirs.abs() < 1).all())  # not clamped there
    torch.testing.assert_close(ours, theirs.float(), rtol=1e-5, atol=1e-6)
    slopes = [torch.autograd.grad((a**2).sum(), x)[0] for a in (ours, theirs)]
    torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-6)
    seen = slopes[0].abs().sum(1) > 0
    assert all(int(row.sum()) == 9 for row in seen)  # nothing outside of the squares
    assert len({tuple(row.flatten().nonzero().flatten().tolist()) for row in seen}) > 1
    again = show(x[1:], draw.rows(1, 3))
    torch.testing.assert_close(again, ours[1:], rtol=1e-5, atol=1e-6)


def test_the_whole_picture_is_a_crop_and_nothing_is_clamped(factory_world: Path) -> None:
    vae = load_vae(located(str(factory_world / "model")), "cpu")
    vae.decoder.conv_out.weight.data *= 30
    decoder = picture_decoder(vae)
    x = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    shown = Crops(decoder=decoder, side=4)(x, Draw(seed=0, step=0, total=1))
    assert float(shown.abs().max()) > 1
    torch.testing.assert_close(shown.clamp(-1, 1), decoder(x), rtol=1e-4, atol=1e-5)


# --- training -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", GANS)
def test_every_critic_trains_beside_dmd2(
    factory_world: Path, factory_caches: Store, kind: str
) -> None:
    artefact = factory.trained(turbo(factory_world, GANS[kind]), store=factory_caches)
    (line,) = history(artefact)
    wanted = {"critic/teacher", "critic/student", "student/gan", "student/gan_pull"}
    assert wanted <= line["terms"].keys()
    assert ("critic/r1" in line["terms"]) == (kind == "teacher")
    assert all(torch.tensor(value).isfinite() for value in line["terms"].values())
    assert {"student", "fake", "critic"} == line["norms"].keys()
    assert all(norm > 0 for norm in line["norms"].values())
    assert artefact.tensors("rivals.safetensors").keys() == artefact.tensors().keys()


@pytest.mark.parametrize("kind", GANS)
def test_the_gan_terms_gradient_survives_recomputation(
    factory_world: Path, factory_caches: Store, kind: str
) -> None:
    """Blocks are tapped, and recomputed, in other adapters than are worn by then."""
    got: list[dict[str, Tensor]] = []
    for keep in (True, False):
        work = turbo(factory_world, GANS[kind], keep_activations=keep)
        bench = factory._bench(work, factory_caches)
        for k, player in enumerate(bench.players.values()):
            for _, parameter in player.named_parameters():
                numbers = torch.Generator().manual_seed(k)
                with torch.no_grad():
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=numbers))
        for _, parameter in bench.players["student"].named_parameters():
            parameter.requires_grad_(True)
        turn = bench.objective(work.recipe.stages[0], 0).turns()[-1]
        draw = Draw(seed=1, step=0, total=2)
        losses = turn.loss(bench.supply(1, draw), draw)
        with bench.testbed.host.wearing("average"):  # type: ignore[attr-defined]
            losses["gan"].sum().backward()
        learns = bench.players["student"].named_parameters()
        got.append({n: p.grad for n, p in learns if p.grad is not None})
    assert turn.moves == ("student",) and got[0].keys() == got[1].keys()
    assert any(float(g.abs().max()) > 0 for g in got[0].values())
    for key, gradient in got[0].items():
        torch.testing.assert_close(got[1][key], gradient, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("kind", ["teacher", "fake"])
def test_taps_of_a_base_in_bfloat16_are_judged_in_float32(
    factory_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """As it is loaded on a GPU."""
    monkeypatch.setattr(
        qwen_image, "load_transformer", partial(qwen_files.load_transformer, dtype=torch.bfloat16)
    )
    work = turbo(factory_world, GANS[kind])
    bench = factory._bench(work, Store(cache=tmp_path))
    objective = bench.objective(work.recipe.stages[0], 0)
    assert isinstance(objective, WithGan)
    draw = Draw(seed=1, step=0, total=2)
    terms = objective.critic_loss(bench.supply(1, draw), draw)
    loss = torch.stack([terms["teacher"], terms["student"]])
    loss.sum().backward()
    assert loss.dtype == torch.float32 and bool(loss.isfinite().all())
    critic: Any = objective.critic
    assert all(p.grad is not None for _, p in critic.named_parameters())


def test_heads_learn_two_prompts_by_heart_and_nothing_else_moves(
    factory_world: Path, factory_caches: Store
) -> None:
    """The student hardly moves, so a critic must tell its samples from two images."""
    work = turbo(factory_world, GANS["dino"].model_copy(update={"rho": 1.0, "crop": 4, "view": 32}))
    (stage,) = work.recipe.stages
    still = {
        who: rates.model_copy(update={"lr": 5e-3 if who == "critic" else 1e-6})
        for who, rates in stage.rates.items()
    }
    bench = factory._bench(work, factory_caches)
    objective = bench.objective(stage, 0)
    assert isinstance(objective, WithGan)
    critic: Any = objective.critic
    eye = critic.features.features.net
    frozen = {k: v.clone() for k, v in eye.state_dict().items()}

    def measured() -> float:
        draw = Draw(seed=7, step=0, total=16)
        with torch.no_grad():
            terms = objective.critic_loss(bench.supply(7, draw), draw)
        return float(torch.stack([terms["teacher"], terms["student"]]).sum(0).mean())

    before = measured()
    for _ in fit(
        objective,
        lambda draw: bench.supply(0, draw),
        steps=40,
        batch_size=4,
        seed=0,
        optimisers={who: rates.optimiser() for who, rates in still.items()},
    ):
        pass
    assert measured() < 0.6 * before
    assert all(torch.equal(frozen[k], v) for k, v in eye.state_dict().items())
    assert not any(p.requires_grad for p in eye.parameters())


def test_the_real_side_is_what_the_share_says(factory_world: Path, factory_caches: Store) -> None:
    work = turbo(factory_world)
    images = encoded(work.bundle, work.images, shape=square(32), store=factory_caches, device="cpu")
    draw = Draw(seed=3, step=1, total=8)
    sides = {}
    for rho in (0.0, 0.5, 1.0):
        gan = GANS["dino"].model_copy(update={"rho": rho})
        bench = factory._bench(
            changed(work, stages=turbo(factory_world, gan).recipe.stages), factory_caches
        )
        assert bench.critics is not None
        sides[rho] = bench.critics(gan, 5).real(draw)
    known = torch.stack([images[0], images[1]])
    shares = {rho: [any(torch.equal(x, k) for k in known) for x in b.x] for rho, b in sides.items()}
    assert not any(shares[0.0]) and all(shares[1.0]) and 0 < sum(shares[0.5]) < 8
    for k, real in enumerate(shares[0.5]):
        assert torch.equal(sides[0.5].x[k], sides[1.0 if real else 0.0].x[k])
        assert int(sides[0.5].c[k]) == int(sides[1.0 if real else 0.0].c[k])


def test_turbo_goes_through_its_stages_and_a_killed_one_ends_alike(
    factory_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last stage's student and fake start as they were left, in one process or in two."""
    work = job(factory_world, "turbo", vit=RANDOM)
    first, second, last = work.recipe.stages
    assert [s.method for s in (first, second, last)] == ["consistency", "dmd2", "dmd2"]
    gan = GANS["dino"].model_copy(update={"rho": 0.0})
    stages = tuple(s.model_copy(update={"steps": 2}) for s in (first, second, last))
    stages = (*stages[:2], stages[2].model_copy(update={"gan": gan}))
    work = changed(work, adapter=SMALL, stages=stages, pairs=PAIRS)
    straight = factory.trained(work, store=Store(cache=tmp_path / "a"))
    monkeypatch.setattr(factory, "SAVE_SECONDS", 0.0)
    store = Store(cache=tmp_path / "b")

    def trip(record: Record, done: int) -> None:
        if done == 5:
            raise RuntimeError("the power went out")

    with pytest.raises(RuntimeError, match="power"):
        factory.trained(work, store=store, watch=trip)
    resumed = factory.trained(work, store=store)
    for file in ("weights.safetensors", "rivals.safetensors"):
        a, b = straight.tensors(file), resumed.tensors(file)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert [line["stage"] for line in history(resumed)] == [1, 2, 3]
    starts = _starts(work, store)
    fake = store.find(work.artefact, work.specs()[1])
    assert fake is not None
    left = fake.tensors("rivals.safetensors")
    assert all(torch.equal(starts[k], left[k]) for k in left)
    assert any(bool(v.any()) for k, v in left.items() if "lora_B" in k)


def _starts(work: Job, store: Store) -> dict[str, Tensor]:
    """The fake score of the last stage as it starts."""
    bench = factory._bench(work, store)
    before = store.find(work.artefact, work.specs()[1])
    assert before is not None
    factory._go_on(bench.players, work.recipe.stages[2], before)
    return {k: v.clone() for k, v in bench.players["fake"].state_dict().items()}


# --- what is checked before ---------------------------------------------------------------------


def test_missing_dino_weights_are_one_sentence_before_anything_is_loaded(
    factory_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for name in ("embedded", "open_testbed"):
        monkeypatch.setattr(factory, name, lambda *_, **__: pytest.fail("it was loaded"))
    work = dataclasses.replace(turbo(factory_world), vit="hub")
    with pytest.raises(MissingPiece, match=rf"looks through {VIT}, whose weights .* by --vit"):
        factory.trained(work, store=Store(cache=tmp_path / "cache"))


def test_weights_of_a_critic_are_part_of_the_key_from_its_stage_on(
    factory_world: Path, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    file = tmp_path / "vit.safetensors"
    save_file(opened_eye(GANS["dino"], RANDOM, seed=0).net.state_dict(), file)
    named, drawn = (job(factory_world, "turbo", vit=v).specs() for v in (str(file), RANDOM))
    assert named[:2] == drawn[:2] and named[2] != drawn[2]
    assert "vae" not in drawn[1] and "vae" in drawn[2]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"vit": "nowhere.safetensors"}, "vit='nowhere.safetensors' is not allowed: use hub"),
        ({"vit": RANDOM, "recipe": "dmd2-2"}, "vit='random' is not allowed: dmd2-2 has no critic"),
    ],
)
def test_wrong_weights_are_one_sentence(
    factory_world: Path, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(BadInput) as error:
        job(factory_world, **{"recipe": "turbo", **options})
    assert str(error.value).startswith(said)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"view": 300}, "view=300"),
        ({"weight": 0.1}, "weight=0.1 is not allowed: give either"),
        ({"rho": 0.5, "pairs": None}, "pairs=None"),
        ({"features": "teacher", "augment": ("colour",)}, "augment="),
    ],
)
def test_wrong_gan_terms_are_refused(changes: dict[str, Any], said: str) -> None:
    honest = resolve_qwen("turbo", size=512).stages[-1].gan
    assert honest is not None
    with pytest.raises(ValueError, match=said):
        QwenGan.model_validate({**honest.model_dump(), **changes})


@pytest.mark.parametrize(
    ("stage", "changes", "said"),
    [
        (0, {"gan": GANS["teacher"]}, "makes no clean samples"),
        (2, {"rates": {}}, "gan needs one for player 'critic'"),
        (2, {"rivals_from": None}, "an earlier stage has a fake score"),
        (1, {"rivals_from": "fake"}, "nothing it could start as"),
        (2, {"gan": GANS["dino"].model_copy(update={"crop": 65})}, "use at most 64 latents"),
    ],
)
def test_stages_that_do_not_fit_are_refused(stage: int, changes: dict[str, Any], said: str) -> None:
    recipe = resolve_qwen("turbo", size=512)
    stages = list(recipe.stages)
    stages[stage] = stages[stage].model_copy(update=changes)
    with pytest.raises(ValueError, match=said):
        QwenRecipe.model_validate(
            {**recipe.model_dump(), "stages": [s.model_dump() for s in stages]}
        )


@pytest.mark.parametrize("kind", GANS)
def test_the_memory_plan_counts_the_critic(
    factory_world: Path, factory_caches: Store, kind: str
) -> None:
    work = turbo(factory_world, GANS[kind])
    objective = factory._bench(work, factory_caches).objective(work.recipe.stages[0], 0)
    assert isinstance(objective, WithGan)
    critic: Any = objective.critic
    heads = sum(p.numel() for _, p in critic.named_parameters())
    seen = 0
    if kind == "dino":
        net = critic.features.features.net
        vae = load_vae(work.bundle, "cpu")  # of which the decoder is kept
        grown = net.pos_embed.numel() - (224 // 16) ** 2 * 192 - 192  # it sees 16 pixels, not 224
        seen = sum(p.numel() for p in net.parameters()) - grown
        seen += sum(p.numel() for p in vae.parameters())
    assert memory_plan(work).critic == 4 * seen + 16 * heads
