"""Forecasts the seconds of a longer case from those of shorter ones."""

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
    "UNKNOWN",
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
"""Exponent while there is a single length to go by: between linear and quadratic."""
MARGIN = 0.3
"""Added to a measured exponent: fixed costs make short lengths look flat."""

_Key = tuple[str, str, str]


@dataclass(frozen=True)
class Forecast:
    """Seconds that a case should take at least, and the length this was concluded from."""

    seconds: float
    length: int


class CostForecaster:
    """Seconds of a call, by attention, dtype, kind of call and length."""

    def __init__(self) -> None:
        self._calls: dict[_Key, dict[int, float]] = defaultdict(dict)

    def add(self, case: Case, call_s: float, kind: str = "") -> None:
        """Note the shortest call of a case: what disturbs the machine only adds to it.

        Args:
            case: that was measured.
            call_s: seconds of the call.
            kind: of call; empty: a call in the phase of the case.
        """
        self._calls[_key(case, kind)][case.length] = call_s

    def forecast(
        self, case: Case, calls: int, kind: str = "", exponent: float = UNKNOWN
    ) -> Forecast | None:
        """Return what so many calls take at least; None where nothing shorter has been measured.

        One shorter length: growth with the given exponent. Two or more: the growth between the last
        two, plus a margin, and never taken for less than linear or more than quadratic.

        Args:
            case: that may be measured.
            calls: of the attention that it takes.
            kind: as in :meth:`add`.
            exponent: of the growth while there is a single length to go by.
        """
        known = {n: s for n, s in self._calls[_key(case, kind)].items() if n <= case.length}
        if not known:
            return None
        *before, last = sorted(known)
        power = exponent
        if before:
            measured = math.log(known[last] / known[before[-1]]) / math.log(last / before[-1])
            power = min(max(measured + MARGIN, 1.0), 2.0)
        call_s = known[last] * (case.length / last) ** power
        return Forecast(calls * call_s, last)


def _key(case: Case, kind: str) -> _Key:
    return case.attention, case.dtype, kind or case.phase
