"""Forecast of the seconds of a longer case from those of shorter ones."""

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
"""Fewest calls of each side in a timing: one to warm up, three rounds."""
CHECK_CALLS = 3
"""Calls of the attention in a check, without its oracle."""
SELF_CALLS = 3
"""Cost, in calls, of an oracle that is the attention itself in float64."""
GRADIENT_CALLS = 16
"""Cost of its backward pass, in calls: usually 3, for the slowest baseline 16."""

UNKNOWN = 1.5
"""Exponent while a single length is measured: between linear and quadratic."""
MARGIN = 0.3
"""Added to a measured exponent: fixed costs make short lengths look flat."""

_Key = tuple[str, str, str]


@dataclass(frozen=True)
class Forecast:
    """The least seconds expected of a case, and the length that they were forecast from."""

    seconds: float
    length: int


class CostForecaster:
    """Seconds of a call, by attention, dtype, kind of call and length."""

    def __init__(self) -> None:
        self._calls: dict[_Key, dict[int, float]] = defaultdict(dict)

    def add(self, case: Case, call_s: float, kind: str = "") -> None:
        """Store the shortest call of a case; disturbances only add time.

        Args:
            case: the measured one.
            call_s: seconds of the call.
            kind: name of another kind of call; empty: a call in the phase of the case.
        """
        self._calls[_key(case, kind)][case.length] = call_s

    def forecast(
        self, case: Case, calls: int, kind: str = "", exponent: float = UNKNOWN
    ) -> Forecast | None:
        """Return the least seconds of some calls; None if no shorter case was measured.

        From one shorter length, time grows with the given exponent. From two or more it grows as
        between the last two, plus a margin, but at least linearly and at most quadratically.

        Args:
            case: the one to forecast.
            calls: calls of the attention that it takes.
            kind: as in :meth:`add`.
            exponent: growth while a single length is measured.
        """
        call_s_at = {n: s for n, s in self._calls[_key(case, kind)].items() if n <= case.length}
        if not call_s_at:
            return None
        *before, last = sorted(call_s_at)
        power = exponent
        if before:
            measured = math.log(call_s_at[last] / call_s_at[before[-1]]) / math.log(
                last / before[-1]
            )
            power = min(max(measured + MARGIN, 1.0), 2.0)
        call_s = call_s_at[last] * (case.length / last) ** power
        return Forecast(calls * call_s, last)


def _key(case: Case, kind: str) -> _Key:
    return case.attention, case.dtype, kind or case.phase
