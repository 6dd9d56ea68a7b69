"""The command ``danon choose``."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from danon.cli.options import RunsFolder, refuse
from danon.runs.folders import results_folder, shipped_results

__all__ = ["choose"]


def choose(
    length: Annotated[int, typer.Option(help="Length of the sequences, in tokens.")],
    memory_gb: Annotated[float, typer.Option(help="Memory that one call may take, in GiB.")],
    task: Annotated[
        str,
        typer.Option(
            help="Task that the attention must be as good at as dense attention: lookup, recall, "
            "language, or the name of a recorded task (mqar, ...)."
        ),
    ] = "lookup",
    phase: Annotated[
        str, typer.Option(help="Call to be fast at: forward, forward+backward or decode.")
    ] = "forward",
    *,
    results: RunsFolder,
) -> None:
    """Recommend an attention, from recorded figures alone."""
    from danon.cli.recommendation_terminal import answer

    usual = results == results_folder("runs")
    folders = (results, shipped_results("reference")) if usual else (results,)
    try:
        raise typer.Exit(answer(folders, length, memory_gb, task, phase, Console()))
    except ValueError as error:
        refuse(str(error))
