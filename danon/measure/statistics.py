"""Intervals for medians and exponents of power laws."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = [
    "FEWEST_ROUNDS",
    "Estimate",
    "fit_exponent",
    "median_interval",
    "next_look",
    "samples_outside",
]

FEWEST_ROUNDS = 8
"""With fewer the range of the samples is no interval: it covers the median too rarely."""
LOOKS_GROWTH = 1.5
"""Rounds go on from one look at the interval to the next by this factor."""
MISSED_PER_LOOK = 0.008
"""Chance that the interval of one look misses the median; all looks together miss it in 5.1 %."""

# Student's t, 97.5 % quantile for 1 .. 10 degrees of freedom.
_T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float


def next_look(rounds: int) -> int:
    """Rounds after which the interval is looked at again."""
    return max(FEWEST_ROUNDS, math.ceil(rounds * LOOKS_GROWTH))


def median_interval(samples: Sequence[float]) -> Estimate:
    """Median of the samples with a 95 % interval that holds however often one has looked.

    The interval lies between two order statistics. How many samples lie below the median is
    binomial, whatever their distribution, so that what :data:`MISSED_PER_LOOK` comes to over
    all looks of :func:`next_look` is known exactly: at most 5.1 % whenever rounds end.

    Fewer than :data:`FEWEST_ROUNDS` samples give their range, which is no 95 % interval.

    Raises:
        ValueError: no samples, or one that is not finite.
    """
    x = np.sort(np.asarray(samples, dtype=np.float64))
    if x.size == 0 or not np.isfinite(x).all():
        raise ValueError(f"samples = {list(samples)}: must be finite and at least one")
    outside = samples_outside(x.size)
    return Estimate(float(np.median(x)), float(x[outside]), float(x[-1 - outside]))


@functools.lru_cache(maxsize=4096)
def samples_outside(size: int) -> int:
    """How many of the sorted samples lie beyond the interval at each end."""
    allowed = int(MISSED_PER_LOOK / 2 * 2**64)  # of 2 ** 64: sizes of thousands overflow a float
    outside, chance, term = -1, 0, 1
    while True:
        chance += (term << 64) >> size
        if chance > allowed:
            return max(outside, 0)
        outside += 1
        term = term * (size - outside) // (outside + 1)


def fit_exponent(lengths: Sequence[float], values: Sequence[float]) -> Estimate:
    """Exponent p of ``values ~ lengths ** p``, least squares in logarithms.

    The 95 % interval comes from the residuals (Student's t), so it widens both with noise and
    where the points do not lie on one power law.

    Raises:
        ValueError: fewer than three different lengths, or a figure that is not positive.
    """
    n, y = np.asarray(lengths, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if n.shape != y.shape or np.unique(n).size < 3:
        raise ValueError(f"lengths = {list(lengths)}: an exponent needs three, one value each")
    if not (np.isfinite(y).all() and (y > 0).all() and (n > 0).all()):
        raise ValueError(f"values = {list(values)}: must be positive and finite")
    u = np.log(n) - np.log(n).mean()
    w = np.log(y) - np.log(y).mean()
    slope = float(u @ w / (u @ u))
    freedom = n.size - 2
    spread = float(np.sqrt(((w - slope * u) ** 2).sum() / freedom / (u @ u)))
    # beyond the table its last row: a little wide, never narrow
    half = _T975[min(freedom, len(_T975)) - 1] * spread
    return Estimate(slope, slope - half, slope + half)
