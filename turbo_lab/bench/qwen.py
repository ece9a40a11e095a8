"""Measure Qwen-Image on a GPU, ours against stock diffusers: ``python -m turbo_lab.bench.qwen``.

Weights are random and full-size, drawn on the GPU; speed and memory do not depend on them. The
rows go to a JSON file under ``benchmarks/`` that names the device, after each part, so a run that
is stopped leaves what it had. ``--tiny`` runs everything on networks of kilobytes on a CPU, to see
that it runs; its seconds mean nothing and are not kept.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from turbo_lab import places
from turbo_lab.atomic import atomic_write_text
from turbo_lab.bench import qwen_parts, qwen_whole
from turbo_lab.bench.qwen_nets import FULL, TINY, Place
from turbo_lab.bench.qwen_parts import Row, Setup, free
from turbo_lab.bench.qwen_round import Round, training
from turbo_lab.errors import BadInput, MissingPiece, TurboLabError
from turbo_lab.provenance import provenance
from turbo_lab.qwen_counts import Work, counted
from turbo_lab.qwen_order import Fast
from turbo_lab.qwen_plan import Device, Precision, floor_seconds, parsed_size
from turbo_lab.schedules import published

WAYS: Mapping[str, Fast] = {
    "ours, bf16": Fast(compiled=True),
    "ours, fp8": Fast(compiled=True, precision="fp8"),
    "ours, fp8 but img_mlp": Fast(compiled=True, precision="fp8", keep=("img_mlp",)),
}
"""Of the whole, from noise to pixels."""
TINY_WAYS: Mapping[str, Fast] = {"ours": Fast(), "ours, fp8": Fast(precision="fp8")}
TRAINED = (512, 1024)
"""Pixels of the training rounds."""

Part = Callable[[Setup], Iterator[Row]]


def parts_of(setup: Setup, variants: Sequence[str] = ()) -> dict[str, Part]:
    """Return what is measured, by name, in its order.

    Args:
        setup: networks, device, work.
        variants: of the transformer, besides the plain one; empty for all.

    Raises:
        BadInput: there is no such variant.
    """
    tiny = setup.settings.name == "tiny"
    sizes = (setup.work.height,) if tiny else TRAINED
    for name in variants:
        if name not in (known := qwen_parts.variants(setup)):
            raise BadInput("variants", name, f"choose among {'; '.join(known)}")
    chosen = variants or (("known times", "fp8") if tiny else ())
    quick = ("plain", *chosen) if chosen else ()
    return {
        "rates": qwen_parts.rates,
        "text": qwen_parts.text,
        "decoding": qwen_parts.decoding,
        "transformer": lambda s: qwen_parts.transformer(s, only=quick),
        "total": lambda s: qwen_whole.total(s, TINY_WAYS if tiny else WAYS),
        "teacher": qwen_whole.teacher,
        "training": lambda s: (
            row
            for size in sizes
            for row in training(s, Round(size=size, batch=1 if tiny else 4, text=setup.work.text))
        ),
    }


# --- the report ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Report:
    """The rows, and what they were measured with."""

    setup: Setup
    rows: tuple[Row, ...]

    @property
    def device(self) -> str:
        """Name of the GPU, or cpu."""
        return torch.cuda.get_device_name() if self.setup.place.device == "cuda" else "cpu"

    def with_row(self, row: Row) -> Report:
        """Return the report with one more row, in place of an older one of the same name."""
        kept = [r for r in self.rows if (r.part, r.name) != (row.part, row.name)]
        return replace(self, rows=(*kept, row))

    def floors(self) -> dict[str, float]:
        """Least seconds by the rates that were measured, for both precisions; {} without them."""
        device = self.measured_device()
        if device is None:
            return {}
        counts = counted(self.setup.settings.model, self.setup.work)
        precisions: tuple[Precision, ...] = ("bf16", "fp8") if device.fp8 else ("bf16",)
        found = {}
        for precision in precisions:
            each = floor_seconds(counts, device, precision)
            inside = ("image linears", "text linears", "attention", "modulation")
            found[f"transformer {precision}"] = sum(each[name] for name in inside)
            found[f"total {precision}"] = found[f"transformer {precision}"] + each["decoding"]
        return {**found, "decoding": each["decoding"], "text": each["text encoder"]}

    def times_faster(self) -> dict[str, float]:
        """How many times faster each whole is than the guided teacher; {} before both are known.

        The teacher's seconds are those of its transformer, scaled, and of the stock decoder.
        """
        found = {(row.part, row.name): row.seconds for row in self.rows}
        steps = found.get(("teacher", f"{qwen_whole.TEACHER_STEPS} guided steps"))
        decoding = found.get(("decoding", "stock"))
        if steps is None or decoding is None:
            return {}
        wholes = {name: s for (part, name), s in found.items() if part == "total" and s}
        return {name: (steps + decoding) / seconds for name, seconds in wholes.items()}

    def over_floor(self, row: Row) -> float | None:
        """How many times its floor a row took; None where either is not known."""
        device, precision = self.measured_device(), "fp8" if "fp8" in row.name else "bf16"
        if device is None or row.seconds is None:
            return None
        floors = self.floors()
        floor = floors.get(row.part, floors.get(f"{row.part} {precision}"))
        if floor is None and row.part in ("teacher", "training") and row.tflop:
            floor = 1e12 * row.tflop / device.bf16
        return None if floor is None else row.seconds / floor

    def measured_device(self) -> Device | None:
        """This device by the rates that were measured; None before they were."""
        rows = {row.name: row for row in self.rows if row.part == "rates"}
        copy, matmul, fp8 = (rows.get(name) for name in ("copy", "matmul", "matmul fp8"))
        if copy is None or matmul is None or matmul.rate is None or not copy.seconds:
            return None
        rate = fp8.rate if fp8 is not None else None
        return Device(
            name=self.device,
            memory=0,
            bf16=1e12 * matmul.rate,
            fp8=None if rate is None else 1e12 * rate,
            bandwidth=1e9 * (copy.gigabytes or 0.0) / copy.seconds,
            host=1.0,
            source="measured here",
        )

    def record(self) -> dict[str, Any]:
        """The report as plain JSON, with its provenance."""
        return {
            "benchmark": "qwen",
            "networks": self.setup.settings.name,
            "device": self.device,
            "work": asdict(self.setup.work),
            "schedule": self.setup.row.name,
            "repeats": self.setup.repeats,
            "floor_seconds": self.floors(),
            "times_faster_than_teacher": self.times_faster(),
            "rows": [self._row(row) for row in self.rows],
            "provenance": provenance(),
        }

    def _row(self, row: Row) -> dict[str, Any]:
        over = self.over_floor(row)
        return row.record() if over is None else {**row.record(), "over_floor": over}


def lines(rows: Sequence[Row]) -> list[str]:
    """Rows for a terminal."""
    return [
        f"{row.part:12s}{row.name:36s}"
        + ("" if row.seconds is None else f"{1e3 * row.seconds:12.2f} ms")
        + ("" if row.rate is None else f"{row.rate:10.1f} TFLOP/s")
        + ("" if row.peak is None else f"{row.peak / 1e9:8.1f} GB")
        + ("" if row.error is None else f"  off by {row.error:.2e}")
        + (f"  {row.note}" if row.note else "")
        for row in rows
    ]


def file_for(device: str) -> Path:
    """Where a device's figures are kept."""
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return places.root() / "benchmarks" / f"qwen-{slug}.json"


