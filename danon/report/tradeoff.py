"""Quality against speed at one length, both of one configuration."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from danon.report import configuration, tables
from danon.report.pareto import pareto_front
from danon.report.remarks import doubtful, remarks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from danon.report.figure import Figure
    from danon.report.quality_tables import Task
    from danon.report.summary import Summary
    from danon.report.tables import View
    from danon.runs.case import CaseResult

__all__ = ["Point", "Tradeoff", "tradeoff"]

ERROR = "error_vs_dense"
"""Metric of the chart of a run without quality."""


@dataclass(frozen=True)
class Point:
    """One attention at one length.

    Attributes:
        attention: registered name.
        quality: value of the chart's metric.
        speedup: speed-up over dense attention.
        best: True if it is on the Pareto front of these two.
    """

    attention: str
    quality: Figure
    speedup: Figure
    best: bool = False


@dataclass(frozen=True)
class Tradeoff:
    """The points of a chart of quality against speed.

    Attributes:
        metric: metric of the quality: that of a task, or the error against dense attention.
        higher: True if higher values are better.
        title: the quality in words.
        origin: source of the speed-ups, in words.
        points: length in tokens -> points, ascending.
        default: length that the chart shows first.
    """

    metric: str
    higher: bool
    title: str
    origin: str
    points: dict[int, tuple[Point, ...]]
    default: int


def tradeoff(results: Sequence[CaseResult], summary: Summary) -> Tradeoff | None:
    """Return the chart that opens the report.

    Quality and speed-up of a point belong to one configuration. The speed-up is that of the
    scoreboard where the quality has those settings, else that of the quality's own case. Of a run
    without quality the chart has the error against dense attention.

    Args:
        results: results of the run.
        summary: summary of the run, which decides on the task and the view.

    Returns:
        The chart; None if no attention besides dense has both figures.
    """
    doubted = {name for name, notes in remarks(results).items() if doubtful(notes)}
    view = summary.forward
    if summary.task is None:
        return _of_error(results, summary, doubted)
    task, length = summary.task
    timed = _timed(results, view) if view else {}
    board = _of_task(task, timed, doubted)
    where = f"{view.phase} pass, {view.dtype}, {view.shape}" if view else ""
    if not board:
        own = {
            n: {row.attention: row.scores[n].speedup for row in task.rows if n in row.scores}
            for n in task.lengths
        }
        board = _of_task(task, own, doubted)
        where = "forward pass of the attention as it is in the model"
    if not board:
        return None
    title = f"{task.heading} in {task.name}"
    default = length if length in board else max(board)
    return Tradeoff(task.metric, task.higher, title, where, board, default)


def _of_task(
    task: Task, speedups: dict[int, dict[str, Figure]], doubted: set[str]
) -> dict[int, tuple[Point, ...]]:
    """Return the points of a task by length; lengths with dense attention alone are left out."""
    board = {}
    for n in task.lengths:
        scores = {row.attention: row.scores[n] for row in task.rows if n in row.scores}
        points = [
            Point(name, score.quality, found)
            for name, score in scores.items()
            if (found := speedups.get(n, {}).get(name)) and found.value > 0
        ]
        board[n] = _ranked(points, doubted, higher=task.higher)
    return {n: points for n, points in board.items() if _compares(points)}


def _timed(results: Sequence[CaseResult], view: View) -> dict[int, dict[str, Figure]]:
    """Return the scoreboard's speed-ups of attentions judged with the settings that were timed."""
    judged = {
        (r.case.length, r.case.attention, configuration.digest(r))
        for r in results
        if r.case.task and r.status == "measured"
    }
    board: dict[int, dict[str, Figure]] = {}
    for name, n, figure, settings in _speedups(results, view):
        if name == tables.REFERENCE or (n, name, settings) in judged:
            board.setdefault(n, {})[name] = figure
    return {n: found for n, found in board.items() if set(found) != {tables.REFERENCE}}


def _of_error(
    results: Sequence[CaseResult], summary: Summary, doubted: set[str]
) -> Tradeoff | None:
    view = summary.forward
    if view is None:
        return None
    curves = tables.Curves(view.of(tables.table(results)))
    board: dict[int, list[Point]] = {}
    for name, n, figure, _ in _speedups(results, view):
        error = curves.get("speed", name, ERROR).get(n)
        if error and error.value > 0 and name != tables.REFERENCE:
            board.setdefault(n, []).append(Point(name, error, figure))
    points = {n: _ranked(found, doubted, higher=False) for n, found in sorted(board.items())}
    if not points:
        return None
    title = "Distance from dense attention's output (no quality was measured in this run)"
    where = f"{view.phase} pass, {view.dtype}, {view.shape}"
    default = summary.length if summary.length in points else max(points)
    return Tradeoff(ERROR, False, title, where, points, default)


def _speedups(results: Sequence[CaseResult], view: View) -> list[tuple[str, int, Figure, str]]:
    """Return attention, length, speed-up and digest of each timed case of a view."""
    curves = tables.Curves(view.of(tables.table(results)))
    names = dict.fromkeys(r.case.attention for r in results)
    return [
        (name, n, figure, curves.settings("speed", name)[n])
        for name in names
        for n, figure in curves.get("speed", name, "speedup").items()
    ]


def _ranked(points: list[Point], doubted: set[str], *, higher: bool) -> tuple[Point, ...]:
    sign = -1 if higher else 1
    front = pareto_front(
        {
            point.attention: (sign * point.quality.value, -point.speedup.value)
            for point in points
            if point.attention not in doubted
        }
    )
    return tuple(dataclasses.replace(p, best=p.attention in front) for p in points)


def _compares(points: Sequence[Point]) -> bool:
    return any(point.attention != tables.REFERENCE for point in points)
