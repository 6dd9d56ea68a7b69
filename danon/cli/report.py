"""The command ``danon report``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from danon.cli.options import RunsFolder, refuse

if TYPE_CHECKING:
    from danon.runs.journal import RecordedRun

__all__ = ["report"]


def report(
    run_dir: Annotated[
        Path | None, typer.Argument(help="Folder of a run in results/runs. Default: the last run.")
    ] = None,
    *,
    results: RunsFolder,
    picture: Annotated[
        Path | None, typer.Option(help="PNG file to draw speed-up and memory to. Default: none.")
    ] = None,
    all_tables: Annotated[
        bool, typer.Option("--tables", help="Print every table instead of the summary.")
    ] = False,
    unmeasured: Annotated[
        bool, typer.Option("--unmeasured", help="Only list what was not measured, and why.")
    ] = False,
) -> None:
    """Print the summary of a recorded run and write its HTML report."""
    from danon.report.html_report import write_report
    from danon.report.speedup_chart import write_chart
    from danon.report.terminal import print_unmeasured, render
    from danon.report.terminal_summary import print_summary
    from danon.runs.files import UNWRITABLE

    console = Console()
    run = _recorded(run_dir, results, console)
    if unmeasured:
        print_unmeasured(run.results, console)
        return
    path = run.run_dir / "report.html"
    try:
        write_report(run.results, run.info, path)
        if picture is not None:
            write_chart(run.results, run.info, picture)
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        print(f"danon: {error}", file=sys.stderr)
        raise typer.Exit(os.EX_IOERR) from error
    (render if all_tables else print_summary)(run.results, run.info, console)
    console.print(f"\nReport    {path}", soft_wrap=True, highlight=False)
    if picture is not None:
        console.print(f"Picture   {picture}", soft_wrap=True, highlight=False)


def _recorded(run_dir: Path | None, results: Path, console: Console) -> RecordedRun:
    """Return the run in a folder, or the last one that can be read."""
    from danon.console.messages import pass_over
    from danon.runs.journal import RecordedRun, recorded_runs
    from danon.runs.schema import SchemaError

    if run_dir is not None:
        try:
            return RecordedRun.read(run_dir)
        except (FileNotFoundError, SchemaError) as error:
            refuse(str(error))
    unreadable = list[str]()
    last = next(recorded_runs(results, unreadable.append), None)
    for why in unreadable:
        pass_over(console, why)
    state = "can be read" if unreadable else "is recorded"
    return last or refuse(f"no run {state} under {results}")
