"""A checkout beside the thresholds of its repository, and how these are measured."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median

import numpy as np

from danon.gate.against import ROUNDS, merged
from danon.gate.comparison import Row
from danon.gate.decide import TYPICAL, Tolerance
from danon.gate.facts import Facts, Missing, facts_of, judged
from danon.gate.pair import Measurement, Side, Worker, WorkerError, balanced, pair
from danon.gate.thresholds import Threshold, Thresholds
from danon.gate.trial import Say, Trial
from danon.measure.case import Case

__all__ = ["PORTABLE", "calibrated", "standing"]

REFERENCE = "sdpa"
PORTABLE = ("parameters", "flops", "state_bytes")
"""Facts that no runtime changes."""
SLACK = 0.05
"""As in a Tolerance, at least: thresholds were measured on another day."""
DRIFTS = 2.0
"""Of a case between processes, that are its slack where that is more."""
LIMIT = 3.0
"""Slacks that must not pass."""
WIDER = 3.0
"""Times as much on another machine."""


def standing(
    head: Side, thresholds: Thresholds, cases: Sequence[Case], inputs: Path, log: Path, *,
    fingerprint: Mapping[str, str], budget_s: float, say: Say, seed: int = 0,
) -> list[Row]:  # fmt: skip
    """What became of each case, in their order; arguments as in :func:`against`."""
    after = facts_of(head, cases, inputs, log, say)
    before: dict[Case, Facts] = {}
    for case in cases:
        known = thresholds.cases.get(case.id)
        everything = thresholds.comparable(fingerprint)
        if known is None:
            before[case] = Missing("there is no threshold of it", gone=True)
        else:
            before[case] = {n: x for n, x in known.facts.items() if everything or n in PORTABLE}
    rows = {case: judged(case, before[case], after[case]) for case in cases}
    wider = 1.0 if thresholds.same_machine(fingerprint) else WIDER

    def measure(some: Sequence[Case], turn: int) -> Iterable[tuple[Case, Measurement]]:
        for case, relative, dense_s in _relative(head, some, inputs, log, seed=turn):
            accepted = thresholds.cases[case.id].relative_time
            slower = math.log(relative / accepted)
            yield case, Measurement(slower, accepted * dense_s, relative * dense_s)

    tolerances = {}
    for name, known in thresholds.cases.items():
        slack = wider * max(SLACK, DRIFTS * known.drift)
        tolerances[name] = Tolerance(slack, LIMIT * slack, known.drift)
    return merged(rows, Trial(measure, budget_s, seed, say, tolerances))


def calibrated(
    side: Side, cases: Sequence[Case], inputs: Path, log: Path, *, pairs: int, say: Say,
    seed: int = 0,
) -> tuple[dict[str, Threshold], dict[str, str]]:  # fmt: skip
    """Thresholds of the cases that run: the code against itself, and beside dense attention.

    Args:
        pairs: of fresh processes, and as many single ones.

    Returns:
        Thresholds, and why there are none of the other cases.

    Raises:
        WorkerError: an unknown attention, the side does not start, or a worker died.
    """
    facts = facts_of(side, cases, inputs, log, say)
    without = {case: some for case, some in facts.items() if isinstance(some, Missing)}
    for some in without.values():
        if some.gone:
            raise WorkerError(some.reason)
    measured = {case: dict(some) for case, some in facts.items() if not isinstance(some, Missing)}
    running = list(measured)
    ratios: dict[Case, list[float]] = {case: [] for case in running}
    relative: dict[Case, list[float]] = {case: [] for case in running}
    base, head = replace(side, name="base"), replace(side, name="head")
    for turn in range(pairs):
        both = pair(base, head, running, inputs, log, rounds=ROUNDS, seed=1000 * seed + turn)
        for done, (case, one) in enumerate(both, 1):
            ratios[case].append(one.log_ratio)
            say(f"against itself, {turn + 1} of {pairs}", done, len(running))
        alone = _relative(side, running, inputs, log, seed=1000 * seed + turn)
        for done, (case, found, _) in enumerate(alone, 1):
            relative[case].append(math.log(found))
            say(f"beside dense attention, {turn + 1} of {pairs}", done, len(running))
    thresholds = {
        case.id: Threshold(
            relative_time=math.exp(median(relative[case])), spread=_spread(ratios[case]),
            drift=_spread(relative[case]), facts=figures,
        )
        for case, figures in measured.items()
    }  # fmt: skip
    return thresholds, {case.id: some.reason for case, some in without.items()}


def _relative(
    side: Side, cases: Sequence[Case], inputs: Path, log: Path, *, seed: int
) -> Iterator[tuple[Case, float, float]]:
    """Each case's time over dense attention's, and seconds of that, in one fresh process."""
    order = random.Random(seed)
    with Worker(side, inputs, log) as worker:
        for case in order.sample(list(cases), len(cases)):
            sides = {"dense": replace(case, attention=REFERENCE), "case": case}
            for name, one in sides.items():
                worker.request("prepare", case=asdict(one), name=name)
            found = balanced((worker, "dense"), (worker, "case"), ROUNDS, order)
            for name in sides:
                worker.request("release", name=name)
            yield case, math.exp(found.log_ratio), found.base_s


def _spread(logs: Sequence[float]) -> float:
    """Standard deviation that one disturbed value in five does not move, and never nothing."""
    low, high = np.quantile(logs, (0.25, 0.75))
    return max(float(high - low) / 1.349, TYPICAL / 2)
