"""The correctness check of a case, which precedes all its figures."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

from torch import Tensor

from danon.bench.shapes import claims_causal
from danon.bench.workload import Workload
from danon.measure.causality import check_causal
from danon.measure.correctness import (
    check_case,
    dense_rows,
    relative_error,
    sample_rows,
    tolerances,
)
from danon.measure.threads import fewer_threads_beside_load
from danon.runs.case import Case, Phase

__all__ = ["Correctness", "Verifier"]

ALL_ROWS = 256
"""Longest length at which every row is checked; beyond it, a sample."""
ROWS: dict[Phase, int] = {"forward": 64, "forward+backward": 32, "decode": 64}
"""Sampled rows by phase: an oracle's backward pass takes seconds on long inputs."""
TOLERANCE_LENGTH = 16384
"""Most tokens on which dense attention's own rounding error is measured."""


@dataclass(frozen=True)
class Correctness:
    """The outcome of a check.

    Attributes:
        reason: why the attention is wrong; empty if it passed.
        info: the record for :attr:`~danon.runs.case.CaseResult.check`.
        error_vs_dense: relative error of the output against dense attention in float64.
        seconds: duration of the check.
    """

    reason: str
    info: dict[str, Any]
    error_vs_dense: float
    seconds: float


class Verifier:
    """Checks each combination of attention, length, dtype and phase once, for all suites.

    Example:
        ``Verifier().verdict(Workload(case)).reason`` is empty if the attention is right.
    """

    def __init__(self) -> None:
        self._outcomes: dict[Case, Correctness] = {}
        self._tolerances: dict[tuple[object, ...], dict[str, float]] = {}

    def verdict(self, workload: Workload) -> Correctness:
        """Return the outcome of the check of a workload; the same case is checked once.

        Args:
            workload: the attention and its inputs.

        Returns:
            The outcome.

        Raises:
            Exception: whatever the attention or its oracle raises.
        """
        key = replace(workload.case, suite="")
        if key not in self._outcomes:
            start = perf_counter()
            with fewer_threads_beside_load(workload.device):
                outcome = self._verify(workload)
            self._outcomes[key] = replace(outcome, seconds=perf_counter() - start)
        return self._outcomes[key]

    def tolerance(self, workload: Workload) -> dict[str, float]:
        """Return the errors that rounding explains.

        Args:
            workload: the attention and its inputs.

        Returns:
            Relative error by tensor: ``output``, ``dq`` ...
        """
        return self._tolerance(workload, workload.module.config.is_causal)

    def _verify(self, workload: Workload) -> Correctness:
        case, module = workload.case, workload.module
        q, k, v = workload.q, workload.k, workload.v
        causal, backward = module.config.is_causal, case.phase == "forward+backward"
        check = check_case(
            workload.subject(),
            q,
            k,
            v,
            _rows(case),
            self._tolerance(workload, causal),
            backward=backward,
        )
        reason = check.reason
        if not reason and case.phase == "forward" and claims_causal(module):
            reason = check_causal(workload.attend, q, k, v, seed=case.length)
        error = math.inf
        if check.output is not None and check.positions is not None:
            exact = dense_rows(q.double(), k.double(), v.double(), check.positions, causal=causal)
            error = relative_error(check.output, exact)
        info = {
            "kind": check.kind,
            "error": check.error,
            "tolerance": check.tolerance,
            "worst": check.worst,
            "rows": check.rows,
            "undecided": check.undecided,
            "causal": claims_causal(module),
        }
        return Correctness(reason, info, error, 0.0)

    def _tolerance(self, workload: Workload, causal: bool) -> dict[str, float]:
        case = workload.case
        length = min(case.length, TOLERANCE_LENGTH)
        key = (length, case.dtype, case.phase, case.device, causal)
        if key not in self._tolerances:
            q, k, v = (x[:, :, :length] for x in (workload.q, workload.k, workload.v))
            self._tolerances[key] = tolerances(
                q,
                k,
                v,
                _rows(replace(case, length=length)),
                causal=causal,
                backward=case.phase == "forward+backward",
            )
        return self._tolerances[key]


def _rows(case: Case) -> Tensor:
    everything = case.length <= ALL_ROWS
    return sample_rows(case.length, case.length if everything else ROWS[case.phase])
