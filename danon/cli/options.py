"""Options that several commands share, and how a command refuses."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from danon.runs.folders import results_folder

__all__ = [
    "Address",
    "Device",
    "Engine",
    "Only",
    "RepositoryAttention",
    "RunsFolder",
    "command_line",
    "refuse",
    "results_option",
]


def results_option(help: str, *parts: str) -> Any:  # noqa: A002  as typer has it
    """Declare the option --results, by default a folder of the current repository."""
    return typer.Option(
        help=help,
        default_factory=lambda: results_folder(*parts),
        show_default=f"{'/'.join(('results', *parts))} of the repository",
    )


Device = Annotated[str, typer.Option(help="Device to measure on: cpu or cuda.")]
RunsFolder = Annotated[Path, results_option("Folder of the recorded runs.", "runs")]
Only = Annotated[
    str,
    typer.Option(
        help="Attentions to measure, by registered name, comma separated. Default: danon's "
        "mechanisms."
    ),
]
RepositoryAttention = Annotated[
    list[str] | None,
    typer.Option(
        help="Attention of your repository as file.py:Class, measured instead of danon's "
        "mechanisms. May be repeated."
    ),
]
Engine = Annotated[
    str, typer.Option(help="Where to run: local, or ray (one case at a time on each machine).")
]
Address = Annotated[
    str, typer.Option(help="Ray cluster address: host:port or auto. Default: start a local Ray.")
]


def command_line() -> str:
    """Return the command as it was typed, for records."""
    return shlex.join(["danon", *sys.argv[1:]])


def refuse(reason: str) -> NoReturn:
    """Print why a command cannot run and exit with status 2."""
    print(f"danon: {reason}", file=sys.stderr)
    raise typer.Exit(2)
