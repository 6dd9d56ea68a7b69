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

__all__ = ["Allowance", "accept", "allowances", "recalibrated"]

RECALIBRATED = "calibrated again"
"""Why a threshold is another one although nobody accepted anything."""


@dataclass(frozen=True)
class Allowance:
    """What a case may cost more in the head.

    Attributes:
        log_time: logarithm of head / base.
        growth: factors of figures, which hold on any machine.
        facts: figures that were none; of recall, how far it may fall.
        why: as the last who accepted said.
    """

    log_time: float = 0.0
    growth: Mapping[str, float] = field(default_factory=dict)
    facts: Mapping[str, float] = field(default_factory=dict)
    why: str = ""

    def of(self, metric: ExactMetric) -> float:
        """What the head's figure may be; of recall, how far it may fall."""
        grown = (
            0.0 if metric.is_recall else math.ceil(metric.base * self.growth.get(metric.name, 0.0))
        )
        return max(self.facts.get(metric.name, 0.0), grown)


def accept(thresholds: Thresholds, found: Path, names: str, *, why: str, by: str) -> Thresholds:
    """Thresholds that the last comparison's figures of some cases meet.

    Once more at a commit, it takes the place of what was accepted there before.

    Args:
        found: the ``gate.json`` of that comparison.
        names: a case, or a shell pattern: those of its cases that have regressed in this commit and
            were not accepted yet.

    Raises:
        ThresholdsError: no comparison has measured the case, or only against thresholds of another
            machine, or there is no reason why.
    """
    if not why.strip():
        raise ThresholdsError("--accept needs --reason, which the history keeps")
    try:
        comparison = GateResult.read(found)
    except FileNotFoundError:
        raise ThresholdsError(f"{found} is not there: run the gate first") from None
    except ValueError as error:
        raise ThresholdsError(str(error)) from error
    if comparison.elsewhere:
        raise ThresholdsError(
            f"{found} compares with thresholds of another machine, which its figures cannot move: "
            "compare with --against REV first, or calibrate here"
        )
    here = thresholds.same_machine(comparison.fingerprint)
    moved = {}
    for name in _accepted(names, thresholds, comparison):
        known = _before(thresholds.cases[name], comparison.head)
        row = next((row for row in comparison.rows if row.case.id == name), None)
        if row is None or not _has_figures(row):
            raise ThresholdsError(f"{found} has no figures of {name!r}: run the gate on it first")
        time = known.time
        if time is not None and row.time_ratio is not None:
            relative = row.relative_time or time.relative * row.time_ratio.value
            time = time.model_copy(update={"relative": relative})
        moved[name] = known.model_copy(
            update={
                "time": time,
                "facts": known.facts
                | {metric.name: _moved(known, metric, here) for metric in row.facts},
                "history": _history(known, commit=comparison.head, by=by, why=why),
            }
        )
    return thresholds.model_copy(update={"cases": thresholds.cases | moved})


def _before(known: Threshold, commit: str) -> Threshold:
    """What a threshold was before somebody accepted a commit: its figures are relative to that."""
    last = known.history[-1] if known.history else None
    if last is None or last.commit != commit or last.why == RECALIBRATED:
        return known
    time = known.time and known.time.model_copy(update={"relative": last.relative_time})
    return known.model_copy(
        update={"time": time, "facts": last.facts, "history": known.history[:-1]}
    )


def _accepted(names: str, thresholds: Thresholds, comparison: GateResult) -> list[str]:
    if names in thresholds.cases:
        return [names]
    known = {
        row.case.id: thresholds.cases.get(row.case.id)
        for row in comparison.bad
        if _has_figures(row)
    }
    left = [
        name
        for name, case in known.items()
        if case
        and not any(
            entry.commit == comparison.head and entry.why != RECALIBRATED for entry in case.history
        )
    ]
    if found := fnmatch.filter(left, names):
        return found
    some = ", ".join(sorted(thresholds.cases)[:4]) + (", ..." if len(thresholds.cases) > 4 else "")
    raise ThresholdsError(
        f"no threshold of {names!r}, and no regression left that it is a pattern of; known: {some}"
    )


def _has_figures(row: Row) -> bool:
    return bool(row.facts) or row.time_ratio is not None


def recalibrated(
    before: Mapping[str, Threshold], found: Mapping[str, Threshold], *, commit: str, by: str
) -> dict[str, Threshold]:
    """Those found, with the history of those before, and those before that were not measured.

    That they were measured again is told there as well.
    """
    return {
        **before,
        **{
            name: new.model_copy(
                update={"history": _history(before[name], commit=commit, by=by, why=RECALIBRATED)}
            )
            if name in before
            else new
            for name, new in found.items()
        },
    }


def allowances(base: Thresholds | None, head: Thresholds | None) -> dict[str, Allowance]:
    """Of the cases that somebody accepted something of between two commits.

    Measuring thresholds again, on another machine perhaps, accepts nothing.
    """
    if base is None or head is None:
        return {}
    found: dict[str, Allowance] = {}
    for name, new in head.cases.items():
        if (old := base.cases.get(name)) is None:
            continue
        since = new.history[len(old.history) :]
        states = [
            *((entry.relative_time, entry.facts) for entry in since),
            (_relative(new), new.facts),
        ]
        more, why = 0.0, ""
        growth, figures = dict[str, float](), dict[str, float]()
        for entry, (before, after) in zip(since, pairwise(states), strict=True):
            if entry.why == RECALIBRATED:
                continue
            why = entry.why
            if before[0] and after[0]:
                more += max(0.0, math.log(after[0] / before[0]))
            for figure, value in after[1].items():
                known = before[1].get(figure, 0.0)
                if figure.startswith(RECALL):
                    figures[figure] = figures.get(figure, 0.0) + max(0.0, known - value)
                elif known:
                    growth[figure] = growth.get(figure, 1.0) * max(1.0, value / known)
                else:
                    figures[figure] = max(figures.get(figure, 0.0), value)
        if why:
            found[name] = Allowance(more, growth, figures, why)
    return found


def _moved(known: Threshold, metric: ExactMetric, here: bool) -> float:
    """A figure that is accepted; of recall how far it fell, in whatever model that was.

    Args:
        here: the threshold is of the machine that measured; if not, it grows by the same factor.
    """
    before = known.facts.get(metric.name, metric.base)
    if metric.is_recall:
        return min(1.0, max(0.0, before + metric.head - metric.base))
    if here or metric.name in PORTABLE or before == metric.base or not metric.base:
        return metric.head
    return math.ceil(before * metric.head / metric.base)


def _history(old: Threshold, *, commit: str, by: str, why: str) -> tuple[Accepted, ...]:
    today = dt.datetime.now(dt.UTC).date().isoformat()
    entry = Accepted(
        when=today, commit=commit, by=by, why=why, relative_time=_relative(old), facts=old.facts
    )
    return *old.history, entry


def _relative(some: Threshold) -> float | None:
    return None if some.time is None else some.time.relative
