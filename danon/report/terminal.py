"""All tables of a run in the terminal."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from danon.report import bound_tables, formatting, quality_tables, run_origin, suite_tables, tables
from danon.report.remarks import MARK, Remark, doubtful, remarks
from danon.report.terminal_quality import LOOKUP, print_quality, table_kind
from danon.report.terminal_style import NAME, STYLES, WIDE, heading_at, marked_name
from danon.report.terminal_suites import print_bounds, print_suite
from danon.report.unmeasured import unmeasured_cases

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import Console

    from danon.runs.case import CaseResult
    from danon.runs.run_info import RunInfo

__all__ = ["print_unmeasured", "render"]

STATUS_STYLES = {"failed": "bold red", "over budget": "yellow", "unavailable": "dim"}
LENGTH_COLUMN = 8  # characters
QUALITY_COLUMN = 7  # of a task on a board
OTHER = "other"  # quality was measured with other settings than the row's
LEGEND = (
    "Speed-up: time of dense attention (sdpa) / own time, both measured alternately in this run; "
    "[95 % interval]. ~ extrapolated: dense was not run at that length. ? the time budget ended "
    "before the interval was narrow; of fewer than eight rounds it is the range, and says less. "
    "GFLOP/s: useful work. Roof: share of the matmul rate measured in this run. N^: fitted "
    "exponent of time. Error: relative, against dense. Decode: one more token after so many; MiB "
    "of the state. Times compare only between equal fingerprints."
)
QUALITY_LEGEND = (
    f"Quality, right: of the very settings that the row is of; {OTHER}: only other settings were "
    "judged, in the tables of quality below."
)


def render(results: Sequence[CaseResult], info: RunInfo, console: Console) -> None:
    """Print the tables of a run.

    A scoreboard for each phase and dtype comes first, cases without figures and their reasons last.

    Args:
        results: outcomes of the run's cases.
        info: description of the run: commit, profile, machine.
        console: console to print on.
    """
    data = tables.table(results)
    console.print()
    console.rule("[bold]danon bench[/]", align="left")
    console.print(escape(run_origin.describe_run(info)), style="dim", highlight=False)
    for machine in run_origin.describe_machines(results, info):
        console.print(escape(machine), style="dim", highlight=False)
    notes = remarks(results)
    boards = [tables.scoreboard(data, view, info.command, notes) for view in tables.views(data)]
    tasks = quality_tables.tasks(results, info.command, info.suites)
    for shown in boards:
        console.print(f"\n[bold]{_title(shown)}[/]", highlight=False)
        console.print(_table(shown, tasks, console.width))
    if boards:
        shown_quality = " ".join((LEGEND, *([QUALITY_LEGEND] if _on_boards(tasks) else [])))
        console.print(Text(shown_quality, style="dim"))
        if console.width < WIDE:
            _print_semantics(boards, console)
    print_quality(tasks, console, notes)
    bounds = bound_tables.bounds(results, info.command, info.suites)
    if bounds:
        print_bounds(bounds, console)
    others = suite_tables.suite_tables(results, info)
    for table in others:
        print_suite(table, console)
    _print_remarks(boards, notes, console)
    if not (boards or tasks or bounds or others):
        console.print("\nNo case has figures.")
    print_unmeasured(results, console)


def _title(shown: tables.Scoreboard) -> str:
    title = f"{shown.view.phase} · {shown.view.dtype} · {shown.view.shape}"
    if math.isfinite(shown.dense_s):
        at = formatting.format_length(shown.headline)
        title += f" · dense at {at}: {formatting.format_seconds(shown.dense_s)}"
    return title


def _table(shown: tables.Scoreboard, tasks: Sequence[quality_tables.Task], width: int) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0))
    head = shown.headline
    at = heading_at(head)
    wide = width >= WIDE
    judged = [(t, head if head in t.lengths else t.headline) for t in _on_boards(tasks)]
    room = width - (118 if wide else 82) - QUALITY_COLUMN * len(judged)
    rates = not judged or room >= -2  # quality may take their place: the report has them too
    lengths = _lengths(shown, room)
    table.add_column("\nattention", no_wrap=True, max_width=18)
    if wide:
        table.add_column("\ncomputes", max_width=44, overflow="fold")
    for length in lengths:
        above = "speed-up" if length == lengths[0] else ""
        table.add_column(
            f"{above}\n{formatting.format_length(length)}", justify="right", no_wrap=True
        )
        if length == head:
            table.add_column(f"95 %{at}", justify="right", no_wrap=True)
    for name in ("GFLOP/s", "roof", "MiB") if rates else ("MiB",):
        table.add_column(f"{name}{at}", justify="right", no_wrap=True)
    table.add_column("time\n~ N^", justify="right", no_wrap=True)
    table.add_column(f"error{at}", justify="right", no_wrap=True)
    for task, n in judged:
        table.add_column(f"{task.name[:NAME]}{heading_at(n)}", justify="right", no_wrap=True)
    for row in shown.rows:
        style = STYLES[row.role]
        cells = [marked_name(row.attention, row.remarks)]
        if wide:
            cells.append(Text(row.semantics, style="dim"))
        for length in lengths:
            figure = row.speedups.get(length)
            cells.append(Text(formatting.format_speedup(figure)))
            if length == head:
                beside = formatting.format_interval(figure) if figure else _elsewhere(row, lengths)
                cells.append(Text(beside, style="dim"))
        exponent = row.exponent.value
        if rates:
            cells += [
                Text(formatting.format_flops(row.flops)),
                Text(formatting.format_share(row.roofline)),
            ]
        cells += [
            Text(formatting.format_mebibytes(row.peak)),
            Text(f"{exponent:.2f}" if math.isfinite(exponent) else formatting.NOTHING),
            Text(formatting.format_error(row.error)),
            *(Text(_quality_on_board(task, row, n)) for task, n in judged),
        ]
        table.add_row(*cells, style=style)
    return table


def _on_boards(tasks: Sequence[quality_tables.Task]) -> list[quality_tables.Task]:
    """Return the tasks that have a column on the scoreboards."""
    chosen = [quality_tables.hardest(tasks, suite) for suite in ("recall", "language")]
    chosen.append(next((task for task in tasks if table_kind(task) is LOOKUP), None))
    return [task for task in chosen if task]


def _quality_on_board(task: quality_tables.Task, row: tables.Row, length: int) -> str:
    """Return the quality with the row's settings, or :data:`OTHER`."""
    score = task.score(row.attention, length)
    if score is None:
        return formatting.NOTHING
    same = row.role == "reference" or (score.settings and score.settings in row.settings)
    return task.write(score.quality.value) if same else OTHER


