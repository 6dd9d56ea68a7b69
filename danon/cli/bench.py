"""The command ``danon bench``."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from danon.bench.profile_names import DESCRIPTIONS
from danon.cli.options import (
    Address,
    Device,
    Engine,
    RunsFolder,
    check_folder,
    choice,
    command_line,
)
from danon.processes.suite_modules import suite_names

__all__ = ["bench"]

PROFILES = "; ".join(f"{name}: {purpose}" for name, purpose in DESCRIPTIONS.items())


def bench(
    profile: Annotated[str, choice(f"Size of the run ({PROFILES})", DESCRIPTIONS)] = "quick",
    device: Device = "cpu",
    attention: Annotated[
        list[str] | None,
        typer.Option(
            help="Attention of your own, measured beside all others. May be repeated.",
            metavar="FILE.py:CLASS",
        ),
    ] = None,
    only: Annotated[
        str,
        typer.Option(
            help="Attentions to keep, by registered name, comma separated; `danon doctor` lists "
            "them. Default: those of the profile.",
            metavar="NAMES",
        ),
    ] = "",
    suites: Annotated[
        str,
        typer.Option(
            help=f"Suites to run, comma separated: {', '.join(suite_names())}; file.py:Class of "
            "your own; file.py:function of a metric. Default: those of the profile.",
            metavar="NAMES",
        ),
    ] = "",
    *,
    results: RunsFolder,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Continue the last run that was killed. Without one a new run begins, with a "
            "message.",
        ),
    ] = False,
    engine: Engine = "local",
    address: Address = "",
) -> None:
    """Measure every attention, print the scoreboard and record the run."""
    from danon.bench.command import Options
    from danon.bench.command import bench as run

    check_folder("--results", results)
    attentions = tuple(attention or ())
    options = Options(
        profile, device, attentions, only, suites, results, resume, command_line(), engine, address
    )
    raise typer.Exit(run(options, Console(emoji=False)))
