"""The command line ``turbo-lab``; each command loads what it needs when it runs."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from typer.core import TyperGroup

from turbo_lab.cli_options import (
    DeviceOption,
    FreshOption,
    ProfileOption,
    only_for,
    say,
)
from turbo_lab.cli_sample import sample
from turbo_lab.cli_train import train
from turbo_lab.errors import BadInput, TurboLabError

if TYPE_CHECKING:
    from turbo_lab.recipes import Profile


class Spoken(TyperGroup):
    """The commands; an error meant for a person is one sentence and an exit code, no traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command: exit code 2 for input that is not allowed, 1 for what went wrong."""
        try:
            with _spoken_warnings():
                return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            if str(stop):  # of a training: where it stopped, and what is kept
                typer.echo(f"turbo-lab: {stop}", err=True)
            raise typer.Exit(130) from None
        except TurboLabError as error:
            typer.echo(f"turbo-lab: {error}", err=True)
            raise typer.Exit(2 if isinstance(error, BadInput) else 1) from None


@contextmanager
def _spoken_warnings() -> Iterator[None]:
    """Say warnings that are meant for a person without the line of code that gives them."""
    with warnings.catch_warnings():
        others = warnings.showwarning

        def show(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
            if category.__module__.startswith("turbo_lab."):
                typer.echo(f"turbo-lab: {message}", err=True)
            else:
                others(message, category, *where, **more)

        warnings.showwarning = show
        yield


app = typer.Typer(
    cls=Spoken,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Few-step diffusion distillation: understand it, measure it, repeat it.",
)

bench_app = typer.Typer(no_args_is_help=True, help="Measure what things cost, in pairs.")
app.add_typer(bench_app, name="bench")
export_app = typer.Typer(no_args_is_help=True, help="Write a student as a file for others.")
app.add_typer(export_app, name="export")
import_app = typer.Typer(no_args_is_help=True, help="Read a student from a file of others.")
app.add_typer(import_app, name="import")

OnlyOption = Annotated[
    list[str] | None, typer.Option(help="Beginning of a notebook's name, e.g. 01; repeatable.")
]
JobsOption = Annotated[int, typer.Option(help="Notebooks at a time; 0 chooses.")]


@app.command()
def figures(
    profile: ProfileOption = "quick",
    only: OnlyOption = None,
    jobs: JobsOption = 0,
    fresh: FreshOption = False,
    parameter: Annotated[
        list[str] | None,
        typer.Option("--parameter", "-p", help="name=value for every chosen notebook; repeatable."),
    ] = None,
) -> None:
    """Run the notebooks and write every figure, the claims and executed copies."""
    from turbo_lab import runner

    values = _named_values(parameter or [], only or [])
    if fresh:
        values["fresh"] = True
    _conclude(runner.run(profile=profile, only=only or [], jobs=jobs, parameters=values))


@app.command()
def refresh(only: OnlyOption = None, jobs: JobsOption = 0) -> None:
    """Run the notebooks at quick and store them, cleaned and with outputs, in notebooks/."""
    from turbo_lab import runner

    _conclude(runner.refresh(only or [], jobs))


app.command()(train)
app.command()(sample)


@export_app.command("lora")
def export_lora(
    student: Annotated[
        str, typer.Argument(help="A family such as dmd2, or the key of an artefact.")
    ],
    out: Annotated[Path, typer.Option(help="The .safetensors file to write.")],
    steps: Annotated[
        int | None, typer.Option(help="Of its sampler; 2 if it could have several.")
    ] = None,
    profile: Annotated[str | None, typer.Option(help="Of its training; quick.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of its training; 0.")] = None,
    format: Annotated[str, typer.Option(help="Key names: diffusers or comfyui.")] = "diffusers",
    dtype: Annotated[
        str, typer.Option(help="stored (every bit), float32, float16 or bfloat16.")
    ] = "stored",
) -> None:
    """Write a LoRA for diffusers or ComfyUI, and the scheduler_config.json that samples it."""
    from turbo_lab import delivery, lora_export

    if delivery.is_key(student):
        only_for("a family of students", "a key", {"profile": profile, "seed": seed})
    of = cast("Profile", "quick" if profile is None else profile)
    chosen = delivery.delivery(student, steps=steps, profile=of, seed=seed or 0)
    done = lora_export.export_lora(chosen, out, format=format, dtype=dtype)
    typer.echo(f"{done.lora}\n{done.scheduler}\n{done.call}")


@import_app.command("lora")
def import_lora(
    file: Annotated[Path, typer.Argument(help="A safetensors file, whoever wrote it.")],
    testbed: Annotated[
        str, typer.Option(help="Whose transformer it fits: qwen_image or postcards.")
    ] = "qwen_image",
    model: Annotated[
        str, typer.Option(help="qwen_image: folder of a pipeline, or its id; else the published.")
    ] = "",
    out: Annotated[
        Path | None, typer.Option(help="Write it here, named as ours, and keep no artefact.")
    ] = None,
) -> None:
    """Check a LoRA of others, say what it is, and keep it as an artefact."""
    from turbo_lab import lora_export, lora_import

    if out is not None:
        lora_export.check_out(out, ".safetensors")
    found = lora_import.incoming(file, testbed=testbed, model=model)
    typer.echo(lora_import.described(found))
    if out is not None:
        lora_import.write_ours(found, out)
        typer.echo(str(out))
    else:
        say(lora_import.kept(found))


@app.command()
def doctor(
    testbed: Annotated[str, typer.Option(help="qwen_image: plan its memory and time.")] = "",
    size: Annotated[str, typer.Option(help="qwen_image: WIDTHxHEIGHT, 2048x2048.")] = "",
    batch: Annotated[int | None, typer.Option(help="qwen_image: pictures, 4.")] = None,
    steps: Annotated[int | None, typer.Option(help="qwen_image: network steps, 2.")] = None,
) -> None:
    """Examine this machine: versions, processor, GPU, memory, folders, hub, what will be slow."""
    from rich.console import Console
    from rich.table import Table

    from turbo_lab.doctor import findings, qwen_plan

    if testbed:
        if testbed != "qwen_image":
            raise BadInput("testbed", testbed, "only qwen_image has a plan")
        plan = {"batch": 4 if batch is None else batch, "steps": 2 if steps is None else steps}
        typer.echo("\n".join(qwen_plan(size or "2048x2048", **plan)))
        return
    only_for("--testbed qwen_image", "this machine", {"size": size, "batch": batch, "steps": steps})
    found = findings()
    table = Table("", "found", "note", box=None, pad_edge=False)
    for one in found:
        table.add_row(one.name, one.value, one.note, style="red" if one.broken else "")
    Console().print(table)
    raise typer.Exit(int(any(one.broken for one in found)))


@app.command()
def bars(
    only: Annotated[str, typer.Option(help="Name of one bar; all if not given.")] = "",
) -> None:
    """Recompute every acceptance figure from the shipped artefacts; exit code 1 if one is short."""
    from turbo_lab.bars import main as measured

    raise typer.Exit(measured(only or None))


@app.command()
def readme() -> None:
    """Write the headline of README.md from the numbers that notebook 06 left in figures/."""
    from turbo_lab.readme import write

    typer.echo("README.md is written." if write() else "README.md was up to date.")


@app.command()
def reproduce(
    profile: Annotated[str, typer.Option(help="quick or paper.")] = "quick",
    only: OnlyOption = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(help="Shipped artefacts to use and not train again, as postcards/teacher."),
    ] = None,
    alone: Annotated[
        bool, typer.Option("--alone", help="Keep all that the notebooks before these train.")
    ] = False,
    jobs: JobsOption = 0,
    device: DeviceOption = "auto",
) -> None:
    """Train everything from nothing, run the notebooks on it, and say which claims changed."""
    from turbo_lab import reproduce as again

    kept = again.kept_as_shipped(keep or [], alone=alone, only=only or [])
    hours = again.training_hours(kept)
    typer.echo(
        f"All that is not kept took {hours:.1f} hours to train; a run that was killed goes on."
    )
    outcomes, found = again.reproduce(
        profile=profile, only=only or [], kept=kept, jobs=jobs, device=device
    )
    typer.echo(again.report(found, again.retrained(profile)))
    _conclude(outcomes)


@bench_app.command("train")
def bench_train(
    only: Annotated[str, typer.Option(help="Beginning of methods' names; all if not given.")] = "",
    batch_size: Annotated[int, typer.Option(help="Samples of a step.")] = 16,
    repeats: Annotated[int, typer.Option(help="Rounds in which each method takes a step.")] = 8,
    json: Annotated[Path | None, typer.Option(help="A file to write the rows to.")] = None,
    device: DeviceOption = "cpu",
) -> None:
    """Time a training step of each method, and its memory, against flow matching and its passes."""
    from turbo_lab.bench.train import main as measured

    measured(only=only, batch_size=batch_size, repeats=repeats, path=json, device=device)


@bench_app.command(
    "qwen",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def bench_qwen(ctx: typer.Context) -> None:
    """Measure Qwen-Image on a GPU, ours against stock diffusers; --help lists its options."""
    from turbo_lab.bench.qwen import main as measured

    raise typer.Exit(measured(ctx.args))


@app.command()
def artifacts() -> None:
    """List the trained artefacts: those in the cache and those shipped with the package."""
    from turbo_lab.store import Store

    for entry in Store.default().entries():
        typer.echo(f"{entry.name}  {entry.key}  {entry.bytes / 1e6:.1f} MB  {entry.root}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; always ends with SystemExit."""
    app(args=None if arguments is None else list(arguments))


def _named_values(pairs: Sequence[str], only: Sequence[str]) -> dict[str, Any]:
    """Parse ``name=value`` texts by the models of the notebooks they are for."""
    from turbo_lab import places
    from turbo_lab.notebook_files import discover
    from turbo_lab.notebook_params import parsed

    texts: dict[str, str] = {}
    for pair in pairs:
        name, sign, value = pair.partition("=")
        if not sign or not name.isidentifier() or name in texts:
            raise BadInput("parameter", pair, "write name=value, each name once")
        texts[name] = value
    values: dict[str, Any] = {}
    for notebook in discover(places.notebook_dir(), only) if texts else []:
        values |= parsed(notebook.name, texts)
    return values


def _conclude(outcomes: Sequence[Any]) -> None:
    failed = [outcome.name for outcome in outcomes if outcome.problem]
    if failed:
        typer.echo(f"{len(failed)} of {len(outcomes)} notebooks failed.", err=True)
        raise typer.Exit(1)


if __name__ == "__main__":
    main()
