"""Two commits beside each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from danon.gate.accept import Allowance
from danon.gate.comparison import Row
from danon.gate.facts import Models, facts_of, judged
from danon.gate.pair import Measurement, OutputError, Side, pair
from danon.gate.trial import Say, Trial
from danon.measure.case import Case

__all__ = ["against", "decided"]

ROUNDS = 2
"""In one pair: its own offset is larger than what more rounds would take away."""


def against(
    base: Side, head: Side, cases: Sequence[Case], inputs: Path, log: Path, models: Models, *,
    end: float, say: Say, allowed: Mapping[str, Allowance] | None = None, seed: int = 0,
) -> list[Row]:  # fmt: skip
    """What became of each case, in their order.

    Args:
        allowed: what cases, by :attr:`Case.id`, may cost more.
        inputs: file of q, k and v for the workers.
        log: gets what the workers print.
        models: the base trains them.
        end: of ``perf_counter``, when whatever is not decided stays so.

    Raises:
        WorkerError: a side does not start, or a worker died.
    """
    may = {case: (allowed or {}).get(case.id, Allowance()) for case in cases}

    def compared(some: Sequence[Case]) -> dict[Case, Row]:
        before = facts_of(base, some, inputs, log, replace(models, train=True), say, end=end)
        after = facts_of(head, some, inputs, log, models, say, end=end)
        return {case: judged(case, before[case], after[case], may[case]) for case in some}

    def measure(
        some: Sequence[Case], turn: int
    ) -> Iterator[tuple[Case, Measurement | OutputError]]:
        for case, found in pair(base, head, some, inputs, log, rounds=ROUNDS, seed=turn, end=end):
            if isinstance(found, OutputError):
                yield case, found
                continue
            more = may[case].log_time
            slower = tuple(seconds * math.exp(more) for seconds in found.base)
            yield case, replace(found, log_ratio=found.log_ratio - more, base=slower)

    return decided(cases, compared, Trial(measure, end, seed, say))


def decided(
    cases: Sequence[Case], compared: Callable[[Sequence[Case]], dict[Case, Row]], trial: Trial
) -> list[Row]:
    """What became of each case, in their order.

    Models are asked last: training them takes longer than all that is exact without one.

    Args:
        compared: says of cases what does not vary.
        trial: times those of them that run on both sides.
    """
    timed = [case for case in cases if not case.task]
    rows = merged(compared(timed), trial) if timed else {}
    if asked := [case for case in cases if case.task]:
        rows |= compared(asked)
    return [rows[case] for case in cases]


def merged(rows: dict[Case, Row], trial: Trial) -> dict[Case, Row]:
    """The same with times, of those that ran on both sides."""
    found = trial.rows([c for c, row in rows.items() if row.finding in ("same", "larger")])
    for case, row in found.items():
        finding, notes = row.finding, [row.note, rows[case].note]
        if rows[case].finding == "larger" and finding == "slower":
            finding = "slower and larger"
        elif rows[case].finding == "larger" and finding != "failed":
            if finding == "undecided":
                notes[0] = f"whether it is slower is not decided: {row.note}"
            finding = "larger"
        note = "; ".join(filter(None, notes))
        rows[case] = replace(row, finding=finding, facts=rows[case].facts, note=note)
    return rows
