"""Files that a command writes beside what it prints, such as ``--html page.html``."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import typer
from rich.console import Console

from danon.cli.options import refuse
from danon.console import messages
from danon.console.exit_status import NOT_WRITTEN
from danon.runs.files import UNWRITABLE

__all__ = ["check_file", "exit_if_unwritable"]


@contextlib.contextmanager
def exit_if_unwritable() -> Iterator[None]:
    """Turn the error of a full disk or of a folder in the block into a line on stderr.

    Raises:
        typer.Exit: With status 74: the file was not written.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        messages.refuse(Console(stderr=True, emoji=False), str(error))
        raise typer.Exit(NOT_WRITTEN) from error


@exit_if_unwritable()
def check_file(option: str, file: Path, suffix: str = "") -> None:
    """Refuse a file that cannot be written, before anything is drawn.

    Args:
        option: the option that named the file.
        file: need not exist.
        suffix: end that its name must have, ``.png``; empty allows every name.
    """
    if suffix and file.suffix.lower() != suffix:
        refuse(f"{option} {file}: must end in {suffix}")
    if file.is_dir():
        refuse(f"{option} {file}: is a folder, not a file")
    if not file.parent.is_dir():
        refuse(f"{option} {file}: there is no folder {file.parent}")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        refuse(f"{option} {file}: no permission to write it; another folder may be named")
