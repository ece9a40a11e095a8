"""Transition matching against closed forms: two views of one image, and where the flow leads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gaussian_world import MEAN, STD, GaussianField, GaussianMap, gaussian_batches
from torch import Tensor, nn

from turbo_lab import recipes, training
from turbo_lab.adapters import AdapterSize
from turbo_lab.errors import BadInput
from turbo_lab.field import frozen
from turbo_lab.fit import Batch, fit
from turbo_lab.methods import Transition
from turbo_lab.methods.transition import (
    Known,
    PointHead,
    gaussian_estimate,
    inner_noise,
    one_view,
    spawn_latent_head,
    spawn_point_head,
)
from turbo_lab.optimisers import Optimiser
from turbo_lab.path import expand, mix, time_grid
from turbo_lab.postcards.captions import TOKENS, VOCABULARY
from turbo_lab.recipes import Rates, Recipe, Stage
from turbo_lab.sample import final, sample
from turbo_lab.store import Store
from turbo_lab.streams import Draw
from turbo_lab.testbeds.points import points
from turbo_lab.testbeds.postcards import LATENT_CHANNELS, LATENT_SHAPE, NetSize

TEACHER = frozen(GaussianField().requires_grad_(False))
DRAW = Draw(seed=3, step=5, total=64)
EDGE = 0.7155


class ExactHead(nn.Module):
    """The head that turns the method's estimate into the exact mean, for data N(m, d² I)."""

    def __init__(self, mean: float = MEAN, std: float = STD) -> None:
        super().__init__()
        self.mean, self.std = mean, std
        self.idle = nn.Parameter(torch.zeros(()))

    def exact(self, y_s: Tensor, s: Tensor, known: Known) -> Tensor:
        """By conditioning a Gaussian: y given x_t is N(m, V), and y_s is y in noise s."""
        _, t, m, _ = known
        s, t = expand(s, y_s), expand(t, y_s)
        variance = self.std**2 / ((1 - t) ** 2 * self.std**2 + t**2)
        gain = (1 - s) * variance / ((1 - s) ** 2 * variance + s**2)
        return m + gain * (y_s - (1 - s) * m)

    def forward(self, y_s: Tensor, s: Tensor, known: Known) -> Tensor:
        mean, spread = gaussian_estimate(y_s, s, known[1], known[2])
        return (self.exact(y_s, s, known) - mean) / spread + 0 * self.idle


def build(head: nn.Module, **options: object) -> Transition:
    settings = {"student": GaussianMap(), "teacher": TEACHER, "times": (1.0, EDGE), **options}
    return Transition(head=head, **settings)  # type: ignore[arg-type]


def place(time: float, n: int = 64, std: float = STD) -> Known:
    """What is known of a transition that starts at a time, for n samples."""
    numbers = torch.Generator().manual_seed(1)
    x, z = (torch.randn(n, 3, generator=numbers) for _ in range(2))
    t = torch.full((n,), time)
    x_t = mix(MEAN + std * x, z, t)
    with torch.no_grad():
        m = GaussianField(MEAN, std)(x_t, t, None)
    return x_t, t, m, None


# --- two views of one image ---------------------------------------------------------------------


def test_two_views_make_one_of_a_lower_noise() -> None:
    n = 40_000
    numbers = torch.Generator().manual_seed(0)
    x, z, y_1 = (torch.randn(n, 1, generator=numbers).double() for _ in range(3))
    t, s = torch.full((n,), 0.7).double(), torch.full((n,), 0.4).double()
    x_tau, tau = one_view(mix(x, z, t), t, mix(z - x, y_1, s), s)
    noise = (x_tau - (1 - tau[:, None]) * x) / tau[:, None]  # what is not x has to be unit noise
    assert float(noise.var()) == pytest.approx(1, abs=4 * (2 / n) ** 0.5)
    assert abs(float((noise * x).mean())) < 4 / n**0.5
    a, b = 0.3 / 0.7, 0.6 / (0.7 * 0.4)
    torch.testing.assert_close(noise, (a * z - b * y_1) / (a * a + b * b) ** 0.5)
    assert float(tau[0]) == pytest.approx(1 / (1 + (a * a + b * b) ** 0.5)) and float(tau[0]) < 0.4


