"""The command ``danon calibrate``."""

from __future__ import annotations

import math
from typing import Annotated

import typer
from rich.console import Console

from danon.cli.options import Only, RepositoryAttention
from danon.cli.values import integer
from danon.runs.folders import results_folder

__all__ = ["calibrate"]


def calibrate(
    attention: RepositoryAttention = None,
    only: Only = "",
    pairs: Annotated[
        int,
        typer.Option(
            help="Number of pairs of fresh processes for each case, at least 2.",
            parser=integer(2),
            metavar="N",
        ),
    ] = 10,
) -> None:
    """Measure the thresholds of the gate at the commit that is checked out."""
    from danon.gate.command import calibrate as run
    from danon.gate.workspace import Options

    options = Options(tuple(attention or ()), only, False, math.inf, results_folder("gate"))
    raise typer.Exit(run(options, pairs, Console(emoji=False)))
