"""Two commits beside each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from danon.gate.acceptance import Allowance
from danon.gate.checkout import Checkout
from danon.gate.exact_metrics import compare_exact, exact_metrics_of
from danon.gate.paired_processes import Measurement, measure_abba
from danon.gate.result import Row
from danon.gate.sequential_test import SequentialTest
from danon.gate.worker_client import OutputError
from danon.gate.workspace import Workspace
from danon.runs.case import Case

__all__ = ["compare_commits", "decide_rows", "merge_rows"]


def compare_commits(
    workspace: Workspace,
    base: Checkout,
    cases: Sequence[Case],
    allowances: Mapping[str, Allowance] | None = None,
) -> list[Row]:
    """Compare the head of a workspace with a base; return a row for each case, in their order.

    Args:
        workspace: has the head; cases that are not decided at its ``end`` stay undecided.
        base: it trains the models of recall.
        cases: to compare.
        allowances: by :attr:`Case.id`, what a case may cost more.

    Raises:
        WorkerError: A side does not start, or a worker died.
    """
    sides = workspace.side("base", base.root), workspace.side("head")
    allowed = {case: (allowances or {}).get(case.id, Allowance()) for case in cases}

    def compare(cases: Sequence[Case]) -> dict[Case, Row]:
        before, after = (
            exact_metrics_of(workspace, side, cases, workspace.new_models, train=side is sides[0])
            for side in sides
        )
        return {
            case: compare_exact(case, before[case], after[case], allowed[case]) for case in cases
        }

    def measure(
        cases: Sequence[Case], seed: int
    ) -> Iterator[tuple[Case, Measurement | OutputError]]:
        for case, pair in measure_abba(workspace, sides, cases, seed=seed):
            if isinstance(pair, OutputError):
                yield case, pair
                continue
            extra = allowed[case].log_time
            slower = tuple(seconds * math.exp(extra) for seconds in pair.base)
            yield case, replace(pair, log_ratio=pair.log_ratio - extra, base=slower)

    test = SequentialTest(measure, end=workspace.end, progress=workspace.progress)
    return decide_rows(cases, compare, test)


def decide_rows(
    cases: Sequence[Case],
    compare: Callable[[Sequence[Case]], dict[Case, Row]],
    test: SequentialTest,
) -> list[Row]:
    """Return a row for each case, in their order.

    Models are asked last: training them takes longer than all other exact metrics.

    Args:
        cases: to decide.
        compare: compares the exact metrics of cases.
        test: times those that run on both sides.
    """
    timed = [case for case in cases if not case.task]
    rows = merge_rows(compare(timed), test) if timed else {}
    if recall := [case for case in cases if case.task]:
        rows |= compare(recall)
    return [rows[case] for case in cases]


def merge_rows(rows: dict[Case, Row], test: SequentialTest) -> dict[Case, Row]:
    """Time the cases that ran on both sides and merge the findings into their rows.

    Args:
        rows: of the exact metrics.
        test: times cases.
    """
    timed = test.rows([case for case, row in rows.items() if row.finding in ("same", "larger")])
    for case, row in timed.items():
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
