"""Lines that commands print: what was done, and why something was not."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape

__all__ = ["pass_over", "refuse", "say"]


def say(console: Console, what: str, words: str) -> None:
    console.print(f"{what:<9} {escape(words)}", soft_wrap=True, highlight=False)


def pass_over(console: Console, why: str) -> None:
    console.print(f"[yellow]passed over:[/] {escape(why)}", soft_wrap=True, highlight=False)


def refuse(console: Console, reason: str) -> None:
    console.print(f"[bold red]danon:[/] {escape(reason)}", soft_wrap=True)
