"""A suite whose case is one call of an attention, checked against its oracle before its figures."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import ClassVar

import torch

from danon.attention import registry
from danon.attention.base import BaseAttention
from danon.bench.cost_forecast import CHECK_CALLS, SELF_CALLS, TIMING_CALLS, UNKNOWN
from danon.bench.profile import Profile
from danon.bench.shapes import config_for, configuration
from danon.bench.suite import Suite, UnmeasuredError, extra_metrics, row_without_figures
from danon.bench.verification import Correctness
from danon.bench.workload import Workload
from danon.runs.case import Case, CaseResult

__all__ = ["CallSuite", "has_definition", "over_cap", "refuse_if", "unavailable"]

DENSE_4096_S = 0.07
"""Dense forward pass in float32 on two cores; only the proportions between cases matter."""

Figures = tuple[dict[str, float], dict[str, list[float]]]
"""Metrics, and the samples behind them: ``candidate_s`` are the seconds of each call."""


class CallSuite(Suite):
    """A suite that checks a call against its oracle, then measures it: implement :meth:`figures`.

    Example:
        ``figures`` of a suite for energy returns
        ``{"energy_j": joules_of(workload.call())}, {}``.

    Attributes:
        takes_extra_metrics: True if :func:`~danon.bench.suite.extra_metric` may add figures.
        times_calls: True if the samples ``candidate_s`` are seconds of a call in the case's phase,
            so that they forecast cases of other suites; else they forecast only this suite's.
        exponent: assumed growth of those seconds while a single length is measured.
    """

    takes_extra_metrics: ClassVar[bool] = True
    times_calls: ClassVar[bool] = False
    exponent: ClassVar[float] = UNKNOWN

    @abstractmethod
    def figures(self, workload: Workload, correctness: Correctness) -> Figures:
        """Measure a call that passed its check.

        Args:
            workload: the attention, q, k and v (B, H, N, D), and ways to call it.
            correctness: outcome of its check.

        Returns:
            Metrics by name, and samples by name. Samples ``candidate_s``, in seconds, are the basis
            of forecasts for longer cases; without them the case forecasts nothing.

        Raises:
            UnmeasuredError: the case has no figures; status and reason of its row.
        """

    def calls(self, case: Case) -> int:
        """Return the fewest calls of the attention that a case takes."""
        return TIMING_CALLS + CHECK_CALLS + (0 if has_definition(case) else SELF_CALLS)

    def expensive(self, workload: Workload, correctness: Correctness) -> str:
        """Return the reason if a checked case is too expensive to measure; else empty."""
        return ""

    def measure(self, case: Case) -> CaseResult:
        """Measure a case, unless it cannot run here, is too expensive, or its check fails."""
        if reason := unavailable(case, backward=case.phase == "forward+backward"):
            return row_without_figures(case, "unavailable", reason)
        if reason := self._too_long(case):
            return row_without_figures(case, "over budget", reason)
        workload = Workload(case)
        correctness = self.context.verifier.verdict(workload)
        if correctness.reason:
            self._note_cost(case, correctness.seconds / (CHECK_CALLS + SELF_CALLS))
            return replace(
                row_without_figures(case, "failed", correctness.reason),
                semantics=workload.module.description,
                check=correctness.info,
            )
        if reason := self.expensive(workload, correctness):
            row = row_without_figures(case, "over budget", reason)
            return replace(row, check=correctness.info)
        metrics, samples = self.figures(workload, correctness)
        metrics |= extra_metrics(self.name, workload, metrics)
        if "candidate_s" in samples:
            self._note_cost(case, min(samples["candidate_s"]))
        return CaseResult(
            case,
            "measured",
            "",
            workload.module.description,
            metrics,
            samples,
            correctness.info,
            config=configuration(case.attention, workload.module),
        )

    def learn_from(self, result: CaseResult) -> None:
        """Take the seconds of a case in an earlier session as a basis of forecasts."""
        if "candidate_s" in result.samples:
            self._note_cost(result.case, min(result.samples["candidate_s"]))

    @property
    def _kind_of_call(self) -> str:
        return "" if self.times_calls else self.name

    def _note_cost(self, case: Case, seconds: float) -> None:
        self.context.costs.add(case, seconds, self._kind_of_call)

    def _too_long(self, case: Case) -> str:
        """Return the reason if the case is too long for the profile; else empty."""
        shorter = self.shorter(self.profile, case)
        if shorter is not None and self.context.result(shorter).status == "over budget":
            return f"{shorter.length} tokens are over budget already"
        cap_s = self.profile.cap(self.name)
        forecast = self.context.costs.forecast(
            case, self.calls(case), self._kind_of_call, self.exponent
        )
        if forecast is None or forecast.seconds <= cap_s:
            return ""
        return over_cap(forecast.seconds, forecast.length, cap_s)

    @classmethod
    def seconds(cls, profile: Profile, case: Case) -> float:
        """Return the expected seconds of a case, roughly, for the progress bar."""
        dense_s = DENSE_4096_S * (case.length / 4096) ** 2
        dense_s *= (0.5 if case.dtype != "float32" else 1) * (3.5 if case.phase != "forward" else 1)
        return min(0.2 + 4 * dense_s, profile.cap(cls.name))


def has_definition(case: Case) -> bool:
    """Return True if the oracle is a definition, not the attention itself in float64."""
    return registry.get(case.attention).oracle is not BaseAttention.oracle


def unavailable(case: Case, *, backward: bool, length: int | None = None) -> str | None:
    """Return the reason if an attention cannot run a case on this machine; else None.

    Args:
        case: attention, dtype, device and shape.
        backward: True if gradients are needed.
        length: tokens of a call; None: those of the case.
    """
    return registry.get(case.attention).unavailable(
        config_for(case),
        length=case.length if length is None else length,
        dtype=getattr(torch, case.dtype),
        device=torch.device(case.device),
        backward=backward,
    )


def over_cap(seconds: float, length: int, cap_s: float) -> str:
    """Return the reason of a case that would take too long.

    Args:
        seconds: the forecast.
        length: tokens of the case that it was forecast from.
        cap_s: seconds that the profile allows.
    """
    return (
        f"estimated {seconds:.0f} s at least, going by {length} tokens; "
        f"the profile allows {cap_s:.0f} s a case"
    )


def refuse_if(reason: str) -> None:
    """Refuse the figures of a case if there is a reason.

    Args:
        reason: why a figure cannot be believed; empty: it can.

    Raises:
        UnmeasuredError: the reason is not empty.
    """
    if reason:
        raise UnmeasuredError("failed", reason)
