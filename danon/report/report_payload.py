"""The data of the report's charts, as JSON holds it."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, get_args

from danon.report import bound_tables, quality_tables, suite_tables, tables
from danon.report.style import styles
from danon.report.suite_infos import suite_infos

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd

    from danon.report.figure import Figure
    from danon.report.gate_error_rates import Panel
    from danon.report.tradeoff import Tradeoff
    from danon.runs.case import CaseResult
    from danon.runs.run_info import RunInfo

__all__ = ["bounds_data", "panel_data", "suite_data", "task_data", "tradeoff_data", "views_data"]

DIGITS = 5
"""Significant digits of a point; a chart shows three."""


def views_data(
    results: Sequence[CaseResult], data: pd.DataFrame, views: Sequence[tables.View], info: RunInfo
) -> dict[str, Any]:
    """Return the attentions with their looks, and their curves by view.

    Args:
        results: results of the run.
        data: table of the run.
        views: views with figures.
        info: description of the run.
    """
    suites = suite_infos(results, info.suites)
    charted = [
        (s.name, m.name) for s in suites.values() for m in s.metrics if m.charted and not m.listed
    ]
    order = ("reference", "ours", "yours", "baseline")
    names = [] if data.empty else list(dict.fromkeys(data["attention"]))
    names.sort(key=lambda name: order.index(tables.role(name, info.command)))
    measured = data[data["status"] == "measured"]
    names = [name for name in names if name in set(measured["attention"])]
    looks = styles(names, info.command)
    return {
        "attentions": [
            {
                "name": name,
                "role": tables.role(name, info.command),
                **dataclasses.asdict(looks[name]),
            }
            for name in names
        ],
        "views": [_view_data(data, view, names, charted) for view in views],
    }


def _view_data(
    data: pd.DataFrame, view: tables.View, names: Sequence[str], charted: Sequence[tuple[str, str]]
) -> dict[str, Any]:
    lines = tables.Curves(view.of(data))
    curves: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for suite, metric in charted:
        source, key = view.source(suite, metric)
        points_of = {name: lines.get(source, name, key) for name in names}
        curves[metric] = {
            name: [{"n": n, **_finite(figure)} for n, figure in points.items() if n]
            for name, points in points_of.items()
            if points
        }
    lengths = {
        point["n"] for metric in curves.values() for line in metric.values() for point in line
    }
    return {"lengths": sorted(lengths), "curves": curves}


def task_data(task: quality_tables.Task) -> dict[str, Any]:
    """Return the scores and curves of a task.

    Args:
        task: task with figures.
    """
    costs = get_args(quality_tables.Cost)
    return {
        "suite": task.suite,
        "name": task.name,
        "metric": task.metric,
        "higher": task.higher,
        "lengths": task.lengths,
        "lines": {
            row.attention: [
                {
                    "n": n,
                    **_finite(score.quality),
                    "semantics": score.semantics,
                    "speedup": _finite(score.speedup),
                    **_or_null(share=score.share, peak=score.peak, items=score.items),
                    "curves": {
                        name: [[*map(_round, p)] for p in points if all(map(math.isfinite, p))]
                        for name, points in score.curves.items()
                    },
                }
                for n, score in row.scores.items()
            ]
            for row in task.rows
        },
        "fronts": {
            n: {cost: sorted(task.front(n, [cost])) for cost in costs} for n in task.lengths
        },
    }


def suite_data(table: suite_tables.SuiteTable) -> dict[str, Any]:
    """Return the curves of a suite's charted metrics.

    Args:
        table: table of the suite.
    """
    return {
        "lengths": table.lengths,
        "metrics": [
            {
                "name": metric.name,
                "heading": metric.heading,
                "unit": metric.unit,
                "lines": {
                    row.attention: [
                        {"n": n, **_finite(row.figure(metric, n))}
                        for n in table.lengths
                        if math.isfinite(row.figure(metric, n).value)
                    ]
                    for row in table.rows
                },
            }
            for metric in table.metrics
            if metric.charted
        ],
    }


def bounds_data(bounds: bound_tables.Bounds) -> dict[str, Any]:
    """Return the quantities of the suite bounds, and the mass of each branch.

    Args:
        bounds: figures of the suite.
    """
    return {
        "lengths": bounds.lengths,
        "quantities": [dataclasses.asdict(quantity) for quantity in bounds.quantities],
        "values": {
            row.attention: {
                metric: {n: _round(value) for n, value in points.items()}
                for metric, points in row.values.items()
            }
            for row in bounds.rows
        },
        "mass": {row.attention: row.mass for row in bounds.rows if any(row.mass.values())},
    }


def panel_data(panel: Panel) -> list[dict[str, Any]]:
    """Return the methods of a panel as a list, the gate itself first.

    Args:
        panel: shares of alarms. JSON objects would be sorted by key.
    """
    return [
        {"method": method, "shares": [dataclasses.asdict(share) for share in shares]}
        for method, shares in panel.rows.items()
    ]


def tradeoff_data(tradeoff: Tradeoff) -> dict[str, Any]:
    """Return the points of the chart that opens the report.

    Args:
        tradeoff: result of :func:`danon.report.tradeoff.tradeoff`.
    """
    return {
        "metric": tradeoff.metric,
        "higher": tradeoff.higher,
        "title": tradeoff.title,
        "points": {
            n: [
                {
                    "name": point.attention,
                    "quality": _finite(point.quality),
                    "speedup": _finite(point.speedup),
                    "best": point.best,
                }
                for point in points
            ]
            for n, points in tradeoff.points.items()
        },
    }


def _finite(figure: Figure) -> dict[str, Any]:
    return _or_null(**dataclasses.asdict(figure))


def _or_null(**values: float | None) -> dict[str, float | None]:
    """Round values, and replace those that JSON cannot hold by null."""
    return {k: None if v is None or not math.isfinite(v) else _round(v) for k, v in values.items()}


def _round(value: float) -> float:
    return float(f"{value:.{DIGITS}g}") if type(value) is float else value
