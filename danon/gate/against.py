"""Two commits beside each other."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from danon.gate.accept import Allowance
from danon.gate.comparison import Finding, Row
from danon.gate.facts import Models, facts_of, judged
from danon.gate.pair import Measurement, Side, pair
from danon.gate.trial import Say, Trial
from danon.measure.case import Case

__all__ = ["against", "merged"]

ROUNDS = 2
"""In one pair: its own offset is larger than what more rounds would take away."""


def against(
    base: Side, head: Side, cases: Sequence[Case], inputs: Path, log: Path, models: Models, *,
    budget_s: float, say: Say, allowed: Mapping[str, Allowance] | None = None, seed: int = 0,
) -> list[Row]:  # fmt: skip
    """What became of each case, in their order.

    Args:
        allowed: what cases, by :attr:`Case.id`, may cost more.
        inputs: file of q, k and v for the workers.
        log: gets what the workers print.
        models: the base trains them.
        budget_s: seconds after which no new pair begins.

    Raises:
        WorkerError: a side does not start, or a worker died.
    """
    before = facts_of(base, cases, inputs, log, replace(models, train=True), say)
    after = facts_of(head, cases, inputs, log, models, say)
    may = {case: (allowed or {}).get(case.id, Allowance()) for case in cases}
    rows = {case: judged(case, before[case], after[case], may[case]) for case in cases}

    def measure(some: Sequence[Case], turn: int) -> Iterator[tuple[Case, Measurement]]:
        for case, found in pair(base, head, some, inputs, log, rounds=ROUNDS, seed=turn):
            more = may[case].log_time
            slower = tuple(seconds * math.exp(more) for seconds in found.base)
            yield case, replace(found, log_ratio=found.log_ratio - more, base=slower)

    return merged(rows, Trial(measure, budget_s, seed, say))


def merged(rows: dict[Case, Row], trial: Trial) -> list[Row]:
    """The same with times, of those that ran on both sides and are timed."""
    timed = trial.rows([
        case for case, row in rows.items() if row.finding in ("same", "larger") and not case.task
    ])  # fmt: skip
    for case, row in timed.items():
        larger = rows[case].finding == "larger" and row.finding != "slower"
        finding: Finding = "larger" if larger else row.finding
        note = row.note or rows[case].note
        rows[case] = replace(row, finding=finding, facts=rows[case].facts, note=note)
    return list(rows.values())
