"""A comparison of two runs as JSON and as an HTML page that needs no network."""

from __future__ import annotations

import importlib.resources
import json
import math
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup

from danon.report import run_origin
from danon.report.terminal_comparison import (
    describe_case,
    figure_name,
    format_change,
    format_value,
    verdict,
)
from danon.runs.files import replace_file

if TYPE_CHECKING:
    from pathlib import Path

    from danon.report.comparison import Compared, Comparison

__all__ = ["to_json", "write_page"]


def to_json(comparison: Comparison) -> str:
    """Return every figure of a comparison as JSON; what is not finite is null."""
    values = {
        "names": comparison.names,
        "runs": [[run.info.run_id for run in side] for side in comparison.runs],
        "differences": comparison.differences,
        "dense_change": _number(comparison.dense_change),
        "figures": [_figure(figure) for figure in comparison.figures],
        "unpaired": [
            {"case": x.case.id, "reason": x.reason, "detail": x.detail, "broken": x.broken}
            for x in comparison.unpaired
        ],
        "unmeasured": [case.id for case in comparison.unmeasured],
    }
    return json.dumps(values, indent=1)


def write_page(comparison: Comparison, path: Path) -> None:
    """Write a page with every figure.

    Args:
        comparison: of two runs or two attentions.
        path: HTML file, replaced as a whole.
    """
    template = importlib.resources.files("danon.report") / "template"
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.globals.update(
        describe_case=describe_case,
        figure_name=figure_name,
        describe_run=run_origin.describe_run,
        format_change=format_change,
        format_value=format_value,
        isfinite=math.isfinite,
    )
    page = environment.from_string((template / "comparison.html").read_text(encoding="utf-8"))
    content = page.render(
        comparison=comparison,
        verdict=verdict(comparison),
        sections=[
            ("Moved", comparison.moved),
            ("Did not move", comparison.same),
            ("Not compared", comparison.untested),
        ],
        css=Markup((template / "report.css").read_text(encoding="utf-8")),
    )
    replace_file(path, content.encode())


def _figure(figure: Compared) -> dict[str, Any]:
    return {
        "case": figure.case.id,
        "metric": figure.metric.name,
        **{
            name: {end: _number(getattr(value, end)) for end in ("value", "low", "high")}
            for name, value in (
                ("before", figure.before),
                ("after", figure.after),
                ("change", figure.change),
            )
        },
        "outcome": figure.outcome,
        "reason": figure.reason,
        "p": _number(figure.p),
        "least": _number(figure.least),
        "better": figure.metric.better,
    }


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
