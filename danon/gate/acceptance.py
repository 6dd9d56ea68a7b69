"""Moving a threshold on purpose, and what that allows between two commits."""

from __future__ import annotations

import datetime as dt
import fnmatch
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from danon.gate.result import RECALL, ExactMetric, GateResult, Row
from danon.gate.thresholds import PORTABLE, Accepted, Threshold, Thresholds, ThresholdsError

__all__ = ["RECALIBRATED", "Allowance", "accept", "allowances", "recalibrated"]

RECALIBRATED = "calibrated again"
"""Reason in the history of a threshold that moved although nobody accepted anything."""


@dataclass(frozen=True)
class Allowance:
    """Extra cost that a case may have in the head.

    Attributes:
        log_time: logarithm of head / base.
        growth: by metric, a factor; it holds on any machine.
        absolute: by metric, the highest value of one that was 0; of recall, the largest fall.
        reason: as the last person who accepted gave it.
    """

    log_time: float = 0.0
    growth: Mapping[str, float] = field(default_factory=dict)
    absolute: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""

    def limit(self, metric: ExactMetric) -> float:
        """Return the highest accepted value in the head; of recall, the largest accepted fall."""
        factor = 0.0 if metric.is_recall else self.growth.get(metric.name, 0.0)
        return max(self.absolute.get(metric.name, 0.0), math.ceil(metric.base * factor))


def accept(
    thresholds: Thresholds, result_path: Path, names: str, *, reason: str, user: str
) -> Thresholds:
    """Return thresholds that the last comparison's figures of some cases meet.

    A second acceptance at a commit replaces the first.

    Args:
        thresholds: as they are.
        result_path: the ``gate.json`` of that comparison.
        names: a case, or a shell pattern for cases that have regressed in this commit and were not
            accepted yet.
        reason: for the history.
        user: name of the person, for the history.

    Raises:
        ThresholdsError: The comparison is missing, has no figures of the case or compares with
            thresholds of another machine; or the reason is empty.
    """
    if not reason.strip():
        raise ThresholdsError("--accept needs --reason, which the history keeps")
    try:
        comparison = GateResult.read(result_path)
    except FileNotFoundError:
        raise ThresholdsError(f"{result_path} is not there: run the gate first") from None
    except ValueError as error:
        raise ThresholdsError(str(error)) from error
    if comparison.elsewhere:
        raise ThresholdsError(
            f"{result_path} compares with thresholds of another machine, which its figures cannot "
            "move: compare with --against REV first, or calibrate here"
        )
    same_machine = thresholds.same_machine(comparison.fingerprint)
    moved = {}
    for name in _cases_named(names, thresholds, comparison):
        before = _before(thresholds.cases[name], comparison.head)
        row = next((row for row in comparison.rows if row.case.id == name), None)
        if row is None or not _has_figures(row):
            raise ThresholdsError(
                f"{result_path} has no figures of {name!r}: run the gate on it first"
            )
        time = before.time
        if time is not None and row.time_ratio is not None:
            relative = row.relative_time or time.relative * row.time_ratio.value
            time = time.model_copy(update={"relative": relative})
        facts = {metric.name: _moved(before, metric, same_machine) for metric in row.facts}
        moved[name] = before.model_copy(
            update={
                "time": time,
                "facts": before.facts | facts,
                "history": _history(before, commit=comparison.head, user=user, reason=reason),
            }
        )
    return thresholds.model_copy(update={"cases": thresholds.cases | moved})


def _before(threshold: Threshold, commit: str) -> Threshold:
    """Return a threshold as it was before somebody accepted a commit."""
    last = threshold.history[-1] if threshold.history else None
    if last is None or last.commit != commit or last.why == RECALIBRATED:
        return threshold
    time = threshold.time and threshold.time.model_copy(update={"relative": last.relative_time})
    return threshold.model_copy(
        update={"time": time, "facts": last.facts, "history": threshold.history[:-1]}
    )


