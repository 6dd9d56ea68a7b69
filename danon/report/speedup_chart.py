"""A chart of a run for a README: speed-up and memory against length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from danon.report import formatting, run_origin, tables
from danon.report.chart_style import INK, SOFT, new_figure, style_axes, write_png
from danon.report.style import styles

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import pandas as pd
    from matplotlib.axes import Axes

    from danon.report.style import Style
    from danon.runs.case import CaseResult
    from danon.runs.run_info import RunInfo

__all__ = ["spread_labels", "write_chart"]

MARKS = ("o", "s", "D", "^", "P", "v", "p", "X")
DPI = 200  # a README is shown on fine screens
LABEL_GAP = 10.5  # points between the names at the ends of curves
SPARSE_RANGE = 50  # an axis that spans more has a tick at powers of ten only
LEAST_MIB = 1 / 1024  # zero bytes have no place on a logarithmic axis


def write_chart(results: Sequence[CaseResult], info: RunInfo, path: Path) -> None:
    """Write a PNG of speed and memory, each from the first view with figures of its suite.

    Args:
        results: outcomes of the run's cases.
        info: description of the run: commit, profile, machine.
        path: PNG file, replaced as a whole.

    Raises:
        ValueError: the results hold no figure of the speed suite.
    """
    data = tables.table(results)
    speed = _first_view(data, "speed", "speedup")
    if speed is None:
        raise ValueError("the results hold no figure of the speed suite: there is nothing to draw")
    memory = _first_view(data, "memory", "peak_bytes")
    names = list(dict.fromkeys(data["attention"]))
    looks = styles(names, info.command)
    figure = new_figure(10.5, 5.2, layout=None)
    left, right = figure.subplots(1, 2)
    figure.subplots_adjust(left=0.055, right=0.89, top=0.87, bottom=0.185, wspace=0.5)
    _panel(left, data, speed, looks, "speed", "speedup", 1.0, side=-1)
    left.axhline(1, color=SOFT, linewidth=0.8, linestyle=":", zorder=0)
    _title(left, "Times faster than dense attention", speed, "dotted: dense extrapolated")
    if memory is None:
        right.text(
            0.5, 0.5, "no figures of the memory suite", ha="center", transform=right.transAxes
        )
    else:
        _panel(right, data, memory, looks, "memory", "peak_bytes", 1 / 2**20, side=1)
        _title(right, "Peak memory in MiB", memory, "beyond inputs and output")
    machines = "; ".join(
        map(run_origin.describe_machine, run_origin.machine_fingerprints(results, info))
    )
    caption = f"{machines}\n{run_origin.describe_run(info)}; {speed.shape}"
    figure.text(0.055, 0.022, caption, fontsize=7.5, color=SOFT, linespacing=1.5)
    write_png(figure, path, dpi=DPI)


def _first_view(data: pd.DataFrame, suite: str, metric: str) -> tables.View | None:
    for view in tables.views(data):
        rows = view.of(data)
        curves = tables.Curves(rows)
        if any(curves.get(suite, name, metric) for name in rows["attention"].unique()):
            return view
    return None


def _title(axes: Axes, title: str, view: tables.View, note: str) -> None:
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", color=INK, pad=20)
    under = f"{view.phase}, {view.dtype}; {note}"
    axes.text(0, 1.03, under, transform=axes.transAxes, fontsize=8.5, color=SOFT)


@dataclass(frozen=True)
class _End:
    """The end of a curve, in data coordinates."""

    name: str
    look: Style
    x: int
    y: float

    @property
    def strong(self) -> bool:
        return self.look.width > 2


def _panel(
    axes: Axes,
    data: pd.DataFrame,
    view: tables.View,
    looks: dict[str, Style],
    suite: str,
    metric: str,
    scale: float,
    side: int,
) -> None:
    """Draw every curve of one metric over length, on logarithmic axes.

    Args:
        axes: axes to draw on.
        data: table of the run.
        view: view to draw.
        looks: style of each attention.
        suite: name of the suite.
        metric: name of the metric.
        scale: factor of the values.
        side: where the name of a curve with an early end goes: above (+1) or below (-1) it.
    """
    from matplotlib.ticker import LogLocator, NullLocator

    curves = tables.Curves(view.of(data))
    ends = []
    lengths: set[int] = set()
    axes.set_xscale("log")
    axes.set_yscale("log")
    for name, look in looks.items():
        points = curves.get(suite, name, metric)
        if not points:
            continue
        lengths |= points.keys()
        xs = list(points)
        ys = [max(point.value * scale, LEAST_MIB) for point in points.values()]
        end = _End(name, look, xs[-1], ys[-1])
        sure = sum(not point.extrapolated for point in points.values())
        (line,) = axes.plot(
            xs[:sure],
            ys[:sure],
            color=look.light,
            linewidth=look.width * 0.75,
            marker=MARKS[look.mark],
            markersize=5 if end.strong else 3,
            zorder=2 + look.width,
        )
        if sure < len(xs):
            start = max(sure - 1, 0)
            axes.plot(
                xs[start:],
                ys[start:],
                linestyle=(0, (1, 1.4)),
                color=look.light,
                linewidth=line.get_linewidth(),
                zorder=line.get_zorder(),
            )
        ends.append(end)
    ticks = sorted(lengths)
    axes.set_xticks(ticks, [formatting.format_length(n) for n in ticks])
    axes.set_xticks([], minor=True)
    low, high = axes.get_ylim()
    steps = (1.0,) if high / low > SPARSE_RANGE else (1.0, 2.0, 5.0)
    axes.yaxis.set_major_locator(LogLocator(subs=steps))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    style_axes(axes, xlabel="tokens N")
    axes.autoscale_view()
    _name_ends(axes, ends, side)


def _name_ends(axes: Axes, ends: Sequence[_End], side: int) -> None:
    """Write each name beside the end of its curve, or above (+1) or below (-1) an early end.

    Names that would overlap are moved vertically and connected to their curves by a line.
    """
    import matplotlib.patheffects

    point = 72 / axes.figure.dpi
    halo = [matplotlib.patheffects.withStroke(linewidth=2.5, foreground="white")]
    early = "bottom" if side > 0 else "top"
    longest = max((end.x for end in ends), default=0)
    for x in {end.x for end in ends}:
        column = sorted((end for end in ends if end.x == x), key=lambda end: end.y)
        at = [axes.transData.transform((end.x, end.y))[1] * point for end in column]
        aside = x == longest
        for end, old, new in zip(column, at, spread_labels(at, LABEL_GAP), strict=True):
            tie = {"arrowstyle": "-", "color": end.look.light, "linewidth": 0.6, "relpos": (0, 0.5)}
            axes.annotate(
                end.name,
                (x, end.y),
                xytext=(20, new - old) if aside else (0, new - old + 5 * side),
                textcoords="offset points",
                ha="left" if aside else "center",
                va="center" if aside else early,
                fontsize=10 if end.strong else 8,
                fontweight="bold" if end.strong else "normal",
                path_effects=halo,
                zorder=9,
                color=end.look.light if end.strong else SOFT,
                annotation_clip=False,
                arrowprops=tie if aside else None,
            )


def spread_labels(positions: Sequence[float], gap: float) -> list[float]:
    """Return positions at least ``gap`` apart that are closest to the given ones.

    With a gap of 0 this is isotonic regression: overlapping neighbours get their mean.

    Args:
        positions: preferred positions, ascending.
        gap: least distance between neighbours.
    """
    blocks: list[tuple[float, int]] = []  # mean of the positions less their gaps, how many
    for index, position in enumerate(positions):
        mean, count = position - index * gap, 1
        while blocks and blocks[-1][0] > mean:
            before, number = blocks.pop()
            mean, count = (before * number + mean * count) / (number + count), number + count
        blocks.append((mean, count))
    flat = [mean for mean, count in blocks for _ in range(count)]
    return [mean + index * gap for index, mean in enumerate(flat)]
