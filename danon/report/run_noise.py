"""Significance of changes between two runs, beside the noise that the runs themselves show.

    judged = judge([Change(0.18, 0.02, ("speed", "speedup"), "ucsa"), ...])
    judged[0].p      # 0.0004 after Holm's correction: the case moved

Two runs of the same code differ by more than the intervals of either: memory is placed anew, and
other programs disturb one run for as long as a case lasts. So the noise is estimated from the
comparison itself. A change between two runs is measured against the changes of the other
attentions' cases. With several runs of a side, it is measured against how those differ: by the
moderated t-test of Smyth 2004 ("Linear models and empirical Bayes methods", section 3), which
shrinks the variance of a figure towards that of the other attentions' figures.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from danon.measure.statistics import FEWEST_ROUNDS

__all__ = ["SIGNIFICANT", "Change", "Judged", "adjust", "interval_width", "judge", "standard_error"]

SIGNIFICANT = 0.05
"""Nominal chance that a comparison of equal runs names any case at all; docs/measurement.md has
the measured one, which is higher where single cases are disturbed."""
BETWEEN_RUNS = 0.02
"""Standard deviation, in logarithms, by which a figure differs between two quiet processes."""
PRIOR_CASES = 4
"""Weight of the assumption that intervals and :data:`BETWEEN_RUNS` explain the noise: so many
cases of other attentions outweigh it."""
CENTRE, TAIL = 0.5, 0.9
"""Quantiles of the other changes; the noisier of them counts, so that outliers widen the noise."""
DEGREES = 6
"""Degrees of freedom of Student's t: recorded changes have heavier tails than a normal law."""
PRIOR_DEGREES = 4
"""Weight of the variance of other figures beside that of a figure's own repeated runs."""
INTERVAL_DEVIATIONS = 2.65
"""Standard errors in half an interval of :func:`danon.measure.statistics.median_interval`."""


@dataclass(frozen=True)
class Change:
    """A change of one figure between two runs.

    Attributes:
        value: logarithm of after / before.
        error: standard error of it within the runs.
        group: figures whose noise is alike: suite and metric.
        family: attentions that move together, since they share code.
        rounds: samples behind it in both runs; few of them say little about its error.
        repeated: logarithms of the figure in the runs of each side; empty with one run a side.
    """

    value: float
    error: float
    group: tuple[str, ...]
    family: str
    rounds: int = 100
    repeated: tuple[Sequence[float], Sequence[float]] = ((), ())

    @property
    def degrees(self) -> int:
        """Degrees of freedom of the variance between repeated runs."""
        return sum(max(0, len(side) - 1) for side in self.repeated)

    @property
    def variance(self) -> float:
        """Variance between repeated runs of one side; NaN without degrees of freedom."""
        if not self.degrees:
            return math.nan
        squares = [np.var(side) * len(side) for side in self.repeated if len(side) > 1]
        return float(sum(squares)) / self.degrees


@dataclass(frozen=True)
class Judged:
    """A change beside its noise.

    Attributes:
        p: chance that noise alone makes any change of the comparison stand out as far.
        low: lower end of the 95 % interval of the change, in logarithms.
        high: upper end.
        least: least change that stands out, in logarithms; NaN if it depends on the figure.
    """

    p: float
    low: float
    high: float
    least: float


def standard_error(low: float, high: float, rounds: int) -> float:
    """Return the standard error of the logarithm of a median from its interval.

    Args:
        low: lower end, positive.
        high: upper end.
        rounds: samples behind the interval; with fewer than eight it is their range.
    """
    width = math.log(high / low)
    if rounds >= FEWEST_ROUNDS:
        return width / 2 / INTERVAL_DEVIATIONS
    # The error of the median over the mean range of a normal sample: right within 15 %.
    return width * 1.2 / max(rounds, 2)


def interval_width(error: float, rounds: int) -> float:
    """Return the width, in logarithms, of the interval that :func:`standard_error` reads.

    Args:
        error: standard error of the logarithm.
        rounds: samples behind the interval.
    """
    return error / standard_error(1.0, math.e, rounds)


