"""The collapsed decoder against diffusers' own, on random weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from turbo_lab import vae_decode
from turbo_lab.errors import BadInput
from turbo_lab.testbeds.qwen_pictures import Codec
from turbo_lab.vae_decode import (
    Decoder,
    Tiles,
    collapsed_net,
    compiled,
    fitting,
    picture_decoder,
    to_uint8,
)


@pytest.fixture(scope="module")
def vae() -> Any:
    from diffusers import AutoencoderKLQwenImage

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # Widths that change from block to block, so that every kind of layer is met.
        vae = AutoencoderKLQwenImage(base_dim=4, dim_mult=[1, 2, 4, 4], num_res_blocks=1)
        for name, parameter in vae.named_parameters():
            if "gamma" in name:
                nn.init.uniform_(parameter, 0.5, 1.5)
    return vae.eval()


def latents(rows: int, height: int, width: int) -> Tensor:
    numbers = torch.Generator().manual_seed(1)
    return torch.randn(rows, 16, height, width, generator=numbers)


def stock(vae: Any, x: Tensor) -> Tensor:
    return Codec(vae=vae).decode(x)


def close(a: Tensor, b: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 6, 10)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_pictures_are_those_of_the_stock_decoder(
    vae: Any, shape: tuple[int, int, int], channels_last: bool
) -> None:
    x = latents(*shape)
    theirs = stock(vae, x)
    assert theirs.std() > 0.02  # not a constant picture
    # Kernels add in another order: with channels last, on another processor, with more threads.
    ours = picture_decoder(vae, at_once=2, channels_last=channels_last)(x)
    close(ours, theirs, atol=4e-5 if channels_last else 2e-5)


def test_it_is_exact_as_far_as_diffusers_is(vae: Any) -> None:
    """In double precision, where diffusers still takes pictures through float32 to enlarge them."""
    import copy

    x = latents(1, 6, 6).double()
    wide = copy.deepcopy(vae).double()
    with torch.no_grad():
        theirs = wide.decode(x[:, :, None]).sample[:, :, 0]
        ours = collapsed_net(wide)(x).clamp(-1, 1)
    close(ours, theirs, atol=2e-7)


def test_half_precision_stays_near(vae: Any) -> None:
    import copy

    x, half = latents(1, 8, 8), copy.deepcopy(vae).bfloat16()
    ours, theirs, exact = picture_decoder(half)(x), stock(half, x), stock(vae, x)
    assert (ours - exact).norm() < 1.5 * (theirs - exact).norm() + 1e-3


def test_only_the_last_slice_in_time_matters(vae: Any) -> None:
    import copy

    other = copy.deepcopy(vae)
    for module in other.decoder.modules():
        if isinstance(module, nn.Conv3d):
            module.weight.data[:, :, :-1].normal_()
    close(stock(other, latents(1, 4, 4)), stock(vae, latents(1, 4, 4)))


@pytest.mark.parametrize("shape", [(2, 70, 40), (1, 50, 50)])
def test_tiles_are_blended_as_in_diffusers(vae: Any, shape: tuple[int, int, int]) -> None:
    x = latents(*shape)
    vae.enable_tiling()
    try:
        theirs = stock(vae, x).clamp(-1, 1)  # which diffusers leaves to what comes after
    finally:
        vae.use_tiling = False
    close(picture_decoder(vae, at_once=4, tiles=Tiles())(x), theirs, atol=3e-5)


def test_one_tile_is_the_whole_picture(vae: Any) -> None:
    x = latents(1, 8, 6)
    close(picture_decoder(vae, tiles=Tiles(side=8, stride=8))(x), stock(vae, x))


def test_queries_in_parts_change_nothing(vae: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vae_decode, "QUERIES", 7)
    x = latents(2, 4, 6)
    close(picture_decoder(vae)(x), stock(vae, x))


def test_it_compiles_as_one_graph(vae: Any) -> None:
    x = latents(1, 4, 4)
    close(compiled(picture_decoder(vae), backend="eager")(x), stock(vae, x))


def test_the_vae_can_be_freed_and_keeps_its_weights(vae: Any) -> None:
    net = collapsed_net(vae)
    theirs = {p.data_ptr() for p in vae.parameters()}
    assert not theirs & {p.data_ptr() for p in net.parameters()}
    assert not any(p.requires_grad for p in net.parameters())


# --- work and memory ----------------------------------------------------------------------------


def test_a_third_of_the_convolutions_work_is_left() -> None:
    """Full-size, on the meta device: convolutions in three axes become a third, nothing else."""
    from accelerate import init_empty_weights
    from diffusers import AutoencoderKLQwenImage

    with init_empty_weights(include_buffers=True):
        vae = AutoencoderKLQwenImage()
    vae, x = vae.to("meta"), torch.empty(1, 16, 64, 64, device="meta")
    counts = []
    for decode in (lambda: vae.decode(x[:, :, None]), lambda: collapsed_net(vae)(x)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            decode()
        counts.append(counter.get_total_flops())
    stock_count, ours = counts
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        collapsed_net(vae)(x)
    assert counter.get_total_flops() == ours
    flat = _flops_of_flat_layers(vae, side=64)
    assert stock_count - flat == 3 * (ours - flat)


def _flops_of_flat_layers(vae: Any, side: int) -> int:
    """Of what is 2-D already or 1x1: attention, upsampling convolutions, 1x1 convolutions."""
    total, hw = 0, side**2
    total += 2 * 16 * 16 * hw  # post_quant_conv
    dim = vae.decoder.conv_in.out_channels
    total += 2 * hw * dim * 4 * dim + 4 * hw * hw * dim  # qkv, projection, attention
    for block in vae.decoder.up_blocks:
        for residual in block.resnets:
            if not isinstance(residual.conv_shortcut, nn.Identity):
                total += 2 * hw * residual.in_dim * residual.out_dim
        for up in block.upsamplers or ():
            hw *= 4
            total += 2 * hw * 9 * up.dim * (up.dim // 2)
    return total


def test_decoding_is_fitted_to_memory() -> None:
    shape, sizes = (4, 256, 256), {"base": 96, "each": 2}
    one = vae_decode.bytes_per_latent(**sizes) * 256 * 256
    assert fitting(shape, **sizes, free=10 * one) == (4, None)
    assert fitting(shape, **sizes, free=2 * one + 1) == (2, None)
    at_once, tiles = fitting(shape, **sizes, free=one // 2)
    assert tiles == Tiles(side=128, stride=96)
    assert at_once == 2
    with pytest.raises(BadInput, match="needs"):
        fitting(shape, **sizes, free=10**6)


def test_pixels_are_rounded_as_diffusers_rounds_them(vae: Any) -> None:
    from diffusers.image_processor import VaeImageProcessor

    pictures = torch.rand(2, 3, 5, 7, generator=torch.Generator().manual_seed(0)) * 2.4 - 1.2
    theirs = VaeImageProcessor().postprocess(pictures, output_type="np")
    theirs = torch.from_numpy((theirs * 255).round().astype("uint8"))
    assert torch.equal(to_uint8(pictures), theirs)


@pytest.mark.parametrize("stride", [0, 33])
def test_tiles_leave_no_gaps(stride: int) -> None:
    with pytest.raises(BadInput, match="from 1 to side"):
        Tiles(side=32, stride=stride)


def test_at_least_one_picture_at_once(vae: Any) -> None:
    with pytest.raises(BadInput, match="at_once"):
        picture_decoder(vae, at_once=0)
    assert isinstance(picture_decoder(vae), Decoder)
