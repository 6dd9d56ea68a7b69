"""The scoreboard in the terminal."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from danon.experiment import frame, words

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from danon.experiment.runs import RunInfo
    from danon.measure.case import CaseResult

__all__ = ["render"]

STYLES = {"ours": "bold green", "yours": "bold magenta", "reference": "bold", "baseline": ""}
STATUS_STYLES = {"failed": "bold red", "over budget": "yellow", "unavailable": "dim"}
WIDE = 130  # columns from which what an attention computes has a column of its own
LENGTH_COLUMN = 8  # characters

LEGEND = (
    "Speed-up: time of dense attention (sdpa) / own time, both measured alternately in this run; "
    "[95 % interval]. ~ extrapolated: dense was not run at that length. ? the time budget ended "
    "before the interval was narrow; with fewer than six rounds it is their range, and says less. "
    "GFLOP/s: useful work. Roof: share of the matmul rate measured in this run. N^: fitted "
    "exponent of time. Error: relative, against dense. Decode: one more token after so many; MiB "
    "of the state. Times compare only between equal fingerprints."
)


def render(results: Sequence[CaseResult], info: RunInfo, console: Console) -> None:
    """Print a scoreboard per phase and dtype, and below them what has no figures, and why."""
    data = frame.table(results)
    console.print()
    console.rule("[bold]danon bench[/]", align="left")
    console.print(escape(frame.origin(info)), style="dim", highlight=False)
    console.print(escape(frame.machine(info)), style="dim", highlight=False)
    boards = [frame.board(data, view, info.command) for view in frame.views(data)]
    for shown in boards:
        console.print(f"\n[bold]{_title(shown)}[/]", highlight=False)
        console.print(_table(shown, console.width))
    if not boards:
        console.print("\nNo case has figures.")
    else:
        console.print(Text(LEGEND, style="dim"))
        if console.width < WIDE:
            _print_semantics(boards, console)
    _print_absences(frame.absences(data), console)


def _title(shown: frame.Board) -> str:
    title = f"{shown.view.phase} · {shown.view.dtype} · {shown.view.shape}"
    if math.isfinite(shown.dense_s):
        at = words.length_label(shown.headline)
        title += f" · dense at {at}: {words.seconds(shown.dense_s)}"
    return title


def _table(shown: frame.Board, width: int) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0))
    head = shown.headline
    at = f"\nat {words.length_label(head)}"
    wide = width >= WIDE
    lengths = _lengths(shown, width - (118 if wide else 82))
    table.add_column("\nattention", no_wrap=True, max_width=18)
    if wide:
        table.add_column("\ncomputes", max_width=44, overflow="fold")
    for length in lengths:
        above = "speed-up" if length == lengths[0] else ""
        table.add_column(f"{above}\n{words.length_label(length)}", justify="right", no_wrap=True)
        if length == head:
            table.add_column(f"95 %{at}", justify="right", no_wrap=True)
    for name in ("GFLOP/s", "roof", "MiB"):
        table.add_column(f"{name}{at}", justify="right", no_wrap=True)
    table.add_column("time\n~ N^", justify="right", no_wrap=True)
    table.add_column(f"error{at}", justify="right", no_wrap=True)
    for row in shown.rows:
        style = STYLES[row.role]
        cells = [Text(row.attention)]
        if wide:
            cells.append(Text(row.semantics, style="dim"))
        for length in lengths:
            figure = row.speedups.get(length)
            cells.append(Text(words.times(figure)))
            if length == head:
                beside = words.interval(figure) if figure else _elsewhere(row, lengths)
                cells.append(Text(beside, style="dim"))
        exponent = row.exponent.value
        cells += [
            Text(words.rate(row.flops)),
            Text(words.share(row.roofline)),
            Text(words.bytes_text(row.peak)),
            Text(f"{exponent:.2f}" if math.isfinite(exponent) else words.NOTHING),
            Text(words.error_text(row.error)),
        ]
        table.add_row(*cells, style=style)
    return table


def _elsewhere(row: frame.Row, lengths: Sequence[int]) -> str:
    """The longest figure of a row that has none at the lengths shown."""
    if not row.speedups or any(n in row.speedups for n in lengths):
        return ""
    longest = max(row.speedups)
    return f"{words.times(row.speedups[longest])} at {words.length_label(longest)}"


def _lengths(shown: frame.Board, room: int) -> list[int]:
    """The lengths that fit: the headline and the longest first, then the next longest."""
    count = max(2, room // LENGTH_COLUMN + 2)
    first = [n for n in (shown.headline, *shown.lengths[-1:]) if n in shown.lengths]
    others = [n for n in reversed(shown.lengths) if n not in first]
    return sorted(dict.fromkeys([*first, *others][:count]))


def _print_semantics(boards: Sequence[frame.Board], console: Console) -> None:
    table = Table(box=None, show_header=False, padding=(0, 1, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column()
    known = {row.attention: row for shown in boards for row in shown.rows}
    for row in known.values():
        table.add_row(Text(row.attention, style=STYLES[row.role]), Text(row.semantics))
    console.print("\n[bold]What each computes[/]")
    console.print(table)


def _print_absences(missing: Sequence[frame.Absence], console: Console) -> None:
    if not missing:
        return
    table = Table(box=None, padding=(0, 1, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(ratio=3)
    table.add_column(ratio=2)
    for absence in missing:
        table.add_row(
            Text(absence.attention), Text(absence.status, style=STATUS_STYLES[absence.status]),
            Text(absence.reason), Text(absence.where, style="dim"),
        )  # fmt: skip
    console.print("\n[bold]Without figures, and why[/]")
    console.print(table)
