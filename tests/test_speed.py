"""C7: fused adapters, paired timing, and the account of the share of speed that is missing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_lab import ADAPTER, small, small_lab

from turbo_lab.adapters import Host
from turbo_lab.claims import Interval
from turbo_lab.field import frozen, guided
from turbo_lab.lab import Lab, Student
from turbo_lab.postcards.captions import null_tokens
from turbo_lab.recipes import student_recipe
from turbo_lab.studies import speed, speed_figures
from turbo_lab.studies.speed_clock import APART, PARTS, TEACHERS, TOGETHER, Apart
from turbo_lab.testbeds.postcards import LATENT_SHAPE


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return small_lab(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def student(lab: Lab) -> Student:
    whole = student_recipe(speed.STUDENT, steps=2, profile="smoke", seed=0)
    recipe = small(whole, lab.recipe)
    return lab.worn(recipe, lab.trained(recipe), family=speed.STUDENT, steps=2)


def _batch(n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    numbers = torch.Generator().manual_seed(0)
    x_t = torch.randn(n, *LATENT_SHAPE, generator=numbers)
    return x_t, torch.linspace(0.1, 1, n), null_tokens(n).clone()


def test_a_fused_adapter_is_the_worn_one_without_its_layers(lab: Lab) -> None:
    host = Host(lab.testbed.spawn("student"), part="transformer")
    worn = host.add("student", ADAPTER, seed=3)
    for key, p in worn.named_parameters():
        numbers = torch.Generator().manual_seed(len(key))
        p.data = 0.3 * torch.randn(p.shape, generator=numbers)
    host.add("other", ADAPTER, seed=4)
    before = {k: v.clone() for k, v in host.net.state_dict().items()}
    net = worn.fused()
    x_t, t, c = _batch(3)
    with torch.no_grad():
        worn_v, bare_v = worn(x_t, t, c), host.bare(x_t, t, c)
        torch.testing.assert_close(net(x_t, t, c), worn_v, atol=1e-5, rtol=1e-4)
    assert (worn_v - bare_v).abs().max() > 1e-2
    assert {n for n, _ in net.named_parameters()} == {
        n for n, _ in lab.testbed.net.named_parameters()
    }
    assert all(torch.equal(v, before[k]) for k, v in host.net.state_dict().items())


def test_guidance_in_two_forwards_is_guidance_in_one(lab: Lab) -> None:
    x_t, t, c = _batch(4)
    net, null = frozen(lab.testbed.net), lab.testbed.null
    torch.testing.assert_close(
        Apart(field=net, null=null, scale=4.0)(x_t, t, c), guided(net, null, 4.0)(x_t, t, c)
    )


def test_forwards_are_counted(lab: Lab, student: Student) -> None:
    timer = speed.Timer(lab=lab, student=student)
    assert [timer.nfe(steps) for steps in (2, 40, 50)] == [2, 80, 100]


def test_the_student_draws_what_the_lab_draws(lab: Lab, student: Student) -> None:
    timer = speed.Timer(lab=lab, student=student, seed=5)
    theirs, _, _ = lab.draw(student.sampling(n=3, seed=5), "", student)
    for way in speed.WAYS:
        pictures, spent = timer.pictures(way, 3)
        torch.testing.assert_close(pictures, theirs, atol=1e-4, rtol=0)
        assert spent.keys() == PARTS.keys() and spent["network"] > 0


@pytest.mark.parametrize("guidance", TEACHERS)
def test_a_walk_gives_a_pair_for_each_block(lab: Lab, student: Student, guidance: str) -> None:
    timer = speed.Timer(lab=lab, student=student)
    pairs = timer.walk(1, 3 * speed.BLOCK, guidance)
    assert len(pairs) == 3
    for pair in pairs:
        assert pair.guidance == guidance and pair.students.keys() == speed.WAYS.keys()
        whole = sum(pair.teacher.values()) / sum(pair.students[speed.FUSED].values())
        assert pair.ratio(speed.FUSED) == pytest.approx(whole)


def _made(network: Mapping[str, float], *, fixed: float = 0.5) -> speed.Speed:
    """Speed whose parts are given: seconds of a forward for one picture, by who makes it."""
    rest = {"guidance": 0.0, "sampler": 0.0, "ends": 0.0}
    pairs = [
        speed.Pair(
            batch=1,
            steps=steps,
            guidance=guidance,
            teacher=rest | {"network": steps * network[guidance], "ends": fixed},
            students={
                way: rest | {"network": 2 * network[way], "ends": fixed} for way in speed.WAYS
            },
        )
        for steps in speed.SHARES
        for guidance in TEACHERS
        for _ in range(3)
    ]
    nfe = {"student": 2.0, "40": 80.0, "50": 100.0}
    return speed.Speed(pairs=tuple(pairs), nfe=nfe, keys=("k",), device="cpu", threads=1)


def test_the_missing_share_is_told_apart_exactly() -> None:
    made = _made({TOGETHER: 1.5, APART: 2.0, speed.FUSED: 1.0, speed.ATTACHED: 1.25})
    assert made.ratio(1, 40).value == pytest.approx((40 * 1.5 + 0.5) / 2.5)
    rows = speed.missing(made).loc[1]
    for way in speed.WAYS:
        row = rows.loc[speed.WAYS[way]]
        assert row["missing"] == pytest.approx(1 - made.ratio(1, 40, way).value / 40)
        named = ["shared", "adapter", "other network", "guidance", "sampler", "ends"]
        assert row[named].sum() == pytest.approx(row["missing"])
    fused, attached = (rows.loc[speed.WAYS[way]] for way in (speed.FUSED, speed.ATTACHED))
    assert fused["shared"] == pytest.approx(0.5 / 2.5) and fused["adapter"] == 0
    assert fused["other network"] == pytest.approx(0, abs=1e-12)
    assert fused["ends"] == pytest.approx((0.5 - 0.5 / 40) / 2.5)
    assert attached["adapter"] == pytest.approx(0.5 / 3.0)


def test_claims_hold_only_near_the_limit() -> None:
    near = _made({TOGETHER: 2.0, APART: 2.0, speed.FUSED: 1.0, speed.ATTACHED: 1.0}, fixed=0.01)
    far = _made({TOGETHER: 1.2, APART: 1.2, speed.FUSED: 1.0, speed.ATTACHED: 1.0})
    for made, verdict in ((near, "holds"), (far, "not reproduced")):
        found = speed.claims(made, notebook="06", profile="quick")
        assert [c.id for c in found] == [
            f"C7-{steps}-batch-1{tail}" for steps in (40, 50) for tail in ("", "-apart")
        ]
        assert {c.verdict for c in found} == {verdict}


def test_figures_draw_every_pair_of_sides() -> None:
    made = _made({TOGETHER: 1.5, APART: 2.0, speed.FUSED: 1.0, speed.ATTACHED: 1.25})
    ratios = speed_figures.ratio_figure(made)
    assert len(ratios.axes) == 2 and len(ratios.axes[0].containers) == 4
    (axis,) = speed_figures.parts_figure(made).axes
    ends = np.array([bar.get_x() + bar.get_width() for bar in axis.containers[-1]])
    own = speed.parts(made).set_index("who")[list(PARTS)].sum(axis=1)
    np.testing.assert_allclose(ends, own[[*TEACHERS, *speed.WAYS]])


def test_intervals_are_those_of_the_pairs() -> None:
    one, two, three = (
        _made({TOGETHER: seconds, APART: 2.0, speed.FUSED: 1.0, speed.ATTACHED: 1.25})
        for seconds in (1.0, 1.5, 3.0)
    )
    made = replace(one, pairs=one.pairs + two.pairs + three.pairs)
    assert made.ratio(1, 50) == Interval(value=30.2, low=20.2, high=60.2)


def test_budgets_have_the_batch_sizes_of_the_claim() -> None:
    assert tuple(speed.BUDGETS["quick"].walks) == tuple(speed.BUDGETS["paper"].walks) == (1, 16)
