"""Two commits beside each other."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from danon.gate.accept import Allowance
from danon.gate.comparison import Finding, Row
from danon.gate.facts import facts_of, judged
from danon.gate.pair import Measurement, Side, pair
from danon.gate.trial import Say, Trial
from danon.measure.case import Case

__all__ = ["against", "merged"]

ROUNDS = 2
"""In one pair: its own offset is larger than what more rounds would take away."""


def against(
    base: Side, head: Side, cases: Sequence[Case], inputs: Path, log: Path, *, budget_s: float,
    say: Say, allowed: Mapping[str, Allowance] | None = None, seed: int = 0,
) -> list[Row]:  # fmt: skip
    """What became of each case, in their order.

    Args:
        allowed: what cases, by :attr:`Case.id`, may cost more.
        inputs: file of q, k and v for the workers.
        log: gets what the workers print.
        budget_s: seconds after which no new pair begins.

    Raises:
        WorkerError: a side does not start, or a worker died.
    """
    before, after = (facts_of(side, cases, inputs, log, say) for side in (base, head))
    may = {case: (allowed or {}).get(case.id, Allowance()) for case in cases}
    rows = {case: judged(case, before[case], after[case], may[case]) for case in cases}

    def measure(some: Sequence[Case], turn: int) -> Iterator[tuple[Case, Measurement]]:
        for case, found in pair(base, head, some, inputs, log, rounds=ROUNDS, seed=turn):
            more = may[case].log_time
            slower, base_s = found.log_ratio - more, found.base_s * math.exp(more)
            yield case, replace(found, log_ratio=slower, base_s=base_s)

    return merged(rows, Trial(measure, budget_s, seed, say))


def merged(rows: dict[Case, Row], trial: Trial) -> list[Row]:
    """The same with times, of those that ran on both sides."""
    timed = trial.rows([case for case, row in rows.items() if row.finding in ("same", "larger")])
    for case, row in timed.items():
        larger = rows[case].finding == "larger" and row.finding != "slower"
        finding: Finding = "larger" if larger else row.finding
        note = row.note or rows[case].note
        rows[case] = replace(row, finding=finding, facts=rows[case].facts, note=note)
    return list(rows.values())
