"""Points with a wrong teacher: closed forms of its field, of distances, of an optimal critic."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from importlib import resources
from itertools import product
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from pydantic import ValidationError
from torch import Tensor, nn

from turbo_lab import point_students
from turbo_lab.errors import BadInput
from turbo_lab.field import Mixture, mixture
from turbo_lab.fit import Batch
from turbo_lab.keys import key_of
from turbo_lab.methods.dmd2 import DMD2, pull
from turbo_lab.methods.gan import WithGan
from turbo_lab.path import mix
from turbo_lab.point_recipes import PointGan, PointRecipe, gan_recipe
from turbo_lab.recipes import Gan
from turbo_lab.store import Store
from turbo_lab.streams import Draw
from turbo_lab.studies import points_gan, points_gan_figures
from turbo_lab.studies import points_gan_measures as measures
from turbo_lab.studies.points_gan import ALONE, BLURRED, BUDGETS, STUDENTS, TILTED, WORLDS, Runs
from turbo_lab.testbeds.points import (
    BLUR,
    MIXTURES,
    TRUTHS,
    WITHIN_3_SIGMA,
    points,
    ring8,
    truth_of,
)

DRAW = Draw(seed=0, step=0, total=400)
TILTED_WEIGHTS = torch.softmax(torch.cos(2 * math.pi * torch.arange(8.0).double() / 8), 0)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(cache=tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def runs(store: Store) -> Runs:
    return points_gan.gan_runs(BUDGETS["smoke"], store=store)


# --- wrong teachers -----------------------------------------------------------------------------


def test_the_field_of_wrong_weights_is_that_of_its_own_mixture() -> None:
    """Asked at pure noise it means its mean; its samples have its weights, at the data's modes."""
    bed, truth = points(TILTED), points(truth_of(TILTED)).teacher
    z = torch.randn(50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mean = TILTED_WEIGHTS @ ring8().means
    assert torch.allclose(z - bed.teacher(z, torch.ones(50)), mean.expand(50, 2), atol=1e-9)
    assert float(mean[0]) == pytest.approx(0.6312, abs=1e-3) and abs(float(mean[1])) < 1e-9
    ends = point_students.path_end(bed.teacher, DRAW.normal("z", (2,)).double())
    shares = truth.responsibilities(ends).mean(0)
    assert float((shares - TILTED_WEIGHTS).abs().max()) < 4 * math.sqrt(0.25 / 400)
    assert float(measures.width_of(ends, truth)) == pytest.approx(1, abs=0.1)


def test_blurred_modes_are_wider_and_nothing_else() -> None:
    wrong, truth = points(BLURRED).teacher, points(truth_of(BLURRED)).teacher
    assert torch.equal(wrong.stds, BLUR * truth.stds) and torch.equal(wrong.means, truth.means)
    assert torch.equal(wrong.log_weights(), truth.log_weights())
    assert truth_of("rare") == "rare" and set(TRUTHS.values()) <= MIXTURES.keys()


# --- distances ----------------------------------------------------------------------------------


def test_mean_norm_of_a_shifted_gaussian() -> None:
    """Centred it is Rayleigh's mean, far out d + s²/2d, in between what 400,000 draws say."""
    s = torch.tensor([0.3], dtype=torch.float64)
    centred, far = (measures.mean_norm(torch.tensor([d]).double(), s) for d in (0.0, 50.0))
    assert float(centred) == pytest.approx(0.3 * math.sqrt(math.pi / 2), rel=1e-6)
    assert float(far) == pytest.approx(50 + 0.09 / 100, abs=1e-6)
    n = torch.randn(400_000, 2, generator=torch.Generator().manual_seed(0))
    drawn = (0.3 * n + torch.tensor([0.4, 0.0])).norm(dim=1)
    error = 4 * float(drawn.std()) / len(n) ** 0.5
    assert float(measures.mean_norm(torch.tensor([0.4]).double(), s)) == pytest.approx(
        float(drawn.mean()), abs=error
    )


def test_the_distance_of_two_gaussians_of_one_centre() -> None:
    """√(π/2) (2 √(a² + b²) - √2 a - √2 b), and nothing from a mixture to itself."""
    a, b = 1.0, 3.0
    exact = math.sqrt(math.pi / 2) * (2 * math.hypot(a, b) - math.sqrt(2) * (a + b))
    one, other = measures.round_mode(a), measures.round_mode(b)
    assert measures.between(one, other) == pytest.approx(exact, rel=1e-9)
    assert measures.between(ring8(), ring8()) == pytest.approx(0, abs=1e-12)
    assert measures.between(points(TILTED).teacher, ring8()) > 0.2


def test_rows_average_to_the_unbiased_distance_and_carry_each_sample_once() -> None:
    """A row is what leaving its sample out changes, times n: the influence of a U-statistic."""
    tilted, truth = points(TILTED).teacher, ring8()
    x = points(TILTED).real(300, seed=1).x
    rows = measures.energy_rows(x, truth)
    pairs = torch.pdist(x.double()).mean()
    to = measures.mean_norm(torch.cdist(x.double(), truth.means), truth.stds) @ (
        truth.log_weights()[0].exp()
    )
    by_hand = 2 * to.mean() - pairs - measures.mean_distance(truth, truth)
    assert float(rows.mean()) == pytest.approx(float(by_hand), abs=1e-9)
    without = measures.energy_rows(torch.cat([x[:7], x[8:]]), truth).mean()
    change = (len(x) - 1) * (rows.mean() - without)
    assert float(change) == pytest.approx(float(rows[7] - rows.mean()), abs=0.02)
    many = torch.stack([measures.energy_rows(x, tilted).mean() for x in _sets(TILTED)])
    assert abs(float(many.mean())) < 4 * float(many.std()) / len(many) ** 0.5  # may be below 0
    with pytest.raises(BadInput, match="two samples"):
        measures.energy_rows(x[:1], truth)


def _sets(world: str) -> list[Tensor]:
    return [points(world).real(100, seed=k).x for k in range(40)]


def test_folding_takes_the_weights_away_and_leaves_the_shape() -> None:
    for world, width in ((TILTED, 1.0), ("ring8", 1.0), (BLURRED, BLUR)):
        x = points(world).real(4000, seed=2).x
        assert measures.width_of(x, ring8()) == pytest.approx(width, rel=0.04)
        shape = measures.energy_rows(measures.folded(x, ring8()), measures.round_mode(width))
        assert abs(float(shape.mean())) < 0.01


def test_the_teachers_own_defects_are_exact() -> None:
    """KL of weights by hand, shares within 3 sigma against 40,000 samples."""
    found = points_gan.teachers()
    kl = float((TILTED_WEIGHTS * (8 * TILTED_WEIGHTS).log()).sum())
    assert found.loc[WORLDS[TILTED], "mode_kl"] == pytest.approx(kl, rel=1e-6)
    assert found.loc[WORLDS[TILTED], "heaviest"] == pytest.approx(math.e**2, rel=1e-6)
    assert found.loc[WORLDS[BLURRED], "width"] == pytest.approx(BLUR)
    for world, title in WORLDS.items():
        drawn = points("ring8").measure(points(world).real(40_000, seed=0).x)["within"]
        assert found.loc[title, "within"] == pytest.approx(drawn, abs=0.01)
    perfect = found.loc["the data themselves"]
    assert perfect["within"] == pytest.approx(WITHIN_3_SIGMA, abs=1e-6)
    assert perfect[["energy", "shape", "mode_kl"]].abs().max() < 1e-9


# --- the gradient of an optimal critic ----------------------------------------------------------


class Placed(nn.Module):
    """A one-step student whose samples are where its parameters say, whatever the noise."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = nn.Parameter(x)

    def forward(self, x_t: Tensor, t: Tensor, c: object) -> Tensor:
        return x_t - self.x


class Optimal(nn.Module):
    """log p / q of two mixtures, each noised to the time that is asked about."""

    def __init__(self, p: Mixture, q: Mixture) -> None:
        super().__init__()
        self.p, self.q, self.unused = p, q, nn.Parameter(torch.zeros(1))

    def forward(self, x_t: Tensor, t: Tensor, c: object) -> Tensor:
        return self.p.log_density(x_t, t) - self.q.log_density(x_t, t)


T = 0.3
Q = mixture(ring8().means, 0.15, torch.arange(1.0, 9.0))
"""What the student's samples are drawn from."""


def both_sides(rho: float) -> Mixture:
    """rho data + (1 - rho) of the teacher of wrong weights: one mixture, as modes are shared."""
    return mixture(ring8().means, ring8().stds, rho / 8 + (1 - rho) * TILTED_WEIGHTS)


def gan_slope(rho: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient ``[N, 2]`` of the GAN term at the student's samples, and these, clean and noised."""
    bed = points(TILTED)
    x, _ = Q.place(DRAW.uniform("k"), DRAW.normal("n", (2,)))
    student = Placed(x)
    dmd2 = DMD2(student=student, teacher=bed.teacher, fake=student, times=(1.0,))
    method = WithGan(
        method=dmd2, critic=Optimal(both_sides(rho), Q), real=bed.batches, weight=1.0,
        noise_range=(T, T),
    )  # fmt: skip
    batch = Batch(torch.zeros(400, 2), torch.full((400,), -1))
    terms = method.student_loss(batch, DRAW)
    (slope,) = torch.autograd.grad(terms["gan"].sum(), student.x)
    eps = DRAW.sub("gan").normal("eps/student", (2,))
    return slope, x, mix(x, eps, torch.full((400,), T))


@pytest.mark.parametrize("rho", [0.0, 0.5, 1.0])
def test_an_optimal_critic_pushes_along_the_scores_of_the_mixture_and_the_student(
    rho: float,
) -> None:
    """-(1 - t) σ(-D) ∇ log (p_mix / q), the scores taken from velocities and not by autograd."""
    slope, _, x_t = gan_slope(rho)
    t, p = torch.full((400,), T), both_sides(rho)
    scores = [-(x_t + (1 - T) * field(x_t, t)) / T for field in (p, Q)]
    d = p.log_density(x_t, T) - Q.log_density(x_t, T)
    expected = -(1 - T) * torch.sigmoid(-d)[:, None] * (scores[0] - scores[1])
    torch.testing.assert_close(slope, expected.float(), rtol=1e-3, atol=1e-3)


def test_only_with_the_teachers_samples_does_the_gan_pull_where_dmd2_does() -> None:
    """At the same noise the two are parallel at rho = 0, sample by sample, and not at 1."""
    angles = []
    for rho in (0.0, 1.0):
        slope, x, x_t = gan_slope(rho)
        t = torch.full((400,), T)
        g, _ = pull(x, x_t, t, Q(x_t, t), points(TILTED).teacher(x_t, t), 1e-3)
        angles.append(nn.functional.cosine_similarity(slope, g))
    moving = g.norm(dim=1) > 1e-3
    assert float(angles[0][moving].min()) > 0.999
    assert float(angles[1][moving].min()) < 0.9


# --- recipes and students -----------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["logistic", "hinge"])
def test_a_critic_that_is_not_followed_leaves_dmd2_as_it_is(store: Store, loss: str) -> None:
    """Bit for bit: the same recipe without a critic ends in the same weights."""
    gan = PointGan(rho=0.5, weight=0.0, r1=0.1, loss=loss, noise_range=(0.0, 0.5))
    watched = gan_recipe(gan, profile="smoke")
    (stage,) = watched.stages
    rates = {name: rate for name, rate in stage.rates.items() if name != "critic"}
    stages = (stage.model_copy(update={"rates": rates}),)
    plain = watched.model_copy(update={"gan": None, "stages": stages})
    one, two = (point_students.trained(r, store=store).tensors() for r in (watched, plain))
    assert all(torch.equal(one[name], two[name]) for name in two)
    followed = gan_recipe(gan.model_copy(update={"weight": 5.0}), profile="smoke")
    three = point_students.trained(followed, store=store).tensors()
    assert any(not torch.equal(three[name], two[name]) for name in two)


def test_the_critics_real_side_is_data_with_probability_rho(store: Store, runs: Runs) -> None:
    draw = Draw(seed=0, step=0, total=4000)
    for rho, world in product((0.0, 0.5, 1.0), WORLDS):
        recipe = gan_recipe(PointGan(rho=rho, weight=1.0), profile="smoke", world=world)
        method = point_students.objective(recipe, point_students.workbench(recipe, store))
        assert isinstance(method, WithGan)
        x = method.real(draw).x
        shares = ring8().responsibilities(x).mean(0)
        due = rho / 8 + (1 - rho) * (TILTED_WEIGHTS if world == TILTED else 1 / 8)
        assert float((shares - due).abs().max()) < 0.04
        width = float(measures.folded(x, ring8()).square().mean())
        other = 1.0 if world == TILTED else BLUR**2
        assert width == pytest.approx(rho + (1 - rho) * other, rel=0.15)
    assert list(method.players) == ["student", "fake", "critic"]


def test_what_does_not_go_together_is_refused_before_any_work(tmp_path: Path) -> None:
    for settings in (
        {"rho": 1.5, "weight": 1.0},
        {"rho": 1.0},
        {"rho": 1, "weight": 1, "loss": "x"},
    ):
        with pytest.raises((BadInput, ValidationError)):
            PointGan(**settings)
    with pytest.raises((BadInput, ValidationError), match="weight or a balance"):
        PointGan(rho=1.0, weight=1.0, balance=1.0)
    recipe = gan_recipe(PointGan(rho=1.0, balance=1.0), profile="smoke")
    (stage,) = recipe.stages
    rates = {name: stage.rates[name] for name in ("student", "fake")}
    for changed, said in (
        ({"rates": rates}, "rates=.*gan needs one for player 'critic'"),
        ({"gan": Gan(rho=1.0, weight=1.0)}, "gan='dino'.*looks at pictures"),
        ({"rivals_from": "fake"}, "rivals_from='fake'"),
        ({"method": "flow", "options": {}}, "gan='rho 1'.*'flow' makes no clean samples"),
    ):
        wrong = recipe.model_copy(update={"stages": (stage.model_copy(update=changed),)})
        with pytest.raises(BadInput, match=said):
            point_students.trained(wrong, store=Store(cache=tmp_path))
    assert not list(tmp_path.rglob("*.safetensors"))
    assert recipe.gan is not None and recipe.before is None


def test_every_student_is_trained_alike_but_for_its_term() -> None:
    recipes = [gan_recipe(gan, seed=1) for gan in STUDENTS.values()]
    assert len({r.model_copy(update={"gan": None}).model_dump_json() for r in recipes}) == 1
    assert len({key_of(r.spec()) for r in recipes}) == len(recipes)


def test_shipped_recipes_still_have_their_keys() -> None:
    """A field with a default must not enter the key of what was trained without it."""
    shipped = Path(str(resources.files("turbo_lab") / "artifacts" / "points"))
    found = [folder for folder in shipped.iterdir() if (folder / "weights.safetensors").is_file()]
    assert len(found) > 100
    for folder in found:
        spec = json.loads((folder / "recipe.json").read_text())
        recipe = PointRecipe.model_validate(spec)
        assert f"{recipe.name}-{key_of(recipe.spec())}" == folder.name


def test_the_students_of_the_notebook_are_shipped(tmp_path: Path) -> None:
    shipped = replace(Store.default(), cache=tmp_path)
    for world, gan, k in product(WORLDS, STUDENTS.values(), range(BUDGETS["quick"].seeds)):
        recipe = gan_recipe(gan, seed=k, world=world)
        assert shipped.find(recipe.artefact, recipe.spec()) is not None, (world, gan, k)


# --- the study ----------------------------------------------------------------------------------


def test_the_angle_is_recorded_along_training(runs: Runs) -> None:
    rows = points_gan.angles(runs)
    assert set(rows["student"]) == set(STUDENTS) and rows["part"].max() == 1
    assert rows["cosine"].between(-1, 1).all() and (rows["ratio"] >= 0).all()


def put(runs: Runs, found: Mapping[str, str], n: int = 1500) -> Runs:
    """The same runs, with students that are exact: each samples the data or its teacher."""
    changed = replace(runs)
    exact = {name: points(name).real(n, seed=3).x for name in ("ring8", *WORLDS)}
    samples = {}
    for world, who in runs.runs:
        name = truth_of(world) if found[who] == "data" else world
        samples[world, who] = points(name).real(n, seed=4).x[None]
    changed.__dict__.update({"exact": exact, "samples": samples})
    return changed


def test_claims_find_differences_that_were_put_there(runs: Runs) -> None:
    which = dict.fromkeys(STUDENTS, "teacher") | {"rho 1": "data"}
    made = {c.id: c for c in points_gan.claims(put(runs, which), profile="smoke")}
    for name, world in (("P18", TILTED), ("P19", BLURRED)):
        found = made[name].interval  # about four standard errors wide
        assert abs(found.value + points_gan.own_distance(world)) < found.high - found.low
        assert made[name].verdict == "holds"
    for name, value in (("P20", -1), ("P21", 1), ("P23", -1)):
        assert made[name].interval.value == pytest.approx(value, abs=0.2)
        assert made[name].verdict == "holds"
    assert made["P22"].verdict == "inconclusive"  # rho 0 is its teacher: no nearer, no farther
    alike = put(runs, dict.fromkeys(STUDENTS, "teacher"))
    same = {c.id: c for c in points_gan.claims(alike, profile="smoke")}
    assert all(same[name].verdict == "inconclusive" for name in ("P18", "P20", "P21", "P23"))


def test_tables_and_figures_show_every_student(runs: Runs, tmp_path: Path) -> None:
    rows = points_gan.table(runs)
    assert set(rows["student"]) == {*STUDENTS, "teacher", "data"}
    assert rows["rho"].isna().sum() == 3 * len(WORLDS)  # alone, teacher and data
    figures = (
        points_gan_figures.figure_clouds(runs),
        points_gan_figures.figure_rho(rows, points_gan.intervals(runs)),
        points_gan_figures.figure_angles(points_gan.angles(runs)),
    )
    for figure in figures:
        assert isinstance(figure, Figure)
        figure.savefig(tmp_path / "drawn.png", dpi=40)
    assert [a.get_title() for a in figures[0].axes[:3]] == ["data", "teacher", ALONE]
    assert points_gan.summary(rows).index.levels[0].tolist() == list(WORLDS.values())
