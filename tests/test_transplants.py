"""Mini-DINO of pieces: transplants by hand, what they lie on, and a training of two steps."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from turbo_lab import dino
from turbo_lab.dino.distil import HeadSize
from turbo_lab.dino.net import VitSize
from turbo_lab.dino.transplants import Transplants, planted
from turbo_lab.errors import BadInput
from turbo_lab.postcards import draw_scenes, render
from turbo_lab.store import Store
from turbo_lab.streams import Draw
from turbo_lab.studies import dino_probe

TRANSPLANTS = Transplants(wide=12, piece=6, shift=0, light=0.0, noise=0.0, grey=0.0)


def test_a_piece_is_planted_at_its_seat_and_nothing_else_changes() -> None:
    ground, piece = torch.zeros(2, 1, 4, 4), torch.arange(1.0, 9).view(2, 1, 2, 2)
    mixed = planted(ground, piece, torch.tensor([[0, 1], [2, 2]]))
    assert torch.equal(mixed[0, 0, :2, 1:3], piece[0, 0])
    assert torch.equal(mixed[1, 0, 2:, 2:], piece[1, 0])
    assert float(mixed.sum()) == float(piece.sum()) and float(ground.sum()) == 0


def marked(rows: int) -> Tensor:
    """Pictures of noise whose first channel says which picture it is."""
    x = torch.rand(rows, 3, 32, 32, generator=torch.manual_seed(0))
    x[:, 0] = torch.arange(float(rows))[:, None, None]
    return x


def test_two_transplants_share_their_piece_and_lie_in_two_other_pictures() -> None:
    views = TRANSPLANTS.cut(marked(6), Draw(seed=1, step=0, total=6))
    seats = []
    for turn, view in ((1, views.first), (2, views.second)):
        for row in range(6):
            own = view[row, 0] == row
            assert int(own.sum()) == 36  # 6x6 pixels of its own, in a square
            assert (view[row, 0][~own] == (row + turn) % 6).all()
            (at,) = (own.nonzero()[:1],)
            seats.append(tuple(at[0].tolist()))
    for row in range(6):
        (a, b), (c, d) = seats[row], seats[6 + row]
        first, second = views.first[row, :, a : a + 6, b : b + 6], views.second[row]
        assert torch.equal(first, second[:, c : c + 6, d : d + 6])
    assert len(set(seats)) > 6  # anywhere


def test_a_piece_larger_than_its_window_is_refused() -> None:
    with pytest.raises((BadInput, ValueError), match="piece"):
        Transplants(wide=8, piece=9)


def test_a_drift_keeps_the_two_seats_near_each_other() -> None:
    crops = TRANSPLANTS.model_copy(update={"wide": 16, "drift": 1})
    views = crops.cut(marked(32), Draw(seed=1, step=0, total=32))
    mine = torch.arange(32.0)[:, None, None]
    first, second = ((view[:, 0] == mine).float() for view in (views.first, views.second))
    centre = torch.arange(16.0)
    for dim in (1, 2):
        gap = ((first.sum(3 - dim) - second.sum(3 - dim)) @ centre / 36).abs()
        assert float(gap.max()) == pytest.approx(1, abs=1e-3)


def test_signs_go_grey_and_what_was_drawn_by_colour_keeps_it() -> None:
    draw = Draw(seed=0, step=0, total=40)
    for coloured, share in ((1.0, 0.0), (0.0, 1.0)):
        crops = TRANSPLANTS.model_copy(update={"coloured": coloured, "grey": 1.0})
        for view in crops.cut(render(draw_scenes("select", range(40))), draw)[:2]:
            flat = (view.amax(1) - view.amin(1)).flatten(1).amax(1) < 1e-6
            assert float(flat.float().mean()) == share


def test_pieces_lie_on_signs_and_on_garments() -> None:
    scenes = draw_scenes("select", range(200))
    x, draw = render(scenes), Draw(seed=0, step=0, total=200)
    crops = Transplants(piece=8)
    signs = crops._pieces(x, torch.zeros(200, dtype=torch.bool), draw)
    apart = (signs.flip(1) - scenes.sign).abs().amax(1)
    assert float((apart <= 3).float().mean()) > 0.9
    garments = crops._pieces(x, torch.ones(200, dtype=torch.bool), draw)
    apart = (garments.flip(1) + 4 - scenes.head - torch.tensor([0.0, 7.5])).abs()
    on = (apart <= torch.tensor([6.0, 7.0])).all(1)
    assert float(on.float().mean()) > 0.5


def test_a_training_on_transplants_runs_and_says_finite_losses(tmp_path: Path) -> None:
    small = {
        "vit": VitSize(width=16, depth=2, heads=2),
        "head": HeadSize(hidden=16, bottleneck=8, prototypes=32),
        "crops": (TRANSPLANTS,),
        "steps": 2,
    }
    recipe = dino.dino_recipe("smoke").model_copy(update=small)
    losses: list[float] = []
    dino.trained(
        recipe,
        store=Store(cache=tmp_path),
        watch=lambda record: losses.append(sum(record.terms.values())),
    )
    assert len(losses) == 2 and all(math.isfinite(loss) and loss > 0 for loss in losses)


def test_digits_are_read_from_aligned_pieces_and_not_where_pieces_show_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A random network reads the window that shows a sign, and guesses from one of the ground."""
    monkeypatch.setattr(dino_probe, "RIDGES", (1e-2,))
    still = {"coloured": 0.0, "grey": 0.0, "light": 0.0, "noise": 0.0}
    nets = {"random": dino.random_features(size=VitSize(width=16, depth=1, heads=2))}
    budget = dino_probe.Budget(fit=400, test=200)
    for piece, low, high in ((8, 0.0, 0.75), (2, 0.8, 1.0)):
        crops = Transplants(wide=8, piece=piece, **still)
        (found,) = dino_probe.digits_in_views(nets, crops, budget=budget).values()
        assert low <= sum(found) / 2 <= high
