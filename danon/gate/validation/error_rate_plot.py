"""A picture of alarms over planted slowdowns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from danon.gate.validation.error_rates import OURS, Rate

__all__ = ["draw"]


def draw(found: Sequence[Rate], place: Path) -> None:
    """A panel for each load, a line for each method; the bars are 95 % intervals."""
    from matplotlib.figure import Figure

    loads = list(dict.fromkeys((rate.machine, rate.load) for rate in found))
    figure = Figure(figsize=(1 + 4.5 * len(loads), 4.5), layout="constrained")
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
        panel.set(title=", ".join(load), xlabel="slowdown planted in one attention, %")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("runs with an alarm, %")
    panels[-1].legend(fontsize=8)
    place.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(place, dpi=120)
