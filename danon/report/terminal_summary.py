"""The summary of a run in the terminal: one table, sentences, and where the rest is."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from rich.table import Table
from rich.text import Text

from danon.report import formatting, run_origin, tables
from danon.report.conclusions import conclude
from danon.report.formatting import format_crossover, format_interval, format_speedup
from danon.report.remarks import MARK
from danon.report.summary import Summary, SummaryRow, summarize
from danon.report.terminal_style import STYLES, heading_at
from danon.report.unmeasured import describe_absences, unmeasured_cases

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from danon.runs.case import CaseResult
    from danon.runs.run_info import RunInfo

__all__ = ["print_summary", "summary_table"]

BEST = "*"
LINES = 40
"""Lines of all output; the rows of the table are as many as fit."""
PLACES = 5
"""Lines that a command prints below: report, figures, records."""
FEWEST_ROWS = 6
MOST_REMARKS = 3
MOST_FAILURES = 4
IMPORTANCE = ("reference", "yours", "ours", "baseline")
LEGEND = "(danon explain COLUMN)"
MARKS = {
    BEST: "best but dense",
    "?": "interval too wide",
    formatting.NOTHING: "not measured",
    MARK: "remark below",
}
"""Meaning of each mark; the legend has those that occur."""


class _Column(NamedTuple):
    """A column of the table.

    Attributes:
        key: its name in :data:`danon.report.columns.COLUMNS`.
        heading: two lines.
        text: function that returns the cell of a row.
        figure: field of :class:`SummaryRow` whose best is marked; empty: none is.
    """

    key: str
    heading: str
    text: Callable[[SummaryRow], str]
    figure: str = ""

    def cell(self, row: SummaryRow, best: frozenset[str]) -> Text:
        """Return the cell of a row; columns with a best one keep a place for its mark."""
        if not self.figure:
            return Text(self.text(row))
        if row.attention in best:
            return Text(f"{self.text(row)}{BEST}", style="bold")
        return Text(f"{self.text(row)} ")


def print_summary(results: Sequence[CaseResult], info: RunInfo, console: Console) -> None:
    """Print the table of a run, and the sentences on it, in at most 40 lines with the places.

    Args:
        results: outcomes of the run's cases so far.
        info: description of the run: commit, profile, machine.
        console: console to print on.
    """
    summary = summarize(results, info)
    machine, *others = run_origin.describe_machines(results, info)
    more = len(others) - (run_origin.DIFFERENT in others)
    if more:
        machine += f" and {more} more machine{'s' if more > 1 else ''}: danon report --tables"
    above = [Text(""), Text(f"{run_origin.describe_run(info)}; {machine}", style="dim"), Text("")]
    if not summary.rows:
        above.append(Text("No case has figures."))
    below = [Text(""), *map(Text, conclude(summary)), *_remarks(summary)]
    below += _failures(results)
    if absences := unmeasured_cases(tables.table(results)):
        below.append(Text(f"{describe_absences(absences)} (why: danon report --unmeasured)."))
    if summary.rows:
        above.append(Text(_title(summary), style="bold"))
        below.insert(0, Text(_legend(summary, console.width), style="dim"))
    taken = sum(len(text.wrap(console, console.width)) for text in (*above, *below))
    room = max(FEWEST_ROWS, LINES - PLACES - taken - 2)
    shown = summary.rows if len(summary.rows) <= room else _chosen(summary.rows, room - 1)
    if hidden := len(summary.rows) - len(shown):
        below.insert(0, Text(f"and {hidden} more: danon report --tables", style="dim"))
    for text in above:
        console.print(text)
    if summary.rows:
        console.print(summary_table(summary, console.width, shown))
    for text in below:
        console.print(text)


def summary_table(summary: Summary, width: int, rows: Sequence[SummaryRow] | None = None) -> Table:
    """Return the table of a summary.

    Args:
        summary: result of :func:`danon.report.summary.summarize`.
        width: columns of the terminal; a narrow one has fewer columns of the table.
        rows: rows to show; None: all.
    """
    shown = summary.rows if rows is None else rows
    columns = _columns(summary, width, shown)
    best = {c.figure: summary.best(c.figure) for c in columns if c.figure}
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("\nattention", no_wrap=True)
    for column in columns:
        table.add_column(column.heading, justify="right", no_wrap=True)
    for row in shown:
        cells = [column.cell(row, best.get(column.figure, frozenset())) for column in columns]
        table.add_row(_name(row), *cells, style=STYLES[row.role])
    return table


def _chosen(rows: Sequence[SummaryRow], count: int) -> list[SummaryRow]:
    """Return some rows in their order: dense attention, ours and the user's before baselines."""
    first = sorted(rows, key=lambda row: IMPORTANCE.index(row.role))[:count]
    return [row for row in rows if row in first]


