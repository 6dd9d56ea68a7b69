"""Figures that several suites give alike."""

from __future__ import annotations

from statistics import median

from danon.measure.timing import Paired

__all__ = ["ratios"]


def ratios(pair: Paired) -> dict[str, float]:
    """The figures of a paired timing."""
    return {
        "time_ratio": pair.ratio.value,
        "time_ratio_low": pair.ratio.low,
        "time_ratio_high": pair.ratio.high,
        "speedup": 1 / pair.ratio.value,
        "reference_time_s": median(pair.reference),
        "conclusive": float(pair.conclusive),
    }
