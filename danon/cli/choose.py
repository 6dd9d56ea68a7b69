"""The command ``danon choose``."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from danon.cli.options import RunsFolder, check_folder, choice, length_option, refuse
from danon.cli.values import number
from danon.runs.case import CALL_PHASES
from danon.runs.folders import results_folder, shipped_results

__all__ = ["choose"]


def choose(
    length: Annotated[int, length_option("Length of the sequences.")],
    memory_gb: Annotated[
        float,
        typer.Option(help="Memory that one call may take, in GiB.", parser=number, metavar="GIB"),
    ],
    task: Annotated[
        str,
        typer.Option(
            help="Task that the attention must be as good at as dense attention: lookup, recall, "
            "language, or the name of a recorded task (mqar, ...).",
            metavar="NAME",
        ),
    ] = "lookup",
    phase: Annotated[str, choice("Call to be fast at", CALL_PHASES)] = "forward",
    *,
    results: RunsFolder,
) -> None:
    """Recommend an attention, your own too, from recorded figures alone."""
    from danon.cli.recommendation_terminal import answer

    check_folder("--results", results, write=False)
    usual = results == results_folder("runs")
    folders = (results, shipped_results("reference")) if usual else (results,)
    try:
        raise typer.Exit(answer(folders, length, memory_gb, task, phase, Console(emoji=False)))
    except ValueError as error:
        refuse(str(error))
