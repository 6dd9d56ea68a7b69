"""A figure with its interval."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

__all__ = ["NO_FIGURE", "Figure"]


if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Figure:
    """A figure with its interval; NaN where there is none.

    Attributes:
        extrapolated: the dense side was not measured at this length.
        conclusive: the interval became narrow enough within the time budget.
    """

    value: float
    low: float = math.nan
    high: float = math.nan
    extrapolated: bool = False
    conclusive: bool = True


NO_FIGURE = Figure(math.nan)
"""Of something that was not measured."""
