"""Screening and confirmation of many cases, as :mod:`danon.gate.decide` has them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter

from danon.gate import decide
from danon.gate.comparison import Finding, Row
from danon.gate.decide import CONFIRMING, SCREENING, Tolerance, Verdict
from danon.gate.pair import Measurement
from danon.measure.case import Case

__all__ = ["Say", "Trial"]

Measure = Callable[[Sequence[Case], int], Iterable[tuple[Case, Measurement]]]
"""Measures each case once, in processes of its own; the number is a seed."""
Say = Callable[[str, int, int], object]
"""Hears what is going on: a stage, cases of it done, cases in all."""


@dataclass
class Trial:
    """Measures until every case is decided.

    Args:
        budget_s: seconds after which no new processes begin.
        seed: of all orders.
    """

    measure: Measure
    budget_s: float
    seed: int
    say: Say
    tolerances: Mapping[str, Tolerance] = field(default_factory=dict)

    def rows(self, cases: Sequence[Case]) -> dict[Case, Row]:
        """One for each case: same, faster, slower or undecided."""
        self._start, self._turn = perf_counter(), 0
        first: dict[Case, list[Measurement]] = {case: [] for case in cases}
        suspects = self._screen(first)
        # The decision rests on what did not raise the suspicion.
        second: dict[Case, list[Measurement]] = {case: [] for case in suspects}
        slower, undecided = self._confirm(second)
        found: dict[Case, Row] = {}
        for case in cases:
            finding: Finding = (
                "slower" if case in slower else "undecided" if case in undecided else "same"
            )
            found[case] = self._row(case, second.get(case) or first[case], finding)
        return found

    def _screen(self, samples: dict[Case, list[Measurement]]) -> list[Case]:
        """Suspects; measures every case until it is clear or suspect."""
        left, suspects = list(samples), list[Case]()
        for look in SCREENING:
            if not self._collect("screening", samples, left, look):
                return suspects + left
            for case in list(left):
                found = decide.screen(
                    _ratios(samples[case]), self._tolerance(case), last=look == SCREENING[-1]
                )
                if found is not Verdict.UNDECIDED:
                    left.remove(case)
                if found is Verdict.SUSPECT:
                    suspects.append(case)
        return suspects

    def _confirm(
        self, samples: dict[Case, list[Measurement]]
    ) -> tuple[set[Case], set[Case]]:  # fmt: skip
        """Those that are slower, and those that time was too short for."""
        slower: set[Case] = set()
        left = {case.id: case for case in samples}
        for look in CONFIRMING:
            if not self._collect("confirming", samples, list(left.values()), look):
                break
            found = decide.confirm(
                {name: _ratios(samples[case]) for name, case in left.items()},
                {name: self._tolerance(case) for name, case in left.items()},
                len(samples),
            )
            slower |= {left[name] for name, v in found.items() if v is Verdict.REGRESSED}
            left = {n: case for n, case in left.items() if found[n] is Verdict.UNDECIDED}
        return slower, set(left.values())

    def _collect(
        self, stage: str, samples: dict[Case, list[Measurement]], cases: Sequence[Case], count: int
    ) -> bool:
        """Bring each of the cases to so many measurements; False if the time is over before."""
        while any(len(samples[case]) < count for case in cases):
            if perf_counter() - self._start > self.budget_s:
                return False
            self._turn += 1
            some = self.measure(cases, 1000 * self.seed + self._turn)
            for done, (case, measured) in enumerate(some, 1):
                samples[case].append(measured)
                self.say(f"{stage}, round {len(samples[case])}", done, len(cases))
        return True

    def _row(self, case: Case, some: Sequence[Measurement], finding: Finding) -> Row:
        tolerance = self._tolerance(case)
        if len(some) < 2:
            return Row(case, "undecided", pairs=len(some), note="the time was over")
        ratio = decide.slowdown(_ratios(some), tolerance.spread)
        if finding == "same" and ratio.high < 1 - tolerance.slack:
            finding = "faster"
        base = median(seconds for m in some for seconds in m.base)
        head = median(seconds for m in some for seconds in m.head)
        return Row(case, finding, ratio, len(some), base, head)

    def _tolerance(self, case: Case) -> Tolerance:
        return self.tolerances.get(case.id, Tolerance())


def _ratios(some: Sequence[Measurement]) -> list[float]:
    return [m.log_ratio for m in some]
