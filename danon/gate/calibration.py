"""Thresholds, measured: the code against itself, and beside dense attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import median

import numpy as np

from danon.gate.decision_rule import TYPICAL
from danon.gate.exact_metrics import Missing, exact_metrics_of
from danon.gate.paired_processes import measure_abba
from danon.gate.relative_times import measure_relative_times
from danon.gate.thresholds import Threshold, Timing
from danon.gate.worker_client import OutputError, WorkerError
from danon.gate.workspace import Workspace
from danon.runs.case import Case

__all__ = ["measure_thresholds"]


def measure_thresholds(
    workspace: Workspace, cases: Sequence[Case], *, pairs: int
) -> tuple[dict[str, Threshold], dict[str, str]]:
    """Measure thresholds of the cases that run; train the models of recall.

    Args:
        workspace: has the code; gets the models, in ``new_models``.
        cases: to measure.
        pairs: number of pairs of fresh processes, and of single ones beside dense attention.

    Returns:
        Thresholds by :attr:`Case.id`, and by the same why the other cases have none.

    Raises:
        WorkerError: An attention is unknown, the side does not start, or a worker died.
    """
    head, models = workspace.side("head"), workspace.new_models
    metrics = exact_metrics_of(workspace, head, cases, models, train=True)
    missing = {case: one for case, one in metrics.items() if isinstance(one, Missing)}
    for one in missing.values():
        if one.finding == "removed":
            raise WorkerError(one.reason)
    measured = {case: dict(one) for case, one in metrics.items() if not isinstance(one, Missing)}
    times = _measure_times(workspace, [case for case in measured if not case.task], pairs)
    thresholds = {
        case.id: Threshold(time=times.get(case), facts=facts, model=models.digest(case))
        for case, facts in measured.items()
    }
    return thresholds, {case.id: one.reason for case, one in missing.items()}


def _measure_times(workspace: Workspace, cases: Sequence[Case], pairs: int) -> dict[Case, Timing]:
    ratios: dict[Case, list[float]] = {case: [] for case in cases}
    relative: dict[Case, list[float]] = {case: [] for case in cases}
    head = workspace.side("head")
    for turn in range(pairs):
        against_itself = measure_abba(
            workspace, (replace(head, name="base"), head), cases, seed=turn
        )
        for done, (case, pair) in enumerate(against_itself, 1):
            if isinstance(pair, OutputError):
                raise pair
            ratios[case].append(pair.log_ratio)
            workspace.progress(f"against itself, {turn + 1} of {pairs}", done, len(cases))
        beside_dense = measure_relative_times(workspace, head, cases, seed=turn)
        for done, (case, time) in enumerate(beside_dense, 1):
            if isinstance(time, OutputError):
                raise time
            relative[case].append(math.log(time.ratio))
            workspace.progress(f"beside dense attention, {turn + 1} of {pairs}", done, len(cases))
    return {
        case: Timing(
            relative=math.exp(median(relative[case])),
            spread=_spread(ratios[case]),
            drift=_spread(relative[case]),
        )
        for case in cases
    }


def _spread(logs: Sequence[float]) -> float:
    """Return a standard deviation that one disturbed value in five does not move; never 0."""
    low, high = np.quantile(logs, (0.25, 0.75))
    return max(float(high - low) / 1.349, TYPICAL / 2)
