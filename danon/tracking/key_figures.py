"""The figures of a bench that people compare, under short names that MLflow lists first."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from danon.report import formatting, quality_tables, tables
from danon.report.formatting import format_length
from danon.report.remarks import remarks

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from danon.report.remarks import Remark
    from danon.runs.case import CaseResult
    from danon.runs.run_info import RunInfo

__all__ = ["KeyFigures", "key_figures"]

DIGITS = 4
"""Significant digits of a key figure; MLflow's tables print all that there are."""


@dataclass(frozen=True)
class KeyFigures:
    """The figures of a bench that people compare.

    Attributes:
        board: scoreboard that speed, memory and error are from; None without timed cases.
        columns: name -> length of its figures, in tokens.
        values: attention -> name -> figure.
        texts: attention -> name -> figure as the terminal prints it.
        ranked: attentions with figures, the best first.
        notes: remarks on attentions.
        lower_is_better: names of columns of quality whose best figure is the lowest.
    """

    board: tables.Scoreboard | None
    columns: dict[str, int] = field(default_factory=dict)
    values: dict[str, dict[str, float]] = field(default_factory=dict)
    texts: dict[str, dict[str, str]] = field(default_factory=dict)
    ranked: tuple[str, ...] = ()
    notes: Mapping[str, tuple[Remark, ...]] = field(default_factory=dict)
    lower_is_better: set[str] = field(default_factory=set)

    def add(self, name: str, length: int, attention: str, value: float, text: str) -> None:
        """Add a figure, unless it is not a finite number.

        Args:
            name: name of the column.
            length: tokens that it belongs to.
            attention: registered name.
            value: the figure.
            text: the figure as the terminal prints it.
        """
        if math.isfinite(value):
            self.columns[name] = length
            self.values.setdefault(attention, {})[name] = float(f"{value:.{DIGITS}g}")
            self.texts.setdefault(attention, {})[name] = text

    @property
    def speedup(self) -> str:
        """Name of the column of speed-ups; empty without one."""
        return next((name for name in self.columns if name.startswith("1 ")), "")

    @property
    def names(self) -> list[str]:
        """Names of the columns, in MLflow's order."""
        return sorted(self.columns)


def key_figures(results: Sequence[CaseResult], info: RunInfo) -> KeyFigures:
    """Return the figures of a bench that people compare.

    Speed, memory and error are at the headline length of the first scoreboard. Quality has a column
    for each task; it names the figures of ``other settings`` than the speed's.

    Args:
        results: outcomes of the cases.
        info: description of the run.
    """
    frame, notes = tables.table(results), remarks(results)
    boards = [tables.scoreboard(frame, v, info.command, notes) for v in tables.views(frame)]
    board = next((board for board in boards if board.lengths), None)
    tasks = quality_tables.tasks(results, info.command, info.suites)
    ranked = [row.attention for row in board.rows] if board else []
    ranked += [row.attention for task in tasks for row in task.rows]
    ranked += [r.case.attention for r in results if r.status == "measured"]
    found = KeyFigures(board, ranked=tuple(dict.fromkeys(ranked)), notes=notes)
    timed: dict[str, frozenset[str]] = {}
    if board is not None:
        length, phase = board.headline, board.view.phase
        at = format_length(length)
        what = "" if phase == "forward" else f"{phase.replace('+', ' ')} "
        for row in board.rows:
            timed[row.attention] = row.settings
            name = row.attention
            if (speed := row.speedups.get(length)) is not None:
                text = formatting.format_speedup(speed)
                found.add(f"1 {what}speed-up {at}", length, name, speed.value, text)
            mebibytes, text = row.peak / 2**20, formatting.format_mebibytes(row.peak)
            found.add(f"2 {what}MiB {at}", length, name, mebibytes, text)
            text = formatting.format_error(row.error)
            found.add(f"3 {what}error {at}", length, name, row.error, text)
    for task in tasks:
        _add_quality(found, task, timed)
    return found


def _add_quality(
    found: KeyFigures, task: quality_tables.Task, timed: Mapping[str, frozenset[str]]
) -> None:
    """Add the quality in a task: in one column of the timed settings, in another of others."""
    length = task.headline
    scored = [(row, score) for row in task.rows if (score := row.scores.get(length)) is not None]
    others = {
        row.attention
        for row, score in scored
        if row.role != "reference"
        and (settings := timed.get(row.attention))
        and score.settings not in settings
    }
    words = "" if task.metric == "accuracy" else f"{task.metric.replace('_', ' ')} "
    column = f"4 {task.name} {words}{format_length(length)}"
    other_column = f"5{column[1:]} other settings"
    for row, score in scored:
        value, text = score.quality.value, task.write(score.quality.value)
        if row.attention not in others:
            found.add(column, length, row.attention, value, text)
        if row.attention in others or (others and row.role == "reference"):
            found.add(other_column, length, row.attention, value, text)
    if not task.higher:
        found.lower_is_better.update((column, other_column))
