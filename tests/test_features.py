"""Features and augmentations: equal to other libraries', frozen, differentiable, left no trace."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from small_lab import TINY
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d
from torch.nn.utils.parametrizations import spectral_norm
from torch.overrides import TorchFunctionMode

from turbo_lab import features
from turbo_lab.adapters import AdapterSize, Host, Worn
from turbo_lab.augment import AUGMENTS, augmented, cutout, random_crop, translation
from turbo_lab.critic import TrainableCritic, Voting, votes_of
from turbo_lab.errors import BadInput, MissingPiece
from turbo_lab.features import Pixels, Taps, VitFeatures, block_taps, normed, vit_features
from turbo_lab.heads import FeatureCritic, SpectralLinear, spawn_heads
from turbo_lab.postcards.captions import TOKENS, VOCABULARY
from turbo_lab.streams import Draw
from turbo_lab.testbeds.postcards import LATENT_SHAPE, spawn_net

VIT = "vit_tiny_patch16_224"
DRAW = Draw(seed=1, step=2, total=6)


@cache
def vit(size: int = 48) -> VitFeatures:
    """A random transformer of timm at a small size: 9 tokens of 192."""
    return vit_features(VIT, (2, 5), size=size, weights="random")


def images(n: int = 6, side: int = 48) -> Tensor:
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def ask(features: VitFeatures, x: Tensor) -> tuple[Tensor, ...]:
    return features(x, torch.zeros(len(x)), None)


# --- vision transformers ------------------------------------------------------------------------


def test_taps_are_what_timm_and_hooks_say() -> None:
    features, x = vit(), images()
    mean, std = (torch.tensor(features.net.pretrained_cfg[k])[:, None, None] for k in MEAN_STD)
    wanted = ((x + 1) / 2 - mean) / std
    heard: list[Tensor] = []
    hooks = [
        features.net.blocks[k].register_forward_hook(lambda m, i, o: heard.append(o[:, 1:]))
        for k in features.blocks
    ]
    features.net(wanted)
    for hook in hooks:
        hook.remove()
    own = features.net.forward_intermediates(
        wanted, indices=[2, 5], output_fmt="NLC", intermediates_only=True
    )
    for ours, theirs, hooked in zip(ask(features, x), own, heard, strict=True):
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(ours, hooked)
        assert ours.shape == (6, 9, 192)
    assert features.widths == (192, 192)


MEAN_STD = ("mean", "std")


def test_features_have_a_gradient_in_x_and_none_in_themselves() -> None:
    features, x = vit(), images(2).requires_grad_()
    torch.stack([a.square().sum() for a in ask(features, x)]).sum().backward()
    assert x.grad is not None and bool(x.grad.isfinite().all()) and bool(x.grad.any())
    assert all(p.grad is None and not p.requires_grad for p in features.net.parameters())
    assert not features.net.training


def test_an_image_comes_to_size_by_area_bicubic_or_crop() -> None:
    large = images(2, 96)
    seen = vit().seen(large)
    torch.testing.assert_close(seen, vit().seen(avg_pool2d(large, 2)))
    assert vit().seen(images(2, 20)).shape[2:] == (48, 48)
    cropping = vit_features(VIT, (0,), size=48, weights="random", fit="crop")
    torch.testing.assert_close(cropping.seen(large), vit().seen(large[:, :, 24:72, 24:72]))
    assert cropping.seen(images(2, 20)).shape[2:] == (48, 48)


def test_weights_come_from_a_seed_or_a_file(tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    same, other = (
        vit_features(VIT, (2, 5), size=48, weights="random", seed=seed) for seed in (0, 1)
    )
    assert torch.equal(before, torch.random.get_rng_state())
    x = images(2)
    assert torch.equal(ask(same, x)[1], ask(vit(), x)[1])
    assert not torch.equal(ask(other, x)[1], ask(vit(), x)[1])
    native = timm.create_model(VIT, pretrained=False, img_size=48)
    native.load_state_dict(other.net.state_dict(), strict=False)
    save_file(native.state_dict(), tmp_path / "vit.safetensors")
    loaded = vit_features(VIT, (2, 5), size=48, weights=tmp_path / "vit.safetensors")
    assert torch.equal(ask(loaded, x)[1], ask(other, x)[1])


def test_weights_that_are_nowhere_are_said_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(MissingPiece, match=f"weights of {VIT} are not on this machine.*weights="):
        vit_features(VIT, (0,), size=48)
    with pytest.raises(MissingPiece, match=r"no file .*gone\.safetensors"):
        vit_features(VIT, (0,), weights=tmp_path / "gone.safetensors")
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"\xff" * 64)
    with pytest.raises(MissingPiece, match="does not hold the weights"):
        vit_features(VIT, (0,), size=48, weights=damaged)


class Answers(BaseHTTPRequestHandler):
    """A hub that has nothing: it answers every question with one number."""

    code = 404

    def do_HEAD(self) -> None:
        self.send_response(self.code)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HTTPServer]:
    """A hub that listens and, until its test serves, never answers; nothing is cached."""
    import huggingface_hub.constants as known

    with HTTPServer(("127.0.0.1", 0), Answers) as server:
        address = f"http://127.0.0.1:{server.server_port}/{{repo_id}}/{{revision}}/{{filename}}"
        monkeypatch.setattr(known, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(known, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(known, "HUGGINGFACE_CO_URL_TEMPLATE", address)
        yield server


def _reached(*_: object, **__: object) -> None:
    raise OSError("timm was reached")


def test_a_hub_that_is_silent_or_gone_is_not_waited_for(
    hub: HTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: pytest.fail("timm was reached"))
    monkeypatch.setattr(features, "HUB_SECONDS", 0.5)
    with pytest.raises(MissingPiece, match=r"hub does not give them \((no answer|.*Timeout)"):
        vit_features(VIT, (0,))
    monkeypatch.setattr(features, "HUB_SECONDS", 60.0)  # a refused connection is known at once
    hub.server_close()
    with pytest.raises(MissingPiece, match=r"hub does not give them \(Connect.*: give weights="):
        vit_features(VIT, (0,))


@pytest.mark.parametrize(("code", "why"), [(404, "OSError"), (503, "error 503")])
def test_a_hub_that_answers_is_timms_to_ask_unless_it_is_broken(
    hub: HTTPServer, monkeypatch: pytest.MonkeyPatch, code: int, why: str
) -> None:
    monkeypatch.setattr(Answers, "code", code)
    monkeypatch.setattr(timm, "create_model", _reached)
    monkeypatch.setattr(features, "HUB_SECONDS", 60.0)
    serving = Thread(target=hub.serve_forever, daemon=True)
    serving.start()
    try:
        with pytest.raises(MissingPiece, match=rf"hub does not give them \({why}\)"):
            vit_features(VIT, (0,))
    finally:
        hub.shutdown()
        serving.join()


def test_weights_in_the_cache_need_no_hub(
    hub: HTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "_ask", lambda *_: pytest.fail("a hub was asked"))
    monkeypatch.setattr(timm, "create_model", _reached)
    name = timm.models.get_pretrained_cfg(VIT).hf_hub_id.replace("/", "--")
    snapshot = tmp_path / f"models--{name}" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").touch()
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    with pytest.raises(MissingPiece, match="OSError"):
        vit_features(VIT, (0,))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"name": "vit_of_dreams"}, "name='vit_of_dreams'"),
        ({"name": "resnet18", "size": None}, "name='resnet18'.*ResNet"),
        ({"blocks": (5, 2)}, "blocks=.*0 to 11"),
        ({"blocks": (12,)}, "blocks=.*0 to 11"),
        ({"blocks": ()}, "blocks="),
        ({"fit": "squeeze"}, "fit='squeeze'.*resize, crop"),
        ({"weights": "weights.pth"}, "weights=.*safetensors"),
    ],
)
def test_what_cannot_be_tapped_is_refused(changed: dict[str, object], said: str) -> None:
    asked = {"name": VIT, "blocks": (0,), "size": 48, "weights": "random", **changed}
    with pytest.raises(BadInput, match=said):
        vit_features(**asked)  # type: ignore[arg-type]


# --- pixels and blocks of a field ---------------------------------------------------------------


def test_pixels_are_patches() -> None:
    features, x = Pixels(patch=16), images(2)
    (tokens,) = features(x, torch.zeros(2), None)
    assert tokens.shape == (2, 9, *features.widths)
    torch.testing.assert_close(
        tokens[1, 5].sort().values, x[1, :, 16:32, 32:48].flatten().sort().values
    )


def test_normed_tokens_have_mean_zero_and_variance_one() -> None:
    for tokens in normed(vit())(images(2), torch.zeros(2), None):
        torch.testing.assert_close(tokens.mean(2), torch.zeros(2, 9), atol=1e-5, rtol=0)
        torch.testing.assert_close(tokens.var(2, correction=0), torch.ones(2, 9), atol=1e-2, rtol=0)


def two_blocks() -> tuple[Host, Worn]:
    """A tiny Qwen-Image of two blocks, and a fake on it that has moved."""
    host = Host(spawn_net(TINY.model_copy(update={"layers": 2}), 0).eval(), part="transformer")
    fake = host.add("fake", AdapterSize(rank=2), seed=0)
    with torch.no_grad():
        for _, p in fake.named_parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
            p.requires_grad_(False)
    return host, fake


def asked(n: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(n, *LATENT_SHAPE, generator=torch.Generator().manual_seed(3))
    return x, torch.linspace(0.1, 0.9, n), torch.zeros(n, TOKENS, dtype=torch.long)


def _hooks(net: nn.Module) -> int:
    return sum(len(m._forward_hooks) for m in net.modules())


def test_taps_are_the_blocks_own_image_tokens_and_leave_the_network_as_it_was() -> None:
    host, fake = two_blocks()
    seen: list[Tensor] = []
    transformer = host.net.transformer
    hook = transformer.norm_out.register_forward_pre_hook(lambda m, a: seen.append(a[0]))  # type: ignore[union-attr]
    before = fake(*asked())
    taps = block_taps(fake)(*asked())
    hook.remove()
    assert [a.shape for a in taps] == [(3, 64, 16)] * 2 and block_taps(fake).widths == (16, 16)
    assert torch.equal(taps[1], seen[1])  # what follows the last block is given its tokens
    assert torch.equal(fake(*asked()), before) and _hooks(host.net) == 0
    teacher = block_taps(host.bare, (1,))(*asked())[0]
    assert not torch.allclose(teacher, taps[1])
    assert torch.equal(block_taps(fake, (1,))(*asked())[0], taps[1])
    with pytest.raises(BadInput, match="0 to 1"):
        block_taps(fake, (2,))


def test_taps_are_removed_when_the_call_fails() -> None:
    host, fake = two_blocks()

    def broken(x: Tensor, t: Tensor, c: object) -> Tensor:
        raise RuntimeError("no")

    taps = block_taps(fake)
    with pytest.raises(RuntimeError, match="no"):
        Taps(field=broken, modules=taps.modules, widths=taps.widths)(*asked())
    assert _hooks(host.net) == 0


def test_taps_have_the_same_gradient_with_checkpointed_blocks() -> None:
    slopes = []
    for checkpointed in (False, True):
        host, fake = two_blocks()
        if checkpointed:
            host.checkpointing()
            host.net.train()
        x, t, c = asked()
        x.requires_grad_()
        torch.stack([a.square().mean() for a in block_taps(fake)(x, t, c)]).sum().backward()
        assert x.grad is not None and all(p.grad is None for _, p in fake.named_parameters())
        slopes.append(x.grad)
    assert bool(slopes[0].any())
    torch.testing.assert_close(slopes[0], slopes[1])


# --- heads --------------------------------------------------------------------------------------


def test_a_spectral_layer_is_what_the_power_iteration_comes_to() -> None:
    for shape in ((7, 3), (3, 7), (5, 1)):
        torch.manual_seed(0)
        ours = SpectralLinear(*shape)
        plain = nn.Linear(*shape)
        plain.load_state_dict(ours.state_dict())
        theirs = spectral_norm(plain, n_power_iterations=200)
        x = torch.randn(4, shape[0])
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


class Heard(TorchFunctionMode):
    """Keeps the dtype of every matrix whose eigenvalues are asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.linalg.eigvalsh:
            self.dtypes.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


