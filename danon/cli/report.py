"""The command ``danon report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from danon.cli.options import RunsFolder
from danon.cli.output_files import check_file, exit_if_unwritable
from danon.cli.recorded_run import find_run

__all__ = ["report"]


def report(
    run_dir: Annotated[
        Path | None,
        typer.Argument(help="Folder or id of a run. Default: the last run.", metavar="RUN"),
    ] = None,
    *,
    results: RunsFolder,
    picture: Annotated[
        Path | None,
        typer.Option(
            help="PNG file to draw speed-up and memory to. Default: none.", metavar="FILE.png"
        ),
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

    console = Console(emoji=False)
    if picture is not None:
        check_file("--picture", picture, ".png")
    run = find_run(run_dir, results, console)
    if unmeasured:
        print_unmeasured(run.results, console)
        return
    path, show = run.run_dir / "report.html", render if all_tables else print_summary
    with exit_if_unwritable():
        try:
            write_report(run.results, run.info, path)
            if picture is not None:
                write_chart(run.results, run.info, picture)
        finally:
            show(run.results, run.info, console)
    console.print(f"\nReport    {path}", soft_wrap=True, highlight=False)
    if picture is not None:
        console.print(f"Picture   {picture}", soft_wrap=True, highlight=False)
