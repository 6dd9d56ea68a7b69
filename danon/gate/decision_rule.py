"""From log ratios of fresh pairs of processes to a decision, with its error controlled.

Screening looks at every case and clears most; it may suspect wrongly. Confirmation measures
suspects again, in new pairs that are independent of the first: a false alarm has to happen there.
Its test is Wilcoxon's signed ranks, exact. In a pair of equal sides, head / base and base / head
are equally likely, whatever the noise is like. Suspects and looks share ALPHA (Bonferroni over the
looks, Holm over the suspects).

    H0: slowdown <= tolerance        alarm when it is rejected
    clear when the interval of the slowdown ends below ``limit``
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
from scipy import stats

from danon.measure.statistics import Estimate

__all__ = [
    "CONFIRMING",
    "SCREENING",
    "Decision",
    "Tolerance",
    "confirm",
    "estimate",
    "noise_factor",
    "screen",
    "slowdown",
]

ALPHA = 0.01
"""Probability that a whole run of the gate raises an alarm where nothing has changed."""
SCREENING = (3, 4, 6, 8)
"""Pairs of every case after which screening looks."""
CONFIRMING = (9, 12, 16, 24)
"""Pairs of a suspect after which confirmation looks; fewer cannot reject."""
COVERAGE = 0.95
"""Coverage of the two-sided interval that a case is cleared by."""
TYPICAL = 0.012
"""Standard deviation of one pair's log ratio where nobody has measured it."""
PRIOR = 4
"""Pairs that the expected spread counts for."""


class Decision(Enum):
    """State of a case after a look."""

    CLEAR = "clear"
    SUSPECT = "suspect"
    REGRESSED = "regressed"
    UNDECIDED = "undecided"


@dataclass(frozen=True)
class Tolerance:
    """Tolerance of one case, in logarithms of head / base.

    Attributes:
        slack: a slowdown up to this is none.
        limit: a slowdown of this must not pass; between the two either answer is right.
        spread: standard deviation of one pair, as calibrated.
    """

    slack: float = 0.01
    limit: float = 0.05
    spread: float = TYPICAL

    def __post_init__(self) -> None:
        if not (0 <= self.slack < self.limit and self.spread > 0):
            raise ValueError(
                f"slack = {self.slack}, limit = {self.limit}, spread = {self.spread}: must be "
                "0 <= slack < limit and 0 < spread"
            )


def estimate(ratios: Sequence[float], spread: float) -> Estimate:
    """Estimate the slowdown from a few pairs: log(head / base) with its interval.

    The middle is Hodges and Lehmann's, which one disturbed pair does not move far. The interval
    weighs the spread of the pairs with the expected one.

    Args:
        ratios: log ratios of the pairs, two or more.
        spread: expected standard deviation of one pair.

    Raises:
        ValueError: There are fewer than two pairs.
    """
    x = np.asarray(ratios, dtype=np.float64)
    if x.size < 2:
        raise ValueError(f"{x.size} pairs: an interval takes two")
    walsh = np.add.outer(x, x)[np.triu_indices(x.size)] / 2
    middle = float(np.median(walsh))
    freedom = x.size - 1
    variance = (PRIOR * spread**2 + freedom * float(x.var(ddof=1))) / (PRIOR + freedom)
    half = stats.t.ppf((1 + COVERAGE) / 2, PRIOR + freedom) * math.sqrt(variance / x.size)
    return Estimate(middle, middle - half, middle + half)


def noise_factor(samples: Iterable[tuple[Sequence[float], float]]) -> float:
    """Return how many times as far as expected the pairs of many cases vary now; 1 at least.

    One case has too few pairs to tell. The median over cases is taken, which cases that differ for
    another reason do not move. The expectation counts as one case's ``PRIOR`` pairs.

    Args:
        samples: log ratios of a case, and their expected spread.
    """
    variances = [(np.var(x, ddof=1) / spread**2, len(x) - 1) for x, spread in samples if len(x) > 1]
    if not variances:
        return 1.0
    # The median of a normal sample's variance is below its mean, the more the fewer pairs.
    squared = np.median([ratio * n / stats.chi2.median(n) for ratio, n in variances])
    freedom = sum(n for _, n in variances)
    return max(1.0, math.sqrt((PRIOR + freedom * squared) / (PRIOR + freedom)))


def slowdown(ratios: Sequence[float], spread: float) -> Estimate:
    """Estimate head / base with its interval; arguments as in :func:`estimate`."""
    logs = estimate(ratios, spread)
    return Estimate(*(math.exp(x) for x in (logs.value, logs.low, logs.high)))


def screen(ratios: Sequence[float], tolerance: Tolerance, *, last: bool) -> Decision:
    """Decide whether a case is clear, suspect, or undecided, which means more pairs.

    Args:
        ratios: log ratios of the pairs so far.
        tolerance: of the case.
        last: True if there will be no more pairs: a case that is not clear is suspect.
    """
    interval = estimate(ratios, tolerance.spread)
    if interval.high < tolerance.limit:
        return Decision.CLEAR
    return Decision.SUSPECT if last or interval.low > tolerance.slack else Decision.UNDECIDED


def confirm(
    ratios: Mapping[str, Sequence[float]], tolerances: Mapping[str, Tolerance], suspects: int
) -> dict[str, Decision]:
    """Decide about suspects at one of the looks, from pairs that screening has not seen.

    Args:
        ratios: by case, log ratios of those that are not decided yet.
        tolerances: by case.
        suspects: number of suspects at first, decided ones included.
    """
    p = {
        name: float(
            stats.wilcoxon(
                np.asarray(x) - tolerances[name].slack, alternative="greater", method="exact"
            ).pvalue
        )
        for name, x in ratios.items()
    }
    decisions: dict[str, Decision] = {}
    rejecting = True
    for rank, name in enumerate(sorted(p, key=p.__getitem__)):
        # Holm: the rest of the family counts, decided ones as if they were not
        left = max(1, suspects - rank)
        rejecting = rejecting and p[name] <= ALPHA / len(CONFIRMING) / left
        if rejecting:
            decisions[name] = Decision.REGRESSED
        elif estimate(ratios[name], tolerances[name].spread).high < tolerances[name].limit:
            decisions[name] = Decision.CLEAR
        else:
            decisions[name] = Decision.UNDECIDED
    return decisions
