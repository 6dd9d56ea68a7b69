"""Figures that are the same in every run, and what it means when they differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from danon.gate.accept import Allowance
from danon.gate.cases import compiled
from danon.gate.comparison import Fact, Row
from danon.gate.pair import DiedError, Side, Worker, WorkerError
from danon.gate.trial import Say
from danon.measure.case import Case

__all__ = ["Facts", "Missing", "facts_of", "judged"]


@dataclass(frozen=True)
class Missing:
    """Why a case has no figures.

    Attributes:
        gone: the side does not have the attention.
    """

    reason: str
    gone: bool = False


Facts = Mapping[str, float] | Missing


def facts_of(
    side: Side, cases: Sequence[Case], inputs: Path, log: Path, say: Say
) -> dict[Case, Facts]:
    """Measure those of each case.

    Raises:
        WorkerError: the side does not start.
    """
    found: dict[Case, Facts] = {}
    with ExitStack() as stack:
        worker = stack.enter_context(Worker(side, inputs, log))
        for done, case in enumerate(cases, 1):
            try:
                found[case] = _facts(worker, case)
            except DiedError as error:
                found[case] = Missing(str(error))
                worker = stack.enter_context(Worker(side, inputs, log))
            except WorkerError as error:
                found[case] = Missing(str(error))
            say(f"figures of {side.name} that do not vary", done, len(cases))
    return found


def judged(case: Case, base: Facts, head: Facts, allowed: Allowance | None = None) -> Row:
    """Same, larger, or not measured on both sides.

    Raises:
        WorkerError: neither side has the attention: its name is wrong.
    """
    allowed = allowed or Allowance()
    if isinstance(head, Missing):
        if not isinstance(base, Missing):
            return Row(case, "removed" if head.gone else "broken", note=head.reason)
        if head.gone and base.gone:
            raise WorkerError(head.reason)
        return Row(case, "not measured", note=head.reason)
    if isinstance(base, Missing):
        return Row(case, "new", note=base.reason)
    facts = tuple(
        Fact(name, base[name], head[name])
        for name in base
        if name in head and base[name] != head[name]
    )
    larger = any(f.grown and f.head > allowed.facts.get(f.name, 0.0) for f in facts)
    note = f"accepted: {allowed.why}" if allowed.why else ""
    return Row(case, "larger" if larger else "same", facts=facts, note=note)


def _facts(worker: Worker, case: Case) -> Facts:
    if case.attention not in worker.attentions:
        known = ", ".join(worker.attentions)
        return Missing(f"{worker.side.name}: no attention {case.attention!r}; known: {known}", True)
    worker.request("prepare", case=asdict(case), name=case.id)
    found: dict[str, float] = worker.request("facts", name=case.id)
    if compiled(case):
        found |= worker.request("breaks", name=case.id)
    worker.request("release", name=case.id)
    return found
