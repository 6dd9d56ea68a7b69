"""What a longer case will take, from what shorter ones took."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

from danon.runs.case import Case

__all__ = [
    "CHECK_CALLS",
    "GRADIENT_CALLS",
    "SELF_CALLS",
    "TIMING_CALLS",
    "CostForecaster",
    "Forecast",
]

TIMING_CALLS = 4
"""Calls of each side that the shortest timing makes: one to warm up, three rounds."""
CHECK_CALLS = 3
"""Calls of the attention that a check makes, its oracle apart."""
SELF_CALLS = 3
"""What an oracle costs, in calls, that is the attention itself in float64."""
GRADIENT_CALLS = 16
"""What its backward pass may cost, in calls: 3 as a rule, 16 of the slowest baseline."""

UNKNOWN = 1.5
"""Exponent while there is a single length to go by."""
MARGIN = 0.3
"""Added to a measured exponent: fixed costs make short lengths look flat."""

_Key = tuple[str, str, str]


@dataclass(frozen=True)
class Forecast:
    """Seconds that a case should take at least, and the length this was concluded from."""

    seconds: float
    length: int


class CostForecaster:
    """Seconds of a call, by attention, dtype, phase and length."""

    def __init__(self) -> None:
        self._calls: dict[_Key, dict[int, float]] = defaultdict(dict)

    def add(self, case: Case, call_s: float) -> None:
        """Note the shortest call of a case: what disturbs the machine only adds to it."""
        self._calls[_key(case)][case.length] = call_s

    def forecast(self, case: Case, calls: int) -> Forecast | None:
        """What so many calls take at least; None where nothing shorter has been measured.

        One shorter length: growth between linear and quadratic. Two or more: the growth between the
        last two, plus a margin, and never taken for less than linear or more than quadratic.
        """
        known = {n: s for n, s in self._calls[_key(case)].items() if n <= case.length}
        if not known:
            return None
        *before, last = sorted(known)
        power = 1.0 if case.suite == "bounds" else UNKNOWN  # its rows are sampled
        if before:
            measured = math.log(known[last] / known[before[-1]]) / math.log(last / before[-1])
            power = min(max(measured + MARGIN, 1.0), 2.0)
        call_s = known[last] * (case.length / last) ** power
        return Forecast(calls * call_s, last)


def _key(case: Case) -> _Key:
    # a call of the suite bounds is its whole case
    return case.attention, case.dtype, "bounds" if case.suite == "bounds" else case.phase