# --- the command --------------------------------------------------------------------------------


def measure(
    setup: Setup,
    only: Sequence[str] = (),
    path: Path | None = None,
    variants: Sequence[str] = (),
) -> Report:
    """Measure the parts, print rows as they come, and keep them after each part.

    A file that is there already keeps its rows, but for those that are measured again: so a GPU
    that is at hand for minutes only can be measured part by part.

    Args:
        setup: networks, device, work.
        only: names of parts; empty for all.
        path: a JSON file, or None.
        variants: of the transformer; empty for all.

    Raises:
        BadInput: there is no such part, no folder for the file, or it has figures of other work.
    """
    parts = parts_of(setup, variants)
    for name in only:
        if name not in parts:
            raise BadInput("parts", name, f"choose among {', '.join(parts)}")
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise BadInput("json", str(path), "name a file in a folder that exists")
    report = Report(setup=setup, rows=earlier(path, setup))
    for name in only or parts:
        for row in _guarded(name, parts[name], setup):
            report = report.with_row(row)
            print(*lines([row]), sep="\n", flush=True)
        free()
        if path is not None:
            text = json.dumps(report.record(), indent=1, ensure_ascii=False, allow_nan=False)
            atomic_write_text(path, text + "\n")
    for name, seconds in report.floors().items():
        print(f"{'floor':12s}{name:36s}{1e3 * seconds:12.2f} ms, by the rates above")
    for name, times in report.times_faster().items():
        print(f"{'faster':12s}{name:36s}{times:12.1f} x the guided teacher, decoding included")
    return report


