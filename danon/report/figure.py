"""A figure with its interval."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["NO_FIGURE", "Figure"]


@dataclass(frozen=True)
class Figure:
    """A figure with its interval; NaN where there is none.

    Attributes:
        value: the figure.
        low: lower end of the interval.
        high: upper end of the interval.
        extrapolated: True if the dense side was not measured at this length.
        conclusive: True if the interval became narrow enough within the time budget.
    """

    value: float
    low: float = math.nan
    high: float = math.nan
    extrapolated: bool = False
    conclusive: bool = True


NO_FIGURE = Figure(math.nan)
"""Placeholder of a missing measurement."""
