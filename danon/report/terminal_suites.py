"""Tables of single suites in the terminal: bounds, and added suites."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from danon.report import bound_tables, formatting, suite_tables
from danon.report.terminal_style import STYLES

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["print_bounds", "print_suite"]

MIN_METRIC_COLUMN = 9
BOUNDS_LEGEND = (
    "A: dense attention's matrix, A^: the attention's own, on rows spread over the length. eps: "
    "|A^ - A| sqrt(d / log n), N^: how it grows with the length (? from two lengths: no interval); "
    "the specification bounds it by a constant. rel: |A^ - A| / |A|. TV: total variation of a "
    "row. gamma: share of |A| that is not seen token by token; covered: share of its mass that "
    "is. delta: |X - X^| / |X|, tokens under nodes replaced by these. Mass: where its own softmax "
    "looks. - is not defined."
)


def print_bounds(bounds: bound_tables.Bounds, console: Console) -> None:
    """Print distances from dense attention's matrix at the longest length."""
    at = bounds.headline
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("attention", no_wrap=True, max_width=18)
    for name in ("eps", "N^", "rel", "TV", "gamma", "covered", "delta"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("mass by branch", overflow="fold")
    for row in bounds.rows:
        if at not in row.mass:
            continue  # its reason is among those without figures
        cells = [
            formatting.format_distance(row.value("eps", at)),
            formatting.format_signed(row.growth("eps")),
        ]
        cells += [
            formatting.format_distance(row.value(name, at))
            for name in ("frobenius", "total_variation", "gamma")
        ]
        cells.append(formatting.format_share(row.value("dense_mass_covered", at)))
        cells.append(formatting.format_distance(row.value("delta", at)))
        mass = Text(formatting.format_shares(row.mass[at]), style="dim")
        table.add_row(Text(row.attention), *map(Text, cells), mass, style=STYLES[row.role])
    console.print(
        f"\n[bold]Bounds at {formatting.format_length(at)} · {bounds.where}[/]", highlight=False
    )
    console.print(table)
    console.print(Text(BOUNDS_LEGEND, style="dim"))


def print_suite(table: suite_tables.SuiteTable, console: Console) -> None:
    """Print the figures of a suite: every metric at the longest lengths that fit."""
    names = [row.attention for row in table.rows]
    room = console.width - min(18, max(map(len, names))) - 1
    width = max(MIN_METRIC_COLUMN, *(len(metric.heading) + 1 for metric in table.metrics))
    count = max(1, room // (width * len(table.metrics)))
    lengths = table.lengths[-count:]
    grid = Table(box=None, padding=(0, 1, 0, 0))
    grid.add_column("\nattention", no_wrap=True, max_width=18)
    for metric in table.metrics:
        for n in lengths:
            above = metric.heading if n == lengths[0] else ""
            grid.add_column(
                f"{above}\n{formatting.format_length(n) if n else 'all'}", justify="right"
            )
    for row in table.rows:
        cells = [
            Text(formatting.format_unit(row.figure(metric, n).value, metric.unit))
            for metric in table.metrics
            for n in lengths
        ]
        grid.add_row(Text(row.attention), *cells, style=STYLES[row.role])
    console.print(f"\n[bold]{escape(table.suite.name)} · {escape(table.where)}[/]", highlight=False)
    console.print(grid)
    legend = [table.suite.description]
    for metric in table.metrics:
        unit = f" ({metric.unit})" if metric.unit else ""
        better = f", {metric.better} is better" if metric.better else ""
        legend.append(f"{metric.heading}: {metric.description or metric.name}{unit}{better}.")
    console.print(Text(" ".join(filter(None, legend)), style="dim"))