def _cases_named(names: str, thresholds: Thresholds, comparison: GateResult) -> list[str]:
    if names in thresholds.cases:
        return [names]
    regressed = {
        row.case.id: thresholds.cases.get(row.case.id)
        for row in comparison.bad
        if _has_figures(row)
    }
    not_accepted = [
        name
        for name, threshold in regressed.items()
        if threshold
        and not any(
            entry.commit == comparison.head and entry.why != RECALIBRATED
            for entry in threshold.history
        )
    ]
    if matching := fnmatch.filter(not_accepted, names):
        return matching
    more = ", ..." if len(thresholds.cases) > 4 else ""
    raise ThresholdsError(
        f"no threshold of {names!r}, and no regression left that it is a pattern of; known: "
        f"{', '.join(sorted(thresholds.cases)[:4])}{more}"
    )


def _has_figures(row: Row) -> bool:
    return bool(row.facts) or row.time_ratio is not None


def recalibrated(
    before: Mapping[str, Threshold], measured: Mapping[str, Threshold], *, commit: str, user: str
) -> dict[str, Threshold]:
    """Merge thresholds that were measured again into those before.

    The history of a case stays and says that it was calibrated again; cases that were not measured
    stay as they are.

    Args:
        before: by :attr:`Case.id`.
        measured: the same.
        commit: that was measured.
        user: who measured it.
    """
    merged = dict(before)
    for name, threshold in measured.items():
        merged[name] = threshold
        if name in before:
            history = _history(before[name], commit=commit, user=user, reason=RECALIBRATED)
            merged[name] = threshold.model_copy(update={"history": history})
    return merged


def allowances(base: Thresholds | None, head: Thresholds | None) -> dict[str, Allowance]:
    """Return what somebody accepted between two commits, by :attr:`Case.id`.

    Measuring thresholds again, on another machine perhaps, accepts nothing.

    Args:
        base: thresholds that the base has.
        head: thresholds that the head has.
    """
    if base is None or head is None:
        return {}
    accepted = {
        name: _allowance(base.cases[name], threshold)
        for name, threshold in head.cases.items()
        if name in base.cases
    }
    return {name: allowance for name, allowance in accepted.items() if allowance.reason}


def _allowance(old: Threshold, new: Threshold) -> Allowance:
    """Return what the new entries of a history allow."""
    since = new.history[len(old.history) :]
    states = [
        *((entry.relative_time, entry.facts) for entry in since),
        (_relative_time(new), new.facts),
    ]
    log_time, reason = 0.0, ""
    growth, absolute = dict[str, float](), dict[str, float]()
    for entry, (before, after) in zip(since, pairwise(states), strict=True):
        if entry.why == RECALIBRATED:
            continue
        reason = entry.why
        if before[0] and after[0]:
            log_time += max(0.0, math.log(after[0] / before[0]))
        for name, value in after[1].items():
            old_value = before[1].get(name, 0.0)
            if name.startswith(RECALL):
                absolute[name] = absolute.get(name, 0.0) + max(0.0, old_value - value)
            elif old_value:
                growth[name] = growth.get(name, 1.0) * max(1.0, value / old_value)
            else:
                absolute[name] = max(absolute.get(name, 0.0), value)
    return Allowance(log_time, growth, absolute, reason)


def _moved(threshold: Threshold, metric: ExactMetric, same_machine: bool) -> float:
    """Return the accepted value of a metric.

    Recall moves by as much as it fell, in whatever model that was. Elsewhere than on the machine of
    the threshold, a value grows by the same factor.
    """
    before = threshold.facts.get(metric.name, metric.base)
    if metric.is_recall:
        return min(1.0, max(0.0, before + metric.head - metric.base))
    if same_machine or metric.name in PORTABLE or before == metric.base or not metric.base:
        return metric.head
    return math.ceil(before * metric.head / metric.base)


def _history(old: Threshold, *, commit: str, user: str, reason: str) -> tuple[Accepted, ...]:
    entry = Accepted(
        when=dt.datetime.now(dt.UTC).date().isoformat(),
        commit=commit,
        by=user,
        why=reason,
        relative_time=_relative_time(old),
        facts=old.facts,
    )
    return *old.history, entry


def _relative_time(threshold: Threshold) -> float | None:
    return None if threshold.time is None else threshold.time.relative