def test_a_spectral_layer_asks_for_eigenvalues_in_float32_under_autocast() -> None:
    """Nothing computes them in bfloat16; a GPU's autocast, other than a CPU's, does not lift it."""
    torch.manual_seed(0)
    layer, x = SpectralLinear(7, 3), torch.randn(4, 7)
    with torch.autocast("cpu", torch.bfloat16), Heard() as heard:
        product = layer.weight @ layer.weight.T
        inside = layer(x)
    assert product.dtype == torch.bfloat16 and heard.dtypes == [torch.float32]
    torch.testing.assert_close(inside.float(), layer(x), rtol=0.02, atol=0.02)


def pixel_critic(captions: tuple[int, int] | None = None) -> FeatureCritic:
    features = Pixels(patch=16)
    return FeatureCritic(
        features=features, heads=spawn_heads(features.widths, seed=0, width=8, captions=captions)
    )


def test_a_feature_critic_votes_per_token_and_its_heads_alone_are_the_player() -> None:
    critic = FeatureCritic(features=vit(), heads=spawn_heads(vit().widths, seed=0, width=8))
    assert isinstance(critic, TrainableCritic) and isinstance(critic, Voting)
    x, t = images(4), torch.zeros(4)
    votes = votes_of(critic, x, t, None)
    assert votes.shape == (4, 18)  # nine tokens of two blocks
    torch.testing.assert_close(critic(x, t, None), votes.mean(1))
    torch.testing.assert_close(critic(x[:1], t[:1], None), votes[:1].mean(1), rtol=1e-4, atol=1e-5)
    votes.sum().backward()
    names = {id(p) for _, p in critic.named_parameters()}
    assert names == {id(p) for p in critic.heads.parameters()}
    assert all(p.grad is not None for p in critic.heads.parameters())
    assert all(p.grad is None for p in vit().net.parameters())


