"""Fields: the exact mixture against closed forms, guidance against diffusers, small wrappers."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import QwenImagePipeline
from torch import Tensor, distributions, nn

from turbo_lab.errors import BadInput
from turbo_lab.field import Mixture, cast, counted, each, frozen, guided, mixture
from turbo_lab.path import mix, score, time_grid, velocity
from turbo_lab.sample import final, sample

ALL_TIMES = (0.0, 1e-4, 0.3, 0.9, 1.0)


def three(dim: int = 2) -> Mixture:
    g = torch.Generator().manual_seed(3)
    means = torch.randn(3, dim, generator=g, dtype=torch.float64)
    weights, labels = torch.tensor([0.2, 0.5, 0.3]), torch.tensor([0, 1, 1])
    return mixture(means, torch.tensor([0.3, 0.5, 0.1]), weights, labels)


def some_points(n: int = 64, dim: int = 2) -> Tensor:
    g = torch.Generator().manual_seed(4)
    return 1.5 * torch.randn(n, dim, generator=g, dtype=torch.float64)


# --- the exact mixture --------------------------------------------------------------------------


@pytest.mark.parametrize("t", ALL_TIMES)
@pytest.mark.parametrize("label", [None, -1, 0, 1])
def test_density_is_that_of_torch_distributions(t: float, label: int | None) -> None:
    field, x = three(), some_points()
    c = None if label is None else torch.full((len(x),), label)
    kept = torch.ones(3, dtype=torch.bool) if label in (None, -1) else field.labels == label
    std = ((1 - t) ** 2 * field.stds[kept] ** 2 + t**2).sqrt()
    reference = distributions.MixtureSameFamily(
        distributions.Categorical(field.weights[kept]),
        distributions.Independent(
            distributions.Normal((1 - t) * field.means[kept], std[:, None].expand(-1, 2)), 1
        ),
    )
    torch.testing.assert_close(field.log_density(x, t, c), reference.log_prob(x))


@pytest.mark.parametrize("t", ALL_TIMES)
@pytest.mark.parametrize("label", [-1, 1])
def test_score_is_the_gradient_of_the_log_density(t: float, label: int) -> None:
    field, x = three(), some_points().requires_grad_()
    c = torch.full((len(x),), label)
    (gradient,) = torch.autograd.grad(field.log_density(x, t, c).sum(), x)
    torch.testing.assert_close(field.score(x, t, c), gradient)


@pytest.mark.parametrize("t", ALL_TIMES[1:])
def test_velocity_and_score_say_the_same(t: float) -> None:
    """score = -ẑ / t, and the other way round v = -(x + t score) / (1 - t) where t < 1."""
    field, x = three(), some_points()
    v, s = field(x, torch.full((len(x),), t)), field.score(x, t)
    torch.testing.assert_close(score(x, v, t), s, rtol=1e-6, atol=1e-6)  # t is float32 in v
    if t < 1:
        torch.testing.assert_close(v, -(x + t * s) / (1 - t), rtol=1e-6, atol=1e-6)


def test_velocity_at_the_ends() -> None:
    """On data E[z] = 0, so v = -x; on pure noise nothing is known of x, so v = x_t - E[x]."""
    field, x = three(), some_points()
    mean = (field.weights[:, None] * field.means).sum(0)
    torch.testing.assert_close(field(x, torch.zeros(len(x))), -x)
    torch.testing.assert_close(field(x, torch.ones(len(x))), x - mean)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("t", [0.0, 0.5, 1.0])
def test_finite_everywhere_in_the_dtype_of_the_input(dtype: torch.dtype, t: float) -> None:
    x = torch.cat([some_points(), 60 * some_points()]).to(dtype)
    times, field = torch.full((len(x),), t), three()
    for out in (field(x, times), field.score(x, times)):
        assert out.isfinite().all()
        assert out.dtype == dtype
    assert field.log_density(x, times).isfinite().all()


def test_velocity_is_the_mean_of_noise_minus_data_at_the_same_place() -> None:
    """Bin 500k pairs by x_t; each bin's mean of z - x is within 5 standard errors of the field."""
    field = mixture(torch.tensor([[-1.0], [0.8]]), torch.tensor([0.2, 0.4]), torch.tensor([1, 2]))
    g = torch.Generator().manual_seed(5)
    x = field.sample(500_000, g).double()
    z = torch.randn(x.shape, generator=g, dtype=torch.float64)
    t = torch.full((len(x),), 0.45)
    x_t, v = mix(x, z, t), velocity(x, z)
    exact = field(x_t, t)
    bins = torch.bucketize(x_t[:, 0], torch.linspace(-1.5, 1.5, 31, dtype=torch.float64))
    for k in range(1, 31):
        gap = (v - exact)[bins == k, 0]
        assert abs(gap.mean()) < 5 * gap.std() / math.sqrt(len(gap))


