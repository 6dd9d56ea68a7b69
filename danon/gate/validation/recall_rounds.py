"""What the gate makes of recall that was planted to fall, and of other rounding."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from danon.gate.exact_metrics import RecallModels, compare_exact
from danon.gate.gate_recorder import case_of
from danon.gate.paired_processes import Side, WorkerClient, WorkerError
from danon.gate.sequential_test import Say
from danon.gate.validation.collect import copied
from danon.gate.validation.error_rates import exact
from danon.gate.validation.fault_injection import disturb, plant
from danon.runs.case import Case
from danon.runs.jsonl import append_json, read_json_lines

__all__ = ["RecallRate", "collect_recall", "recall_rates"]

PLANTED = 0.02
"""That recall is planted to fall by, in the test that most is answered in."""
ROUNDING = 1e-5
"""Relative error of every output: more than another order of sums makes in float32."""
RUNS = 40
"""Of each kind with each attention."""
KINDS = ("rounding", "forgetting")


@dataclass(frozen=True)
class RecallRate:
    """Alarms of one kind."""

    planted: str
    runs: int
    alarms: int

    @property
    def interval(self) -> tuple[float, float]:
        """Of the share of alarms, 95 %."""
        return exact(self.alarms, self.runs)


def collect_recall(
    side: Side,
    commit: str,
    cases: Sequence[Case],
    inputs: Path,
    log: Path,
    models: RecallModels,
    place: Path,
    *,
    end: float,
    say: Say,
) -> int:
    """Ask each trained model until there are RUNS of each kind, and add the answers to a file.

    Args:
        end: of ``perf_counter``: nobody is asked later.

    Returns:
        How many were added.

    Raises:
        WorkerError: a worker died, an attention does not run, or a model does not fit.
    """
    count = 0
    for case in (case for case in cases if case.task and models.place(case).exists()):
        with WorkerClient(side, inputs, log) as worker:
            base = worker.request("recall", **models.request(case))
        if isinstance(base, str):
            raise WorkerError(base)
        # Of this model as it answers today: other code or weights begin again.
        known = [x for x in read_json_lines(place) if (x["case"], x["base"]) == (case.id, base)]
        done = Counter(x["planted"] for x in known)
        kinds = {"rounding": (0.0, ROUNDING), "forgetting": (PLANTED / max(base.values()), 0.0)}
        for kind, (forgotten, rounding) in kinds.items():
            root, first = copied(side.root, "disturbed"), done[kind]
            plant(
                root,
                disturb,
                attention=case.attention,
                forgotten=forgotten,
                rounding=rounding,
                seed=zlib.crc32(f"{case.id} {first}".encode()),
            )
            with WorkerClient(Side("head", root), inputs, log) as worker:
                for turn in range(first, RUNS):
                    if perf_counter() >= end:
                        return count
                    head = worker.request("recall", **models.request(case))
                    append_json(
                        place,
                        {
                            "case": case.id,
                            "planted": kind,
                            "commit": commit,
                            "base": base,
                            "head": head,
                        },
                    )
                    count += 1
                    say(f"{kind} in {case.attention}", turn + 1, RUNS)
    return count


def recall_rates(place: Path) -> list[RecallRate]:
    """Of each kind, over all attentions, by what the gate says of them today."""
    found = []
    for kind in KINDS:
        some = [line for line in read_json_lines(place) if line["planted"] == kind]
        rows = [compare_exact(case_of(line["case"]), line["base"], line["head"]) for line in some]
        if rows:
            alarms = sum(row.finding == "worse" for row in rows)
            found.append(RecallRate(kind, len(rows), alarms))
    return found
