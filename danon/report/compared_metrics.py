"""The figures of a case that two runs can be compared by, and what stands in the way."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from danon.measure.machines import similar
from danon.report import configuration
from danon.report.figure import Figure
from danon.report.remarks import HARMLESS
from danon.report.run_noise import Judged, standard_error
from danon.report.run_pool import rounds_of
from danon.report.tables import figure, speedup
from danon.runs.case import CONTENDED_CORES as CONTENDED
from danon.runs.case import REFERENCE, CaseResult
from danon.runs.suite_info import Metric, SuiteInfo

__all__ = ["CONTENDED", "Pair", "compared_metrics", "read_figure"]

SPEEDUP = "speedup"
DERIVED = frozenset(
    {"time_s", "time_ratio", "useful_flops_per_s", "roofline_fraction", "time_exponent"}
)
"""Metrics that follow from the times, which the speed-up stands for; absolute times compare only
between equal fingerprints, and vary more than ratios even there."""
EXACT_SUITES = frozenset({"memory", "bounds"})
EXACT = frozenset({"error_vs_dense", "state_bytes", "memory_exponent"})
"""Metrics, besides those of :data:`EXACT_SUITES`, that are the same in every run of one code."""
ANSWERS = "answers"
"""Metric of a case with questions: how many were asked."""
TOLERANCE = 1e-3
"""Relative change of an exact metric that is none: recorded runs of one code agree to the bit."""
ROUNDING = 1e-5
"""Sizes of errors up to which float32 rounding decides."""


@dataclass(frozen=True)
class Pair:
    """Two measured results of one case, or of two attentions.

    Attributes:
        before: the first result.
        after: the second result.
        first_machine: fingerprint of the machine of the first.
        second_machine: fingerprint of the machine of the second.
        one_run: True for two attentions of one run.
        members: results that each of both is the mean of.
    """

    before: CaseResult
    after: CaseResult
    first_machine: Mapping[str, Any]
    second_machine: Mapping[str, Any]
    one_run: bool = False
    members: tuple[Sequence[CaseResult], Sequence[CaseResult]] = ((), ())

    def obstacle(self, metric: Metric, before: Figure, after: Figure, same_seed: bool) -> str:
        """Return the reason why a figure cannot be compared; empty if it can.

        Args:
            metric: of the figure.
            before: the first figure.
            after: the second figure.
            same_seed: True if both runs had the same inputs.
        """
        if not (math.isfinite(before.value) and math.isfinite(after.value)):
            return f"{metric.heading} is missing on one side"
        if not self._same_machine:
            return "measured on different machines"
        if not self.one_run and not self._same_settings:
            return "measured with other settings"
        if metric.name == SPEEDUP and (before.extrapolated or after.extrapolated):
            return "dense attention's time is extrapolated"
        if metric.name == SPEEDUP and (doubt := self._doubt()):
            return doubt
        if self.is_noisy(metric):
            both = (before, after)
            positive = all(math.isfinite(x.low) and x.low > 0 and x.value > 0 for x in both)
            return "" if positive else f"{metric.heading} has no interval"
        if self.is_share(metric):
            return ""
        if not same_seed:
            return "measured with another seed"
        if self.is_exact(metric) or before.value == after.value:
            return ""
        return f"{metric.heading} has no interval"

    def is_exact(self, metric: Metric) -> bool:
        """Return True if a metric is the same in every run of one code."""
        return metric.name in EXACT or self.before.case.suite in EXACT_SUITES

    def is_noisy(self, metric: Metric) -> bool:
        """Return True if a metric is tested beside the noise of the runs."""
        has_interval = f"{metric.name}_low" in self.before.metrics
        return not self.is_exact(metric) and (metric.name == SPEEDUP or has_interval)

    def is_share(self, metric: Metric) -> bool:
        """Return True if a metric is a share of right answers to so many questions."""
        return metric.name == "accuracy" and all(x.metrics.get(ANSWERS, 0) for x in self._sides)

    def share_change(self, before: Figure, after: Figure) -> Judged:
        """Return Fisher's exact test of two shares, and the interval of their ratio.

        Args:
            before: the first share.
            after: the second share.
        """
        from scipy import stats

        counts = [round(x.metrics[ANSWERS]) for x in self._sides]
        right = [round(x.value * n) for x, n in zip((before, after), counts, strict=True)]
        wrong = [n - r for n, r in zip(counts, right, strict=True)]
        p = float(stats.fisher_exact([right, wrong]).pvalue)
        ratio = stats.contingency.relative_risk(right[1], counts[1], right[0], counts[0])
        ends = ratio.confidence_interval(0.95)
        return Judged(p, _log(ends.low), _log(ends.high), math.nan)

    def differs(self, before: Figure, after: Figure) -> bool:
        """Return True if two exact figures are different.

        Args:
            before: the first figure.
            after: the second figure.
        """
        largest = max(abs(before.value), abs(after.value))
        return largest > ROUNDING and abs(after.value - before.value) > TOLERANCE * largest

    def error(self, before: Figure, after: Figure) -> float:
        """Return the standard error of the logarithm of a change, within the runs.

        Args:
            before: the first figure, with its interval.
            after: the second figure.
        """
        sides = zip((before, after), self._rounds, strict=True)
        return math.hypot(*(standard_error(x.low, x.high, rounds) for x, rounds in sides))

    @property
    def rounds(self) -> int:
        """Samples behind both figures: rounds, or trainings."""
        return sum(self._rounds)

    def repeated(self, metric: Metric) -> tuple[list[float], list[float]]:
        """Return the logarithms of a figure in the repeated runs of each side.

        Args:
            metric: of the figure, which is positive.
        """
        first, second = (
            [math.log(read_figure(x, metric).value) for x in side] for side in self.members
        )
        return first, second

    @property
    def _rounds(self) -> list[int]:
        return [rounds_of(x) for x in self._sides]

    @functools.cached_property
    def _same_machine(self) -> bool:
        return similar(self.first_machine, self.second_machine)

    @property
    def _sides(self) -> tuple[CaseResult, CaseResult]:
        return self.before, self.after

    def _doubt(self) -> str:
        """Return the reason why a time is in doubt; empty without one."""
        if any(CONTENDED in x.metrics for x in self._sides):
            return "other programs took its cores (†)"
        if any(setting not in HARMLESS for x in self._sides for setting in x.notes):
            return "it changed settings of the process (†)"
        return ""

    @functools.cached_property
    def _same_settings(self) -> bool:
        one, other = (configuration.digest(x) for x in self._sides)
        return one == other and self.before.semantics == self.after.semantics


def compared_metrics(suite: SuiteInfo, pair: Pair) -> Iterator[Metric]:
    """Yield the metrics of a case that two runs are compared by.

    Of a case with a task only its quality: the speed of models is measured too briefly.

    Args:
        suite: description of the suite.
        pair: both results.
    """
    judge = suite.judge(pair.before.case.task) if pair.before.case.task else None
    for metric in (judge,) if judge else suite.metrics:
        reference = pair.before.case.attention == pair.after.case.attention == REFERENCE
        if metric.name in DERIVED or not metric.better or (metric.name == SPEEDUP and reference):
            continue
        sides = (pair.before, pair.after)
        if any(math.isfinite(read_figure(side, metric).value) for side in sides):
            yield metric


def read_figure(result: CaseResult, metric: Metric) -> Figure:
    """Return a metric of a result with its interval; NaN if it has none.

    Args:
        result: measured.
        metric: description.
    """
    if metric.name == SPEEDUP and result.case.attention == REFERENCE:
        return Figure(1.0, 1.0, 1.0)
    if metric.name == SPEEDUP:
        return speedup({**result.metrics, "attention": result.case.attention})
    return figure(result.metrics, metric.name)


def _log(ratio: float) -> float:
    return math.log(ratio) if ratio > 0 else -math.inf
