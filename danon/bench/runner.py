"""The runner of cases: measures each case once, and makes a row of its outcome."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch

from danon.bench import suite as suites
from danon.bench.isolation import Isolation
from danon.bench.profile import Profile
from danon.bench.suite import Suite, SuiteContext, UnmeasuredError, row_without_figures
from danon.measure.background_work import BackgroundWork
from danon.measure.integrity import Integrity
from danon.measure.other_load import CpuReading, contended_cores
from danon.processes.suite_modules import import_suites
from danon.runs.case import CONTENDED_CORES, Case, CaseResult

__all__ = ["CaseRunner"]


class CaseRunner:
    """Measures every case by its suite, at most once in a session.

    Example:
        ``CaseRunner(PROFILES["smoke"], on_begin=print, on_result=print).result(case)``

    Args:
        profile: lengths, budgets and caps.
        on_begin: called with a case before it is measured.
        on_result: called with its outcome.
        earlier: outcomes of an interrupted session, which are not measured again.
        isolation: turns exceptions into rows; None: one without callbacks.
        integrity: record of the functions that measure, to detect replaced ones; None: no check.
        run_dir: folder of trained models; None: they are not stored.
        note: called with a message for the user at the end.
    """

    def __init__(
        self,
        profile: Profile,
        on_begin: Callable[[Case], object],
        on_result: Callable[[CaseResult], object],
        earlier: Iterable[CaseResult] = (),
        isolation: Isolation | None = None,
        integrity: Integrity | None = None,
        run_dir: Path | None = None,
        note: Callable[[str], object] = lambda text: None,
    ) -> None:
        import_suites()
        self._integrity = integrity
        self._isolation = isolation or Isolation()
        # Background work of an attention is reported once, but goes on: attention -> its work.
        self._left_running: dict[str, str] = {}
        self._on_begin, self._on_result = on_begin, on_result
        self._context = SuiteContext(profile, self.result, run_dir=run_dir, note=note)
        self._suites: dict[str, Suite] = {}
        self._results = {result.case: result for result in earlier}
        for result in self._results.values():
            self._suite(result.case).learn_from(result)

    def result(self, case: Case) -> CaseResult:
        """Return the outcome of a case, and measure it unless it was measured before.

        Args:
            case: a case of any suite.
        """
        if case not in self._results:
            self._on_begin(case)
            self._results[case] = result = self._isolation.outcome(
                case, self._outcome_with_integrity
            )
            self._on_result(result)
        return self._results[case]

    def samples(self, result: CaseResult) -> list[float]:
        """Return the seconds of each call behind a result."""
        return self._suite(result.case).samples(result)

    def _suite(self, case: Case) -> Suite:
        if case.suite not in self._suites:
            self._suites[case.suite] = suites.get(case.suite)(self._context)
        return self._suites[case.suite]

    def _outcome_with_integrity(self, case: Case) -> CaseResult:
        """Return the outcome; failed if the attention left work running or replaced a function."""
        before = BackgroundWork.now()
        result = self._outcome(case)
        if not case.task and (left := BackgroundWork.now().since(before)):
            self._left_running.setdefault(case.attention, left)
        reasons = (
            [f"leaves {self._left_running[case.attention]}"]
            if case.attention in self._left_running
            else []
        )
        if self._integrity is not None and (replaced := self._integrity.replaced()):
            self._integrity.restore()
            reasons.append(f"replaces {', '.join(replaced[:3])}, which measures it")
        if not reasons or result.status != "measured":
            return result
        return replace(
            row_without_figures(case, "failed", "; ".join(reasons)),
            semantics=result.semantics,
            check=result.check,
        )

    def _outcome(self, case: Case) -> CaseResult:
        before = CpuReading.now()
        try:
            result = self._suite(case).measure(case)
        except UnmeasuredError as error:
            return row_without_figures(case, error.status, str(error))
        cores = contended_cores(before, CpuReading.now(), torch.get_num_threads())
        if cores and case.device == "cpu" and "time_s" in result.metrics:
            return replace(result, metrics=result.metrics | {CONTENDED_CORES: cores})
        return result
