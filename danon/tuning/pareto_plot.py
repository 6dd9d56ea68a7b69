"""Draw the candidates of a study by two figures, with their Pareto front."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from danon.report import chart_style
from danon.report.chart_style import new_figure, style_axes
from danon.report.pareto import pareto_front
from danon.tuning.candidates import Candidate, StudyResult
from danon.tuning.objective import FIGURES, HEADINGS, LABELS, Objective
from danon.tuning.study_terminal import differences

__all__ = ["plotly_figure", "write_png"]

VERTICAL = ("quality", "memory", "parameters")
"""Objectives for the vertical axis, the first available one is taken."""


def write_png(result: StudyResult, file: Path) -> None:
    """Draw a picture for another page.

    Args:
        result: the candidates and the best of them.
        file: PNG file to write.
    """
    x, y = _axes(result.objective)
    points = _points(result)
    figure = new_figure(7, 4.5)
    axes = figure.subplots()
    for label, shown, style in (
        ("trials", result.candidates, {"s": 18, "color": "0.7"}),
        ("best", result.front, {"s": 40}),
        ("default", [result.default], {"s": 70, "marker": "*", "color": "black"}),
    ):
        axes.scatter(*zip(*(points[c.number] for c in shown), strict=True), label=label, **style)
    line = sorted(points[number] for number in pareto_front(points))
    axes.plot(*zip(*line, strict=True), color="0.6", lw=1, zorder=0, label="front of these two")
    axes.set_xscale("log")
    style_axes(axes, LABELS[x], LABELS[y])
    axes.xaxis.set_major_formatter("{x:.3g}")
    axes.xaxis.set_minor_formatter("{x:.3g}")
    axes.legend()
    chart_style.write_png(figure, file)


def plotly_figure(result: StudyResult) -> Any:
    """Return the same as an interactive figure: a point shows its trial and its settings.

    Args:
        result: the candidates and the best of them.
    """
    import plotly.graph_objects as go

    x, y = _axes(result.objective)
    points, default = _points(result), result.default
    figure = go.Figure(
        layout={
            "title": {"text": f"Front: {HEADINGS[x]}, {LABELS[y]}"},
            "template": "plotly_white",
            "xaxis": {"title": {"text": LABELS[x]}, "type": "log"},
            "yaxis": {"title": {"text": LABELS[y]}},
        }
    )

    def add(label: str, shown: Sequence[Candidate], **style: Any) -> None:
        figure.add_scatter(
            x=[points[c.number][0] for c in shown],
            y=[points[c.number][1] for c in shown],
            name=label,
            hoverinfo="text",
            text=[
                f"trial {c.number}: {differences(c.choice, default.choice)}<br>"
                + ", ".join(
                    f"{n} {c.figures()[FIGURES[n]]:.3g}" for n in result.objective.available
                )
                for c in shown
            ],
            **style,
        )

    grey, size = "#9aa3af", 9
    front = set(pareto_front(points))
    line = sorted(
        (c for c in result.candidates if c.number in front), key=lambda c: points[c.number]
    )
    add("front of these two", line, mode="lines", line={"color": grey, "width": 1})
    add("trials", result.candidates, mode="markers", marker={"color": grey, "size": size - 3})
    for name, c in result.best.items():
        add(f"best for {name}", [c], mode="markers", marker={"size": size})
    add(
        "default",
        [default],
        mode="markers",
        marker={"symbol": "star", "color": "black", "size": size + 3},
    )
    return figure


def _axes(objective: Objective) -> tuple[str, str]:
    """Return the objectives on the two axes: the time, where there is one, and another."""
    x = "speed" if "speed" in objective.available else objective.available[0]
    return x, next((y for y in VERTICAL if y in objective.available and y != x), x)


def _points(result: StudyResult) -> dict[int, tuple[float, float]]:
    """Return the coordinates of each candidate, by its number."""
    x, y = _axes(result.objective)
    figures = {c.number: c.figures() for c in result.candidates}
    return {number: (values[FIGURES[x]], values[FIGURES[y]]) for number, values in figures.items()}
