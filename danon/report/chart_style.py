"""The look of every matplotlib chart: figure, axes, file."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Literal

from danon.runs.files import replace_file

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["INK", "SOFT", "new_figure", "style_axes", "write_png"]

INK, SOFT, GRID = "#16191d", "#5b6470", "#e4e7eb"
"""Colours of titles, of labels, and of the grid."""
DPI = 150


def new_figure(
    width: float, height: float, *, layout: Literal["constrained"] | None = "constrained"
) -> Figure:
    """Make a figure that draws without a display, whatever the backend of the process.

    Args:
        width: in inches.
        height: in inches.
        layout: None: the caller places the axes.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white", layout=layout)
    FigureCanvasAgg(figure)
    return figure


def style_axes(axes: Axes, xlabel: str = "", ylabel: str = "") -> None:
    """Draw axes with a light grid and soft labels, without a frame.

    Args:
        axes: of a panel.
        xlabel: below the axis.
        ylabel: beside the axis.
    """
    axes.set_xlabel(xlabel, fontsize=9, color=SOFT)
    axes.set_ylabel(ylabel, fontsize=9, color=SOFT)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", labelsize=8.5, colors=SOFT, length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def write_png(figure: Figure, path: Path, *, dpi: int = DPI) -> None:
    """Write a figure as a whole file.

    Args:
        figure: from :func:`new_figure`.
        path: of the file; its folders are made.
        dpi: dots per inch.
    """
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=dpi)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, content.getvalue())
