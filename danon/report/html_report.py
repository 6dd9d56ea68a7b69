"""The report: one HTML file that needs no network."""

from __future__ import annotations

import dataclasses
import importlib.resources
import math
from typing import TYPE_CHECKING, Any, get_args

import jinja2
from markupsafe import Markup

from danon.report import (
    bound_tables,
    figure,
    formatting,
    quality_tables,
    run_origin,
    suite_tables,
    tables,
)
from danon.report.gate_error_rates import GateErrorRates, Panel, gate_error_rates
from danon.report.remarks import remarks
from danon.report.style import styles
from danon.report.suite_infos import suite_infos
from danon.report.tuned_settings import tuned_settings_rows
from danon.report.unmeasured import unmeasured_cases
from danon.runs import failures
from danon.runs.files import replace_file

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import pandas as pd

    from danon.runs.case import CaseResult
    from danon.runs.run_info import RunInfo

__all__ = ["write_report"]


def write_report(results: Sequence[CaseResult], info: RunInfo, path: Path) -> None:
    """Write the report of one run.

    Args:
        results: outcomes of its cases; an empty run makes a report that says so.
        info: description of the run: commit, profile, machine.
        path: HTML file, replaced as a whole.
    """
    from plotly.offline import get_plotlyjs

    data = tables.table(results)
    views = tables.views(data)
    tasks = quality_tables.tasks(results, info.command, info.suites)
    bounds = bound_tables.bounds(results, info.command, info.suites)
    others = suite_tables.suite_tables(results, info)
    drawn = bool(views or tasks or bounds or others)
    rates, rates_trouble = _error_rates(path) if drawn else (None, "")
    template = importlib.resources.files("danon.report") / "template"
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.globals.update(formatting=formatting, isfinite=math.isfinite)
    page = environment.from_string((template / "report.html").read_text(encoding="utf-8"))
    content = page.render(
        info=info,
        origin=run_origin.describe_run(info),
        machines=run_origin.describe_machines(results, info),
        fingerprints=run_origin.machine_fingerprints(results, info),
        boards=[tables.scoreboard(data, view, info.command, remarks(results)) for view in views],
        tasks=tasks,
        bounds=bounds,
        drawn=drawn,
        suites_section=_section("suites.html", environment, bool(others), tables=others),
        bounds_section=_section("bounds.html", environment, bool(bounds), bounds=bounds),
        tuned_section=_tuned(results, path, environment),
        alarms_section=_section(
            "alarms.html",
            environment,
            bool(rates or rates_trouble),
            rates=rates,
            trouble=rates_trouble,
        ),
        absences=unmeasured_cases(data),
        failures=failures.read(path.parent, results),
        checks=tables.check_rows(data).to_dict("records"),
        counts=data["status"].value_counts().to_dict(),
        payload={
            **_payload(results, data, views, info),
            "suites": [_suite_payload(table) for table in others],
            "quality": [_task_payload(t) for t in tasks],
            "bounds": _bounds_payload(bounds) if bounds else None,
            "alarms": [_panel_payload(panel) for panel in rates.panels] if rates else [],
        },
        css=Markup((template / "report.css").read_text(encoding="utf-8")),
        scripts=[
            Markup((template / name).read_text(encoding="utf-8"))
            for name in (
                "report.js",
                *(["quality.js"] if tasks else ()),
                *(["bounds.js"] if bounds else ()),
                *(["suites.js"] if others else ()),
                *(["alarms.js"] if rates else ()),
            )
        ],
        plotly=Markup(get_plotlyjs()),
    )
    replace_file(path, content.encode())


def _tuned(results: Sequence[CaseResult], path: Path, environment: jinja2.Environment) -> Markup:
    """Return the section on tuned settings of a run's attentions; empty if there are none."""
    rows, trouble = [], ""
    try:
        rows = tuned_settings_rows(results, path)
    except ValueError as error:  # the figures of the run are written all the same
        trouble = str(error)
    return _section("tuned.html", environment, bool(rows or trouble), rows=rows, trouble=trouble)


def _error_rates(path: Path) -> tuple[GateErrorRates | None, str]:
    """Return the error rates of the gate, or the reason why they cannot be read."""
    try:
        return gate_error_rates(path), ""
    except ValueError as error:  # the figures of the run are written all the same
        return None, str(error)


def _section(name: str, environment: jinja2.Environment, present: bool, **values: Any) -> Markup:
    """Return an optional part of the page; empty if the run has none."""
    if not present:
        return Markup()
    template = importlib.resources.files("danon.report") / "template" / name
    return Markup(environment.from_string(template.read_text(encoding="utf-8")).render(**values))


def _payload(
    results: Sequence[CaseResult], data: pd.DataFrame, views: Sequence[tables.View], info: RunInfo
) -> dict[str, Any]:
    """Return the data of the charts."""
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
        "views": [_view_payload(data, view, names, charted) for view in views],
    }


def _view_payload(
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


def _task_payload(task: quality_tables.Task) -> dict[str, Any]:
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
                        name: [point for point in points if all(map(math.isfinite, point))]
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


def _suite_payload(table: suite_tables.SuiteTable) -> dict[str, Any]:
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


def _bounds_payload(bounds: bound_tables.Bounds) -> dict[str, Any]:
    return {
        "lengths": bounds.lengths,
        "quantities": [dataclasses.asdict(quantity) for quantity in bounds.quantities],
        "values": {row.attention: row.values for row in bounds.rows},
        "mass": {row.attention: row.mass for row in bounds.rows if any(row.mass.values())},
    }


def _panel_payload(panel: Panel) -> list[dict[str, Any]]:
    """Return a list: JSON objects are sorted by key, and the gate itself must come first."""
    return [
        {"method": method, "shares": [dataclasses.asdict(share) for share in shares]}
        for method, shares in panel.rows.items()
    ]


def _finite(figure: figure.Figure) -> dict[str, Any]:
    return _or_null(**dataclasses.asdict(figure))


def _or_null(**values: float | None) -> dict[str, float | None]:
    """Replace values that JSON cannot hold by null."""
    return {k: None if v is None or not math.isfinite(v) else v for k, v in values.items()}