def test_the_second_view_says_nothing_at_one_and_everything_at_zero() -> None:
    x_t, t, _, _ = place(0.6)
    y = torch.randn(64, 3)
    x_tau, tau = one_view(x_t, t, torch.randn(64, 3), torch.ones(64))
    torch.testing.assert_close(x_tau, x_t, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(tau, t)
    x_tau, tau = one_view(x_t, t, y, torch.full((64,), 1e-6))
    torch.testing.assert_close(x_tau, x_t - 0.6 * y, rtol=1e-3, atol=1e-3)
    assert float(tau.max()) < 1e-5
    z, ones = torch.randn(64, 3), torch.ones(64)
    x_tau, tau = one_view(z, ones, y, ones)  # neither says anything
    torch.testing.assert_close(x_tau, z, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(tau, ones)


@pytest.mark.parametrize("time", [1.0, EDGE, 0.2])
def test_the_teachers_answer_is_the_posterior_mean(time: float) -> None:
    head, known = ExactHead(), place(time)
    for s in (1.0, 0.6, 0.05, 1e-3):
        y_s, at = torch.randn(64, 3), torch.full((64,), s)
        got = build(head).answer(y_s, at, known)
        torch.testing.assert_close(got, head.exact(y_s, at, known), rtol=1e-3, atol=1e-3)


def test_a_head_of_zeros_is_exact_for_data_of_unit_variance() -> None:
    unit = frozen(GaussianField(0.0, 1.0).requires_grad_(False))
    method = build(spawn_zero(), teacher=unit)
    x_t, t = torch.randn(64, 3), torch.full((64,), EDGE)
    known: Known = (x_t, t, unit(x_t, t, None), None)
    y_s, s = torch.randn(64, 3), torch.linspace(0.01, 1, 64)
    torch.testing.assert_close(
        method.estimate(y_s, s, known), method.answer(y_s, s, known), rtol=1e-3, atol=1e-4
    )


def spawn_zero() -> nn.Module:
    class Zero(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.zeros(()))

        def forward(self, y_s: Tensor, s: Tensor, known: Known) -> Tensor:
            return self.scale * y_s

    return Zero()


# --- where the flow leads -----------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 4, 16])
def test_the_first_transition_is_the_teachers_own_path_step_for_step(steps: int) -> None:
    known = place(1.0)
    z, t, m, _ = known
    torch.testing.assert_close(inner_noise(z, t, m), -z)
    y = build(ExactHead(), inner_steps=steps).rollout(inner_noise(z, t, m), known)
    path = final(sample(TEACHER, time_grid(steps), z))
    torch.testing.assert_close(z - y, path, rtol=1e-4, atol=1e-4)


def test_the_rollout_converges_at_first_order_to_a_sample_of_the_transition() -> None:
    """From inner noise y_1 the exact flow leads to the mean plus √V y_1."""
    known, y_1 = place(EDGE), torch.randn(64, 3, generator=torch.Generator().manual_seed(2))
    spread = STD / (((1 - EDGE) * STD) ** 2 + EDGE**2) ** 0.5
    exact = known[2] + spread * y_1
    errors = [
        float((build(ExactHead(), inner_steps=n).rollout(y_1, known) - exact).abs().mean())
        for n in (32, 64)
    ]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1) and errors[1] < 0.02


@pytest.mark.parametrize("std", [0.05, 0.7, 1.0, 2.5, 20.0])
def test_the_fold_spreads_as_it_says_it_does(std: float) -> None:
    n = 5_000
    known = place(EDGE, n, std)
    x_t, t, m, _ = known
    head = ExactHead(MEAN, std)
    y = build(head, inner_steps=200).rollout(inner_noise(x_t, t, m), known)
    x = x_t - EDGE * y
    alpha = std * (1 - EDGE) / ((std * (1 - EDGE)) ** 2 + EDGE**2) ** 0.5
    factor = alpha + 1 - alpha**2
    assert 1 <= factor <= 1.25
    # The noise that is read off has a mean that is not zero where the data's is not.
    assert float(x.std()) / std == pytest.approx(factor, rel=0.03)


# --- losses -------------------------------------------------------------------------------------


def test_an_exact_head_has_no_loss_and_a_student_folds_it_in() -> None:
    method = build(ExactHead(), inner_steps=200, times=(1.0,))
    terms = method.loss(gaussian_batches(DRAW), DRAW)
    assert (
        float(terms["head"].detach().max()) < 1e-5 and float(terms["fold"].detach().mean()) < 1e-3
    )
    wrong = build(ExactHead(), inner_steps=200, times=(1.0,), student=GaussianMap(1.0, 0.7))
    assert float(wrong.loss(gaussian_batches(DRAW), DRAW)["fold"].detach().mean()) > 0.1


def test_each_term_has_gradients_in_its_own_player_alone() -> None:
    student, head = GaussianMap(1.2, 0.5), spawn_zero()
    method = build(head, student=student)
    (turn,) = method.turns()
    assert turn.moves == ("student", "head") and list(method.players) == ["student", "head"]
    terms = turn.loss(gaussian_batches(DRAW), DRAW)
    players = [*student.parameters(), *head.parameters()]
    of_head = torch.autograd.grad(terms["head"].sum(), players, allow_unused=True)
    of_fold = torch.autograd.grad(terms["fold"].sum(), players, allow_unused=True)
    assert [g is not None for g in of_head] == [False, False, True]
    assert [g is not None for g in of_fold] == [True, True, False]


@pytest.mark.parametrize("kind", ["points", "latents"])
def test_heads_start_at_the_gaussian_estimate_and_reach_every_parameter(kind: str) -> None:
    shape: tuple[int, ...] = (2,)
    head: nn.Module = spawn_point_head(seed=0)
    again: nn.Module = spawn_point_head(seed=0)
    c: Tensor | None = None
    if kind == "latents":
        sizes = {"channels": LATENT_CHANNELS, "vocabulary": VOCABULARY, "tokens": TOKENS}
        head, again = (spawn_latent_head(**sizes, seed=0, width=8) for _ in range(2))
        shape, c = LATENT_SHAPE, torch.zeros(4, TOKENS, dtype=torch.long)
    ours, theirs = head.state_dict(), again.state_dict()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    y_s, s, t = torch.randn(4, *shape), torch.tensor([1.0, 0.7, 0.3, 0.01]), torch.full((4,), EDGE)
    known: Known = (torch.randn(4, *shape), t, torch.randn(4, *shape), c)
    assert not bool(head(y_s, s, known).any())
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.1)
    out = head(y_s, s, known)
    assert out.shape == y_s.shape and bool(out.isfinite().all())
    out.square().sum().backward()
    assert all(p.grad is not None for p in head.parameters())


