"""The report: one HTML file that needs no network."""

from __future__ import annotations

import importlib.resources
import math
from typing import TYPE_CHECKING, NamedTuple

import jinja2
from markupsafe import Markup

from danon.report import (
    bound_tables,
    formatting,
    quality_tables,
    report_payload,
    run_origin,
    suite_tables,
    tables,
)
from danon.report.conclusions import conclude
from danon.report.gate_error_rates import GateErrorRates, gate_error_rates
from danon.report.glossary import Glossary
from danon.report.plotly_bundle import compressed_plotly
from danon.report.remarks import remarks
from danon.report.summary import summarize
from danon.report.tradeoff import tradeoff
from danon.report.tuned_settings import TunedSettingsRow, tuned_settings_rows
from danon.report.unmeasured import describe_absences, unmeasured_cases
from danon.runs import failures
from danon.runs.files import replace_file

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from danon.runs.case import CaseResult
    from danon.runs.run_info import RunInfo

__all__ = ["write_report"]


class _Section(NamedTuple):
    """One section of the page, with a line in its contents.

    Attributes:
        name: id of the section and stem of its template.
        title: heading.
        present: True if the run has something to show there.
    """

    name: str
    title: str
    present: bool


def write_report(results: Sequence[CaseResult], info: RunInfo, path: Path) -> None:
    """Write the report of one run.

    Args:
        results: outcomes of its cases; an empty run makes a report that says so.
        info: description of the run: commit, profile, machine.
        path: HTML file, replaced as a whole.
    """
    data = tables.table(results)
    views = tables.views(data)
    tasks = quality_tables.tasks(results, info.command, info.suites)
    bounds = bound_tables.bounds(results, info.command, info.suites)
    others = suite_tables.suite_tables(results, info)
    summary = summarize(results, info)
    opening = tradeoff(results, summary)
    drawn = bool(views or tasks or bounds or others)
    rates, rates_trouble = _error_rates(path) if drawn else (None, "")
    tuned, tuned_trouble = _tuned(results, path)
    sections = [
        _Section("summary", "Summary", drawn),
        _Section("scoreboard", "Scoreboard", bool(views)),
        _Section("lengths", "Against length", bool(views)),
        _Section("quality", "Quality", bool(tasks)),
        _Section("bounds", "Bounds", bool(bounds)),
        _Section("suites", "Other figures", bool(others)),
        _Section("tuned", "Tuned settings", bool(tuned or tuned_trouble)),
        _Section("alarms", "How often the gate errs", bool(rates or rates_trouble)),
        _Section("unmeasured", "Without figures, and why", True),
        _Section("checks", "Correctness checks", True),
        _Section("columns", "Columns", True),
        _Section("provenance", "Provenance", True),
    ]
    present = [section for section in sections if section.present]
    page, absences = _environment().get_template("report.html"), unmeasured_cases(data)
    content = page.render(
        info=info,
        sections=present,
        glossary=Glossary((info.suites or {}).values()),
        origin=run_origin.describe_run(info),
        machines=run_origin.describe_machines(results, info),
        fingerprints=run_origin.machine_fingerprints(results, info),
        conclusions=conclude(summary),
        summary=summary,
        opening=opening,
        boards=[tables.scoreboard(data, view, info.command, remarks(results)) for view in views],
        tasks=tasks,
        bounds=bounds,
        drawn=drawn,
        tables=others,
        tuned=tuned,
        tuned_trouble=tuned_trouble,
        rates=rates,
        rates_trouble=rates_trouble,
        absences=absences,
        absence=describe_absences(absences) if absences else "",
        failures=failures.read(path.parent, results),
        checks=tables.check_rows(data).to_dict("records"),
        counts=data["status"].value_counts().to_dict(),
        payload={
            **report_payload.views_data(results, data, views, info),
            "tradeoff": report_payload.tradeoff_data(opening) if opening else None,
            "suites": [report_payload.suite_data(table) for table in others],
            "quality": [report_payload.task_data(task) for task in tasks],
            "bounds": report_payload.bounds_data(bounds) if bounds else None,
            "alarms": [report_payload.panel_data(p) for p in rates.panels] if rates else [],
        },
        css=_text("report.css") + _text("print.css"),
        scripts=[_text(name) for name in _scripts({section.name for section in present}, opening)],
        plotly=Markup(compressed_plotly()) if drawn else "",
    )
    replace_file(path, content.encode())


def _scripts(sections: set[str], opening: object) -> list[str]:
    """Return the scripts of a page in their order: behaviour, then charts, then their start."""
    charts = {
        "tradeoff.js": opening is not None,
        "lengths.js": "lengths" in sections,
        "quality.js": "quality" in sections,
        "bounds.js": "bounds" in sections,
        "suites.js": "suites" in sections,
        "alarms.js": "alarms" in sections,
    }
    if "summary" not in sections:
        return ["page.js", "headings.js"]
    wanted = [name for name, needed in charts.items() if needed]
    library = ["page.js", "headings.js", "axes.js", "drawing.js", "labels.js", "legend.js"]
    return [*library, *wanted, "start.js"]


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        loader=jinja2.PackageLoader("danon.report", "template"),
    )
    environment.globals.update(formatting=formatting, isfinite=math.isfinite)
    return environment


def _text(name: str) -> Markup:
    """Return a file of the template folder, to be written as it is."""
    folder = importlib.resources.files("danon.report") / "template"
    return Markup((folder / name).read_text(encoding="utf-8"))


def _tuned(results: Sequence[CaseResult], path: Path) -> tuple[list[TunedSettingsRow], str]:
    """Return the tuned settings of a run's attentions, or the reason why they cannot be read."""
    try:
        return tuned_settings_rows(results, path), ""
    except ValueError as error:  # the figures of the run are written all the same
        return [], str(error)


def _error_rates(path: Path) -> tuple[GateErrorRates | None, str]:
    """Return the error rates of the gate, or the reason why they cannot be read."""
    try:
        return gate_error_rates(path), ""
    except ValueError as error:  # the figures of the run are written all the same
        return None, str(error)
