"""A comparison of two runs in the terminal."""

from __future__ import annotations

import math
from statistics import median
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from danon.report import formatting
from danon.report.remarks import MARK

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from danon.report.comparison import Compared, Comparison
    from danon.report.figure import Figure
    from danon.runs.case import Case
    from danon.runs.suite_info import Metric

__all__ = [
    "describe_case",
    "figure_name",
    "format_change",
    "format_value",
    "print_comparison",
    "verdict",
]

MOST_ROWS = 14
MOST_REASONS = 4
MOST_BROKEN = 3
MOST_DIFFERENCES = 3
LARGEST = 5
"""Changes within noise that are shown where nothing moved."""
PLAIN_SUITES = ("speed", "memory", "decode")
"""Suites that the figure or the phase already names."""
HEADINGS = {"error_vs_dense": "error"}
BEFORE, INTERVAL = 3, 6
"""Columns that a narrow terminal leaves out, the second one first."""


def print_comparison(comparison: Comparison, console: Console, *, everything: bool = False) -> None:
    """Print what moved first, then how much is the same and what cannot be compared.

    Args:
        comparison: of two runs or two attentions.
        console: console to print on.
        everything: True to list every figure; else at most 40 lines are printed.
    """
    _print_origin(comparison, console)
    console.print(Text(verdict(comparison), style="bold"))
    limit = None if everything else MOST_ROWS
    _print_broken(comparison, console, everything)
    _print_figures(comparison, comparison.moved, "", console, limit)
    if everything:
        _print_figures(comparison, comparison.same, "Did not move", console, None)
        _print_figures(comparison, comparison.untested, "Not compared", console, None)
        for case in comparison.unpaired:
            why = f"{case.reason}{f': {case.detail}' if case.detail else ''}"
            console.print(Text(f"{case.case.id}: {why}"), soft_wrap=True)
    elif not any(figure.outcome != "untested" for figure in comparison.figures):
        _print_figures(comparison, comparison.untested, "Not compared", console, MOST_ROWS)
    elif not comparison.moved:
        largest = [figure for figure in comparison.same if not math.isnan(figure.p)][:LARGEST]
        _print_figures(comparison, largest, "Largest changes, all within noise", console, None)
    _print_counts(comparison, console, everything)


def verdict(comparison: Comparison) -> str:
    """Return the result of a comparison in one line."""
    tested, moved = comparison.tested, comparison.moved
    noisy = sum(not math.isnan(figure.p) for figure in moved)
    settled = [figure for figure in comparison.figures if figure.outcome != "untested"]
    if not settled:
        return "Nothing can be compared."
    exact = len(settled) - len(tested)
    verb = "differ" if comparison.one_run else "moved"
    text = (
        f"{noisy} of {len(tested)} figures with noise {verb}, "
        f"{len(moved) - noisy} of {exact} exact figures"
    )
    if comparison.broken:
        text += f"; {len(comparison.broken)} cases failed on one side only"
    return f"{text}."


def describe_case(case: Case) -> str:
    """Return suite, phase, dtype and length of a case in words, without what others repeat."""
    suite = case.suite if case.suite not in PLAIN_SUITES else ""
    phase = case.phase if not case.task else ""
    length = formatting.format_length(case.length) if case.length else ""
    return " ".join(word for word in (suite, case.task, phase, case.dtype, length) if word)


def format_value(metric: Metric, figure: Figure) -> str:
    """Return a figure with as many digits as its kind has."""
    if metric.name == "speedup":
        return formatting.format_speedup(figure)
    if metric.name == "accuracy":
        return formatting.format_accuracy(figure.value)
    if metric.unit == "B":
        return formatting.format_mebibytes(figure.value)
    return formatting.format_unit(figure.value, metric.unit)


def format_change(value: float) -> str:
    """Return a relative change: ``+20 %``, ``-3.1 %``, ``x12`` where percents are unreadable."""
    if not math.isfinite(value):
        return formatting.NOTHING
    if value > 9:
        return f"x{1 + value:.3g}"
    digits = 0 if abs(value) >= 0.0995 else 1
    return f"{100 * value:+.{digits}f} %"


