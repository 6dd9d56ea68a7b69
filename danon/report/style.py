"""Colours and marks of the attentions, the same in the report and in the chart.

Ours stand out in colours that stay apart under colour blindness (after Okabe and Ito); baselines
are muted and told apart by their marks as well; dense attention is the colour of text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from danon.config.mechanism import mechanisms
from danon.report import tables

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
    """

    light: str
    dark: str
    mark: int
    width: float


YOURS = ("#a3189f", "#f2a0ee")
DENSE = ("#111418", "#f4f6f8")
MUTED = (
    "#7d889c",
    "#a08755",
    "#6f9180",
    "#9a7390",
    "#5f86a3",
    "#ab7f70",
    "#858c4f",
    "#7f78ad",
    "#8d8378",
    "#5f9191",
    "#a9838d",
    "#777a6d",
    "#6a7f5f",
    "#9089b3",
)
MARKS = 8


def styles(attentions: Sequence[str], command: str) -> dict[str, Style]:
    """Return a style for each attention, by its role and its position in the sequence."""
    chosen: dict[str, Style] = {}
    ours = mechanisms()
    muted = strong = 0
    for name in attentions:
        role = tables.role(name, command)
        if role == "reference":
            chosen[name] = Style(*DENSE, mark=0, width=2.5)
        elif role == "baseline":
            tint = MUTED[muted % len(MUTED)]
            chosen[name] = Style(tint, tint, mark=1 + muted % (MARKS - 1), width=1.3)
            muted += 1
        else:
            pair = YOURS if role == "yours" else ours[tables.mechanism(name)].colors
            chosen[name] = Style(*pair, mark=strong % MARKS, width=3.0)
            strong += 1
    return chosen
