"""Error rates of the gate: runs are replayed from rounds whose truth is known."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from scipy import stats

from danon.gate.decision_rule import CONFIRMING, SCREENING
from danon.gate.gate_recorder import case_of
from danon.gate.paired_processes import Measurement
from danon.gate.sequential_test import SequentialTest
from danon.runs.case import Case
from gate_validation.other_tools import Rule
from gate_validation.rounds import Round

__all__ = ["MIN_ROUNDS", "OURS", "Rate", "clopper_pearson", "error_rates"]

OURS = "danon gate"
FIRST = SCREENING[0]
"""Number of rounds that every run takes."""
MIN_ROUNDS = SCREENING[-1] + CONFIRMING[-1]
"""Number of rounds that a run takes at most; with fewer nothing is counted."""
_Round = Mapping[str, Measurement]
_Run = Mapping[str, list[Measurement]]
"""Measurements of each case, in order."""


@dataclass(frozen=True, kw_only=True)
class Rate:
    """Alarms of one method.

    Attributes:
        method: the gate or another tool.
        machine: its processor.
        load: what else ran.
        slowdown: that was injected into one attention; its cases count as alarms, at 0 all cases.
        runs: number of runs.
        alarms: number of these with an alarm.
        undecided: number of runs that ended without a decision.
        rounds: number of rounds that the runs were replayed from.
        disjoint: number of runs that share no round.
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
        """Interval of the share of alarms, 95 %, as of the disjoint runs alone."""
        return clopper_pearson(round(self.disjoint * self.alarms / self.runs), self.disjoint)


def clopper_pearson(count: int, total: int) -> tuple[float, float]:
    """Return the exact 95 % interval of a share (Clopper and Pearson).

    Args:
        count: number of successes.
        total: number of trials.
    """
    interval = stats.binomtest(count, total).proportion_ci(method="exact")
    return float(interval.low), float(interval.high)


def error_rates(rounds: Sequence[Round], other_tools: Mapping[str, Rule]) -> list[Rate]:
    """Count alarms for each machine, load and slowdown: the gate's, and those of other tools.

    A run takes rounds in the order they were measured, as many as it needs. No two runs begin with
    the same round; without a slowdown, no two share one of their first rounds.

    Args:
        rounds: in the order they were measured.
        other_tools: their rules by name.
    """
    rates: list[Rate] = []
    for machine, load in dict.fromkeys((r.machine, r.load) for r in rounds):
        here = [r for r in rounds if (r.machine, r.load) == (machine, load)]
        names = set.intersection(*(set(r.measured) for r in here))
        by_slowdown: dict[float, list[_Round]] = {}
        for one in here:
            by_slowdown.setdefault(one.slowdown, []).append({n: one.measured[n] for n in names})
        same = by_slowdown.pop(0.0, [])
        make_rate = partial(Rate, machine=machine, load=load)
        if len(same) < MIN_ROUNDS:
            continue
        runs = [_run(same, start) for start in range(0, len(same) - FIRST + 1, FIRST)]
        plain = partial(make_rate, slowdown=0.0, rounds=len(same), disjoint=len(runs))
        rates += _rates_of(runs, other_tools, "", plain)
        for slowdown, slower in sorted(by_slowdown.items()):
            if len(slower) >= MIN_ROUNDS:
                disjoint = len(slower) // (FIRST + CONFIRMING[0])
                planted = partial(
                    make_rate, slowdown=slowdown, rounds=len(slower), disjoint=disjoint
                )
                rates += _over_attentions(same, slower, other_tools, planted)
    return rates


def _over_attentions(
    same: Sequence[_Round],
    slower: Sequence[_Round],
    other_tools: Mapping[str, Rule],
    make_rate: Callable[..., Rate],
) -> list[Rate]:
    """Count with the slowdown in one attention after the other; other cases are of equal rounds."""
    rates: dict[str, Rate] = {}
    for attention in sorted({case_of(name).attention for name in slower[0]}):
        runs = []
        for start in range(len(slower)):
            slowed, equal = _run(slower, start), _run(same, FIRST * start % len(same))
            runs.append(
                {
                    name: slowed[name] if case_of(name).attention == attention else equal[name]
                    for name in slowed
                }
            )
        for rate in _rates_of(runs, other_tools, attention, make_rate):
            before = rates.get(rate.method)
            rates[rate.method] = (
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
    return list(rates.values())


def _run(rounds: Sequence[_Round], start: int) -> _Run:
    order = [*rounds[start:], *rounds[:start]]
    return {name: [one[name] for one in order] for name in rounds[0]}


def _rates_of(
    runs: Sequence[_Run],
    other_tools: Mapping[str, Rule],
    attention: str,
    make_rate: Callable[..., Rate],
) -> Iterator[Rate]:
    """Yield the rate of every method.

    Args:
        runs: to decide.
        other_tools: their rules by name.
        attention: whose alarms count; empty for all.
        make_rate: makes a rate from the method, runs, alarms and undecided.
    """
    make_rate = partial(make_rate, runs=len(runs))
    ours = [_decided(run, attention) for run in runs]
    alarms, undecided = (sum(which) for which in zip(*ours, strict=True))
    yield make_rate(method=OURS, alarms=alarms, undecided=undecided)
    for method, rule in other_tools.items():
        alarms = sum(_raised(rule, run, attention) for run in runs)
        yield make_rate(method=method, alarms=alarms, undecided=0)


def _decided(run: _Run, attention: str) -> tuple[bool, bool]:
    """Return two flags: there is an alarm, there is no decision."""
    left = {case_of(name): iter(measured) for name, measured in run.items()}

    def measure(cases: Sequence[Case], seed: int) -> Iterator[tuple[Case, Measurement]]:
        return ((case, next(left[case])) for case in cases)

    rows = SequentialTest(measure).rows(list(left))
    findings = [row.finding for row in rows.values() if attention in ("", row.case.attention)]
    alarm = "slower" in findings
    return alarm, not alarm and "undecided" in findings


def _raised(rule: Rule, run: _Run, attention: str) -> bool:
    """Return True if a rule raises an alarm from the rounds that every run takes."""
    for name, measured in run.items():
        if attention in ("", case_of(name).attention):
            first = measured[:FIRST]
            base, head = [s for m in first for s in m.base], [s for m in first for s in m.head]
            if rule(base, head):
                return True
    return False
