"""The command ``danon gate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from danon.cli.options import Only, RepositoryAttention, check_folder, refuse, results_option
from danon.cli.values import number

__all__ = ["gate"]


def gate(
    against: Annotated[
        str,
        typer.Option(
            help="Revision to compare with (main, HEAD~1, ...). Default: the stored thresholds.",
            metavar="REVISION",
        ),
    ] = "",
    attention: RepositoryAttention = None,
    only: Only = "",
    dirty: Annotated[
        bool, typer.Option("--dirty", help="Include changes that are not committed.")
    ] = False,
    time_limit_minutes: Annotated[
        float,
        typer.Option(
            help="Limit of the whole comparison, in minutes.", parser=number, metavar="MINUTES"
        ),
    ] = 10.0,
    accept: Annotated[
        str,
        typer.Option(
            help="Take the last gate's figures as thresholds of a case, or of regressions that "
            "match a pattern.",
            metavar="CASE",
        ),
    ] = "",
    reason: Annotated[
        str, typer.Option(help="Reason to accept, kept in the history.", metavar="TEXT")
    ] = "",
    *,
    results: Annotated[
        Path, results_option("Folder to write gate.json, gate.md and gate.xml to.", "gate")
    ],
) -> None:
    """Check whether an attention became slower, larger or worse; exit with status 1 if so."""
    from danon.gate.command import accept_cases
    from danon.gate.command import gate as run
    from danon.gate.workspace import Options

    check_folder("--results", results)
    if reason and not accept:
        refuse(f"--reason {reason!r}: only with --accept")
    if accept:
        raise typer.Exit(accept_cases(accept, reason, results, Console(emoji=False)))
    options = Options(tuple(attention or ()), only, dirty, time_limit_minutes, results, against)
    raise typer.Exit(run(options, Console(emoji=False)))
