"""Metrics that are the same in every run, and what it means when they differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass

from danon.gate.acceptance import Allowance
from danon.gate.cases import counts_graph_breaks
from danon.gate.paired_processes import draw_content
from danon.gate.recall_models import RecallModels
from danon.gate.result import ExactMetric, Finding, Row
from danon.gate.worker_client import (
    DiedError,
    ForeignError,
    OutputError,
    Side,
    TimeOverError,
    WorkerClient,
    WorkerError,
)
from danon.gate.workspace import Workspace
from danon.runs.case import Case

__all__ = ["ExactMetrics", "Missing", "compare_exact", "exact_metrics_of"]


@dataclass(frozen=True)
class Missing:
    """Reason why a case has no metrics.

    Attributes:
        reason: in words.
        finding: what becomes of the case if the other side has metrics.
    """

    reason: str
    finding: Finding = "broken"


ExactMetrics = Mapping[str, float] | Missing
"""Metrics of a case by name, or why there are none."""


def exact_metrics_of(
    workspace: Workspace,
    side: Side,
    cases: Sequence[Case],
    models: RecallModels,
    *,
    train: bool = False,
) -> dict[Case, ExactMetrics]:
    """Measure the exact metrics of each case.

    Args:
        workspace: starts workers until its time is over; later cases are not measured.
        side: the code to measure.
        cases: to measure.
        models: trained models for the cases of recall.
        train: True to train them first, with this side.

    Raises:
        WorkerError: The side does not start, or an attention is not its own.
    """
    metrics: dict[Case, ExactMetrics] = {}
    try:
        with ExitStack() as stack:
            worker = stack.enter_context(workspace.start_worker(side))
            for done, case in enumerate(cases, 1):
                try:
                    metrics[case] = _measure(worker, case, models, train=train)
                except DiedError as error:
                    metrics[case] = Missing(str(error))
                    worker = stack.enter_context(workspace.start_worker(side))
                except OutputError as error:
                    metrics[case] = Missing(str(error), "failed")
                except (ForeignError, TimeOverError):
                    raise
                except WorkerError as error:
                    metrics[case] = Missing(str(error))
                workspace.progress(f"exact metrics of {side.name}", done, len(cases))
    except TimeOverError as error:
        late = Missing(str(error), "undecided")
        return {case: metrics.get(case, late) for case in cases}
    return metrics


def compare_exact(
    case: Case, base: ExactMetrics, head: ExactMetrics, allowed: Allowance | None = None
) -> Row:
    """Return a row that says same, larger, worse, or why there is no comparison.

    Args:
        case: the case of both.
        base: its metrics in the base.
        head: its metrics in the head.
        allowed: growth that somebody accepted.

    Raises:
        WorkerError: Neither side has the attention: its name is wrong.
    """
    allowed = allowed or Allowance()
    for side in (base, head):
        if isinstance(side, Missing) and side.finding == "undecided":
            return Row(case, "undecided", note=side.reason)
    if isinstance(head, Missing) and head.finding == "failed":
        return Row(case, "failed", note=head.reason)
    if isinstance(head, Missing):
        if not isinstance(base, Missing):
            return Row(case, head.finding, note=head.reason)
        if base.finding == head.finding == "removed":
            raise WorkerError(head.reason)
        return Row(case, "not measured", note=base.reason if case.task else head.reason)
    if isinstance(base, Missing):
        return Row(case, "new", note=base.reason)
    shared = [ExactMetric(name, base[name], head[name]) for name in base if name in head]
    shared = sorted(shared, key=lambda metric: (len(metric.name), metric.name))  # 8 pairs before 16
    shown = tuple(metric for metric in shared if metric.is_recall or metric.base != metric.head)
    if case.task and not shown:
        return Row(case, "not measured", note="base and head were asked other questions")
    bad = any(metric.is_worse(allowed.limit(metric)) for metric in shown)
    finding: Finding = ("worse" if case.task else "larger") if bad else "same"
    note = f"accepted: {allowed.reason}" if allowed.reason else ""
    return Row(case, finding, facts=shown, note=note)


def _measure(
    worker: WorkerClient, case: Case, models: RecallModels, *, train: bool
) -> ExactMetrics:
    if case.attention not in worker.attentions:
        names = ", ".join(worker.attentions)
        unknown = f"no attention {case.attention!r}; known: {names}"
        reason = worker.left_out.get(case.attention, unknown)
        return Missing(f"{worker.side.name}: {reason}", "removed")
    worker.check_attention(case.attention)
    if case.task:
        return _measure_recall(worker, case, models, train=train)
    worker.request("prepare", case=asdict(case), name=case.id, seed=draw_content())
    metrics: dict[str, float] = worker.request("exact_metrics", name=case.id)
    if counts_graph_breaks(case):
        metrics |= worker.request("graph_breaks", name=case.id)
    worker.verify(case.id)
    worker.check_imports()  # once more: a call may import something
    worker.request("release", name=case.id)
    return metrics


def _measure_recall(
    worker: WorkerClient, case: Case, models: RecallModels, *, train: bool
) -> ExactMetrics:
    path = models.path(case)
    if train:
        path.parent.mkdir(parents=True, exist_ok=True)
        worker.request("train", **models.request(case))
    elif not path.exists():
        return Missing(f"there is no trained model, {path.name}", "not measured")
    answer: dict[str, float] | str = worker.request("recall", **models.request(case))
    worker.check_imports()
    if isinstance(answer, str):  # with other parameters it would be another model
        return Missing(f"{worker.side.name}: {answer}", "not measured")
    return answer
