"""Two commits beside each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from danon.gate.acceptance import Allowance
from danon.gate.exact_metrics import RecallModels, compare_exact, exact_metrics_of
from danon.gate.paired_processes import Measurement, OutputError, Side, measure_abba
from danon.gate.result import Row
from danon.gate.sequential_test import Say, SequentialTest
from danon.runs.case import Case

__all__ = ["compare_commits", "decided"]

ROUNDS = 2
"""In one pair: its own offset is larger than what more rounds would take away."""


def compare_commits(
    base: Side,
    head: Side,
    cases: Sequence[Case],
    inputs: Path,
    log: Path,
    models: RecallModels,
    *,
    end: float,
    say: Say,
    allowed: Mapping[str, Allowance] | None = None,
    seed: int = 0,
) -> list[Row]:
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
        before = exact_metrics_of(
            base, some, inputs, log, replace(models, train=True), say, end=end
        )
        after = exact_metrics_of(head, some, inputs, log, models, say, end=end)
        return {case: compare_exact(case, before[case], after[case], may[case]) for case in some}

    def measure(
        some: Sequence[Case], turn: int
    ) -> Iterator[tuple[Case, Measurement | OutputError]]:
        for case, found in measure_abba(
            base, head, some, inputs, log, rounds=ROUNDS, seed=turn, end=end
        ):
            if isinstance(found, OutputError):
                yield case, found
                continue
            more = may[case].log_time
            slower = tuple(seconds * math.exp(more) for seconds in found.base)
            yield case, replace(found, log_ratio=found.log_ratio - more, base=slower)

    return decided(cases, compared, SequentialTest(measure, end, seed, say))


def decided(
    cases: Sequence[Case],
    compared: Callable[[Sequence[Case]], dict[Case, Row]],
    trial: SequentialTest,
) -> list[Row]:
    """What became of each case, in their order.

    Models are asked last: training them takes longer than all that is exact without one.

    Args:
        compared: says of cases what does not vary.
        trial: times those of them that run on both sides.
    """
    timed = [case for case in cases if not case.task]
    rows = merge_rows(compared(timed), trial) if timed else {}
    if asked := [case for case in cases if case.task]:
        rows |= compared(asked)
    return [rows[case] for case in cases]


def merge_rows(rows: dict[Case, Row], trial: SequentialTest) -> dict[Case, Row]:
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
