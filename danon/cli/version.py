"""The option ``danon --version``."""

from __future__ import annotations

import importlib.metadata
import platform

import typer

from danon import __version__
from danon.console.exit_status import DONE
from danon.runs.commit import UNKNOWN, commit_of

__all__ = ["print_version", "version_line"]


def version_line() -> str:
    """Return the versions of danon, torch and Python, and the commit of a checkout."""
    commit, dirty = commit_of()
    where = "" if commit == UNKNOWN else f" (commit {commit[:10]}{', changed since' * dirty})"
    try:
        torch = importlib.metadata.version("torch")  # importing it takes seconds
    except importlib.metadata.PackageNotFoundError:
        torch = "not installed"
    return f"danon {__version__}{where}, torch {torch}, Python {platform.python_version()}"


def print_version(asked: bool) -> None:
    """Print the versions and end the command, if the option is given."""
    if asked:
        typer.echo(version_line())
        raise typer.Exit(DONE)
