"""The command ``danon history``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from danon.cli.options import check_folder, results_option

__all__ = ["history"]


def history(
    case: Annotated[
        str, typer.Argument(help="Name of a case, as in results/thresholds.json.", metavar="CASE")
    ],
    *,
    results: Annotated[Path, results_option("Folder to write the plot to.", "gate")],
) -> None:
    """Show where the time of a case changed over the runs of the gate."""
    from danon.gate.command import history as run

    check_folder("--results", results)
    raise typer.Exit(run(case, results, Console(emoji=False)))
