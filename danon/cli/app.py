"""The commands, as typer shows them."""

from __future__ import annotations

import math
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console

from danon.runs.folders import results_folder, shipped_results

if TYPE_CHECKING:
    from danon.runs.journal import RecordedRun

__all__ = ["app"]

app = typer.Typer(
    help="Measure attention mechanisms.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _results(help: str, *parts: str) -> Any:  # noqa: A002  as typer has it
    """The option --results: of the repository one stands in, if not given."""
    return typer.Option(
        help=help,
        default_factory=lambda: results_folder(*parts),
        show_default=f"{'/'.join(('results', *parts))} of the repository",
    )


Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Results = Annotated[Path, _results("Folder of all runs.", "runs")]
Only = Annotated[str, typer.Option(help="Registered names to measure, comma separated.")]
OwnInRepository = Annotated[
    list[str] | None,
    typer.Option(help="file.py:Class of your repository, instead of danon's mechanisms."),
]
Engine = Annotated[
    str, typer.Option(help="local, or ray: one case at a time on each machine of a cluster.")
]
Address = Annotated[
    str, typer.Option(help="Of the cluster: host:port or auto; a Ray of its own without.")
]
RunDir = Annotated[Path | None, typer.Argument(help="A folder under results/runs.")]


@app.command()
def bench(
    profile: Annotated[str, typer.Option(help="quick, standard or full.")] = "quick",
    device: Device = "cpu",
    attention: Annotated[
        list[str] | None,
        typer.Option(help="file.py:Class of your own, measured beside everything else."),
    ] = None,
    only: Annotated[str, typer.Option(help="Registered names to keep, comma separated.")] = "",
    suites: Annotated[
        str, typer.Option(help="Suites to run: names, or file.py:Class; default: all.")
    ] = "",
    *,
    results: Results,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a killed run.")] = False,
    engine: Engine = "local",
    address: Address = "",
) -> None:
    """Measure every attention, print the scoreboard, record it."""
    from danon.bench.command import Options
    from danon.bench.command import bench as run

    command = shlex.join(["danon", *sys.argv[1:]])
    own = tuple(attention or ())
    options = Options(profile, device, own, only, suites, results, resume, command, engine, address)
    raise typer.Exit(run(options, Console()))


@app.command()
def report(
    run_dir: RunDir = None,
    *,
    results: Results,
    picture: Annotated[
        Path | None, typer.Option(help="Also draw speed-up and memory to this PNG.")
    ] = None,
) -> None:
    """Show the scoreboard of a run again (the last one) and write its report."""
    from danon.report.html_report import write_report
    from danon.report.speedup_chart import write_chart
    from danon.report.terminal import render
    from danon.runs.files import UNWRITABLE

    console = Console()
    run = _recorded(run_dir, results, console)
    path = run.run_dir / "report.html"
    found, info = run.results, run.info
    try:
        write_report(found, info, path)
        if picture is not None:
            write_chart(found, info, picture)
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        print(f"danon: {error}", file=sys.stderr)
        raise typer.Exit(os.EX_IOERR) from error
    render(found, info, console)
    console.print(f"\nReport    {path}", soft_wrap=True, highlight=False)
    if picture is not None:
        console.print(f"Picture   {picture}", soft_wrap=True, highlight=False)


@app.command()
def record(
    folder: Annotated[Path, typer.Argument(help="One under results/runs, or results/gate.")],
) -> None:
    """Upload a run or a comparison to MLflow, or what of it is not there yet."""
    from danon.gate.gate_recorder import record as comparison
    from danon.gate.result import GateResult
    from danon.gate.result_report import FILES
    from danon.runs.schema import SchemaError
    from danon.tracking.bench_recorder import upload
    from danon.tracking.store import StoreError

    found, place = None, folder / FILES[0]
    if place.exists():
        try:
            found = GateResult.read(place)
        except ValueError as error:
            _refuse(str(error))
    elif not (folder / "run.json").exists():
        _refuse(f"{folder} has neither run.json nor {place.name}")
    try:
        print(upload(folder) if found is None else comparison(found))
    except (FileNotFoundError, SchemaError, StoreError) as error:
        _refuse(str(error))


@app.command()
def choose(
    length: Annotated[int, typer.Option(help="Tokens.")],
    memory_gb: Annotated[float, typer.Option(help="GiB that one call may take.")],
    task: Annotated[
        str,
        typer.Option(help="lookup (of the settings that are timed), recall, language, mqar ..."),
    ] = "lookup",
    phase: Annotated[str, typer.Option(help="forward, forward+backward or decode.")] = "forward",
    *,
    results: Results,
) -> None:
    """Say which attention to take, from recorded figures alone."""
    from danon.cli.choose import answer

    usual = results == results_folder("runs")
    folders = (results, shipped_results("reference")) if usual else (results,)
    try:
        raise typer.Exit(answer(folders, length, memory_gb, task, phase, Console()))
    except ValueError as error:
        _refuse(str(error))


@app.command()
def gate(
    against: Annotated[
        str, typer.Option(help="Revision to compare with: main, HEAD~1; else the thresholds.")
    ] = "",
    attention: OwnInRepository = None,
    only: Only = "",
    dirty: Annotated[
        bool, typer.Option("--dirty", help="Take along changes that no commit has.")
    ] = False,
    time_limit_minutes: Annotated[float, typer.Option(help="Of the whole comparison.")] = 10.0,
    accept: Annotated[
        str,
        typer.Option(help="Case, or pattern of regressions, that the last gate's figures are for."),
    ] = "",
    reason: Annotated[str, typer.Option(help="Reason to accept, for the history.")] = "",
    *,
    results: Annotated[Path, _results("Gets gate.json, gate.md and gate.xml.", "gate")],
) -> None:
    """Say whether an attention has become slower, larger or worse; exit status 1 if so."""
    from danon.gate.command import accept_cases
    from danon.gate.command import gate as run
    from danon.gate.workspace import Options

    if accept:
        raise typer.Exit(accept_cases(accept, reason, results, Console()))
    options = Options(tuple(attention or ()), only, dirty, time_limit_minutes, results, against)
    raise typer.Exit(run(options, Console()))


@app.command()
def history(
    case: Annotated[str, typer.Argument(help="As in results/thresholds.json.")],
    *,
    results: Annotated[Path, _results("Gets the plot.", "gate")],
) -> None:
    """Show where the time of a case changed over the runs of the gate."""
    from danon.gate.command import history as run

    raise typer.Exit(run(case, results, Console()))


@app.command()
def calibrate(
    attention: OwnInRepository = None,
    only: Only = "",
    pairs: Annotated[int, typer.Option(help="Of fresh processes, for each case.")] = 10,
) -> None:
    """Measure the thresholds that the gate compares with, at the commit that is checked out."""
    from danon.gate.command import calibrate as run
    from danon.gate.workspace import Options

    options = Options(tuple(attention or ()), only, False, math.inf, results_folder("gate"))
    raise typer.Exit(run(options, pairs, Console()))


tuning = typer.Typer(
    help="Let Optuna search for better settings, or join a study.",
    invoke_without_command=True,
    pretty_exceptions_enable=False,
)
app.add_typer(tuning, name="tune")
Storage = Annotated[
    str, typer.Option(help="postgresql://... or sqlite:///...; the repository's file without.")
]
Trials = Annotated[int, typer.Option(help="That the study is to have in the end.")]


@tuning.callback()
def tune(
    context: typer.Context,
    mechanism: Annotated[str, typer.Option(help="Registered name, or file.py:Class.")] = "",
    objective: Annotated[
        str, typer.Option(help="Some of speed,memory,quality,parameters; or balanced.")
    ] = "balanced",
    limit: Annotated[
        list[str] | None, typer.Option(help="quality=0.05: the most that a figure may be.")
    ] = None,
    length: Annotated[
        int | None, typer.Option(help="Tokens; 16384 without, for a quantization plan 1024.")
    ] = None,
    trials: Trials = 60,
    kind: Annotated[
        str, typer.Option(help="hyperparameters, architecture, quantization or schedule.")
    ] = "hyperparameters",
    dtype: Annotated[
        str | None, typer.Option(help="bfloat16 without; a quantization plan begins with float32.")
    ] = None,
    device: Device = "cpu",
    sampler: Annotated[str, typer.Option(help="tpe or random.")] = "tpe",
    seed: Annotated[int, typer.Option(help="Of the sampler and of what is measured.")] = 0,
    study: Annotated[str, typer.Option(help="Its name; made from the options without.")] = "",
    storage: Storage = "",
    engine: Engine = "local",
    address: Address = "",
    *,
    results: Annotated[Path, _results("Gets tuned/ and tune/.")],
) -> None:
    """Search the settings of an attention; the same command goes on with its study."""
    from danon.tuning.command import LENGTH_AND_DTYPE, Options
    from danon.tuning.command import tune as run

    if context.invoked_subcommand is not None:
        return
    command = shlex.join(["danon", *sys.argv[1:]])
    usual = LENGTH_AND_DTYPE.get(kind, (16384, "bfloat16"))
    options = Options(
        mechanism,
        kind,
        objective,
        tuple(limit or ()),
        usual[0] if length is None else length,
        dtype or usual[1],
        device,
        trials,
        sampler,
        seed,
        study,
        storage,
        engine,
        address,
        results,
        command,
    )
    raise typer.Exit(run(options, Console()))


@tuning.command()
def worker(
    study: Annotated[str, typer.Option(help="Name of a study that danon tune has begun.")],
    storage: Storage = "",
    trials: Annotated[int, typer.Option(help="As of danon tune; 0: what that has asked for.")] = 0,
) -> None:
    """Run trials of a study beside its other workers."""
    from danon.tuning.command import join

    command = shlex.join(["danon", *sys.argv[1:]])
    raise typer.Exit(join(study, storage, trials, Console(), command))


@app.command()
def doctor(device: Device = "cpu") -> None:
    """Say what this machine can run, and why not the rest."""
    from danon.cli.doctor import doctor as examine

    if device not in ("cpu", "cuda"):
        _refuse(f"unknown device {device!r}; known: cpu, cuda")
    try:
        examine(device, Console())
    except ValueError as error:
        _refuse(str(error))


def _recorded(run_dir: Path | None, results: Path, console: Console) -> RecordedRun:
    """A run, or the last one that can be read."""
    from danon.console.messages import pass_over
    from danon.runs.journal import RecordedRun, recorded_runs
    from danon.runs.schema import SchemaError

    if run_dir is not None:
        try:
            return RecordedRun.read(run_dir)
        except (FileNotFoundError, SchemaError) as error:
            _refuse(str(error))
    unreadable = list[str]()
    found = next(recorded_runs(results, unreadable.append), None)
    for why in unreadable:
        pass_over(console, why)
    state = "can be read" if unreadable else "is recorded"
    return found or _refuse(f"no run {state} under {results}")


def _refuse(reason: str) -> NoReturn:
    print(f"danon: {reason}", file=sys.stderr)
    raise typer.Exit(2)
