"""Lines that commands print: work done, runs passed over, refusals."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.markup import escape

__all__ = ["pass_over", "refuse", "say"]


def say(console: Console, label: str, text: str) -> None:
    """Print a line with a label: ``Written   results/power.png``.

    Args:
        console: of the command.
        label: in the first column.
        text: shown as it is, without markup.
    """
    console.print(f"{label:<9} {escape(text)}", soft_wrap=True, highlight=False, emoji=False)


def pass_over(console: Console, reason: str) -> None:
    """Print that a file or a run is left out, and the reason.

    Args:
        console: of the command.
        reason: shown as it is, without markup.
    """
    console.print(
        f"[yellow]passed over:[/] {escape(reason)}", soft_wrap=True, highlight=False, emoji=False
    )


def refuse(console: Console, reason: str) -> None:
    """Print on stderr, in one line, why a command does not run or did not end well.

    Args:
        console: of the command; one that writes to another file than stdout gets the line itself.
        reason: shown as it is, without markup.
    """
    if console.file is sys.stdout:
        console = Console(stderr=True, emoji=False)
    console.print(
        f"[bold red]danon:[/] {escape(' '.join(reason.split()))}",
        soft_wrap=True,
        highlight=False,
        emoji=False,  # file.py:B: is none
    )
