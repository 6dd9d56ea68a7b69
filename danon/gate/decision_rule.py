"""From log ratios of fresh pairs of processes to a decision, with its error controlled.

Screening looks at every case and lets go of what is clear; it may suspect wrongly. Confirmation
measures suspects again, in new pairs that know nothing of the first: a false alarm has to happen
there. Its test is Wilcoxon's signed ranks, exact: in a pair of equal sides, head / base and
base / head are equally likely, whatever the noise is like. Suspects and looks share ALPHA
(Bonferroni over the looks, Holm over the suspects).

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
"""Chance that a whole run of the gate raises an alarm where nothing has changed."""
SCREENING = (3, 4, 6, 8)
"""Pairs of every case after which screening looks."""
CONFIRMING = (9, 12, 16, 24)
"""Pairs of a suspect after which confirmation looks; fewer cannot reject."""
COVERAGE = 0.95
"""Of the two-sided interval that a case is cleared by."""
TYPICAL = 0.012
"""Spread of one pair's log ratio where nobody has measured it."""
PRIOR = 4
"""Pairs that this expectation counts for."""


class Decision(Enum):
    CLEAR = "clear"
    SUSPECT = "suspect"
    REGRESSED = "regressed"
    UNDECIDED = "undecided"


@dataclass(frozen=True)
class Tolerance:
    """Of one case, in logarithms of head / base.

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
    """Slowdown and interval from a few pairs; their own spread is moderated by the expected one.

    The middle is Hodges and Lehmann's, which one disturbed pair does not move far.
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
    """How many times as far as expected pairs vary now, going by many cases; 1 at least.

    Each case has too few pairs to tell. Of all of them the median is taken, which cases that differ
    for another reason do not move; the expectation counts as one case's ``PRIOR`` pairs.

    Args:
        samples: log ratios of a case, and the spread that is expected of them.
    """
    found = [(np.var(x, ddof=1) / spread**2, len(x) - 1) for x, spread in samples if len(x) > 1]
    if not found:
        return 1.0
    # Of a normal sample's variance the median is below the mean, the more the fewer pairs.
    squared = np.median([ratio * n / stats.chi2.median(n) for ratio, n in found])
    freedom = sum(n for _, n in found)
    return max(1.0, math.sqrt((PRIOR + freedom * squared) / (PRIOR + freedom)))


def slowdown(ratios: Sequence[float], spread: float) -> Estimate:
    """The same, as head / base."""
    found = estimate(ratios, spread)
    return Estimate(*(math.exp(x) for x in (found.value, found.low, found.high)))


def screen(ratios: Sequence[float], tolerance: Tolerance, *, last: bool) -> Decision:
    """Of a case after some pairs: clear, suspect, or undecided: measure on.

    Args:
        last: there is no time for more pairs: what is not clear is suspect.
    """
    found = estimate(ratios, tolerance.spread)
    if found.high < tolerance.limit:
        return Decision.CLEAR
    return Decision.SUSPECT if last or found.low > tolerance.slack else Decision.UNDECIDED


def confirm(
    ratios: Mapping[str, Sequence[float]], tolerances: Mapping[str, Tolerance], suspects: int
) -> dict[str, Decision]:
    """Of suspects, after one of the looks, from pairs that screening has not seen.

    Args:
        ratios: of those that are not decided yet.
        suspects: how many there were at first, decided ones included.
    """
    p = {
        name: float(
            stats.wilcoxon(
                np.asarray(x) - tolerances[name].slack, alternative="greater", method="exact"
            ).pvalue
        )
        for name, x in ratios.items()
    }
    found: dict[str, Decision] = {}
    rejecting = True
    for place, name in enumerate(sorted(p, key=p.__getitem__)):
        # Holm: the rest of the family counts, decided ones as if they were not
        left = max(1, suspects - place)
        rejecting = rejecting and p[name] <= ALPHA / len(CONFIRMING) / left
        if rejecting:
            found[name] = Decision.REGRESSED
        elif estimate(ratios[name], tolerances[name].spread).high < tolerances[name].limit:
            found[name] = Decision.CLEAR
        else:
            found[name] = Decision.UNDECIDED
    return found
