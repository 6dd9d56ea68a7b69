"""Intervals for shares of right answers."""

from __future__ import annotations

__all__ = ["difference_interval"]

CONFIDENCE = 0.95


def difference_interval(lost: int, gained: int, answers: int) -> tuple[float, float]:
    """Return a 95 % interval of the difference of two accuracies on the same questions.

    Each share gets the interval of Clopper and Pearson at 97.5 %. Both hold together in 95 % of
    cases: the interval of the difference is a little wide, never narrow.

    Args:
        lost: questions that the first alone answers right.
        gained: questions that the second alone answers right.
        answers: questions in all.

    Returns:
        Least and most of the first one's accuracy less the second one's.

    Raises:
        ValueError: counts that are negative, or more than there are questions.
    """
    from scipy.stats import binomtest  # takes half a second to import

    if min(lost, gained) < 0 or lost + gained > answers or answers < 1:
        raise ValueError(
            f"lost = {lost}, gained = {gained}: must be >= 0 and at most answers = {answers} in all"
        )
    each = (1 + CONFIDENCE) / 2
    first, second = (
        binomtest(count, answers).proportion_ci(each, method="exact") for count in (lost, gained)
    )
    return float(first.low - second.high), float(first.high - second.low)
