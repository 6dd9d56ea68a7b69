"""A checkout beside the thresholds of its repository."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from danon.gate.against_commit import decide_rows
from danon.gate.decision_rule import Tolerance
from danon.gate.exact_metrics import ExactMetrics, Missing, compare_exact, exact_metrics_of
from danon.gate.paired_processes import Measurement
from danon.gate.recall_models import RecallModels
from danon.gate.relative_times import measure_relative_times
from danon.gate.result import RECALL, Row
from danon.gate.sequential_test import SequentialTest
from danon.gate.thresholds import PORTABLE, Thresholds, ThresholdsError, Timing
from danon.gate.worker_client import OutputError, WorkerError
from danon.gate.workspace import Workspace
from danon.runs.case import Case

__all__ = ["ELSEWHERE", "PEAK_ELSEWHERE", "measure_against_thresholds"]

SLACK = 0.05
"""Smallest slack of a :class:`Tolerance`: thresholds were measured on another day."""
DRIFTS = 2.0
"""Slack of a case in multiples of its drift between processes, where that is more."""
LIMIT = 3.0
"""Limit of a :class:`Tolerance` in multiples of its slack."""
ELSEWHERE = (6.0, 8.0)
"""Slack and limit on another machine, as factors.

Beside dense attention the same code was up to 5.2 times as slow on one processor as on another
(docs/log.md), most where one has matrix units.
"""
PEAK_ELSEWHERE = 1.5
"""Factor of peak bytes that another machine may take.

The same code took up to 1.36 times as many with one processor's matrix products as with another's
(docs/log.md).
"""


def measure_against_thresholds(
    workspace: Workspace,
    thresholds: Thresholds,
    cases: Sequence[Case],
    fingerprint: Mapping[str, str],
) -> list[Row]:
    """Compare the head of a workspace with thresholds; return a row for each case, in their order.

    Args:
        workspace: has the head; cases that are not decided at its ``end`` stay undecided.
        thresholds: of the head's repository.
        cases: to compare.
        fingerprint: of this machine.

    Raises:
        ThresholdsError: A trained model is missing or another one.
        WorkerError: The side does not start or lacks an attention of the user, or a worker died.
    """
    models, head = workspace.committed_models, workspace.side("head")
    _check_models(thresholds, cases, models)
    timings = {name: case.time for name, case in thresholds.cases.items() if case.time}

    def compare(cases: Sequence[Case]) -> dict[Case, Row]:
        measured = exact_metrics_of(workspace, head, cases, models)
        _check_targets(workspace.targets, measured)
        return {
            case: compare_exact(case, _accepted(case, thresholds, metrics, fingerprint), metrics)
            for case, metrics in measured.items()
        }

    def measure(
        cases: Sequence[Case], seed: int
    ) -> Iterator[tuple[Case, Measurement | OutputError]]:
        for case, time in measure_relative_times(workspace, head, cases, seed=seed):
            if isinstance(time, OutputError):
                yield case, time
                continue
            accepted = timings[case.id].relative
            slower = math.log(time.ratio / accepted)
            yield (
                case,
                Measurement(slower, (accepted * time.dense_s,), (time.ratio * time.dense_s,)),
            )

    test = SequentialTest(
        measure,
        _tolerances(timings, same_machine=thresholds.same_machine(fingerprint)),
        end=workspace.end,
        progress=workspace.progress,
    )
    return [
        row
        if row.time_ratio is None
        else replace(row, relative_time=timings[row.case.id].relative * row.time_ratio.value)
        for row in decide_rows(cases, compare, test)
    ]


def _check_targets(targets: Sequence[str], measured: Mapping[Case, ExactMetrics]) -> None:
    """Check that the head has every attention of the user.

    Thresholds name the class alone. So a wrong file would look like an attention that was removed.

    Raises:
        WorkerError: It lacks one.
    """
    classes = {target.rpartition(":")[2] for target in targets}
    for case, metrics in measured.items():
        if case.attention not in classes or not isinstance(metrics, Missing):
            continue
        if metrics.finding == "removed":
            raise WorkerError(metrics.reason)


def _tolerances(timings: Mapping[str, Timing], *, same_machine: bool) -> dict[str, Tolerance]:
    tolerances = {}
    for name, timing in timings.items():
        if same_machine:
            slack = max(SLACK, DRIFTS * timing.drift)
            limit = LIMIT * slack
        else:
            slack, limit = map(math.log, ELSEWHERE)
        tolerances[name] = Tolerance(slack, limit, timing.drift)
    return tolerances


def _accepted(
    case: Case, thresholds: Thresholds, measured: ExactMetrics, fingerprint: Mapping[str, str]
) -> ExactMetrics:
    """Return the metrics that a case may have on this machine."""
    threshold = thresholds.cases.get(case.id)
    if threshold is None:
        return Missing("there is no threshold of it", "removed")
    return {
        name: value
        for name, value in threshold.facts.items()
        if _is_comparable(name, value, measured, thresholds, fingerprint)
    }


def _is_comparable(
    name: str,
    accepted: float,
    measured: ExactMetrics,
    thresholds: Thresholds,
    fingerprint: Mapping[str, str],
) -> bool:
    """Return True if what was measured on this machine can be held to an accepted value."""
    if name in PORTABLE or name.startswith(RECALL):
        return True
    if not thresholds.comparable(fingerprint):
        return False
    if (
        name != "peak_bytes"
        or thresholds.same_machine(fingerprint)
        or isinstance(measured, Missing)
    ):
        return True
    return measured.get(name, 0.0) > PEAK_ELSEWHERE * accepted


def _check_models(thresholds: Thresholds, cases: Sequence[Case], models: RecallModels) -> None:
    """Check that the trained models are those that thresholds are about.

    Raises:
        ThresholdsError: One is missing or another one.
    """
    for case in cases:
        threshold = thresholds.cases.get(case.id)
        if threshold is not None and threshold.model and threshold.model != models.digest(case):
            raise ThresholdsError(
                f"{models.path(case).name} is not the trained model {threshold.model} that the "
                f"threshold of {case.id} is about: commit it, or calibrate again"
            )
