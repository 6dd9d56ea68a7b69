"""Intervals for medians and exponents of power laws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["FEWEST_ROUNDS", "Estimate", "fit_exponent", "median_interval"]

FEWEST_ROUNDS = 6
"""With fewer, no interval between two of the samples covers the median in 95 % of cases."""

_RESAMPLES = 2000
# Student's t, 97.5 % quantile for 1 .. 10 degrees of freedom.
_T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float


def median_interval(samples: Sequence[float], *, seed: int = 0) -> Estimate:
    """Median of the samples with a 95 % percentile-bootstrap interval.

    Fewer than :data:`FEWEST_ROUNDS` samples give their full range, the widest they allow.

    Raises:
        ValueError: no samples, or one that is not finite.
    """
    x = np.asarray(samples, dtype=np.float64)
    if x.size == 0 or not np.isfinite(x).all():
        raise ValueError(f"samples = {list(samples)}: must be finite and at least one")
    middle = float(np.median(x))
    if x.size < FEWEST_ROUNDS:
        return Estimate(middle, float(x.min()), float(x.max()))
    draws = np.random.default_rng(seed).integers(0, x.size, size=(_RESAMPLES, x.size))
    low, high = np.quantile(np.median(x[draws], axis=1), (0.025, 0.975))
    return Estimate(middle, float(low), float(high))


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
