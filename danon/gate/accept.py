"""Moving a threshold on purpose, and what that allows between two commits."""

from __future__ import annotations

import datetime as dt
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from danon.gate.comparison import RECALL
from danon.gate.thresholds import Accepted, Threshold, Thresholds, ThresholdsError

__all__ = ["Allowance", "accept", "allowances", "recalibrated"]


@dataclass(frozen=True)
class Allowance:
    """What a case may cost more in the head.

    Attributes:
        log_time: logarithm of head / base.
        facts: figures up to which growth is accepted; of recall, how far it may fall.
        why: as the last who accepted said.
    """

    log_time: float = 0.0
    facts: Mapping[str, float] = field(default_factory=dict)
    why: str = ""


def accept(thresholds: Thresholds, found: Path, name: str, *, why: str, by: str) -> Thresholds:
    """Thresholds that the last comparison's figures of a case meet.

    Args:
        found: the ``gate.json`` of that comparison.
        name: of the case.

    Raises:
        ThresholdsError: no comparison has measured the case, or there is no reason why.
    """
    if not why.strip():
        raise ThresholdsError("--accept needs --why, which the history keeps")
    if name not in thresholds.cases:
        raise ThresholdsError(f"no threshold of {name!r}; known: {_some(thresholds.cases)}")
    try:
        comparison = json.loads(found.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ThresholdsError(f"{found} is not there: run the gate first") from None
    rows: dict[str, Any] = {row["case"]["id"]: row for row in comparison["rows"]}
    known = thresholds.cases[name]
    row = rows.get(name, {"time_ratio": None, "facts": []})
    if not (row["facts"] if known.time is None else row["time_ratio"]):
        raise ThresholdsError(f"{found} has no figures of {name!r}: run the gate on it first")
    time = known.time
    if time is not None:
        relative = time.relative * row["time_ratio"]["value"]
        time = time.model_copy(update={"relative": relative})
    moved = known.model_copy(update={
        "time": time,
        "facts": known.facts | {fact["name"]: _moved(known, **fact) for fact in row["facts"]},
        "history": _history(known, commit=comparison["head"], by=by, why=why),
    })  # fmt: skip
    return thresholds.model_copy(update={"cases": {**thresholds.cases, name: moved}})


def recalibrated(
    before: Mapping[str, Threshold], found: Mapping[str, Threshold], *, commit: str, by: str
) -> dict[str, Threshold]:
    """Those found, with the history of those before, and those before that were not measured.

    What measuring again accepts is told in the history as well.
    """
    return {**before, **{
        name: new.model_copy(update={
            "history": _history(before[name], commit=commit, by=by, why="calibrated again")
        }) if name in before else new
        for name, new in found.items()
    }}  # fmt: skip


def allowances(base: Thresholds | None, head: Thresholds | None) -> dict[str, Allowance]:
    """Of the cases that somebody accepted between two commits."""
    if base is None or head is None:
        return {}
    found: dict[str, Allowance] = {}
    for name, new in head.cases.items():
        old = base.cases.get(name)
        if old is not None and len(new.history) > len(old.history):
            more = 0.0
            if new.time is not None and old.time is not None:
                more = max(0.0, math.log(new.time.relative / old.time.relative))
            facts = new.facts
            if new.model:  # recall; of another model there is nothing to compare
                before = old.facts if new.model == old.model else new.facts
                facts = {
                    figure: max(0.0, before.get(figure, value) - value)
                    for figure, value in new.facts.items()
                }
            found[name] = Allowance(more, facts, new.history[-1].why)
    return found


def _moved(known: Threshold, name: str, base: float, head: float) -> float:
    """A figure that is accepted; of recall how far it fell, in whatever model that was."""
    if not name.startswith(RECALL):
        return head
    return min(1.0, max(0.0, known.facts.get(name, base) + head - base))


def _history(old: Threshold, *, commit: str, by: str, why: str) -> tuple[Accepted, ...]:
    today = dt.datetime.now(dt.UTC).date().isoformat()
    relative = None if old.time is None else old.time.relative
    entry = Accepted(
        when=today, commit=commit, by=by, why=why, relative_time=relative, facts=old.facts
    )
    return *old.history, entry


def _some(names: Mapping[str, object]) -> str:
    return ", ".join(sorted(names)[:4]) + (", ..." if len(names) > 4 else "")
