"""Runs of the gate replayed from rounds whose truth is known, and how often they raise an alarm."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from scipy import stats

from danon.gate.decide import CONFIRMING, SCREENING
from danon.gate.pair import Measurement
from danon.gate.power.rivals import Rule
from danon.gate.power.rounds import Round
from danon.gate.record import case_of
from danon.gate.trial import Trial
from danon.measure.case import Case

__all__ = ["OURS", "Rate", "exact", "rates"]

OURS = "danon gate"
REPLAYS = 100
"""Of each slowdown in each attention; rounds are drawn anew for each."""
ENOUGH = SCREENING[-1] + CONFIRMING[-1]
"""Rounds that one run may take."""
_Run = Mapping[str, list[Measurement]]
"""What each case measures, in order."""


@dataclass(frozen=True)
class Rate:
    """Alarms of one method.

    Attributes:
        slowdown: that was planted in one attention; an alarm is one of its cases, or any at 0.
        undecided: runs that ended without a decision.
        rounds: that the runs were replayed from.
    """

    method: str
    load: str
    slowdown: float
    runs: int
    alarms: int
    undecided: int
    rounds: int

    @property
    def interval(self) -> tuple[float, float]:
        """Of the share of alarms, 95 %."""
        return exact(self.alarms, self.runs)


def exact(count: int, of: int) -> tuple[float, float]:
    """Interval of a share (Clopper and Pearson), 95 %."""
    found = stats.binomtest(count, of).proportion_ci(method="exact")
    return float(found.low), float(found.high)


def rates(rounds: Sequence[Round], rivals: Mapping[str, Rule], seed: int = 0) -> list[Rate]:
    """For each load and slowdown that there are rounds of: ours, and the rivals'.

    Of the same code a run screens with rounds that no other run screens with, one after the other;
    what it confirms with is drawn from all the others.
    """
    found: list[Rate] = []
    for load in dict.fromkeys(r.load for r in rounds):
        same = [r for r in rounds if r.load == load and not r.slowdown]
        runs = list(_same(same, random.Random(seed))) if len(same) >= ENOUGH else []
        found += _judged(runs, rivals, load, 0.0, len(same), "")
        for slowdown in sorted({r.slowdown for r in rounds if r.load == load} - {0.0}):
            slower = [r for r in rounds if (r.load, r.slowdown) == (load, slowdown)]
            if min(len(slower), len(same)) < ENOUGH:
                continue
            parts: dict[str, Rate] = {}
            for attention in sorted({case_of(name).attention for name in slower[0].measured}):
                runs = list(_mixed(same, slower, attention, random.Random(seed)))
                for rate in _judged(runs, rivals, load, slowdown, len(slower), attention):
                    parts[rate.method] = _sum(parts.get(rate.method), rate)
            found += parts.values()
    return found


def _same(rounds: Sequence[Round], order: random.Random) -> Iterator[_Run]:
    first = SCREENING[0]
    for start in range(0, len(rounds) - first + 1, first):
        own, rest = rounds[start : start + first], [*rounds[:start], *rounds[start + first :]]
        yield _run([*own, *order.sample(rest, len(rest))])


def _mixed(
    same: Sequence[Round], slower: Sequence[Round], attention: str, order: random.Random
) -> Iterator[_Run]:
    for _ in range(REPLAYS):
        other, own = (_run(order.sample(some, len(some))) for some in (same, slower))
        yield {n: own[n] if case_of(n).attention == attention else other[n] for n in own}


def _run(rounds: Iterable[Round]) -> _Run:
    found: dict[str, list[Measurement]] = {}
    for some in rounds:
        for name, measured in some.measured.items():
            found.setdefault(name, []).append(measured)
    return found


def _judged(
    runs: Sequence[_Run], rivals: Mapping[str, Rule], load: str, slowdown: float, rounds: int,
    attention: str,
) -> Iterator[Rate]:  # fmt: skip
    """What every method makes of them.

    Args:
        attention: whose alarms count; empty for all.
    """
    if not runs:
        return
    ours = [_decided(run, attention) for run in runs]
    alarms, undecided = (sum(which) for which in zip(*ours, strict=True))
    yield Rate(OURS, load, slowdown, len(runs), alarms, undecided, rounds)
    for method, rule in rivals.items():
        alarms = sum(_raised(rule, run, attention) for run in runs)
        yield Rate(method, load, slowdown, len(runs), alarms, 0, rounds)


def _decided(run: _Run, attention: str) -> tuple[bool, bool]:
    """Whether there is an alarm, and whether no decision."""
    left = {case_of(name): iter(measured) for name, measured in run.items()}

    def measure(cases: Sequence[Case], turn: int) -> Iterator[tuple[Case, Measurement]]:
        return ((case, next(left[case])) for case in cases)

    rows = Trial(measure, math.inf, 0, lambda *_: None).rows(list(left))
    findings = [row.finding for row in rows.values() if attention in ("", row.case.attention)]
    alarm = "slower" in findings
    return alarm, not alarm and "undecided" in findings


def _raised(rule: Rule, run: _Run, attention: str) -> bool:
    """An alarm from the samples of as many rounds as screening takes at least."""
    for name, measured in run.items():
        if attention in ("", case_of(name).attention):
            some = measured[: SCREENING[0]]
            base, head = [s for m in some for s in m.base], [s for m in some for s in m.head]
            if rule(base, head):
                return True
    return False


def _sum(one: Rate | None, other: Rate) -> Rate:
    if one is None:
        return other
    return Rate(
        one.method, one.load, one.slowdown, one.runs + other.runs, one.alarms + other.alarms,
        one.undecided + other.undecided, one.rounds,
    )  # fmt: skip