def test_a_critic_without_votes_has_one() -> None:
    votes = votes_of(lambda x_t, t, c: x_t.sum(1), torch.ones(3, 2), torch.zeros(3), None)
    assert torch.equal(votes, torch.full((3, 1), 2.0))


def test_heads_are_their_seed_travel_as_tensors_and_hear_captions_if_asked() -> None:
    x, t, c = images(2), torch.zeros(2), torch.arange(2 * TOKENS).reshape(2, TOKENS)
    before = torch.random.get_rng_state()
    plain, asking = pixel_critic(), pixel_critic((VOCABULARY, TOKENS))
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(plain(x, t, c), pixel_critic()(x, t, c.flip(0)))
    assert not torch.allclose(asking(x, t, c), asking(x, t, c.flip(0)))
    with torch.no_grad():
        for _, p in asking.named_parameters():
            p.add_(1.0)
    fresh = pixel_critic((VOCABULARY, TOKENS))
    fresh.load_state_dict(asking.state_dict())
    assert torch.equal(fresh(x, t, c), asking(x, t, c))
    with pytest.raises(BadInput, match="width=0"):
        spawn_heads((4,), seed=0, width=0)


# --- augmentation -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", AUGMENTS)
def test_an_augmentation_is_its_draw_row_by_row_and_lets_gradients_through(name: str) -> None:
    change, x = augmented([name]), images(6, 32).requires_grad_()
    seen = change(x, DRAW)
    assert seen.shape == x.shape and not torch.equal(seen, x)
    assert torch.equal(seen, change(x, DRAW))
    parts = [change(x[a:b], DRAW.rows(a, b)) for a, b in ((0, 2), (2, 6))]
    torch.testing.assert_close(torch.cat(parts), seen)
    seen.square().sum().backward()
    assert x.grad is not None and bool(x.grad.isfinite().all())
    assert all(bool(row.any()) for row in x.grad)
    one = images(1, 32).expand(6, -1, -1, -1)
    assert len(change(one, DRAW).unique(dim=0)) == 6  # every row has numbers of its own


