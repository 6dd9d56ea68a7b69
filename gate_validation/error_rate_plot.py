"""A plot of alarms over injected slowdowns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from danon.report.chart_style import new_figure, style_axes, write_png
from gate_validation.error_rates import OURS, Rate

__all__ = ["draw"]


def draw(rates: Sequence[Rate], path: Path) -> None:
    """Draw a panel for each load, a line for each method; the bars are 95 % intervals.

    Args:
        rates: of all methods.
        path: of the file to write.
    """
    settings = list(dict.fromkeys((rate.machine, rate.load) for rate in rates))
    figure = new_figure(1 + 4.5 * len(settings), 4.5)
    panels = figure.subplots(1, len(settings), squeeze=False, sharey=True)[0]
    for panel, setting in zip(panels, settings, strict=True):
        for method in dict.fromkeys(rate.method for rate in rates):
            line = [
                rate
                for rate in rates
                if ((rate.machine, rate.load), rate.method) == (setting, method)
            ]
            x = [100 * rate.slowdown for rate in line]
            y = [100 * rate.alarms / rate.runs for rate in line]
            below = [v - 100 * rate.interval[0] for v, rate in zip(y, line, strict=True)]
            above = [100 * rate.interval[1] - v for v, rate in zip(y, line, strict=True)]
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
        panel.set_title(", ".join(setting))
        ylabel = "runs with an alarm, %" if panel is panels[0] else ""
        style_axes(panel, "slowdown planted in one attention, %", ylabel)
    panels[-1].legend(fontsize=8)
    write_png(figure, path)
