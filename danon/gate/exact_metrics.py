"""Figures that are the same in every run, and what it means when they differ."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from danon.gate.acceptance import Allowance
from danon.gate.cases import compiled
from danon.gate.paired_processes import (
    DiedError,
    ForeignError,
    OutputError,
    Side,
    TimeOverError,
    WorkerClient,
    WorkerError,
    content,
)
from danon.gate.result import ExactMetric, Finding, Row
from danon.gate.sequential_test import Say
from danon.runs.case import Case

__all__ = ["Facts", "Missing", "RecallModels", "compare_exact", "exact_metrics_of"]


@dataclass(frozen=True)
class Missing:
    """Why a case has no figures.

    Attributes:
        then: what becomes of a case that has figures in the base only.
    """

    reason: str
    then: Finding = "broken"


Facts = Mapping[str, float] | Missing


@dataclass(frozen=True)
class RecallModels:
    """Small trained models, which a case with a task asks.

    Attributes:
        folder: of their weights, ``<attention>.pt``.
        train: first of all, with the side whose exact metrics are taken.
    """

    folder: Path
    train: bool = False

    def place(self, case: Case) -> Path:
        """Where the weights of a case are."""
        return self.folder / f"{case.attention}.pt"

    def digest(self, case: Case) -> str:
        """Of the weights, to tell them from others; empty if a case has none."""
        place = self.place(case)
        known = case.task and place.exists()
        return hashlib.sha256(place.read_bytes()).hexdigest()[:12] if known else ""

    def request(self, case: Case) -> dict[str, str]:
        """What a worker has to know."""
        return {"attention": case.attention, "place": str(self.place(case))}


def exact_metrics_of(
    side: Side,
    cases: Sequence[Case],
    inputs: Path,
    log: Path,
    models: RecallModels,
    say: Say,
    *,
    end: float = math.inf,
) -> dict[Case, Facts]:
    """Measure those of each case.

    Args:
        end: of ``perf_counter``: cases whose turn comes later are not measured.

    Raises:
        WorkerError: the side does not start, or an attention is not its own.
    """
    found: dict[Case, Facts] = {}
    try:
        with ExitStack() as stack:
            worker = stack.enter_context(WorkerClient(side, inputs, log, end))
            for done, case in enumerate(cases, 1):
                try:
                    found[case] = _exact_metrics(worker, case, models)
                except DiedError as error:
                    found[case] = Missing(str(error))
                    worker = stack.enter_context(WorkerClient(side, inputs, log, end))
                except OutputError as error:
                    found[case] = Missing(str(error), "failed")
                except (ForeignError, TimeOverError):
                    raise
                except WorkerError as error:
                    found[case] = Missing(str(error))
                say(f"figures of {side.name} that do not vary", done, len(cases))
    except TimeOverError as error:
        late = Missing(str(error), "undecided")
        return {case: found.get(case, late) for case in cases}
    return found


def compare_exact(case: Case, base: Facts, head: Facts, allowed: Allowance | None = None) -> Row:
    """Same, larger, worse, or not measured on both sides.

    Raises:
        WorkerError: neither side has the attention: its name is wrong.
    """
    allowed = allowed or Allowance()
    for side in (base, head):
        if isinstance(side, Missing) and side.then == "undecided":
            return Row(case, "undecided", note=side.reason)
    if isinstance(head, Missing) and head.then == "failed":
        return Row(case, "failed", note=head.reason)
    if isinstance(head, Missing):
        if not isinstance(base, Missing):
            return Row(case, head.then, note=head.reason)
        if base.then == head.then == "removed":
            raise WorkerError(head.reason)
        return Row(case, "not measured", note=base.reason if case.task else head.reason)
    if isinstance(base, Missing):
        return Row(case, "new", note=base.reason)
    both = [ExactMetric(name, base[name], head[name]) for name in base if name in head]
    both = sorted(both, key=lambda metric: (len(metric.name), metric.name))  # 8 pairs before 16
    metrics = tuple(metric for metric in both if metric.is_recall or metric.base != metric.head)
    if case.task and not metrics:
        return Row(case, "not measured", note="base and head were asked other questions")
    bad = any(metric.bad(allowed.of(metric)) for metric in metrics)
    finding: Finding = ("worse" if case.task else "larger") if bad else "same"
    return Row(case, finding, facts=metrics, note=f"accepted: {allowed.why}" if allowed.why else "")


def _exact_metrics(worker: WorkerClient, case: Case, models: RecallModels) -> Facts:
    if case.attention not in worker.attentions:
        known = ", ".join(worker.attentions)
        missing = f"no attention {case.attention!r}; known: {known}"
        reason = f"{worker.side.name}: {worker.left_out.get(case.attention, missing)}"
        return Missing(reason, "removed")
    worker.own(case.attention)
    if case.task:
        return _recall(worker, case, models)
    worker.request("prepare", case=asdict(case), name=case.id, seed=content())
    found: dict[str, float] = worker.request("facts", name=case.id)
    if compiled(case):
        found |= worker.request("breaks", name=case.id)
    worker.verify(case.id)
    worker.prove()  # once more: a call may import something
    worker.request("release", name=case.id)
    return found


def _recall(worker: WorkerClient, case: Case, models: RecallModels) -> Facts:
    place = models.place(case)
    if models.train:
        place.parent.mkdir(parents=True, exist_ok=True)
        worker.request("train", **models.request(case))
    elif not place.exists():
        return Missing(f"there is no trained model, {place.name}", "not measured")
    found: dict[str, float] | str = worker.request("recall", **models.request(case))
    worker.prove()
    if isinstance(found, str):  # with other parameters it would be another model
        return Missing(f"{worker.side.name}: {found}", "not measured")
    return found