def test_translation_moves_by_an_eighth_at_most_and_fills_with_grey() -> None:
    ramp = 1 + torch.arange(32 * 32.0).reshape(1, 1, 32, 32).expand(400, 1, 32, 32)
    moved = translation(ramp, Draw(seed=0, step=0, total=400))
    offsets = set()
    for row in moved:
        y, x = divmod(int(row[0, 16, 16]) - 1, 32)
        offsets.add((y - 16, x - 16))
        dy, dx = y - 16, x - 16
        kept = row[0, max(0, -dy) : 32 - max(0, dy), max(0, -dx) : 32 - max(0, dx)]
        shown = ramp[0, 0, max(0, dy) : 32 + min(0, dy), max(0, dx) : 32 + min(0, dx)]
        assert torch.equal(kept, shown)
        assert int((row == 0).sum()) == 32 * 32 - kept.numel()
    assert {y for y, _ in offsets} == {x for _, x in offsets} == set(range(-4, 5))


def test_cutout_takes_half_the_sides_or_what_of_them_is_inside() -> None:
    holes = cutout(torch.ones(400, 3, 32, 32), Draw(seed=0, step=0, total=400)) == 0
    assert torch.equal(holes.all(1), holes.any(1))
    sizes = torch.stack([holes[:, 0].any(2).sum(1), holes[:, 0].any(1).sum(1)])
    assert int(sizes.max()) == 16 and int(sizes.min()) == 8
    assert torch.equal(holes[:, 0].sum((1, 2)), sizes[0] * sizes[1])