def test_images_are_flat_points() -> None:
    field, x = three(dim=12), some_points(5, 12)
    t = torch.rand(5)
    images = field(x.reshape(5, 3, 2, 2), t)
    assert torch.equal(images.reshape(5, 12), field(x, t))


def test_class_condition_restricts_row_by_row() -> None:
    field, x = three(), some_points(6)
    t, c = torch.rand(6), torch.tensor([0, 1, -1, 0, 1, -1])
    v = field(x, t, c)
    for row, label in enumerate(c.tolist()):
        alone = field if label < 0 else field.only(label)
        torch.testing.assert_close(v[row], alone(x[row : row + 1], t[row : row + 1])[0])
    assert field.responsibilities(x, t, c)[0].tolist() == [1, 0, 0]


def test_exact_samples_have_the_weights_means_and_stds() -> None:
    n, field = 100_000, three()
    g = torch.Generator().manual_seed(6)
    x, k = field.place(torch.rand(n, generator=g), torch.randn(n, 2, generator=g))
    for j, w in enumerate([0.2, 0.5, 0.3]):
        mine = x[k == j].double()
        assert len(mine) / n == pytest.approx(w, abs=5 * math.sqrt(w * (1 - w) / n))
        torch.testing.assert_close(mine.mean(0), field.means[j], rtol=0, atol=0.01)
        torch.testing.assert_close(mine.std(0), field.stds[j].expand(2), rtol=0.03, atol=0)


def test_log_density_integrates_to_one() -> None:
    axis = torch.linspace(-6, 6, 241, dtype=torch.float64)
    x = torch.cartesian_prod(axis, axis)
    mass = three().log_density(x, 0.2).exp().sum() * (axis[1] - axis[0]) ** 2
    assert mass.item() == pytest.approx(1, abs=1e-6)


def test_gradients_flow_through_the_exact_field() -> None:
    field, x = three(), some_points(4)
    t = torch.rand(4, dtype=torch.float64)
    assert torch.autograd.gradcheck(field, (x.requires_grad_(), t.requires_grad_()))


@pytest.mark.parametrize(
    ("parameter", "call"),
    [
        ("means", lambda: mixture(torch.zeros(3), 1.0)),
        ("stds", lambda: mixture(torch.zeros(3, 2), 0.0)),
        ("weights", lambda: mixture(torch.zeros(3, 2), 1.0, torch.tensor([1.0, -1, 1]))),
        ("labels", lambda: mixture(torch.zeros(3, 2), 1.0, labels=torch.tensor([0, 1]))),
        ("c", lambda: three()(torch.zeros(2, 2), torch.ones(2), torch.tensor([0, 7]))),
    ],
)
def test_wrong_mixtures_and_classes_are_refused(parameter: str, call) -> None:
    with pytest.raises(BadInput, match=f"^{parameter}="):
        call()


# --- guidance -----------------------------------------------------------------------------------


class Toy(nn.Module):
    """A field of images with a class: enough to tell the two branches apart."""

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(7)
        self.shifts = nn.Parameter(torch.randn(4, 3, 4, 6, generator=g))

    def forward(self, x_t: Tensor, t: Tensor, c: Tensor) -> Tensor:
        return x_t.sin() + self.shifts[c + 1] * (1 + t.to(x_t)[:, None, None, None])


