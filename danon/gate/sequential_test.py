"""Screening and confirmation of many cases by the rules of :mod:`danon.gate.decision_rule`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from time import perf_counter

from danon.gate import decision_rule
from danon.gate.decision_rule import CONFIRMING, SCREENING, Decision, Tolerance
from danon.gate.paired_processes import Measurement
from danon.gate.result import Finding, Row
from danon.gate.worker_client import OutputError, TimeOverError
from danon.gate.workspace import Progress
from danon.runs.case import Case

__all__ = ["Measure", "SequentialTest"]

Measure = Callable[[Sequence[Case], int], Iterable[tuple[Case, Measurement | OutputError]]]
"""Measures each case once, in processes of its own; the number is a seed.

It may raise TimeOverError.
"""


@dataclass
class SequentialTest:
    """Measures cases until each is decided.

    Attributes:
        measure: called for every round.
        tolerances: by :attr:`Case.id`; a case without one has the default.
        end: value of ``perf_counter`` after which nothing is measured.
        progress: hears how far the test is.
    """

    measure: Measure
    tolerances: Mapping[str, Tolerance] = field(default_factory=dict)
    end: float = math.inf
    progress: Progress = lambda stage, done, total: None

    def rows(self, cases: Sequence[Case]) -> dict[Case, Row]:
        """Return a row for each case: same, faster, slower, failed or undecided.

        Args:
            cases: to measure and decide.
        """
        self._round, self._over = 0, False
        self._failed: dict[Case, str] = {}
        self._noise = 1.0
        first: dict[Case, list[Measurement]] = {case: [] for case in cases}
        suspects = self._screen(first)
        # The decision rests on what did not raise the suspicion.
        second: dict[Case, list[Measurement]] = {case: [] for case in suspects}
        slower, undecided = self._confirm(second, first)
        self._noise = self._noise_of(first, second)
        rows: dict[Case, Row] = {}
        for case in cases:
            finding: Finding = (
                "slower" if case in slower else "undecided" if case in undecided else "same"
            )
            rows[case] = self._row(case, first[case], second.get(case), finding)
        return rows

    def _screen(self, samples: dict[Case, list[Measurement]]) -> list[Case]:
        """Measure every case until it is clear or suspect; return the suspects."""
        left, suspects = list(samples), list[Case]()
        for look in SCREENING:
            if not self._collect("screening", samples, left, look):
                return [case for case in suspects + left if case not in self._failed]
            left = [case for case in left if case not in self._failed]
            self._noise = self._noise_of(samples)
            for case in list(left):
                decision = decision_rule.screen(
                    _ratios(samples[case]), self._tolerance(case), last=look == SCREENING[-1]
                )
                if decision is not Decision.UNDECIDED:
                    left.remove(case)
                if decision is Decision.SUSPECT:
                    suspects.append(case)
        return [case for case in suspects if case not in self._failed]

    def _confirm(
        self, samples: dict[Case, list[Measurement]], first: Mapping[Case, list[Measurement]]
    ) -> tuple[set[Case], set[Case]]:
        """Return the slower cases, and those that the time was too short for."""
        slower: set[Case] = set()
        left = {case.id: case for case in samples}
        for look in CONFIRMING:
            if not self._collect("confirming", samples, list(left.values()), look):
                break
            left = {n: case for n, case in left.items() if case not in self._failed}
            self._noise = self._noise_of(first, samples)
            decisions = decision_rule.confirm(
                {name: _ratios(samples[case]) for name, case in left.items()},
                {name: self._tolerance(case) for name, case in left.items()},
                len(samples),
            )
            slower |= {left[name] for name, d in decisions.items() if d is Decision.REGRESSED}
            left = {n: case for n, case in left.items() if decisions[n] is Decision.UNDECIDED}
        return slower, set(left.values())

    def _collect(
        self, stage: str, samples: dict[Case, list[Measurement]], cases: Sequence[Case], count: int
    ) -> bool:
        """Bring each case to so many measurements; return False if the time is over before."""
        while left := [
            case for case in cases if case not in self._failed and len(samples[case]) < count
        ]:
            self._round += 1
            self._over = self._over or perf_counter() > self.end
            try:
                if self._over:
                    return False
                for done, (case, measured) in enumerate(self.measure(left, self._round), 1):
                    if isinstance(measured, OutputError):
                        self._failed[case] = str(measured)
                        continue
                    samples[case].append(measured)
                    self.progress(f"{stage}, round {len(samples[case])}", done, len(left))
            except TimeOverError:
                self._over = True
        return True

    def _row(
        self,
        case: Case,
        first: Sequence[Measurement],
        second: Sequence[Measurement] | None,
        finding: Finding,
    ) -> Row:
        if case in self._failed:
            return Row(case, "failed", note=self._failed[case])
        samples, tolerance = second or first, self._tolerance(case)
        if len(samples) < 2:
            return Row(case, "undecided", pairs=len(samples), note="the time was over")
        ratio = decision_rule.slowdown(_ratios(samples), tolerance.spread)
        note = ""
        if finding == "same" and ratio.high < 1 - tolerance.slack:
            finding = "faster"
        elif finding == "undecided":
            note = (
                f"the time was over before new pairs confirmed or denied it ({len(second or ())} "
                f"of {CONFIRMING[0]} or more)"
                if self._over
                else f"{len(samples)} pairs vary too much to decide"
            )
        base = median(seconds for m in samples for seconds in m.base)
        head = median(seconds for m in samples for seconds in m.head)
        return Row(case, finding, ratio, len(samples), base, head, note=note)

    def _tolerance(self, case: Case) -> Tolerance:
        calibrated = self._calibrated(case)
        return replace(calibrated, spread=calibrated.spread * self._noise)

    def _calibrated(self, case: Case) -> Tolerance:
        return self.tolerances.get(case.id, Tolerance())

    def _noise_of(self, *stages: Mapping[Case, list[Measurement]]) -> float:
        """Return how many times as far as calibrated the pairs of this run vary."""
        return decision_rule.noise_factor(
            (_ratios(measured), self._calibrated(case).spread)
            for samples in stages
            for case, measured in samples.items()
        )


def _ratios(samples: Sequence[Measurement]) -> list[float]:
    return [m.log_ratio for m in samples]
