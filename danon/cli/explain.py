"""The command ``danon explain``."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from danon.cli.options import refuse

__all__ = ["explain"]


def explain(
    column: Annotated[
        list[str] | None,
        typer.Argument(help="Heading of a column, or name of a metric. Default: list them all."),
    ] = None,
) -> None:
    """Explain a column of the tables."""
    from danon.processes.suite_modules import import_suites
    from danon.report.columns import COLUMNS, columns, find

    import_suites()
    console = Console(emoji=False)
    asked = " ".join(column or ())
    if not asked:
        for name, one in COLUMNS.items():
            first = one.text.partition(". ")[0].rstrip(".")
            console.print(f"[bold]{name:10}[/] {escape(first)}.", highlight=False)
        metrics = ", ".join(name for name in columns() if name not in COLUMNS)
        console.print(f"\n[bold]metrics[/]    {metrics}", highlight=False)
        return
    matches = find(asked)
    if not matches:
        refuse(f"column {asked!r}: must be one of {', '.join(columns())}")
    for name, one in matches.items():
        unit = f" ({one.unit})" if one.unit else ""
        heading = f", heading {one.title!r}" if one.title != name else ""
        console.print(f"[bold]{escape(name)}[/]{heading}{unit}", highlight=False)
        console.print(escape(one.text), highlight=False)
