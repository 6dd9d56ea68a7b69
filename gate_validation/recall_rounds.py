"""Injected falls of recall and other rounding, and what the gate makes of them."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from danon.gate.exact_metrics import compare_exact
from danon.gate.gate_recorder import case_of
from danon.gate.worker_client import Side, WorkerError
from danon.gate.workspace import Workspace
from danon.runs.case import Case
from danon.runs.jsonl import append_json, read_json_lines
from gate_validation.collect import copy_checkout
from gate_validation.error_rates import clopper_pearson
from gate_validation.fault_injection import disturb, inject

__all__ = ["RecallRate", "collect_recall", "recall_rates"]

FALL = 0.02
"""Fall of recall that is injected, in the test with the highest recall."""
ROUNDING = 1e-5
"""Relative error of every output: more than another order of sums makes in float32."""
RUNS = 40
"""Number of runs of each fault with each attention."""
FAULTS = ("rounding", "forgetting")


@dataclass(frozen=True)
class RecallRate:
    """Alarms of one fault.

    Attributes:
        planted: name of the fault.
        runs: number of runs.
        alarms: number of these with an alarm.
    """

    planted: str
    runs: int
    alarms: int

    @property
    def interval(self) -> tuple[float, float]:
        """Interval of the share of alarms, 95 %."""
        return clopper_pearson(self.alarms, self.runs)


def collect_recall(workspace: Workspace, cases: Sequence[Case], path: Path, *, end: float) -> int:
    """Ask each trained model until there are RUNS of each fault, and add the answers to a file.

    Args:
        workspace: its head is a checkout of danon, with trained models.
        cases: those of recall count.
        path: of the file. Its answers count towards RUNS.
        end: value of ``perf_counter`` after which no model is asked.

    Returns:
        The number of answers that were added.

    Raises:
        WorkerError: A worker died, an attention does not run, or a model does not fit.
    """
    count = 0
    models = workspace.committed_models
    for case in (case for case in cases if case.task and models.path(case).exists()):
        request = models.request(case)
        with workspace.start_worker(workspace.side("base")) as worker:
            base = worker.request("recall", **request)
        if isinstance(base, str):
            raise WorkerError(base)
        # Answers of other code or weights do not count: they begin again.
        earlier = [x for x in read_json_lines(path) if (x["case"], x["base"]) == (case.id, base)]
        counts = Counter(x["planted"] for x in earlier)
        for fault in FAULTS:
            first = counts[fault]
            root = _copy_with_fault(workspace.head.root, case, fault, base, first)
            with workspace.start_worker(Side("head", root)) as worker:
                for run in range(first, RUNS):
                    if perf_counter() >= end:
                        return count
                    head = worker.request("recall", **request)
                    values = {"case": case.id, "planted": fault, "commit": workspace.head.commit}
                    append_json(path, {**values, "base": base, "head": head})
                    count += 1
                    workspace.progress(f"{fault} in {case.attention}", run + 1, RUNS)
    return count


def _copy_with_fault(
    root: Path, case: Case, fault: str, base: Mapping[str, float], first: int
) -> Path:
    """Return a copy of a checkout whose attention has a fault, another one for each first run."""
    copy = copy_checkout(root, "disturbed")
    inject(
        copy,
        disturb,
        attention=case.attention,
        forgotten=FALL / max(base.values()) if fault == "forgetting" else 0.0,
        rounding=ROUNDING if fault == "rounding" else 0.0,
        seed=zlib.crc32(f"{case.id} {first}".encode()),
    )
    return copy


def recall_rates(path: Path) -> list[RecallRate]:
    """Count alarms of each fault, over all attentions, by the rules of today's gate.

    Args:
        path: of the answers.
    """
    rates = []
    for fault in FAULTS:
        answers = [line for line in read_json_lines(path) if line["planted"] == fault]
        rows = [compare_exact(case_of(x["case"]), x["base"], x["head"]) for x in answers]
        if rows:
            alarms = sum(row.finding == "worse" for row in rows)
            rates.append(RecallRate(fault, len(rows), alarms))
    return rates
