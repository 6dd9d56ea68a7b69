"""A table for each suite with figures of its own: added suites, and added metrics."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from danon.report.figure import Figure
from danon.report.suite_infos import suite_infos
from danon.report.tables import figure, role

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from danon.report.tables import Role
    from danon.runs.case import Case, CaseResult
    from danon.runs.run_info import RunInfo
    from danon.runs.suite_info import Metric, SuiteInfo

__all__ = ["Row", "SuiteTable", "suite_tables"]

INTERVAL_ENDS = ("_low", "_high")


@dataclass(frozen=True)
class Row:
    """One attention.

    Attributes:
        attention: registered name.
        role: role in the comparison.
        semantics: description of the attention.
        figures: (metric, length) -> figure.
    """

    attention: str
    role: Role
    semantics: str
    figures: dict[tuple[str, int], Figure]

    def figure(self, metric: Metric, length: int) -> Figure:
        """Return a figure; NaN if there is none."""
        return self.figures.get((metric.name, length), Figure(math.nan))


@dataclass(frozen=True)
class SuiteTable:
    """The figures of a suite with one task, phase, dtype and shape.

    Attributes:
        suite: description of the suite.
        where: task, phase, dtype and shape in words.
        metrics: columns.
        lengths: lengths in tokens, ascending.
        rows: attentions, best first by the first metric at the longest length.
    """

    suite: SuiteInfo
    where: str
    metrics: tuple[Metric, ...]
    lengths: tuple[int, ...]
    rows: tuple[Row, ...]

    @property
    def headline(self) -> int:
        """The longest length."""
        return self.lengths[-1]


def suite_tables(results: Sequence[CaseResult], info: RunInfo) -> list[SuiteTable]:
    """Return a table for each suite, task, phase, dtype and shape with figures of its own."""
    tables = []
    for name, suite in suite_infos(results, info.suites).items():
        measured = [r for r in results if r.case.suite == name and r.status == "measured"]
        for where in dict.fromkeys(_where(r.case) for r in measured):
            alike = [r for r in measured if _where(r.case) == where]
            if metrics := _metrics(suite, alike):
                tables.append(_table(suite, where, metrics, alike, info.command))
    return tables


def _metrics(suite: SuiteInfo, results: Iterable[CaseResult]) -> tuple[Metric, ...]:
    """Return the columns: listed and measured metrics; all metrics of an unknown suite."""
    from danon.runs.suite_info import Metric

    measured = dict.fromkeys(name for result in results for name in result.metrics)
    if suite.metrics:
        return tuple(m for m in suite.metrics if m.listed and m.name in measured)
    names = (name for name in measured if not name.endswith(INTERVAL_ENDS))
    return tuple(Metric(name, "") for name in names)


def _table(
    suite: SuiteInfo,
    where: str,
    metrics: tuple[Metric, ...],
    results: Sequence[CaseResult],
    command: str,
) -> SuiteTable:
    figures: dict[str, dict[tuple[str, int], Figure]] = {}
    semantics = {}
    for result in results:
        case = result.case
        semantics[case.attention] = result.semantics
        for metric in metrics:
            if metric.name in result.metrics:
                value = figure(result.metrics, metric.name)
                figures.setdefault(case.attention, {})[metric.name, case.length] = value
    lengths = tuple(sorted({r.case.length for r in results}))
    rows = [
        Row(name, role(name, command), semantics[name], values) for name, values in figures.items()
    ]
    first = metrics[0]

    def rank(row: Row) -> tuple[bool, float]:
        value = row.figure(first, lengths[-1]).value
        return math.isnan(value), -value if first.better == "higher" else value

    return SuiteTable(suite, where, metrics, lengths, tuple(sorted(rows, key=rank)))


def _where(case: Case) -> str:
    shape = f"{case.device}, batch {case.batch}, {case.heads} heads x {case.head_dim}"
    return ", ".join(filter(None, (case.task, case.phase, case.dtype, shape)))