def test_a_head_learns_transitions_on_points_and_hands_them_to_the_student() -> None:
    """One Euler step of the teacher of a ring lands in its middle; the student lands on it."""
    bed = points("ring8", width=64)
    student, head = bed.spawn("student"), PointHead()
    method = Transition(
        student=student, teacher=frozen(bed.teacher), head=head, times=(1.0,), inner_steps=4
    )

    def batches(draw: Draw) -> Batch:
        x, c, _ = bed.batches(draw)
        return Batch(x, torch.full_like(c, -1))

    plan = {name: Optimiser(lr=5e-3, final=0.05) for name in ("student", "head")}
    records = list(fit(method, batches, steps=150, batch_size=64, seed=0, optimisers=plan))
    first, last = records[0].terms, records[-1].terms
    assert last["transition/fold"] < 0.01 * first["transition/fold"]
    z = torch.randn(512, 2, generator=torch.Generator().manual_seed(0))
    at = torch.ones(512)
    with torch.no_grad():
        m = bed.teacher(z, at, None)
        led = z - method.rollout(inner_noise(z, at, m), (z, at, m, None))
        own = final(sample(student, time_grid(1), z))
    # The student has become the head's rollout, and has left the teacher's mean for the ring.
    assert float((own - led).norm(dim=1).median()) < 0.1
    assert float((z - m).norm(dim=1).max()) < 0.1 < 0.5 < float(own.norm(dim=1).median())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"times": (0.9, 0.5)}, "times"),
        ({"times": (1.0, 1.0)}, "times"),
        ({"inner_steps": 0}, "inner_steps=0"),
        ({"distance": "l1"}, "l1"),
    ],
)
def test_bad_options_are_named(options: dict[str, object], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        build(spawn_zero(), **options)


# --- through recipes ----------------------------------------------------------------------------


def test_the_head_is_kept_for_replay_and_dropped_before_the_next_stage(tmp_path: Path) -> None:
    whole = recipes.resolve("teacher", profile="smoke")
    size = NetSize(layers=1, heads=1, head_width=16, text_width=16)
    short = whole.stages[0].model_copy(update={"steps": 2})
    base = whole.model_copy(update={"net": size, "stages": (short,)})
    shared = {"steps": 2, "batch_size": 4, "teacher": "guided", "guidance_scale": 3.0}
    rates = Rates(lr=1e-2)
    warm = Stage(
        method="transition",
        options={"times": (1.0, EDGE), "inner_steps": 2},
        rates={"student": rates, "head": rates},
        **shared,  # type: ignore[arg-type]
    )
    matched = Stage(
        method="dmd2",
        options={"times": (1.0, EDGE), "rival_updates": 1},
        rates={"student": rates, "fake": rates},
        rivals_from="before",
        **shared,  # type: ignore[arg-type]
    )
    recipe = Recipe(
        name="warm",
        net=size,
        stages=(warm, matched),
        teacher=base,
        adapter=AdapterSize(rank=2),
    )
    store = Store(cache=tmp_path)
    artefact = training.trained(recipe, store=store)
    assert recipe.before is not None and recipe.before.times == (1.0, EDGE)
    first = store.find(recipe.artefact, recipe.before.spec())
    assert first is not None
    assert all(".lora_" in name for name in first.tensors())  # the student is an adapter alone
    kept = first.tensors(training.RIVAL_FILE)
    assert {key.split("/")[0] for key in kept} == {"head"}
    assert training.replay(recipe.before, first, store) == training.recorded(first)
    bench = training.workbench(recipe, store)
    assert list(bench.rivals) == ["fake"] and "head" not in bench.pieces
    start = bench.student.state_dict()
    assert all(torch.equal(start[k], v.float()) for k, v in first.tensors().items())
    assert training.replay(recipe, artefact, store) == training.recorded(artefact)
