"""Options that several commands share, and how a command refuses."""

from __future__ import annotations

import shlex
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from danon.cli.values import one_of, tokens
from danon.cluster.connection import ENGINES
from danon.console import messages
from danon.console.exit_status import REFUSED
from danon.runs.case import DEVICES
from danon.runs.folders import results_folder

__all__ = [
    "Address",
    "Device",
    "Engine",
    "Only",
    "RepositoryAttention",
    "RunsFolder",
    "check_folder",
    "choice",
    "command_line",
    "length_option",
    "refuse",
    "results_option",
]


def choice(help: str, names: Iterable[str]) -> Any:  # noqa: A002  as typer has it
    """Declare an option that takes one of several names; the help lists them.

    Args:
        help: what is chosen, without a full stop.
        names: allowed values.
    """
    allowed = tuple(names)
    listed = f"{help}: {', '.join(allowed)}."
    return typer.Option(help=listed, parser=one_of(lambda: allowed), metavar="NAME")


def length_option(help: str) -> Any:  # noqa: A002
    """Declare the option --length, in tokens: 16384, 16k, 1M."""
    return typer.Option(
        help=f"{help} 16k is 16384, 1M is 1048576.", parser=tokens, metavar="TOKENS"
    )


def results_option(help: str, *parts: str) -> Any:  # noqa: A002
    """Declare the option --results, by default a folder of the current repository."""
    return typer.Option(
        help=help,
        default_factory=lambda: results_folder(*parts),
        show_default=f"{'/'.join(('results', *parts))} of the repository",
        metavar="FOLDER",
    )


Device = Annotated[str, choice("Device to measure on", DEVICES)]
RunsFolder = Annotated[Path, results_option("Folder of the recorded runs.", "runs")]
Only = Annotated[
    str,
    typer.Option(
        help="Attentions to measure, by registered name, comma separated. Default: danon's "
        "mechanisms.",
        metavar="NAMES",
    ),
]
RepositoryAttention = Annotated[
    list[str] | None,
    typer.Option(
        help="Attention of your repository, measured instead of danon's mechanisms. May be "
        "repeated.",
        metavar="FILE.py:CLASS",
    ),
]
Engine = Annotated[str, choice("Engine; ray spreads the work over a Ray cluster", ENGINES)]
Address = Annotated[
    str,
    typer.Option(
        help="Address of the Ray cluster: host:port or auto. Default: start a local Ray.",
        metavar="ADDRESS",
    ),
]


def command_line() -> str:
    """Return the command as it was typed, for records."""
    return shlex.join(["danon", *sys.argv[1:]])


def check_folder(option: str, folder: Path, *, write: bool = True) -> None:
    """Refuse a folder that is a file, or that cannot be written to, before anything is measured.

    Args:
        option: the option or argument that named the folder.
        folder: need not exist.
        write: the command is going to write there.
    """
    existing = next((part for part in (folder, *folder.parents) if part.exists()), Path())
    reason = f"{existing} is a file, not a folder"
    if existing.is_dir():
        if not write:
            return
        try:  # permissions alone do not tell of a filesystem that takes no files
            with tempfile.TemporaryDirectory(dir=existing, prefix=".danon-"):
                return
        except PermissionError:
            reason = f"no permission to write to {existing}"
        except OSError as error:
            reason = f"nothing can be written to {existing} ({error.strerror})"
    refuse(f"{option} {folder}: {reason}; {option} FOLDER takes another")


def refuse(reason: str) -> NoReturn:
    """Print why a command cannot run and exit with status 2."""
    messages.refuse(Console(stderr=True, emoji=False), reason)
    raise typer.Exit(REFUSED)