def _elsewhere(row: tables.Row, lengths: Sequence[int]) -> str:
    """Return the figure at the longest length, for a row without figures at the lengths shown."""
    if not row.speedups or any(n in row.speedups for n in lengths):
        return ""
    longest = max(row.speedups)
    return (
        f"{formatting.format_speedup(row.speedups[longest])} at {formatting.format_length(longest)}"
    )


def _lengths(shown: tables.Scoreboard, room: int) -> list[int]:
    """Return the lengths that fit: the headline and the longest, then the next longest."""
    count = max(2, room // LENGTH_COLUMN + 2)
    first = [n for n in (shown.headline, *shown.lengths[-1:]) if n in shown.lengths]
    others = [n for n in reversed(shown.lengths) if n not in first]
    return sorted(dict.fromkeys([*first, *others][:count]))


def _print_remarks(
    boards: Sequence[tables.Scoreboard], notes: Mapping[str, tuple[Remark, ...]], console: Console
) -> None:
    """Print the remarks on the marked names."""
    merged = {name: dict.fromkeys(sentences) for name, sentences in notes.items()}
    for row in (row for shown in boards for row in shown.rows if row.remarks):
        merged.setdefault(row.attention, {}).update(dict.fromkeys(row.remarks))
    for name, sentences in merged.items():
        last = "; never marked as the best" if doubtful(sentences) else ""
        text = f"{MARK} {name}: {'; '.join(remark.text for remark in sentences)}{last}."
        console.print(Text(text, style="yellow"), soft_wrap=True)


def _print_semantics(boards: Sequence[tables.Scoreboard], console: Console) -> None:
    table = Table(box=None, show_header=False, padding=(0, 1, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column()
    rows = {row.attention: row for shown in boards for row in shown.rows}
    for row in rows.values():
        table.add_row(Text(row.attention, style=STYLES[row.role]), Text(row.semantics))
    console.print("\n[bold]What each computes[/]")
    console.print(table)


def print_unmeasured(results: Sequence[CaseResult], console: Console) -> None:
    """Print the cases without figures, and why they have none.

    Args:
        results: outcomes of the run's cases.
        console: console to print on.
    """
    missing = unmeasured_cases(tables.table(results))
    if not missing:
        console.print("\nEvery case has figures.")
        return
    table = Table(box=None, padding=(0, 1, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(ratio=3)
    table.add_column(ratio=2)
    for cases in missing:
        table.add_row(
            Text(cases.attention),
            Text(cases.status, style=STATUS_STYLES[cases.status]),
            Text(cases.reason),
            Text(cases.where, style="dim"),
        )
    console.print("\n[bold]Without figures, and why[/]")
    console.print(table)
