"""The report: one HTML file with everything in it, which asks nothing of the network."""

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
    provenance,
    quality_tables,
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
        results: its cases; none at all makes a report that says so.
        info: where they come from.
        path: the HTML file, replaced as a whole.
    """
    from plotly.offline import get_plotlyjs

    data = tables.table(results)
    views = tables.views(data)
    tasks = quality_tables.tasks(results, info.command, info.suites)
    found = bound_tables.bounds(results, info.command, info.suites)
    others = suite_tables.suite_tables(results, info)
    drawn = bool(views or tasks or found or others)
    errs, errs_trouble = _alarms(path) if drawn else (None, "")
    template = importlib.resources.files("danon.report") / "template"
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.globals.update(formatting=formatting, isfinite=math.isfinite)
    page = environment.from_string((template / "report.html").read_text(encoding="utf-8"))
    content = page.render(
        info=info,
        origin=provenance.describe_run(info),
        machines=provenance.describe_machines(results, info),
        fingerprints=provenance.machine_fingerprints(results, info),
        boards=[tables.scoreboard(data, view, info.command, remarks(results)) for view in views],
        tasks=tasks,
        bounds=found,
        drawn=drawn,
        suites_section=_section("suites.html", environment, bool(others), tables=others),
        bounds_section=_section("bounds.html", environment, bool(found), bounds=found),
        tuned_section=_tuned(results, path, environment),
        alarms_section=_section(
            "alarms.html", environment, bool(errs or errs_trouble), found=errs, trouble=errs_trouble
        ),
        absences=unmeasured_cases(data),
        failures=failures.read(path.parent, results),
        checks=tables.check_rows(data).to_dict("records"),
        counts=data["status"].value_counts().to_dict(),
        payload={
            **_payload(results, data, views, info),
            "suites": [_suite_payload(table) for table in others],
            "quality": [_task_payload(t) for t in tasks],
            "bounds": _bounds_payload(found) if found else None,
            "alarms": [_panel_payload(panel) for panel in errs.panels] if errs else [],
        },
        css=Markup((template / "report.css").read_text(encoding="utf-8")),
        scripts=[
            Markup((template / name).read_text(encoding="utf-8"))
            for name in (
                "report.js",
                *(["quality.js"] if tasks else ()),
                *(["bounds.js"] if found else ()),
                *(["suites.js"] if others else ()),
                *(["alarms.js"] if errs else ()),
            )
        ],
        plotly=Markup(get_plotlyjs()),
    )
    replace_file(path, content.encode())


def _tuned(results: Sequence[CaseResult], path: Path, environment: jinja2.Environment) -> Markup:
    """The section on tuned settings of the attentions of a run; empty where there are none."""
    rows, trouble = [], ""
    try:
        rows = tuned_settings_rows(results, path)
    except ValueError as error:  # the figures of the run are not to be lost for it
        trouble = str(error)
    return _section("tuned.html", environment, bool(rows or trouble), rows=rows, trouble=trouble)


def _alarms(path: Path) -> tuple[GateErrorRates | None, str]:
    """How often the gate errs, or why that cannot be said."""
    try:
        return gate_error_rates(path), ""
    except ValueError as error:  # the figures of the run are not to be lost for it
        return None, str(error)


def _section(name: str, environment: jinja2.Environment, there: bool, **values: Any) -> Markup:
    """A part of the page that not every run has."""
    if not there:
        return Markup()
    template = importlib.resources.files("danon.report") / "template" / name
    return Markup(environment.from_string(template.read_text(encoding="utf-8")).render(**values))


def _payload(
    results: Sequence[CaseResult], data: pd.DataFrame, views: Sequence[tables.View], info: RunInfo
) -> dict[str, Any]:
    """Return what the charts draw, as plain data."""
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
        home, asked = view.source(suite, metric)
        found = {name: lines.get(home, name, asked) for name in names}
        curves[metric] = {
            name: [{"n": n, **_finite(figure)} for n, figure in points.items() if n]
            for name, points in found.items()
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
                    **_known(share=score.share, peak=score.peak, items=score.items),
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


def _bounds_payload(found: bound_tables.Bounds) -> dict[str, Any]:
    return {
        "lengths": found.lengths,
        "quantities": [dataclasses.asdict(quantity) for quantity in found.quantities],
        "values": {row.attention: row.values for row in found.rows},
        "mass": {row.attention: row.mass for row in found.rows if any(row.mass.values())},
    }


def _panel_payload(panel: Panel) -> list[dict[str, Any]]:
    """A list: names are sorted where JSON is written, and the first method is the gate itself."""
    return [
        {"method": method, "shares": [dataclasses.asdict(share) for share in shares]}
        for method, shares in panel.rows.items()
    ]


def _finite(figure: figure.Figure) -> dict[str, Any]:
    return _known(**dataclasses.asdict(figure))


def _known(**values: float | None) -> dict[str, float | None]:
    """What JSON has no number for is null."""
    return {k: None if v is None or not math.isfinite(v) else v for k, v in values.items()}