def test_colour_keeps_pictures_apart_from_brightness_saturation_and_contrast() -> None:
    x = images(200, 8)
    seen = AUGMENTS["colour"](x, Draw(seed=0, step=0, total=200))
    for a, b in zip(x, seen, strict=True):  # the pattern of grey is the same up to gain and shift
        pair = torch.stack([a.mean(0).flatten(), b.mean(0).flatten()])
        assert float(pair.corrcoef()[0, 1]) > 0.999
    shift = (seen - x).mean((1, 2, 3))
    assert -0.5 <= float(shift.min()) < -0.45 and 0.45 < float(shift.max()) <= 0.5
    gain = seen.mean(1).std((1, 2)) / x.mean(1).std((1, 2))
    assert 0.5 <= float(gain.min()) < 0.55 and 1.45 < float(gain.max()) <= 1.5


def test_random_crops_are_windows_of_their_own_image() -> None:
    x = images(6, 32)
    crops = random_crop(x, DRAW, 8)
    for image, crop in zip(x, crops, strict=True):
        assert any(torch.equal(crop, window) for window in _windows(image, 8))
    assert torch.equal(random_crop(x, DRAW, 32), x)
    for size in (0, 33):
        with pytest.raises(BadInput, match=f"size={size}"):
            random_crop(x, DRAW, size)
    with pytest.raises(BadInput, match="augment='flip'"):
        augmented(["flip"])


def _windows(image: Tensor, size: int) -> Iterator[Tensor]:
    last = image.shape[1] - size + 1
    return (image[:, y : y + size, x : x + size] for y in range(last) for x in range(last))
