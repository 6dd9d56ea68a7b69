"""Colours and marks of the attentions, the same in the report and in the chart.

Ours stand out in colours that stay apart under colour blindness (after Okabe and Ito); baselines
are muted and told apart by their marks as well; dense attention is the colour of text.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from danon.config.mechanism import mechanisms
from danon.report import tables
from danon.report.tables import REFERENCE

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Style", "styles"]


@dataclass(frozen=True)
class Style:
    """The look of a curve.

    Attributes:
        light: colour on a light background.
        dark: colour on a dark background.
        mark: index into the list of marks.
        width: line width in pixels.
        dash: ``solid``, or ``dash`` for other settings of an attention (``ucsa-balanced``).
    """

    light: str
    dark: str
    mark: int
    width: float
    dash: Literal["solid", "dash"] = "solid"


YOURS = ("#a3189f", "#f2a0ee")
DENSE = ("#111418", "#f4f6f8")
MUTED = (
    ("#7d889c", "#7d889c"),
    ("#a08755", "#a08755"),
    ("#6f9180", "#6f9180"),
    ("#9a7390", "#9a7390"),
    ("#5f86a3", "#5f86a3"),
    ("#ab7f70", "#ab7f70"),
    ("#858c4f", "#858c4f"),
    ("#7f78ad", "#7f78ad"),
    ("#8d8378", "#8d8378"),
    ("#5f9191", "#5f9191"),
    ("#a7808a", "#a9838d"),
    ("#777a6d", "#7e8173"),
    ("#6a7f5f", "#6f8563"),
    ("#8c84b0", "#9089b3"),
)
MARKS = 8


SHADES = ((0.0, 0.55), (0.08, 0.65), (-0.08, 0.6), (0.0, 0.3))
"""Shift of the hue, and factor of the distance from black or white, of a mechanism's variants."""


def styles(attentions: Sequence[str], command: str) -> dict[str, Style]:
    """Return a style for each attention, by its role and its position in the sequence."""
    chosen: dict[str, Style] = {}
    ours = mechanisms()
    variants: dict[str, int] = {}
    muted = strong = 0
    for name in attentions:
        role = tables.role(name, command)
        varied = any(name.startswith(f"{other}-") for other in attentions if other != REFERENCE)
        dash: Literal["solid", "dash"] = "dash" if varied else "solid"
        if role == "reference":
            chosen[name] = Style(*DENSE, mark=0, width=2.5)
        elif role == "baseline":
            light, dark = MUTED[muted % len(MUTED)]
            mark = 1 + muted % (MARKS - 1)
            chosen[name] = Style(light, dark, mark=mark, width=1.3, dash=dash)
            muted += 1
        else:
            family = tables.mechanism(name)
            pair = YOURS if role == "yours" else ours[family].colors
            if name != family and role == "ours":
                pair = _shade(pair, variants.get(family, 0))
                variants[family] = variants.get(family, 0) + 1
                dash = "dash"
            chosen[name] = Style(*pair, mark=strong % MARKS, width=3.0, dash=dash)
            strong += 1
    return chosen


def _shade(pair: tuple[str, str], variant: int) -> tuple[str, str]:
    """Return a variant's colours: darker on a light background, and lighter on a dark one."""
    turn, factor = SHADES[variant % len(SHADES)]
    light, dark = (colorsys.rgb_to_hls(*_channels(colour)) for colour in pair)
    return (
        _hex(colorsys.hls_to_rgb((light[0] + turn) % 1, light[1] * factor, light[2])),
        _hex(colorsys.hls_to_rgb((dark[0] + turn) % 1, 1 - (1 - dark[1]) * factor, dark[2])),
    )


def _channels(colour: str) -> tuple[float, float, float]:
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return red, green, blue


def _hex(channels: tuple[float, float, float]) -> str:
    return "#" + "".join(f"{round(255 * channel):02x}" for channel in channels)
