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
CONFIDENCE = 0.95
"""Confidence of the interval of an exponent."""


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval.

    Attributes:
        value: the figure.
        low: lower end of the interval.
        high: upper end of the interval.
    """

    value: float
    low: float
    high: float


def next_look(rounds: int) -> int:
    """Return the number of rounds after which the interval is looked at again.

    Args:
        rounds: at the last look.
    """
    return max(FEWEST_ROUNDS, math.ceil(rounds * LOOKS_GROWTH))


def median_interval(samples: Sequence[float]) -> Estimate:
    """Return the median with a 95 % interval that holds however often one has looked.

    The interval lies between two order statistics. The number of samples below the median is
    binomial, whatever their distribution. So the sum of :data:`MISSED_PER_LOOK` over all looks of
    :func:`next_look` is known exactly: at most 5.1 %, whenever rounds end.

    Fewer than :data:`FEWEST_ROUNDS` samples give their range, which is no 95 % interval.

    Args:
        samples: in any order.

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
    """Return the number of sorted samples that lie beyond the interval at each end.

    Args:
        size: number of samples.
    """
    # In integers: called between timed rounds, where importing scipy.stats (0.8 s) would count.
    allowed = int(MISSED_PER_LOOK / 2 * 2**64)  # of 2 ** 64: sizes of thousands overflow a float
    outside, chance, term = -1, 0, 1
    while True:
        chance += (term << 64) >> size
        if chance > allowed:
            return max(outside, 0)
        outside += 1
        term = term * (size - outside) // (outside + 1)


def fit_exponent(lengths: Sequence[float], values: Sequence[float]) -> Estimate:
    """Fit the exponent p of ``values ~ lengths ** p`` by least squares in logarithms.

    The 95 % interval comes from the residuals (Student's t). It widens with noise, and where the
    points do not lie on one power law.

    Args:
        lengths: three or more different ones.
        values: one for each length.

    Raises:
        ValueError: fewer than three different lengths, or a figure that is not positive.
    """
    n, y = np.asarray(lengths, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if n.shape != y.shape or np.unique(n).size < 3:
        raise ValueError(f"lengths = {list(lengths)}: an exponent needs three, one value each")
    if not (np.isfinite(y).all() and (y > 0).all() and (n > 0).all()):
        raise ValueError(f"values = {list(values)}: must be positive and finite")
    from scipy import stats  # takes 0.8 s to import

    fit = stats.linregress(np.log(n), np.log(y))
    slope = float(fit.slope)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n.size - 2) * fit.stderr)
    return Estimate(slope, slope - half, slope + half)
