"""The summary of a run: one table of every attention's most important figures."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from danon.report import quality_tables, recommendation, run_origin, tables
from danon.report.crossover import Crossover, crossover
from danon.report.figure import NO_FIGURE, Figure
from danon.report.remarks import Remark, doubtful, remarks

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd

    from danon.report.quality_tables import Task
    from danon.report.recommendation import Recommendation
    from danon.report.tables import Role, Scoreboard, View
    from danon.runs.case import CaseResult
    from danon.runs.run_info import RunInfo

__all__ = ["Summary", "SummaryRow", "summarize"]


@dataclass(frozen=True)
class SummaryRow:
    """The figures of one attention.

    Attributes:
        attention: registered name.
        role: role in the comparison.
        speedup: speed-up of the forward pass at the headline length.
        peak: peak bytes of that pass.
        quality: quality with the same settings; NaN if other settings were judged, or none.
        pays_from: crossover length of the forward pass.
        training: speed-up of forward and backward.
        decode: speed-up of one more token.
        remarks: notes on its figures.
    """

    attention: str
    role: Role
    speedup: Figure = NO_FIGURE
    peak: float = math.nan
    quality: float = math.nan
    pays_from: Crossover | None = None
    training: Figure = NO_FIGURE
    decode: Figure = NO_FIGURE
    remarks: tuple[Remark, ...] = ()


@dataclass(frozen=True)
class Summary:
    """One table of a run.

    Attributes:
        forward: view of the forward pass; None if none was measured.
        training: view of forward and backward, or None.
        decode: view of decoding, or None.
        length: tokens of the forward pass: the longest length at which dense attention and at least
            half of the attentions were timed.
        training_length: the same for forward and backward.
        decode_length: the same for decoding.
        task: task of the quality and its length; None if none was measured.
        rows: attentions, the fastest first; doubtful ones last.
        recommendation: answer of ``danon choose`` from this run alone; None without a forward pass.
    """

    forward: View | None
    training: View | None
    decode: View | None
    length: int
    training_length: int
    decode_length: int
    task: tuple[Task, int] | None
    rows: tuple[SummaryRow, ...]
    recommendation: Recommendation | None

    def best(self, column: str) -> frozenset[str]:
        """Return the attentions with the best figure of a column, dense attention aside.

        Ties count; doubts and wide intervals do not.

        Args:
            column: name of a figure of :class:`SummaryRow`.
        """
        keys = {
            row.attention: key
            for row in self.rows
            if row.role != "reference"
            and not doubtful(row.remarks)
            and (key := self._loss(row, column)) is not None
        }
        least = min(keys.values(), default=None)
        return frozenset(name for name, key in keys.items() if key == least)

    def _loss(self, row: SummaryRow, column: str) -> tuple[float, ...] | None:
        """Return a key such that less is better; None without a figure."""
        value = getattr(row, column)
        if isinstance(value, Crossover):
            return value.sort_key if value.side != ">" else None
        if value is None or not math.isfinite(getattr(value, "value", value)):
            return None
        if isinstance(value, Figure):
            return (-value.value,) if value.conclusive else None
        higher = column == "quality" and self.task is not None and self.task[0].higher
        return (-value if higher else value,)


def summarize(results: Sequence[CaseResult], info: RunInfo) -> Summary:
    """Return the summary of a run, finished or not.

    Args:
        results: outcomes of its cases so far.
        info: description of the run: commit, profile, machine.
    """
    data = tables.table(results)
    views = tables.views(data)
    notes = remarks(results)

    def board(phase: str) -> Scoreboard | None:
        return _board(data, [view for view in views if view.phase == phase], info, notes)

    forward, training, decode = board("forward"), board("forward+backward"), board("decode")
    task = _task(quality_tables.tasks(results, info.command, info.suites))
    answer = None
    if forward and task:
        answer = recommendation.recommend(
            [(info, results)],
            length=forward.headline,
            memory_bytes=math.inf,
            task=task.name,
            phase="forward",
            here=run_origin.machine_fingerprints(results, info),
        )
    judged = (task, task.headline) if task else None
    if answer and answer.judged:
        judged = answer.judged[1:]
    boards = [shown for shown in (forward, training, decode) if shown]
    names = dict.fromkeys(row.attention for shown in boards for row in shown.rows)
    if judged:
        names |= dict.fromkeys(row.attention for row in judged[0].rows)
    rows = [_row(name, forward, training, decode, judged, info, notes) for name in names]
    return Summary(
        forward=forward.view if forward else None,
        training=training.view if training else None,
        decode=decode.view if decode else None,
        length=forward.headline if forward else 0,
        training_length=training.headline if training else 0,
        decode_length=decode.headline if decode else 0,
        task=judged,
        rows=tuple(sorted(rows, key=_rank)),
        recommendation=answer,
    )


def _board(
    data: pd.DataFrame, views: Sequence[View], info: RunInfo, notes: dict[str, tuple[Remark, ...]]
) -> Scoreboard | None:
    """Return the scoreboard of the view with the longest headline; reduced precision on ties."""
    boards = [_readable(data, view, info, notes) for view in views]
    return max(
        boards, key=lambda shown: (shown.headline, shown.view.dtype != "float32"), default=None
    )


def _readable(
    data: pd.DataFrame, view: View, info: RunInfo, notes: dict[str, tuple[Remark, ...]]
) -> Scoreboard:
    """Return a scoreboard at the longest length at which half of the attentions have a speed-up."""
    shown = tables.scoreboard(data, view, info.command, notes)
    timed = [row for row in shown.rows if row.speedups]
    for length in reversed([n for n in shown.lengths if n <= shown.headline]):
        if 2 * sum(length in row.speedups for row in timed) >= len(timed):
            return tables.scoreboard(data, view, info.command, notes, headline=length)
    return shown


def _task(tasks: Sequence[Task]) -> Task | None:
    """Return the task of the quality column: lookup, or the first one there is."""
    chosen = [task for task in tasks if task.name == quality_tables.LOOKUP]
    hardest = [quality_tables.hardest(tasks, suite) for suite in ("recall", "language")]
    return next((task for task in (*chosen, *hardest, *tasks) if task), None)


def _row(
    name: str,
    forward: Scoreboard | None,
    training: Scoreboard | None,
    decode: Scoreboard | None,
    judged: tuple[Task, int] | None,
    info: RunInfo,
    notes: dict[str, tuple[Remark, ...]],
) -> SummaryRow:
    row = SummaryRow(name, tables.role(name, info.command), remarks=notes.get(name, ()))
    on_board = _find(forward, name)
    if forward and on_board:
        row = dataclasses.replace(
            row,
            speedup=on_board.speedups.get(forward.headline, NO_FIGURE),
            peak=on_board.peak,
            pays_from=None if row.role == "reference" else crossover(on_board.speedups),
            remarks=on_board.remarks,
        )
    return dataclasses.replace(
        row,
        training=_speedup(training, name),
        decode=_speedup(decode, name),
        quality=_quality(judged, name, on_board),
    )


def _find(shown: Scoreboard | None, name: str) -> tables.Row | None:
    return next((row for row in shown.rows if row.attention == name), None) if shown else None


def _speedup(shown: Scoreboard | None, name: str) -> Figure:
    row = _find(shown, name)
    return row.speedups.get(shown.headline, NO_FIGURE) if shown and row else NO_FIGURE


def _quality(judged: tuple[Task, int] | None, name: str, timed: tables.Row | None) -> float:
    """Return the quality of the very settings whose time stands in the row; else NaN."""
    score = judged[0].score(name, judged[1]) if judged else None
    if score is None:
        return math.nan
    same = (
        timed is None
        or not timed.settings
        or timed.role == "reference"
        or (score.settings and score.settings in timed.settings)
    )
    return score.quality.value if same else math.nan


def _rank(row: SummaryRow) -> tuple[bool, float, str]:
    speed = row.speedup.value if math.isfinite(row.speedup.value) else -math.inf
    return doubtful(row.remarks), -speed, row.attention
