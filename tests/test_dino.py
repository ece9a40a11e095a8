"""Mini-DINO: views, the loss against the paper's formula, training, features, and the probe."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from typer.testing import CliRunner

from turbo_lab import dino, lab
from turbo_lab.cli import app
from turbo_lab.dino import training
from turbo_lab.dino.distil import Dino, HeadSize, Teacher, balanced, momentum_at, spawn_pupil
from turbo_lab.dino.net import VitSize, spawn_vit, tapped
from turbo_lab.dino.recipe import DinoRecipe
from turbo_lab.dino.views import Crops, hide, salient, windows
from turbo_lab.errors import BadInput
from turbo_lab.fit import Batch, fit
from turbo_lab.keys import key_of
from turbo_lab.optimisers import Optimiser
from turbo_lab.postcards import draw_scenes, render
from turbo_lab.recipes.adversarial import AGAINST, EYE, gan
from turbo_lab.store import CACHE_VARIABLE, Artefact, Store
from turbo_lab.streams import Draw

TINY = VitSize(width=16, depth=2, heads=2)
HEAD = HeadSize(hidden=16, bottleneck=8, prototypes=32)
CROPS = Crops(wide=16, reach=4, narrow=8, locals=2, grey=0.0)


@cache
def cards(n: int, stream: str = "select") -> Tensor:
    return render(draw_scenes(stream, range(n)))


def tiny_recipe() -> DinoRecipe:
    recipe = dino.dino_recipe("smoke")
    return recipe.model_copy(update={"vit": TINY, "head": HEAD, "crops": (CROPS,)})


# --- views --------------------------------------------------------------------------------------


def test_views_are_a_function_of_the_draw_and_do_not_depend_on_how_a_batch_is_sliced() -> None:
    draw = Draw(seed=3, step=5, total=8)
    whole = CROPS.cut(cards(8), draw)
    halves = [CROPS.cut(cards(8)[a:b], draw.rows(a, b)) for a, b in ((0, 3), (3, 8))]
    for name in ("first", "second", "covered"):
        parts = [getattr(half, name) for half in halves]
        assert torch.equal(getattr(whole, name), torch.cat(parts))
    for k in range(CROPS.locals):
        assert torch.equal(whole.narrow[k], torch.cat([half.narrow[k] for half in halves]))
    again, other = CROPS.cut(cards(8), draw), CROPS.cut(cards(8), Draw(seed=3, step=6, total=8))
    assert torch.equal(again.first, whole.first) and not torch.equal(other.first, whole.first)


def test_a_view_without_light_and_noise_is_a_window_of_the_picture_itself() -> None:
    crops = CROPS.model_copy(update={"light": 0.0, "noise": 0.0})
    views = crops.cut(cards(4), Draw(seed=0, step=0, total=4))
    for view in (views.first, views.second, *views.narrow):
        size = view.shape[-1]
        for picture, window in zip(cards(4), view, strict=True):
            every = picture.unfold(1, size, 1).unfold(2, size, 1)  # [3, places, places, size, size]
            same = (every == window[:, None, None]).all(dim=(0, 3, 4))
            assert same.sum() == 1


def test_the_second_window_stays_within_reach_of_the_first() -> None:
    rows, columns = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    places = torch.stack([rows, columns, rows]).expand(64, 3, 32, 32)
    crops = CROPS.model_copy(update={"light": 0.0, "noise": 0.0, "reach": 2})
    views = crops.cut(places, Draw(seed=0, step=0, total=64))
    apart = (views.first - views.second)[:, :2, 0, 0].abs()
    assert apart.max() == 2 and 0 < apart.mean() < 2


def test_windows_are_drawn_where_there_is_much_to_see() -> None:
    x = torch.zeros(400, 3, 32, 32)
    x[:, :, 4:8, 20:24] = torch.randn(400, 3, 4, 4, generator=torch.manual_seed(0))
    uniform = (torch.arange(400) + 0.5) / 400
    rows, columns = salient(x, 16, uniform, 6.0).unbind(1)
    assert (rows < 8).all() and (columns > 4).all()  # some of it in every window
    assert float(((rows <= 4) & (columns >= 8)).double().mean()) > 0.5  # all of it in most
    for axis in salient(x, 16, uniform, 0.0).unbind(1):  # any place, each as often as another
        assert axis.unique().tolist() == list(range(17))
        assert float(axis.double().mean()) == pytest.approx(8, abs=0.1)


def test_windows_and_hiding_by_hand() -> None:
    x = torch.arange(64.0).view(1, 1, 8, 8)
    assert torch.equal(windows(x, torch.tensor([[2, 3]]), 4), x[:, :, 2:6, 3:7])
    hidden = hide(x + 1, torch.tensor([[1, 2]]))
    assert (hidden[..., :4, 4:] == 0).all() and (hidden[..., 4:, :4] == 0).all()
    assert torch.equal(hidden[..., :4, :4], (x + 1)[..., :4, :4])


# --- loss ---------------------------------------------------------------------------------------


def game(**changes: float) -> Dino:
    student = spawn_pupil(TINY, HEAD, 0)
    teacher = Teacher(student)
    return Dino(student=student, teacher=teacher, crops=(CROPS,), steps=10, **changes)


def test_the_loss_is_the_formula_of_the_paper_written_out() -> None:
    dino_game, draw = game(), Draw(seed=0, step=0, total=4)
    with torch.no_grad():  # the teacher differs from the student
        for parameter in dino_game.teacher.pupil.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.manual_seed(1)))
    terms = dino_game.loss(Batch(cards(4), None), draw)
    views = CROPS.cut(cards(4), draw)

    def logits(pupil: torch.nn.Module, x: Tensor, token: int) -> Tensor:
        seen = pupil.vit.forward_features(x)[:, token]  # type: ignore[union-attr,operator]
        unit = normalize(pupil.head.mlp(seen), dim=-1)  # type: ignore[union-attr,operator]
        return unit @ normalize(pupil.head.prototypes, dim=-1).T  # type: ignore[union-attr,arg-type]

    student, teacher = dino_game.student, dino_game.teacher.pupil
    hidden = hide(views.first, views.covered)
    wide = (views.first, views.second)
    said = [logits(student, x, 0) / 0.1 for x in (hidden, views.second, *views.narrow)]
    right = balanced(torch.cat([logits(teacher, x, 0) for x in wide]) / 0.04)
    total, pairs = torch.zeros(4), 0
    for i in range(2):
        for j in range(len(said)):
            if i != j:
                p, q = right[4 * i : 4 * i + 4], said[j].exp() / said[j].exp().sum(1, keepdim=True)
                total, pairs = total - (p * q.log()).sum(1), pairs + 1
    assert pairs == 2 * (2 + CROPS.locals) - 2
    assert torch.allclose(terms["views"], total / pairs, atol=1e-5)

    tokens = (CROPS.wide // 4) ** 2
    every = [torch.stack([logits(teacher, x, 1 + k) for k in range(tokens)], 1) for x in wide]
    right = balanced(torch.cat(every).flatten(0, 1) / 0.04).view(8, tokens, -1)
    for row in range(4):
        losses = []
        for k in views.covered[row].tolist():
            q = (logits(student, hidden[row : row + 1], 1 + k) / 0.1)[0]
            losses.append(-(right[row, k] * (q - q.exp().sum().log())).sum())
        assert torch.allclose(terms["patches"][row], torch.stack(losses).mean(), atol=1e-4)


def test_balanced_probabilities_use_every_prototype_alike_and_sharpen_with_temperature() -> None:
    logits = torch.randn(64, 8, generator=torch.manual_seed(0))
    logits[:, 0] += 3  # a prototype that everyone likes
    even = balanced(logits, rounds=200)
    assert torch.allclose(even.sum(1), torch.ones(64), atol=1e-5)
    assert torch.allclose(even.sum(0), torch.full((8,), 8.0), atol=1e-3)
    plain = logits.softmax(1)
    assert balanced(logits).sum(0).std() < 0.2 * plain.sum(0).std()

    def entropy(p: Tensor) -> float:
        return float(-(p * p.clamp_min(1e-30).log()).sum(1).mean())

    assert entropy(balanced(logits / 0.1)) < entropy(balanced(logits)) < math.log(8)


def test_balancing_ignores_what_is_added_to_a_prototype_or_to_a_sample() -> None:
    logits = torch.randn(32, 6, generator=torch.manual_seed(0), dtype=torch.float64)
    moved = logits + torch.randn(6, dtype=torch.float64) + torch.randn(32, 1, dtype=torch.float64)
    assert torch.allclose(balanced(moved, rounds=300), balanced(logits, rounds=300), atol=1e-8)


def test_the_teacher_follows_with_the_cosine_momentum_and_learns_nothing_itself() -> None:
    assert momentum_at(0, 10, 0.9) == pytest.approx(0.9)
    assert momentum_at(5, 10, 0.9) == pytest.approx(0.95)
    assert momentum_at(10, 10, 0.9) == momentum_at(11, 10, 0.9) == 1
    one = game(momentum=0.9)
    with torch.no_grad():
        for parameter in one.student.parameters():
            parameter.add_(1.0)
    before = [p.clone() for p in one.teacher.parameters()]
    one.follow()
    expected = [0.9 * a + 0.1 * b for a, b in zip(before, one.student.parameters(), strict=True)]
    for got, want in zip(one.teacher.parameters(), expected, strict=True):
        assert torch.allclose(got, want, atol=1e-6)
    one.follow()
    momentum = momentum_at(1, 10, 0.9)
    for got, a, b in zip(one.teacher.parameters(), expected, one.student.parameters(), strict=True):
        assert torch.allclose(got, momentum * a + (1 - momentum) * b, atol=1e-6)
    terms = one.loss(Batch(cards(2), None), Draw(seed=0, step=0, total=2))
    torch.stack([term.sum() for term in terms.values()]).sum().backward()
    assert all(p.grad is None for p in one.teacher.parameters())
    assert all(p.grad is not None for p in one.student.parameters())


def test_only_the_student_is_moved_by_its_loss(tmp_path: Path) -> None:
    one = game(momentum=0.0)
    records = fit(
        one,
        lambda draw: training.real_batch(draw, seed=0),
        steps=2,
        batch_size=4,
        seed=0,
        optimisers={"student": Optimiser(lr=1e-3)},
    )
    for record in records:
        assert set(record.terms) == {"dino/views", "dino/patches"}
        assert set(record.norms) == {"student"}
    assert int(one.teacher.age) == 2


# --- training -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[DinoRecipe, Artefact]:
    recipe = tiny_recipe()
    return recipe, dino.trained(recipe, store=Store(cache=tmp_path_factory.mktemp("dino")))


def test_a_training_of_seconds_leaves_an_artefact_that_replays(
    made: tuple[DinoRecipe, Artefact],
) -> None:
    recipe, artefact = made
    then, now = training.recorded(artefact), training.replay(recipe, artefact)
    assert now == then and len(then.first) == len(then.last) == training.TRACE_STEPS
    start = spawn_vit(TINY, recipe.seed).state_dict()
    kept = artefact.tensors()
    assert kept.keys() == start.keys()
    assert any(not torch.equal(kept[k].float(), start[k].half().float()) for k in kept)
    lines = artefact.file("history.jsonl").read_text().splitlines()
    assert len(lines) == 1 and '"step": 8' in lines[0]


def test_a_stopped_training_ends_as_an_unstopped_one(
    made: tuple[DinoRecipe, Artefact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, straight = made
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)

    def trip(record: object) -> None:
        if getattr(record, "step", 0) == 5:
            raise RuntimeError("the power went out")

    store = Store(cache=tmp_path)
    with pytest.raises(RuntimeError, match="power"):
        dino.trained(recipe, store=store, watch=trip)
    steps: list[int] = []
    resumed = dino.trained(recipe, store=store, watch=lambda record: steps.append(record.step))
    assert steps == [6, 7, 8]
    a, b = straight.tensors(), resumed.tensors()
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_train_dino_is_a_name_of_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    recipe = tiny_recipe()
    monkeypatch.setattr(lab.dino, "dino_recipe", lambda profile, *, seed: recipe)
    said = CliRunner().invoke(app, ["train", "dino", "--profile", "smoke", "--device", "cpu"])
    assert said.exit_code == 0 and said.output.startswith("postcards/dino  ")
    assert Store(cache=tmp_path).find("postcards/dino", recipe.spec()) is not None


def test_recipes_refuse_what_is_not_allowed() -> None:
    with pytest.raises(BadInput, match="profile='fast'"):
        dino.dino_recipe("fast")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="seed=-1"):
        dino.dino_recipe(seed=-1)
    with pytest.raises((BadInput, ValueError), match="heads"):
        VitSize(width=10, heads=4)
    with pytest.raises(BadInput, match="blocks"):
        dino.random_features(size=TINY, blocks=(1, 0))


def test_students_are_keyed_by_the_recipe_of_the_mini_dino_that_they_were_shown_through() -> None:
    recipe = dino.dino_recipe("quick", seed=3)
    assert recipe.name == dino.NAME and recipe.artefact == "postcards/dino"
    assert DinoRecipe.model_validate(recipe.spec()) == recipe
    assert key_of(dino.dino_recipe().spec()) == EYE
    seen = {name: gan("quick", 0, name=name).stages[-1].gan for name in AGAINST}
    assert {name for name, term in seen.items() if term and term.eye == EYE} == {
        name for name, against in AGAINST.items() if against.features == "dino"
    }


# --- features -----------------------------------------------------------------------------------


def test_features_are_timms_own_tokens_frozen_and_differentiable_in_the_picture() -> None:
    vit = spawn_vit(TINY, 0)
    features = tapped(vit)
    x = cards(3).clone().requires_grad_(True)
    first, last = features(x, torch.zeros(3), None)
    assert features.widths == (16, 16)
    assert first.shape == last.shape == (3, 64, 16)
    assert torch.allclose(vit.norm(last), vit.forward_features(x)[:, 1:], atol=1e-5)
    last.square().mean().backward()
    assert x.grad is not None and (x.grad.abs().amax((1, 2, 3)) > 0).all()
    assert all(p.grad is None and not p.requires_grad for p in vit.parameters())
    other = features(x, torch.ones(3), torch.zeros(3, 5, dtype=torch.long))
    assert all(torch.equal(a, b) for a, b in zip((first, last), other, strict=True))


def test_random_features_come_from_their_seed_alone() -> None:
    x, t = cards(2), torch.zeros(2)
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    one, same, other = (dino.random_features(k, size=TINY)(x, t, None)[-1] for k in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(one, same) and not torch.allclose(one, other)


# --- the shipped one ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped() -> tuple[DinoRecipe, Artefact]:
    recipe, nowhere = dino.dino_recipe(), Path("/nowhere")
    store = Store(cache=nowhere, shipped=Store.default().shipped)
    artefact = store.find(recipe.artefact, recipe.spec())
    assert artefact is not None, "the mini-DINO of today's recipe is not shipped"
    return recipe, artefact


def test_the_shipped_mini_dino_is_small_and_replays(shipped: tuple[DinoRecipe, Artefact]) -> None:
    recipe, artefact = shipped
    assert sum(file.stat().st_size for file in artefact.path.iterdir()) <= 3e6
    then, now = training.recorded(artefact), training.replay(recipe, artefact)
    assert now.first == pytest.approx(then.first, rel=2e-3)
    assert now.last == pytest.approx(then.last, rel=1e-2)
    assert now.last[0] < 0.9 * now.first[0]


def test_the_shipped_teacher_has_not_collapsed(shipped: tuple[DinoRecipe, Artefact]) -> None:
    """One answer for all, or no answer at all: the two ways in which DINO fails (section 5.3)."""
    recipe, artefact = shipped
    end = training.finished(recipe, artefact)
    for logits in end.teacher(cards(256)):
        p = (logits.flatten(0, -2) / recipe.teacher_temperature).softmax(1)
        most = math.log(recipe.head.prototypes)
        assert float(-(p * p.clamp_min(1e-30).log()).sum(1).mean()) < 0.8 * most  # it answers
        used = p.mean(0)
        assert float(-(used * used.log()).sum()) > 0.5 * most  # not always the same