def images(n: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(8)
    x_t, t = torch.randn(n, 3, 4, 6, generator=g), torch.rand(n, generator=g)
    return x_t, t, torch.arange(n) % 3


NULL = torch.tensor([-1])


def test_scale_one_is_the_field_bit_for_bit_at_half_the_price() -> None:
    net, (x_t, t, c) = counted(Toy()), images()
    for rescale in ("none", "token", "sample"):
        assert torch.equal(guided(net, NULL, 1.0, rescale)(x_t, t, c), Toy()(x_t, t, c))
    assert net.per_image(len(x_t)) == 3


def test_guidance_is_the_published_line() -> None:
    net, (x_t, t, c) = Toy(), images()
    v_cond, v_null = net(x_t, t, c), net(x_t, t, torch.full_like(c, -1))
    torch.testing.assert_close(
        guided(net, NULL, 4.0)(x_t, t, c), v_null + 4.0 * (v_cond - v_null), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(guided(net, NULL, 0.0)(x_t, t, c), v_null)


def test_token_rescale_is_that_of_the_qwen_pipeline() -> None:
    """Pack as the pipeline packs, then its three lines, then compare in packed space."""
    net, (x_t, t, c) = Toy(), images()

    def pack(v: Tensor) -> Tensor:
        return QwenImagePipeline._pack_latents(v, *v.shape)

    noise_pred, neg_noise_pred = pack(net(x_t, t, c)), pack(net(x_t, t, torch.full_like(c, -1)))
    comb_pred = neg_noise_pred + 4.0 * (noise_pred - neg_noise_pred)
    cond_norm = torch.norm(noise_pred, dim=-1, keepdim=True)
    noise_norm = torch.norm(comb_pred, dim=-1, keepdim=True)
    ours = pack(guided(net, NULL, 4.0, "token")(x_t, t, c))
    torch.testing.assert_close(ours, comb_pred * (cond_norm / noise_norm), rtol=1e-5, atol=1e-5)


def test_sample_rescale_keeps_direction_and_takes_the_length() -> None:
    net, (x_t, t, c) = Toy(), images()
    plain, ours = guided(net, NULL, 4.0)(x_t, t, c), guided(net, NULL, 4.0, "sample")(x_t, t, c)
    length = net(x_t, t, c).flatten(1).norm(dim=1)
    torch.testing.assert_close(ours.flatten(1).norm(dim=1), length)
    torch.testing.assert_close(
        torch.cosine_similarity(ours.flatten(1), plain.flatten(1)), torch.ones(len(c))
    )


def test_rescale_of_a_vanishing_velocity_is_zero_not_nan() -> None:
    x_t, t, c = images()
    still = guided(lambda x, t, c: torch.zeros_like(x), NULL, 4.0, "token")
    assert torch.equal(still(x_t, t, c), torch.zeros_like(x_t))


def test_guidance_takes_nested_conditions_and_one_time_for_all() -> None:
    def net(x: Tensor, t: Tensor, c: tuple[Tensor, Tensor]) -> Tensor:
        return x * t[:, None] + c[0].mean(1) * c[1][:, None]

    x_t, c = some_points(4), (torch.randn(4, 5, 2), torch.arange(4))
    null = (torch.zeros(1, 5, 2), torch.ones(1, dtype=torch.long))
    v = guided(net, null, 3.0)(x_t, torch.tensor(0.5), c)
    torch.testing.assert_close(v, 0.5 * x_t + 3 * c[0].mean(1) * c[1][:, None])


@pytest.mark.parametrize(
    ("parameter", "call"),
    [
        ("scale", lambda: guided(three(), NULL, -1.0)),
        ("scale", lambda: guided(three(), NULL, math.nan)),
        ("rescale", lambda: guided(three(), NULL, 2.0, "rms")),
        (
            "rescale",
            lambda: guided(three(), NULL, 2.0, "token")(
                some_points(2), torch.ones(2), torch.tensor([0, 1])
            ),
        ),
        ("c", lambda: guided(three(), NULL, 2.0)(some_points(2), torch.ones(2), None)),
        ("c", lambda: each(torch.neg, ["a caption"])),
    ],
)
def test_wrong_guidance_is_refused(parameter: str, call) -> None:
    with pytest.raises(BadInput, match=f"^{parameter}="):
        call()


# --- small wrappers -----------------------------------------------------------------------------


@pytest.mark.parametrize(("scale", "steps", "nfe"), [(4.0, 40, 80), (1.0, 40, 40), (1.0, 2, 2)])
def test_nfe_of_teacher_and_student(scale: float, steps: int, nfe: int) -> None:
    net, c = counted(three()), torch.zeros(8, dtype=torch.long)
    final(sample(guided(net, NULL, scale), time_grid(steps), some_points(8), c))
    assert net.per_image(8) == nfe


def test_frozen_gives_the_same_without_a_graph() -> None:
    net, (x_t, t, c) = Toy(), images()
    v = frozen(net)(x_t.requires_grad_(), t, c)
    assert not v.requires_grad
    assert torch.equal(v, net(x_t, t, c))


def test_cast_happens_at_the_border_and_leaves_times_and_labels() -> None:
    seen = {}

    def net(x: Tensor, t: Tensor, c: tuple[Tensor, Tensor]) -> Tensor:
        seen.update(x=x.dtype, t=t.dtype, embeds=c[0].dtype, mask=c[1].dtype)
        return x

    x_t = torch.randn(2, 3)
    c = (torch.randn(2, 4), torch.ones(2, dtype=torch.long))
    v = cast(net, torch.bfloat16)(x_t, torch.ones(2), c)
    half = torch.bfloat16
    assert seen == {"x": half, "t": torch.float32, "embeds": half, "mask": torch.long}
    assert torch.equal(v, x_t.bfloat16().float())