def _print_origin(comparison: Comparison, console: Console) -> None:
    console.rule("[bold]danon compare[/]", align="left")
    for name, side in comparison.runs_by_name:
        for run in side:
            dirty = " with uncommitted changes" if run.info.dirty else ""
            commit = f"commit {run.info.commit[:10]}{dirty}"
            text = f"{name:<7} {run.info.run_id}: profile {run.info.profile}, {commit}"
            console.print(Text(text, style="dim"))
    differences = list(comparison.differences)
    if len(differences) > MOST_DIFFERENCES:
        rest = len(differences) - MOST_DIFFERENCES
        differences = [*differences[:MOST_DIFFERENCES], f"{rest} more (--json lists them)"]
    for text in differences:
        console.print(Text(f"differs: {text}", style="yellow"))
    console.print()


def _print_broken(comparison: Comparison, console: Console, everything: bool) -> None:
    if everything:
        return  # among all cases without a counterpart, below
    for case in comparison.broken[:MOST_BROKEN]:
        text = f"{case.case.attention} {describe_case(case.case)} {case.reason}: {case.detail}"
        console.print(Text(text, style="bold red"), no_wrap=True, overflow="ellipsis")


def _print_figures(
    comparison: Comparison,
    figures: Sequence[Compared],
    title: str,
    console: Console,
    limit: int | None,
) -> None:
    if not figures:
        return
    headings = ["attention", "case", "figure", *comparison.names, "change", "95 %"]
    rows = [_cells(figure, comparison.doubtful) for figure in figures[:limit]]
    shown = list(range(1 if comparison.one_run else 0, len(headings)))
    for dropped in (INTERVAL, BEFORE):
        widths = (max(len(cells[i]) for cells in (headings, *rows)) + 1 for i in shown)
        if sum(widths) > console.width:
            shown.remove(dropped)
    table = Table(box=None, padding=(0, 1, 0, 0))
    for i in shown:
        table.add_column(headings[i], justify="right" if i >= BEFORE else "left", no_wrap=True)
    for figure, cells in zip(figures, rows, strict=False):
        style = "" if figure.outcome != "moved" else "green" if figure.better else "red"
        table.add_row(*(Text(cells[i]) for i in shown), style=style)
    if title:
        console.print(f"\n{title}", highlight=False)
    console.print(table)
    if limit is not None and len(figures) > limit:
        console.print(f"... and {len(figures) - limit} more: --all lists them", style="dim")


def _cells(figure: Compared, doubtful: frozenset[str]) -> list[str]:
    """Return the cells of all columns."""
    ends = (figure.change.low, figure.change.high)
    return [
        f"{figure.case.attention}{f' {MARK}' if figure.case.attention in doubtful else ''}",
        describe_case(figure.case),
        figure_name(figure.metric),
        format_value(figure.metric, figure.before),
        format_value(figure.metric, figure.after),
        format_change(figure.change.value),
        " to ".join(map(format_change, ends)) if all(map(math.isfinite, ends)) else "",
    ]


def _percent(value: float) -> str:
    return format_change(value).lstrip("+")


def figure_name(metric: Metric) -> str:
    """Return the name of a figure, with its unit."""
    if metric.name == "speedup":
        return "speed-up"
    name = HEADINGS.get(metric.name, metric.heading)
    return name.replace("_bytes", " MiB").replace("_", " ")


def _print_counts(comparison: Comparison, console: Console, everything: bool) -> None:
    """Print how small a change is seen, and what is not compared."""
    console.print()
    least = [x.least for x in comparison.tested if math.isfinite(x.least)]
    lines = []
    if least and not comparison.one_run:
        lines.append(
            "To stand out from the noise between these runs a figure must change by "
            f"{_percent(median(least))} in the median case, by {_percent(min(least))} in the "
            "quietest."
        )
    if math.isfinite(comparison.dense_change):
        change = format_change(comparison.dense_change)
        lines.append(f"Dense attention's own time changed by {change} in the median, untested.")
    reasons = list(comparison.reasons.items())
    shown = reasons if everything else reasons[:MOST_REASONS]
    texts = [f"{count} {reason}" for reason, count in shown]
    texts += [f"{len(reasons) - len(shown)} other reasons"] if len(reasons) > len(shown) else []
    texts += (
        [f"{len(comparison.unmeasured)} without figures on both sides"]
        if comparison.unmeasured
        else []
    )
    if texts:
        lines.append(f"Not compared: {'; '.join(texts)}.")
    if not everything:
        lines.append("--all lists every figure, --html FILE writes a page, --json prints JSON.")
    for line in lines:
        console.print(Text(line, style="dim"))