def _name(row: SummaryRow) -> str:
    return f"{row.attention} {MARK}" if row.remarks else row.attention


def _title(summary: Summary) -> str:
    view = summary.forward or summary.training or summary.decode
    if view is None:
        return "Quality"
    return f"Speed-ups over dense attention (sdpa): {view.phase}, {view.dtype}, {view.shape}"


def _legend(summary: Summary, width: int) -> str:
    """Return what the marks of the table mean."""
    columns = _columns(summary, width, summary.rows)
    texts = [_name(row) for row in summary.rows]
    texts += [column.text(row) for row in summary.rows for column in columns]
    best = any(summary.best(column.figure) for column in columns if column.figure)
    occur = {
        BEST: best,
        "?": any(text.endswith("?") for text in texts),
        formatting.NOTHING: formatting.NOTHING in texts,
        MARK: any(text.endswith(MARK) for text in texts),
    }
    return "  ".join((*(f"{mark} {MARKS[mark]}" for mark in MARKS if occur[mark]), LEGEND))


def _columns(summary: Summary, width: int, rows: Sequence[SummaryRow]) -> list[_Column]:
    """Return the columns that have figures and fit the width; the interval is dropped first."""
    columns = [*_forward_columns(summary), *_other_columns(summary)]
    names = max(len("attention"), *(len(_name(row)) for row in rows)) if rows else 0
    while len(columns) > 1 and names + sum(_width(c, rows) + 1 for c in columns) > width:
        interval = (column for column in columns if column.key == "interval")
        columns.remove(next(interval, columns[-1]))
    return columns


def _forward_columns(summary: Summary) -> list[_Column]:
    at = heading_at(summary.length)
    columns = [
        _Column("speed-up", f"speed-up{at} ", lambda r: format_speedup(r.speedup), "speedup"),
        _Column("interval", "95 %\ninterval", lambda r: format_interval(r.speedup)),
        _Column("memory", f"MiB{at} ", lambda r: formatting.format_mebibytes(r.peak), "peak"),
    ]
    if not summary.forward:
        columns = []
    if summary.task:
        task, length = summary.task
        heading = f"{task.name}{heading_at(length)} "
        columns.append(
            _Column("quality", heading, lambda r: _written(task.write, r.quality), "quality")
        )
    if summary.forward:
        pays = _Column("pays from", "pays\nfrom ", _pays_from, "pays_from")
        columns.append(pays)
    return columns


def _pays_from(row: SummaryRow) -> str:
    """Return the crossover length; nothing for dense attention, which has none."""
    return "" if row.role == "reference" else format_crossover(row.pays_from)


def _other_columns(summary: Summary) -> list[_Column]:
    columns = []
    if summary.training:
        heading = f"training{heading_at(summary.training_length)} "
        columns.append(
            _Column("training", heading, lambda r: format_speedup(r.training), "training")
        )
    if summary.decode:
        heading = f"decode{heading_at(summary.decode_length)} "
        columns.append(_Column("decode", heading, lambda r: format_speedup(r.decode), "decode"))
    return columns


def _width(column: _Column, rows: Sequence[SummaryRow]) -> int:
    cells = [len(column.text(row)) + bool(column.figure) for row in rows]
    return max([*cells, *map(len, column.heading.split("\n"))])


def _written(write: Callable[[float], str], value: float) -> str:
    return write(value) if math.isfinite(value) else formatting.NOTHING


def _remarks(summary: Summary) -> list[Text]:
    """Return a line for each remark, names with the same one together."""
    names: dict[str, list[str]] = {}
    for row in summary.rows:
        for remark in row.remarks:
            names.setdefault(remark.text, []).append(row.attention)
    lines = [f"{MARK} {', '.join(of)}: {text}." for text, of in names.items()]
    if len(lines) > MOST_REMARKS:
        rest = f"{MARK} {len(lines) - MOST_REMARKS + 1} more remarks: danon report --tables"
        lines = [*lines[: MOST_REMARKS - 1], rest]
    return [Text(line, style="yellow") for line in lines]


def _failures(results: Sequence[CaseResult]) -> list[Text]:
    """Return a line for each of the first failed cases, and how many more there are."""
    failed = [result for result in results if result.status == "failed"]
    lines = [f"failed {result.case.id}: {result.reason}" for result in failed[:MOST_FAILURES]]
    if len(failed) > MOST_FAILURES:
        more = len(failed) - MOST_FAILURES
        lines.append(f"failed: {more} more (danon report --unmeasured)")
    return [Text(line, style="red") for line in lines]
