"""A picture of alarms over planted slowdowns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from danon.gate.validation.error_rates import OURS, Rate
from danon.report.chart_style import new_figure, style_axes, write_png

__all__ = ["draw"]


def draw(found: Sequence[Rate], place: Path) -> None:
    """A panel for each load, a line for each method; the bars are 95 % intervals."""
    loads = list(dict.fromkeys((rate.machine, rate.load) for rate in found))
    figure = new_figure(1 + 4.5 * len(loads), 4.5)
    panels = figure.subplots(1, len(loads), squeeze=False, sharey=True)[0]
    for panel, load in zip(panels, loads, strict=True):
        for method in dict.fromkeys(rate.method for rate in found):
            some = [
                rate for rate in found if ((rate.machine, rate.load), rate.method) == (load, method)
            ]
            x = [100 * rate.slowdown for rate in some]
            y = [100 * rate.alarms / rate.runs for rate in some]
            below = [v - 100 * rate.interval[0] for v, rate in zip(y, some, strict=True)]
            above = [100 * rate.interval[1] - v for v, rate in zip(y, some, strict=True)]
            ours = method == OURS
            panel.errorbar(
                x,
                y,
                (below, above),
                label=method,
                marker="o",
                markersize=4,
                capsize=2,
                linewidth=2.5 if ours else 1,
                zorder=3 if ours else 2,
            )
        panel.set_title(", ".join(load))
        ylabel = "runs with an alarm, %" if panel is panels[0] else ""
        style_axes(panel, "slowdown planted in one attention, %", ylabel)
    panels[-1].legend(fontsize=8)
    write_png(figure, place)
