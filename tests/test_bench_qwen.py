"""The benchmark of Qwen-Image on networks of kilobytes: that it runs, and what it concludes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from turbo_lab.bench import qwen, qwen_nets, qwen_parts, qwen_round, qwen_whole
from turbo_lab.bench.qwen import Report, file_for, lines, main
from turbo_lab.bench.qwen_nets import FULL, TINY, Place
from turbo_lab.bench.qwen_parts import Row, Setup, measured
from turbo_lab.bench.qwen_round import Round, round_flops
from turbo_lab.qwen_counts import Work, decode_counts
from turbo_lab.recipes.qwen_image import resolve_qwen
from turbo_lab.schedules import published

CPU = Place.on("cpu")


@pytest.fixture(scope="module", autouse=True)
def no_compiler_and_no_garbage() -> Iterator[None]:
    """What takes most of the time of tiny networks and has tests of its own."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (qwen, qwen_parts, qwen_round, qwen_whole):
            patch.setattr(module, "free", lambda: None)
        patch.setattr(qwen_parts, "compiled", lambda decoder, backend: decoder)
        yield


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a dry run writes."""
    path = tmp_path_factory.mktemp("bench") / "tiny.json"
    assert main(["--tiny", "--repeats", "2", "--json", str(path)]) == 0
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return found


def row(record: dict[str, Any], part: str, name: str) -> dict[str, Any]:
    (found,) = (r for r in record["rows"] if (r["part"], r["name"]) == (part, name))
    return dict(found)


# --- a dry run ----------------------------------------------------------------------------------


def test_every_part_runs_and_says_that_it_was_tiny(record: dict[str, Any]) -> None:
    parts = [r["part"] for r in record["rows"]]
    assert list(dict.fromkeys(parts)) == [
        "rates", "text", "decoding", "transformer", "total", "teacher", "training"
    ]  # fmt: skip
    assert (record["networks"], record["device"]) == ("tiny", "cpu")
    assert "versions" in record["provenance"]
    ran = [r for r in record["rows"] if "seconds" in r]
    assert all(len(r["runs"]) == 2 for r in ran if "scaled" not in r.get("note", ""))
    assert all("note" in r for r in record["rows"] if "seconds" not in r)


def test_variants_compute_the_same_and_fp8_says_how_far_it_is_off(record: dict[str, Any]) -> None:
    assert row(record, "transformer", "known times")["error"] < 1e-5
    assert 1e-4 < row(record, "transformer", "fp8")["error"] < 0.3
    assert row(record, "decoding", "collapsed")["error"] < 1e-4
    assert "off by" in row(record, "total", "ours, fp8")["note"]


def test_the_teacher_is_scaled_from_what_was_timed(record: dict[str, Any]) -> None:
    short, long = (row(record, "teacher", f"{n} guided steps")["seconds"] for n in (2, 50))
    assert long == pytest.approx(25 * short)
    stock, ours = (row(record, *of)["seconds"] for of in (("decoding", "stock"), ("total", "ours")))
    faster = record["times_faster_than_teacher"]
    assert faster.keys() == {"stock pipeline", "ours", "ours, fp8"}
    assert faster["ours"] == pytest.approx((25 * short + stock) / ours)


def test_a_cycle_of_training_is_one_step_of_the_student_and_two_of_the_fake(
    record: dict[str, Any],
) -> None:
    assert "3 gradient" in row(record, "training", "dmd2 64 px")["note"]


def test_a_critic_looks_at_both_sides_each_turn_and_the_student_once(
    record: dict[str, Any],
) -> None:
    """Two turns of the critic, each with a sample and a real picture; one that leads to x."""
    found, alone = (row(record, "training", f"{n} 64 px") for n in ("dmd2 and gan", "dmd2"))
    assert found["note"].endswith("critic: 4 forward, 1 gradient")
    assert "3 gradient;" in found["note"]  # the student's pass serves both terms
    assert found["tflop"] > alone["tflop"] and found["over_floor"] > 0


def test_rows_know_how_far_they_are_from_their_floor(record: dict[str, Any]) -> None:
    floors = record["floor_seconds"]
    found = row(record, "transformer", "plain")
    assert found["over_floor"] == pytest.approx(found["seconds"] / floors["transformer bf16"])
    whole = row(record, "total", "stock pipeline")
    parts = floors["transformer bf16"] + floors["decoding"]
    assert whole["over_floor"] == pytest.approx(whole["seconds"] / parts)
    trained = row(record, "training", "dmd2 64 px")
    rate = row(record, "rates", "matmul")["rate"]
    assert trained["over_floor"] == pytest.approx(trained["seconds"] * rate / trained["tflop"])


def test_parts_can_be_measured_one_by_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tiny.json"
    command = ["--tiny", "--repeats", "1", "--json", str(path), "--parts"]
    for part in ("rates", "text", "rates"):
        assert main([*command, part]) == 0
    rows = json.loads(path.read_text("utf-8"))["rows"]
    assert [r["part"] for r in rows if r["name"] in ("copy", "stock")] == ["text", "rates"]
    assert main([*command, "transformer", "--variants", "fused"]) == 0
    rows = json.loads(path.read_text("utf-8"))["rows"]
    assert [r["name"] for r in rows if r["part"] == "transformer"] == ["plain", "fused"]
    assert main([*command, "text", "--batch", "1"]) == 2
    assert "other work" in capsys.readouterr().err


# --- without a GPU ------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_figures_without_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TURBO_LAB_ROOT", str(tmp_path))
    assert main([]) == 1
    assert "torch sees none" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--repeats", "3"], "at least 5"),
        (["--tiny", "--parts", "magic"], "choose among rates"),
        (["--tiny", "--size", "100x100"], "multiple of 16"),
        (["--tiny", "--variants", "magic"], "choose among plain"),
        (["--tiny", "--schedule", "turbo"], "choose one of wuli-2"),
        (["--tiny", "--json", "/nowhere/x.json"], "folder that exists"),
        (["--tiny", "--json", "/"], "folder that exists"),
        (["--tiny", "--json", __file__], "no file of this command"),
        (["--tiny", "--batch", "0"], "batch=0"),
        (["--tiny", "--steps", "0"], "steps=0"),
        (["--tiny", "--text", "0"], "text=0"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert sentence in capsys.readouterr().err


def test_each_device_has_a_file_of_its_own() -> None:
    assert file_for("NVIDIA H200 (141 GB)").name == "qwen-nvidia-h200-141-gb.json"


# --- what it concludes --------------------------------------------------------------------------


def full(*rows: Row) -> Report:
    work = Work(height=2048, width=2048, batch=4, steps=2)
    setup = Setup(settings=FULL, place=CPU, work=work, row=published("wuli-2"))
    return Report(setup=setup, rows=rows)


def test_floors_follow_from_measured_rates() -> None:
    """3384 TFLOP at 790 TFLOP/s are 4.28 s; its linear layers at 1100 leave 1.6 + 2.0 s."""
    copy = Row(part="rates", name="copy", seconds=0.1, gigabytes=300.0)
    matmul = Row(part="rates", name="matmul", seconds=1.0, tflop=790)
    fp8 = Row(part="rates", name="matmul fp8", seconds=1.0, tflop=1100)
    assert full(copy, matmul).floors()["transformer bf16"] == pytest.approx(4.29, abs=0.02)
    both = full(copy, matmul, fp8).floors()
    assert both["transformer fp8"] == pytest.approx(1596 / 790 + 1781 / 1100, abs=0.03)
    assert full(copy).floors() == {}


def test_the_median_and_all_runs_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([9.0, 1.0, 2.0])
    monkeypatch.setattr(qwen_parts, "clocked", lambda task, device: next(ticks))
    setup = Setup(
        settings=TINY, place=CPU, work=Work(height=64, width=64), row=published("wuli-2"), repeats=3
    )
    calls: list[int] = []
    found = measured(setup, "rates", "one", lambda: calls.append(1), flops=4e12)
    assert (found.seconds, found.runs, found.rate) == (2.0, (9.0, 1.0, 2.0), 2.0)
    assert len(calls) == 1  # the warm-up: the clock does not run the task here
    assert "2000.00 ms" in lines([found])[0]


def test_a_trained_pass_is_counted_as_its_products() -> None:
    """Forward and backward through a frozen base, against the operations PyTorch executes."""
    net = qwen_nets.transformer(TINY, CPU)
    round_ = Round(size=256, batch=2, text=64, checkpointing=False)
    x = torch.randn(2, 256, 64, requires_grad=True)
    text = torch.randn(2, 64, 16, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        out = net(
            hidden_states=x,
            encoder_hidden_states=text,
            timestep=torch.ones(2),
            img_shapes=[[(1, 16, 16)]] * 2,
            return_dict=False,
        )[0]
        out.sum().backward()
    once = round_flops(TINY.model, round_, {"forward": 0, "gradient": 1})
    # The last block's text is read by nobody, and time needs no gradient: both are small.
    assert once == pytest.approx(counter.get_total_flops(), rel=0.1)
    forward = round_flops(TINY.model, round_, {"forward": 1, "gradient": 0})
    again = round_flops(
        TINY.model, Round(size=256, batch=2, text=64), {"forward": 0, "gradient": 1}
    )
    assert again == once + forward


def test_a_look_of_the_critic_decodes_a_square_and_sees_it() -> None:
    """Against the count from settings: the decoder's, and 24 d² n L + 4 n² d L of its eye's.

    A gradient takes as much again as the products, and what is decoded twice on top.
    """
    work = Work(height=64, width=64)
    setup = Setup(settings=TINY, place=CPU, work=work, row=published("wuli-2"))
    gan = qwen_round.stages(setup, 64)["dmd2 and gan"].gan
    assert gan is not None and (gan.crop, gan.view) == (8, 32)
    critic = qwen_round.Critic.on(setup, Round(size=64), gan)
    forward, gradient = (critic.flops((16, 8, 8), {mode: 1.0}) for mode in ("forward", "gradient"))
    assert not sum(critic.looks.values())  # counting is no look
    decoding = decode_counts(TINY.model.vae, work)["collapsed"].flops
    d, n, blocks = 192, 2 * 2 + 1, 2
    seen = 24 * d**2 * n * blocks + 4 * n**2 * d * blocks + 2 * (n - 1) * 3 * 16**2 * d
    assert forward == decoding + seen
    assert 2 * forward < gradient < 2 * forward + decoding


def test_a_batch_is_split_as_the_recipes_split_theirs() -> None:
    for size in (512, 1024, 1328):
        stage = resolve_qwen("dmd2-2", size=size).stages[0]
        assert Round(size=size, batch=stage.batch_size).micro_batches == stage.micro_batches


# --- random networks ----------------------------------------------------------------------------


def test_random_networks_are_whole_and_keep_the_size_of_numbers() -> None:
    net = qwen_nets.transformer(TINY, CPU, seed=1)
    assert sum(p.numel() for p in net.parameters()) == TINY.model.transformer.parameters
    assert not any(p.requires_grad or p.is_meta for p in net.parameters())
    weight = net.transformer_blocks[0].img_mlp.net[2].weight
    assert weight.std() == pytest.approx(weight.shape[1] ** -0.5, rel=0.1)
    assert torch.equal(net.txt_norm.weight, torch.ones(16))
    same, other = (qwen_nets.transformer(TINY, CPU, seed=s) for s in (1, 2))
    assert torch.equal(weight, same.transformer_blocks[0].img_mlp.net[2].weight)
    assert not torch.equal(weight, other.transformer_blocks[0].img_mlp.net[2].weight)


def test_sizes_that_are_measured_are_those_of_the_classes() -> None:
    from accelerate import init_empty_weights
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    from turbo_lab.qwen_plan import ENCODER

    config = Qwen2_5_VLConfig(
        text_config=dict(FULL.text), vision_config=dict(FULL.vision), tie_word_embeddings=False
    )
    with init_empty_weights():
        encoder = Qwen2_5_VLForConditionalGeneration(config)
    assert sum(p.numel() for p in encoder.parameters()) == ENCODER
    assert FULL.model.transformer.parameters == 20_430_401_088


def test_the_adapter_is_on_all_linear_layers_of_the_blocks() -> None:
    net = qwen_nets.transformer(TINY, CPU)
    adapter = qwen_nets.random_adapter(net, CPU, rank=3)
    assert len(list(adapter.paths)) == 2 * 14
    assert all(3 in value.shape for value in adapter.tensors.values())