def judge(changes: Sequence[Change], *, learn_noise: bool = True) -> list[Judged]:
    """Judge changes beside the noise of the other changes.

    What has moved is no noise: the others are then judged again without it.

    Args:
        changes: of a whole comparison.
        learn_noise: True to take the noise from the changes of other families; False where
            differences are expected, as between two attentions.
    """
    moved = set[int]()
    while True:
        judged = _judge(changes, moved, learn_noise)
        found = {i for i, verdict in enumerate(judged) if verdict.p < SIGNIFICANT}
        if not learn_noise or found <= moved:
            return judged
        moved |= found


def _judge(changes: Sequence[Change], moved: set[int], learn_noise: bool) -> list[Judged]:
    """Judge changes beside the noise of those that have not moved."""
    from scipy import stats

    spread = np.array([math.hypot(change.error, BETWEEN_RUNS) for change in changes])
    sizes = np.array([abs(change.value) for change in changes])
    factors = np.ones(len(changes))
    kinds = [(change.group, change.family) for change in changes]
    if learn_noise:
        settled = [(i, *kind) for i, kind in enumerate(kinds) if i not in moved]
        for group, family in set(kinds):
            others = [i for i, g, f in settled if g == group and f != family]
            here = [kind == (group, family) for kind in kinds]
            factors[here] = _noise_factor(sizes[others] / spread[others])
    noise = spread * factors
    degrees = np.array([min(DEGREES, max(1, change.rounds - 2)) for change in changes])
    for i, change in enumerate(changes):
        if change.degrees:
            alike = [
                other
                for other, kind in zip(changes, kinds, strict=True)
                if kind[0] == change.group and kind[1] != change.family
            ]
            noise[i] = _repeated_noise(change, alike)
            degrees[i] = PRIOR_DEGREES + change.degrees
    chances = adjust(2 * stats.t.sf(sizes / noise, degrees))
    half = stats.t.ppf(0.975, degrees) * noise
    least = stats.t.isf(SIGNIFICANT / 2 / max(len(changes), 1), degrees) * noise
    return [
        Judged(p, change.value - float(end), change.value + float(end), float(enough))
        for change, p, end, enough in zip(changes, chances, half, least, strict=True)
    ]


def _repeated_noise(change: Change, others: Sequence[Change]) -> float:
    """Return the standard error of a change between groups of repeated runs."""
    typical = [other.variance / _median_share(other.degrees) for other in others if other.degrees]
    prior = float(np.median(typical)) if typical else BETWEEN_RUNS**2
    total = PRIOR_DEGREES + change.degrees
    variance = (PRIOR_DEGREES * prior + change.degrees * change.variance) / total
    between = variance * sum(1 / len(side) for side in change.repeated)
    return max(math.sqrt(between), change.error)


@functools.cache
def _median_share(degrees: int) -> float:
    """Return the median of a variance of normal samples over the true one."""
    from scipy import stats

    return float(stats.chi2.median(degrees)) / degrees


def _noise_factor(deviations: np.ndarray) -> float:
    """Return by what factor noise exceeds the assumed one, from deviations of other families."""
    from scipy import stats

    if not deviations.size:
        return 1.0
    quantiles = np.array((CENTRE, TAIL))
    sizes = np.quantile(deviations, quantiles) / stats.norm.ppf((1 + quantiles) / 2)
    total = PRIOR_CASES + deviations.size
    return math.sqrt((PRIOR_CASES + deviations.size * float(sizes.max()) ** 2) / total)


def adjust(chances: Iterable[float]) -> list[float]:
    """Return chances after Holm's correction for how many there are.

    If the chances are right, one below 0.05 appears in at most 5 % of comparisons of equal runs,
    however the figures depend on each other.

    Args:
        chances: p-values of one comparison.
    """
    single = [float(chance) for chance in chances]
    adjusted = [1.0] * len(single)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(single)), key=single.__getitem__)):
        largest = max(largest, (len(single) - rank) * single[index])
        adjusted[index] = min(1.0, largest)
    return adjusted
