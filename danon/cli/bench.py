"""The command ``danon bench``."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from danon.cli.options import Address, Device, Engine, RunsFolder, command_line

__all__ = ["bench"]


def bench(
    profile: Annotated[
        str, typer.Option(help="Size of the run: quick, standard or full.")
    ] = "quick",
    device: Device = "cpu",
    attention: Annotated[
        list[str] | None,
        typer.Option(
            help="Attention of your own as file.py:Class, measured beside all others. "
            "May be repeated."
        ),
    ] = None,
    only: Annotated[
        str,
        typer.Option(help="Attentions to keep, by registered name, comma separated. Default: all."),
    ] = "",
    suites: Annotated[
        str,
        typer.Option(
            help="Suites to run: names, file.py:Class, or file.py:function of a metric. "
            "Default: all."
        ),
    ] = "",
    *,
    results: RunsFolder,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the last run that was killed.")
    ] = False,
    engine: Engine = "local",
    address: Address = "",
) -> None:
    """Measure every attention, print the scoreboard and record the run."""
    from danon.bench.command import Options
    from danon.bench.command import bench as run

    attentions = tuple(attention or ())
    options = Options(
        profile, device, attentions, only, suites, results, resume, command_line(), engine, address
    )
    raise typer.Exit(run(options, Console()))
