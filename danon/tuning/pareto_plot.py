"""The trials of a study by time and quality (or memory), and which of them are the front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from danon.report import chart_style
from danon.report.chart_style import new_figure, style_axes
from danon.report.pareto import pareto_front
from danon.tuning.candidates import Candidate
from danon.tuning.objective import FIGURES, Objective
from danon.tuning.study_terminal import differences

__all__ = ["plotly_figure", "write_png"]

TIME = "time over that of the default settings"
LABELS = {"quality": "share of wrong answers", "memory": "memory over that of the default settings"}


def write_png(
    some: Sequence[Candidate],
    best: Sequence[Candidate],
    goal: Objective,
    default: Candidate,
    place: Path,
) -> None:
    """The picture for a page of somebody else's."""
    other, points = _points(some, goal)
    figure = new_figure(7, 4.5)
    axes = figure.subplots()
    for label, among, style in (
        ("trials", some, {"s": 18, "color": "0.7"}),
        ("best", best, {"s": 40}),
        ("default", [default], {"s": 70, "marker": "*", "color": "black"}),
    ):
        axes.scatter(*zip(*(points[c.number] for c in among), strict=True), label=label, **style)
    line = sorted(points[number] for number in pareto_front(points))
    axes.plot(*zip(*line, strict=True), color="0.6", lw=1, zorder=0, label="front of these two")
    axes.set_xscale("log")
    style_axes(axes, TIME, LABELS[other])
    axes.xaxis.set_major_formatter("{x:.3g}")
    axes.xaxis.set_minor_formatter("{x:.3g}")
    axes.legend()
    chart_style.write_png(figure, place)


def plotly_figure(
    some: Sequence[Candidate], best: Mapping[str, Candidate], goal: Objective, default: Candidate
) -> Any:
    """The same to look into: a point says its trial and its settings."""
    import plotly.graph_objects as go

    other, points = _points(some, goal)
    figure = go.Figure(
        layout={
            "title": {"text": f"Front: time, {LABELS[other]}"},
            "template": "plotly_white",
            "xaxis": {"title": {"text": TIME}, "type": "log"},
            "yaxis": {"title": {"text": LABELS[other]}},
        }
    )

    def add(label: str, among: Sequence[Candidate], **style: Any) -> None:
        figure.add_scatter(
            x=[points[c.number][0] for c in among],
            y=[points[c.number][1] for c in among],
            name=label,
            hoverinfo="text",
            text=[
                f"trial {c.number}: {differences(c.choice, default.choice)}<br>"
                + ", ".join(f"{n} {c.figures()[FIGURES[n]]:.3g}" for n in goal.known)
                for c in among
            ],
            **style,
        )

    grey, size = "#9aa3af", 9
    front = set(pareto_front(points))
    line = sorted((c for c in some if c.number in front), key=lambda c: points[c.number])
    add("front of these two", line, mode="lines", line={"color": grey, "width": 1})
    add("trials", some, mode="markers", marker={"color": grey, "size": size - 3})
    for name, c in best.items():
        add(f"best for {name}", [c], mode="markers", marker={"size": size})
    add(
        "default",
        [default],
        mode="markers",
        marker={"symbol": "star", "color": "black", "size": size + 3},
    )
    return figure


def _points(
    some: Sequence[Candidate], goal: Objective
) -> tuple[str, dict[int, tuple[float, float]]]:
    """What time is drawn against, and the place of each choice."""
    other = "quality" if "quality" in goal.known else "memory"
    figures = {c.number: c.figures() for c in some}
    return other, {n: (x[FIGURES["speed"]], x[FIGURES[other]]) for n, x in figures.items()}
