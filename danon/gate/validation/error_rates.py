"""Runs of the gate replayed from rounds whose truth is known, and how often they raise an alarm."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from scipy import stats

from danon.gate.decision_rule import CONFIRMING, SCREENING
from danon.gate.gate_recorder import case_of
from danon.gate.paired_processes import Measurement
from danon.gate.sequential_test import SequentialTest
from danon.gate.validation.other_tools import Rule
from danon.gate.validation.rounds import Round
from danon.runs.case import Case

__all__ = ["ENOUGH", "OURS", "Rate", "exact", "rates"]

OURS = "danon gate"
FIRST = SCREENING[0]
ENOUGH = SCREENING[-1] + CONFIRMING[-1]
"""Rounds that one run may take."""
_Round = Mapping[str, Measurement]
_Run = Mapping[str, list[Measurement]]
"""What each case measures, in order."""


@dataclass(frozen=True, kw_only=True)
class Rate:
    """Alarms of one method.

    Attributes:
        slowdown: that was planted in one attention; an alarm is one of its cases, or any at 0.
        undecided: runs that ended without a decision.
        rounds: that the runs were replayed from.
        disjoint: runs that so many rounds are enough for without using one twice.
    """

    method: str
    machine: str
    load: str
    slowdown: float
    runs: int
    alarms: int
    undecided: int
    rounds: int
    disjoint: int

    @property
    def interval(self) -> tuple[float, float]:
        """Of the share of alarms, 95 %, as of disjoint runs: others say the same again."""
        return exact(round(self.disjoint * self.alarms / self.runs), self.disjoint)


def exact(count: int, of: int) -> tuple[float, float]:
    """Interval of a share (Clopper and Pearson), 95 %."""
    found = stats.binomtest(count, of).proportion_ci(method="exact")
    return float(found.low), float(found.high)


def rates(rounds: Sequence[Round], other_tools: Mapping[str, Rule]) -> list[Rate]:
    """For each machine, load and slowdown that there are rounds of: ours, and the other tools'.

    A run goes through rounds in the order they were measured, begins where no other does, and takes
    as many as it needs. Where nothing is planted, no two runs begin with a common round.
    """
    found: list[Rate] = []
    for machine, load in dict.fromkeys((r.machine, r.load) for r in rounds):
        here = [r for r in rounds if (r.machine, r.load) == (machine, load)]
        names = set.intersection(*(set(r.measured) for r in here))
        kinds: dict[float, list[_Round]] = {}
        for some in here:
            kinds.setdefault(some.slowdown, []).append({n: some.measured[n] for n in names})
        same = kinds.pop(0.0, [])
        about = partial(Rate, machine=machine, load=load)
        if len(same) < ENOUGH:
            continue
        runs = [_run(same, start) for start in range(0, len(same) - FIRST + 1, FIRST)]
        plain = partial(about, slowdown=0.0, rounds=len(same), disjoint=len(runs))
        found += _judged(runs, other_tools, "", plain)
        for slowdown, slower in sorted(kinds.items()):
            if len(slower) >= ENOUGH:
                disjoint = len(slower) // (FIRST + CONFIRMING[0])
                planted = partial(about, slowdown=slowdown, rounds=len(slower), disjoint=disjoint)
                found += _over_attentions(same, slower, other_tools, planted)
    return found


def _over_attentions(
    same: Sequence[_Round],
    slower: Sequence[_Round],
    other_tools: Mapping[str, Rule],
    about: Callable[..., Rate],
) -> list[Rate]:
    """With the slowdown in one attention after the other, the others' cases of equal rounds."""
    found: dict[str, Rate] = {}
    for attention in sorted({case_of(name).attention for name in slower[0]}):
        runs = []
        for start in range(len(slower)):
            own, other = _run(slower, start), _run(same, FIRST * start % len(same))
            runs.append(
                {
                    name: own[name] if case_of(name).attention == attention else other[name]
                    for name in own
                }
            )
        for rate in _judged(runs, other_tools, attention, about):
            before = found.get(rate.method)
            found[rate.method] = (
                rate
                if before is None
                else replace(
                    before,
                    runs=before.runs + rate.runs,
                    alarms=before.alarms + rate.alarms,
                    undecided=before.undecided + rate.undecided,
                    disjoint=before.disjoint + rate.disjoint,
                )
            )
    return list(found.values())


def _run(rounds: Sequence[_Round], start: int) -> _Run:
    order = [*rounds[start:], *rounds[:start]]
    return {name: [some[name] for some in order] for name in rounds[0]}


def _judged(
    runs: Sequence[_Run],
    other_tools: Mapping[str, Rule],
    attention: str,
    about: Callable[..., Rate],
) -> Iterator[Rate]:
    """What every method makes of them.

    Args:
        attention: whose alarms count; empty for all.
    """
    some = partial(about, runs=len(runs))
    ours = [_decided(run, attention) for run in runs]
    alarms, undecided = (sum(which) for which in zip(*ours, strict=True))
    yield some(method=OURS, alarms=alarms, undecided=undecided)
    for method, rule in other_tools.items():
        alarms = sum(_raised(rule, run, attention) for run in runs)
        yield some(method=method, alarms=alarms, undecided=0)


def _decided(run: _Run, attention: str) -> tuple[bool, bool]:
    """Whether there is an alarm, and whether no decision."""
    left = {case_of(name): iter(measured) for name, measured in run.items()}

    def measure(cases: Sequence[Case], turn: int) -> Iterator[tuple[Case, Measurement]]:
        return ((case, next(left[case])) for case in cases)

    rows = SequentialTest(measure, math.inf, 0, lambda *_: None).rows(list(left))
    findings = [row.finding for row in rows.values() if attention in ("", row.case.attention)]
    alarm = "slower" in findings
    return alarm, not alarm and "undecided" in findings


def _raised(rule: Rule, run: _Run, attention: str) -> bool:
    """An alarm from the samples of as many rounds as screening takes at least."""
    for name, measured in run.items():
        if attention in ("", case_of(name).attention):
            some = measured[:FIRST]
            base, head = [s for m in some for s in m.base], [s for m in some for s in m.head]
            if rule(base, head):
                return True
    return False
