"""Distribution matching on points: closed forms, what is shipped, and a smoke run."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scipy.integrate import dblquad
from test_point_students import forbid_training

from turbo_lab.errors import BadInput
from turbo_lab.field import counted, mixture
from turbo_lab.keys import key_of
from turbo_lab.methods.divergences import power
from turbo_lab.point_recipes import rival_calls
from turbo_lab.point_students import (
    CLOUD,
    TRAJECTORY,
    rival_recipe,
    student_recipe,
    trained,
    workbench,
)
from turbo_lab.store import Store
from turbo_lab.streams import Draw
from turbo_lab.studies import points_distribution as study
from turbo_lab.studies import points_distribution_figures as drawn
from turbo_lab.studies.points_density import (
    Plane,
    divergence,
    divergences,
    kernel_width,
    log_kernels,
    log_smoothed,
    log_tilted,
    measured,
    mode_divergences,
    plane_around,
    smoothed,
)
from turbo_lab.studies.points_distribution import BUDGETS
from turbo_lab.studies.points_plane import ExactRival, PlaneRuns, noised_density
from turbo_lab.studies.points_runs import WANTED, Key
from turbo_lab.studies.points_tilt import TiltRuns, guided_field, places, target, tilt_plane
from turbo_lab.testbeds.points import points

SMOKE = BUDGETS["smoke"]
SHIPPED = Path(study.__file__).parents[1] / "artifacts" / "points"


# --- divergences --------------------------------------------------------------------------------


def test_quadrature_agrees_with_the_kl_of_two_gaussians() -> None:
    one = mixture(torch.tensor([[0.3, -0.2]]), 0.2)
    two = mixture(torch.tensor([[0.0, 0.1]]), 0.3)
    plane = Plane(axis=0.04 * torch.arange(-80, 81, dtype=torch.float64))
    q, p = (log_smoothed(m, plane, 1e-9) for m in (one, two))
    ratio, distance = (0.2 / 0.3) ** 2, 0.3**2 + 0.3**2
    exact = ratio - 1 - math.log(ratio) + distance / (2 * 0.3**2)
    assert divergence(q, p, plane.cell) == pytest.approx(exact, abs=1e-6)  # float32 means
    assert divergence(q, q, plane.cell) == 0


def test_kernels_agree_with_a_mixture_and_with_adaptive_quadrature() -> None:
    x = torch.tensor([[0.1, 0.0], [0.5, -0.3], [-0.4, 0.2]])
    goal, h = mixture(torch.tensor([[0.0, 0.0], [0.6, 0.0]]), 0.3, torch.tensor([0.7, 0.3])), 0.15
    assert kernel_width(goal) == pytest.approx(h)
    found = divergences(goal, x)

    def normal(a: float, b: float, m: list[float], var: float) -> float:
        return math.exp(-((a - m[0]) ** 2 + (b - m[1]) ** 2) / (2 * var)) / (2 * math.pi * var)

    def log_q(a: float, b: float) -> float:
        return math.log(sum(normal(a, b, m, h**2) for m in x.tolist()) / 3)

    def log_p(a: float, b: float) -> float:
        var = 0.3**2 + h**2
        return math.log(0.7 * normal(a, b, [0, 0], var) + 0.3 * normal(a, b, [0.6, 0], var))

    def integrand(b: float, a: float) -> float:
        q = log_q(a, b)
        return math.exp(q) * (q - log_p(a, b))

    exact, _ = dblquad(integrand, -1.2, 1.3, -1.1, 1.0, epsabs=2e-4)
    assert found["rkl"] == pytest.approx(exact, abs=2e-3)
    assert found["fkl"] > 0


def test_kernels_are_exact_far_from_every_sample() -> None:
    x = torch.tensor([[3.0, -3.0], [-3.0, 3.0]])  # near in each coordinate, never in both
    plane = Plane(axis=torch.linspace(-3, 3, 7, dtype=torch.float64))
    exact = mixture(x.double(), 0.05).log_density(plane.points)
    assert torch.allclose(log_kernels(x, plane, 0.05), plane.shaped(exact), rtol=1e-12)


def test_scaling_the_plane_with_the_noise_changes_nothing() -> None:
    x, mix = points("ring8").real(200, seed=0).x.double(), points("ring8").teacher
    h = kernel_width(mix)
    t = h / (1 + h)
    noised_x = mixture((1 - t) * x, t)
    axis = (1 - t) * plane_around(mix, x, h=h).axis
    plane = Plane(axis=axis)
    log_q = plane.shaped(noised_x.log_density(plane.points))
    log_p = plane.shaped(mix.log_density(plane.points, t))
    found = divergences(mix, x)
    assert divergence(log_q, log_p, plane.cell) == pytest.approx(found["rkl"], rel=1e-9)
    assert divergence(log_p, log_q, plane.cell) == pytest.approx(found["fkl"], rel=1e-9)


def test_exact_data_have_a_floor_that_falls_with_their_number() -> None:
    few, many = (measured("rare", points("rare").real(n, seed=0).x) for n in (512, 8192))
    assert many["within"] == pytest.approx(0.98889, abs=0.005)
    assert many["covered"] == 1
    for name in ("rkl", "fkl", "mode_rkl", "mode_fkl"):
        assert 0 < many[name] < few[name]
    assert many["mode_rkl"] == pytest.approx(4 / (2 * 8192), rel=1.5)  # (K - 1) / 2N on average


def test_a_lost_mode_is_seen_by_forward_kl_and_hardly_by_reverse_kl() -> None:
    x = points("rare").real(4000, seed=0).x
    mix = points("rare").teacher
    kept = x[mix.responsibilities(x).argmax(1) < 3]
    found = measured("rare", kept)
    assert found["covered"] == pytest.approx(3 / 5)
    assert found["rkl"] < 0.1
    assert found["fkl"] > 10
    shares = mode_divergences([1.0, 0.0], torch.tensor([0.5, 0.5]), 99)
    assert shares["mode_rkl"] == pytest.approx(
        0.995 * math.log(0.995 / 0.5) + 0.005 * math.log(0.005 / 0.5)
    )


# --- guidance -----------------------------------------------------------------------------------


def test_tilting_a_gaussian_divides_its_variance_by_the_scale() -> None:
    mix = mixture(
        torch.tensor([[0.0, 0.0], [0.0, 0.0]]), torch.tensor([0.2, 50.0]),
        torch.tensor([1e-9, 1.0]), labels=torch.tensor([0, 1]),
    )  # fmt: skip
    plane = Plane(axis=0.02 * torch.arange(-75, 76, dtype=torch.float64))
    for w in (1.0, 2.0, 4.0):
        p = log_tilted(mix, 0, w, plane).exp() * plane.cell
        assert float(p.sum()) == pytest.approx(1)
        variance = float((p.sum(1) * plane.axis**2).sum())
        assert variance == pytest.approx(0.2**2 / w, rel=1e-3)


def test_the_tilted_density_has_the_guided_score_at_time_zero() -> None:
    plane, _ = tilt_plane()
    log_p = target(2.0)
    step = float(plane.axis[1] - plane.axis[0])
    i, j = int(torch.searchsorted(plane.axis, -0.1)), int(torch.searchsorted(plane.axis, 1.3))
    at = torch.stack([plane.axis[i], plane.axis[j]])[None]
    mix = places()
    c = torch.tensor([0])
    guided = mix.score(at) + 2 * (mix.score(at, 0.0, c) - mix.score(at))
    slope = [
        (log_p[i + 1, j] - log_p[i - 1, j]) / (2 * step),
        (log_p[i, j + 1] - log_p[i, j - 1]) / (2 * step),
    ]
    assert guided[0].tolist() == pytest.approx([float(s) for s in slope], rel=0.02)
    t = torch.tensor([0.4])
    assert torch.equal(guided_field(1.0)(at, t, None), mix(at, t, c))


def test_smoothing_a_gaussian_adds_variances() -> None:
    one = mixture(torch.tensor([[0.2, 0.1]]), 0.2)
    plane = Plane(axis=0.05 * torch.arange(-60, 61, dtype=torch.float64))
    found = smoothed(log_smoothed(one, plane, 1e-9), plane, 0.15)
    near = found > -30  # beyond, float64 has no digits left
    assert torch.allclose(found[near], log_smoothed(one, plane, 0.15)[near], atol=1e-6)


# --- the alpha-beta plane -----------------------------------------------------------------------


def rival(alpha: float, beta: float, clip: tuple[float, float] = (1e-30, 1e30)) -> ExactRival:
    student = points("rare").spawn("student")
    return ExactRival(
        student=student, teacher=points("rare").teacher, alpha=alpha, beta=beta, ratio_clip=clip
    )


def test_the_noised_density_of_samples_is_that_of_a_mixture() -> None:
    centres = torch.randn(40, 2, generator=torch.Generator().manual_seed(0)).double()
    x_t, t = torch.randn(9, 2).double(), torch.linspace(0.1, 0.9, 9).double()
    log_q, score = noised_density(x_t, t, centres)
    tiny = mixture(centres, 1e-6)
    assert torch.allclose(log_q, tiny.log_density(x_t, t), atol=1e-6)
    assert torch.allclose(score, tiny.score(x_t, t), atol=1e-5)


def test_on_the_line_a_cell_is_the_f_divergence() -> None:
    z = torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
    x, centres, t = z[:10] / 2, z[10:], torch.linspace(0.1, 0.6, 10)
    x_t = 0.7 * x + 0.2
    reverse = rival(0.0, 1.0).gradient(x, x_t, t, centres)
    log_q, score_q = noised_density(x_t, t, centres)
    teacher = points("rare").teacher
    for alpha in (-0.5, 0.5, 1.0):
        g = rival(alpha, 1 - alpha).gradient(x, x_t, t, centres)
        h = power(alpha).h((teacher.log_density(x_t, t) - log_q).exp())
        assert torch.allclose(g, h[:, None] * reverse, rtol=1e-4, atol=1e-6)
    v = [-(t[:, None] * s + x_t) / (1 - t[:, None]) for s in (score_q, teacher.score(x_t, t))]
    gap = t[:, None] * (v[1] - v[0])  # DMD2 with velocities of exact scores
    size = (x - (x_t - t[:, None] * v[1])).abs().mean(1, keepdim=True)
    assert torch.allclose(reverse, gap / size, rtol=1e-3, atol=1e-5)


def test_cells_that_blow_up_are_counted_and_hatched() -> None:
    clouds = torch.full((2, 2, 2, 64, 2), math.nan)
    clouds[0, 1] = points("rare").real(64, seed=0).x
    clouds[1, 0, 0] = clouds[0, 1, 0]
    runs = PlaneRuns(grid=(0.0, 1.0), clouds=clouds, key="k")
    table = runs.table.groupby(["alpha", "beta"])["finite"].sum()
    assert table.to_dict() == {(0, 0): 0, (0, 1): 2, (1, 0): 1, (1, 1): 0}
    texts = [t.get_text() for t in drawn.figure_plane(runs).axes[0].texts]
    assert texts.count("blows up") == 2
    assert any("1 of 2 blew up" in text for text in texts)
    assert sum("reverse KL" in text for text in texts) == 1


# --- recipes ------------------------------------------------------------------------------------


def test_recipes_of_shipped_artefacts_keep_their_keys() -> None:
    have = {path.name for path in SHIPPED.iterdir()}
    for family in TRAJECTORY:
        for steps in (1, 2, 4, 8):
            for seed in range(3):
                recipe = student_recipe(family, steps=steps, seed=seed)
                assert f"{recipe.name}-{key_of(recipe.spec())}" in have
                assert recipe.base is not None
                assert f"base-{key_of(recipe.base.spec())}" in have


def test_shipped_rivals_are_those_that_are_asked_for() -> None:
    have = {path.name for path in SHIPPED.glob("dmd2-*")}
    asked = set()
    for key in WANTED:
        for seed in range(BUDGETS["quick"].seeds):
            options = study_options(key)
            recipe = rival_recipe(steps=key.steps, seed=seed, world=key.world, options=options)
            asked.add(f"{recipe.name}-{key_of(recipe.spec())}")
    assert len(asked) == len(WANTED) * BUDGETS["quick"].seeds
    assert have == asked


def study_options(key: Key) -> dict[str, object]:
    from turbo_lab.studies.points_runs import VARIANTS

    return dict(VARIANTS[key.variant])


@pytest.mark.parametrize(
    ("steps", "k", "rollout"), [(1, 1, ""), (1, 5, ""), (2, 5, "backward"), (2, 5, "forward")]
)
def test_rivals_spend_the_network_calls_they_are_given(
    steps: int, k: int, rollout: str, tmp_path: Path
) -> None:
    options = {"rival_updates": k, **({"rollout": rollout} if rollout else {})}
    recipe = rival_recipe(steps=steps, profile="smoke", options=options)
    store = Store(cache=tmp_path)
    trained(recipe.base, store=store)  # type: ignore[arg-type]
    bench, stage = workbench(recipe, store), recipe.stages[-1]
    spent = 0.0

    def count(net: torch.nn.Module, inputs: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        nonlocal spent
        spent += len(inputs[0]) * (3 if out.requires_grad else 1)

    for net in (bench.student, bench.pieces["fake"]):
        net.register_forward_hook(count)  # type: ignore[attr-defined]
    bench.pieces["teacher"] = teacher = counted(points("ring8").teacher)  # type: ignore[index]
    rounds = 60
    turns = bench.objective(stage).turns()
    for at in range(rounds):
        for turn in turns:
            if at % turn.every:
                continue
            for name, player in bench.objective(stage).players.items():
                for _, parameter in player.named_parameters():
                    parameter.requires_grad_(name in turn.moves)
            draw = Draw(seed=0, step=at, total=4, stream=turn.name)
            turn.loss(bench.batches(draw), draw)
    calls = (spent + teacher.images) / (4 * rounds)
    # Which step is drawn is random: with one step the count is exact.
    assert calls == pytest.approx(rival_calls(steps, k, rollout), rel=1e-9 if steps == 1 else 0.06)


def test_a_fake_starts_as_the_student_and_learns_apart_from_it(tmp_path: Path) -> None:
    recipe = rival_recipe(steps=1, profile="smoke", world="rare")
    store = Store(cache=tmp_path)
    trained(recipe.base, store=store)  # type: ignore[arg-type]
    bench = workbench(recipe, store)
    fake = dict(bench.pieces["fake"].named_parameters())  # type: ignore[attr-defined]
    for name, parameter in bench.student.named_parameters():
        assert torch.equal(parameter, fake[name])
        assert parameter is not fake[name]
    assert set(bench.rivals) == {"fake"}


def test_bad_options_are_refused_in_one_sentence() -> None:
    with pytest.raises(BadInput, match="steps=0"):
        rival_recipe(steps=0)
    with pytest.raises(BadInput, match="x="):
        divergences(points("rare").teacher, torch.full((3, 2), math.nan))


# --- the whole ----------------------------------------------------------------------------------


def test_claims_follow_the_outcomes() -> None:
    good, bad = (points("rare").real(400, seed=k).x for k in range(2))
    mix = points("rare").teacher
    collapsed = mix.means[[0]].float() + 0.05 * torch.randn(400, 2)
    lost = torch.tensor([[9.0, 9.0]]).expand(400, 2)
    samples = {}
    for key in WANTED:
        x = points(key.world).real(400, seed=0).x
        samples[key] = x.expand(2, -1, -1)
    samples[Key("little noise", "rare", 1)] = collapsed.expand(2, -1, -1)
    samples[Key("rivals-1", "rare", 1)] = lost.expand(2, -1, -1)
    runs = study.Runs(budget=replace(SMOKE, seeds=2, samples=400), runs={})
    runs.__dict__["samples"] = samples
    grid = (0.0, 1.0)
    clouds = torch.full((2, 2, 2, 400, 2), math.nan)
    clouds[0, 1], clouds[1, 0] = collapsed, bad
    plane = PlaneRuns(grid=grid, clouds=clouds, key="k")
    first = places().means[:1].float() + torch.zeros(400, 2)
    tilt = TiltRuns(
        clouds={1.0: good.expand(2, -1, -1), 2.0: good.expand(2, -1, -1),
                4.0: first.expand(2, -1, -1)},
        paths={w: good for w in (1.0, 2.0, 4.0)}, key="k",
    )  # fmt: skip
    found = {c.id: c.verdict for c in study.claims(runs, plane, tilt, "quick")}
    assert [*found] == [f"P{k}" for k in range(3, 13)]
    for id_ in ("P4", "P8", "P9", "P10", "P11", "P12"):
        assert found[id_] == "holds"
    for id_ in ("P3", "P5", "P6", "P7"):
        assert found[id_] == "inconclusive"

    samples[Key("plain", "rare", 1)] = collapsed.expand(2, -1, -1)
    samples[Key("little noise", "rare", 1)] = good.expand(2, -1, -1)
    clouds[0, 1], clouds[1, 0] = bad, math.nan
    found = {c.id: c.verdict for c in study.claims(runs, plane, tilt, "quick")}
    assert found["P3"] == "holds"  # no rare mode at all
    assert found["P4"] == found["P9"] == "not reproduced"
    assert found["P10"] == "holds"  # what blew up is nowhere


def test_the_smoke_study_runs_and_runs_again_from_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(cache=tmp_path)
    runs = study.training_runs(SMOKE, store=store)
    plane, tilt = (study.plane_runs(SMOKE.plane, store=store),
                   study.tilt_runs(SMOKE.tilt, store=store))  # fmt: skip
    assert len(runs.keys) == len(WANTED) * SMOKE.seeds
    run = runs.runs[Key("plain", "rare", 1)][0]
    assert [len(x) for x in run.clouds.values()] == [CLOUD] * len(run.clouds)
    assert max(run.clouds) == run.rounds == run.history["round"].iloc[-1]
    assert {"student/g_norm", "student/gap", "fake/velocity"} <= set(run.history)

    forbid_training(monkeypatch)
    again = study.training_runs(SMOKE, store=store)
    assert again.keys == runs.keys
    for key, x in runs.samples.items():
        assert torch.equal(again.samples[key], x)
    assert study.plane_runs(SMOKE.plane, store=store).key == plane.key
    assert study.tilt_runs(SMOKE.tilt, store=store).key == tilt.key

    short = replace(runs, runs={key: runs.runs[key] for key in list(runs.runs)[4:]})
    along, finished, exact = study.course(short), study.table(runs), study.floor(SMOKE)
    assert set(along["world"]) == {"rare"}
    assert study.summary(finished, exact).notna().all().all()
    made = study.claims(runs, plane, tilt, "smoke")
    assert json.dumps([c.record() for c in made], allow_nan=False)
    figures = [
        drawn.figure_training(along, exact), drawn.figure_tilted(tilt),
        drawn.figure_samples(runs), drawn.figure_plane(plane),
        drawn.figure_time_scales(runs, finished), drawn.figure_rollouts(finished, exact),
    ]  # fmt: skip
    assert [len(figure.axes) for figure in figures] == [15, 12, 30, 2, 4, 4]
