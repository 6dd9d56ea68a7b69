"""The crossover length: from where on an attention is faster than dense attention."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from danon.report.figure import Figure

__all__ = ["Crossover", "crossover"]


@dataclass(frozen=True)
class Crossover:
    """A crossover length, or the side of it that all measured lengths lie on.

    Attributes:
        length: tokens; the shortest or longest measured length if all lie on one side.
        side: ``<`` if faster at every measured length, ``>`` if slower at the longest, else empty.
    """

    length: float
    side: str = ""

    @property
    def sort_key(self) -> tuple[float, int]:
        """A key that sorts the shortest crossover first."""
        return self.length, "< >".index(self.side or " ")


def crossover(speedups: Mapping[int, Figure]) -> Crossover | None:
    """Return the length from which on an attention is faster than dense attention.

    Between two measured lengths, the speed-up is taken for a power of the length. Where it passes 1
    several times, the last pass counts.

    Args:
        speedups: length in tokens -> measured speed-up. Extrapolated ones are left out.

    Returns:
        The crossover; None without a measured speed-up.

    Example:
        >>> from danon.report.figure import Figure
        >>> crossover({1024: Figure(0.5), 4096: Figure(2.0)})
        Crossover(length=2048.0, side='')
    """
    measured = sorted(
        (length, figure.value) for length, figure in speedups.items() if not figure.extrapolated
    )
    if not measured:
        return None
    longest, last = measured[-1]
    if last < 1:
        return Crossover(longest, ">")
    for (shorter, slow), (longer, fast) in reversed(list(itertools.pairwise(measured))):
        if slow < 1 <= fast:
            share = math.log(1 / slow) / math.log(fast / slow)
            return Crossover(shorter * (longer / shorter) ** share)
    return Crossover(measured[0][0], "<")