def earlier(path: Path | None, setup: Setup) -> tuple[Row, ...]:
    """Return the rows of a file, if it is there.

    Raises:
        BadInput: they are of other work, or of another device.
    """
    if path is None or not path.is_file():
        return ()
    record, now = _record(path), Report(setup=setup, rows=()).record()
    same = ("benchmark", "networks", "device", "work", "schedule", "repeats")
    if any(record.get(key) != now[key] for key in same):
        raise BadInput("json", str(path), "it has figures of other work; name a new file")
    return tuple(Row.read(row) for row in record["rows"])


def _record(path: Path) -> dict[str, Any]:
    """What this command wrote earlier."""
    try:
        record = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        record = None
    if not isinstance(record, dict):
        raise BadInput("json", str(path), "it is no file of this command; name a new one")
    return record


def _guarded(name: str, part: Part, setup: Setup) -> Iterator[Row]:
    """The rows of a part; one that says why where its memory is short."""
    try:
        yield from part(setup)
    except torch.OutOfMemoryError as error:
        yield Row(part=name, name="stopped", note=str(error).splitlines()[0][:160])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    asked = _parser().parse_args(arguments)
    try:
        setup = _setup(asked)
        path = None if asked.tiny else asked.json or file_for(torch.cuda.get_device_name())
        if path is not None and asked.json is None:
            path.parent.mkdir(exist_ok=True)
        measure(setup, asked.parts, asked.json if asked.tiny else path, asked.variants)
    except TurboLabError as error:
        print(f"turbo-lab: {error}", file=sys.stderr)
        return 2 if isinstance(error, BadInput) else 1
    return 0


def _setup(asked: argparse.Namespace) -> Setup:
    if asked.repeats < 1 or (asked.repeats < 5 and not asked.tiny):
        raise BadInput("repeats", asked.repeats, "a median needs at least 5")
    if not asked.tiny and not torch.cuda.is_available():
        raise MissingPiece(
            "Qwen-Image is measured on a CUDA GPU, and torch sees none; --tiny runs the same on "
            "networks of kilobytes."
        )
    width, height = parsed_size(asked.size or ("64x64" if asked.tiny else "2048x2048"))
    row = published(asked.schedule)
    work = Work(
        height=height,
        width=width,
        batch=_or(asked.batch, 2 if asked.tiny else 4),
        steps=_or(asked.steps, row.steps),
        text=_or(asked.text, 8 if asked.tiny else 64),
    )
    return Setup(
        settings=TINY if asked.tiny else FULL,
        place=Place.on("cpu" if asked.tiny else "cuda"),
        work=work,
        row=row,
        repeats=asked.repeats,
        side=64 if asked.tiny else 8192,
        backend="eager" if asked.tiny else "inductor",
    )


def _or(asked: int | None, usual: int) -> int:
    return usual if asked is None else asked


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m turbo_lab.bench.qwen", description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="networks of kilobytes on a CPU")
    parser.add_argument("--size", default="", help="WIDTHxHEIGHT; 2048x2048")
    parser.add_argument("--batch", type=int, default=None, help="pictures; 4")
    parser.add_argument("--steps", type=int, default=None, help="network steps; the schedule's own")
    parser.add_argument("--text", type=int, default=None, help="tokens of a prompt; 64")
    parser.add_argument("--schedule", default="wuli-2", help="a published one")
    parser.add_argument("--repeats", type=int, default=5, help="counted runs of each thing")
    parser.add_argument("--parts", nargs="*", default=(), help="some of the parts")
    parser.add_argument("--variants", nargs="*", default=(), help="some of the transformer's")
    parser.add_argument("--json", type=Path, default=None, help="file for the rows")
    return parser


if __name__ == "__main__":
    sys.exit(main())
