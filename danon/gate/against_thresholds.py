"""A checkout beside the thresholds of its repository, and how these are measured."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median

import numpy as np

from danon.gate.against_commit import ROUNDS, decided
from danon.gate.decision_rule import TYPICAL, Tolerance
from danon.gate.exact_metrics import Facts, Missing, RecallModels, compare_exact, exact_metrics_of
from danon.gate.paired_processes import (
    Measurement,
    OutputError,
    Side,
    WorkerClient,
    WorkerError,
    balanced,
    content,
    measure_abba,
)
from danon.gate.result import RECALL, Row
from danon.gate.sequential_test import Say, SequentialTest
from danon.gate.thresholds import PORTABLE, Threshold, Thresholds, ThresholdsError, Timing
from danon.runs.case import Case

__all__ = ["ELSEWHERE", "PEAK_ELSEWHERE", "measure_against_thresholds", "measure_thresholds"]

REFERENCE = "sdpa"
SLACK = 0.05
"""As in a Tolerance, at least: thresholds were measured on another day."""
DRIFTS = 2.0
"""Of a case between processes, that are its slack where that is more."""
LIMIT = 3.0
"""Slacks that must not pass."""
ELSEWHERE = (6.0, 8.0)
"""On another machine, slack and limit, as factors: beside dense attention the same code was up to
5.2 times as slow on one processor as on another (docs/log.md), most where one has matrix units."""
PEAK_ELSEWHERE = 1.5
"""Peak bytes that another machine may take, as a factor: the same code took up to 1.36 times as
many with one processor's matrix products as with another's (docs/log.md)."""


def measure_against_thresholds(
    head: Side,
    thresholds: Thresholds,
    cases: Sequence[Case],
    inputs: Path,
    log: Path,
    models: RecallModels,
    *,
    fingerprint: Mapping[str, str],
    end: float,
    say: Say,
    seed: int = 0,
) -> list[Row]:
    """What became of each case, in their order.

    Arguments as in :func:`danon.gate.against_commit.compare_commits`.

    Raises:
        ThresholdsError: a trained model is not there.
        WorkerError: the side does not start, or a worker died.
    """
    _check(thresholds, cases, models)
    timings = {name: known.time for name, known in thresholds.cases.items() if known.time}

    def compared(some: Sequence[Case]) -> dict[Case, Row]:
        after = exact_metrics_of(head, some, inputs, log, models, say, end=end)
        before: dict[Case, Facts] = {}
        for case in some:
            known = thresholds.cases.get(case.id)
            if known is None:
                before[case] = Missing("there is no threshold of it", "removed")
            else:
                before[case] = {
                    name: figure
                    for name, figure in known.facts.items()
                    if _counts(name, figure, after[case], thresholds, fingerprint)
                }
        return {case: compare_exact(case, before[case], after[case]) for case in some}

    def measure(
        some: Sequence[Case], turn: int
    ) -> Iterator[tuple[Case, Measurement | OutputError]]:
        for case, found in _relative(head, some, inputs, log, seed=turn, end=end):
            if isinstance(found, OutputError):
                yield case, found
                continue
            relative, dense_s = found
            accepted = timings[case.id].relative
            slower = math.log(relative / accepted)
            yield case, Measurement(slower, (accepted * dense_s,), (relative * dense_s,))

    tolerances = {}
    for name, timing in timings.items():
        slack = max(SLACK, DRIFTS * timing.drift)
        tolerances[name] = Tolerance(slack, LIMIT * slack, timing.drift)
        if not thresholds.same_machine(fingerprint):
            slack, limit = map(math.log, ELSEWHERE)
            tolerances[name] = Tolerance(slack, limit, timing.drift)
    return [
        row
        if row.time_ratio is None
        else replace(row, relative_time=timings[row.case.id].relative * row.time_ratio.value)
        for row in decided(cases, compared, SequentialTest(measure, end, seed, say, tolerances))
    ]


def measure_thresholds(
    side: Side,
    cases: Sequence[Case],
    inputs: Path,
    log: Path,
    models: RecallModels,
    *,
    pairs: int,
    say: Say,
    seed: int = 0,
) -> tuple[dict[str, Threshold], dict[str, str]]:
    """Thresholds of the cases that run: the code against itself, and beside dense attention.

    Args:
        models: are trained.
        pairs: of fresh processes, and as many single ones.

    Returns:
        Thresholds, and why there are none of the other cases.

    Raises:
        WorkerError: an unknown attention, the side does not start, or a worker died.
    """
    metrics = exact_metrics_of(side, cases, inputs, log, replace(models, train=True), say)
    without = {case: some for case, some in metrics.items() if isinstance(some, Missing)}
    for some in without.values():
        if some.then == "removed":
            raise WorkerError(some.reason)
    measured = {case: dict(some) for case, some in metrics.items() if not isinstance(some, Missing)}
    running = [case for case in measured if not case.task]
    ratios: dict[Case, list[float]] = {case: [] for case in running}
    relative: dict[Case, list[float]] = {case: [] for case in running}
    base, head = replace(side, name="base"), replace(side, name="head")
    for turn in range(pairs):
        both = measure_abba(
            base, head, running, inputs, log, rounds=ROUNDS, seed=1000 * seed + turn
        )
        for done, (case, one) in enumerate(both, 1):
            if isinstance(one, OutputError):
                raise one
            ratios[case].append(one.log_ratio)
            say(f"against itself, {turn + 1} of {pairs}", done, len(running))
        alone = _relative(side, running, inputs, log, seed=1000 * seed + turn)
        for done, (case, found) in enumerate(alone, 1):
            if isinstance(found, OutputError):
                raise found
            relative[case].append(math.log(found[0]))
            say(f"beside dense attention, {turn + 1} of {pairs}", done, len(running))
    times = {
        case: Timing(
            relative=math.exp(median(relative[case])),
            spread=_spread(ratios[case]),
            drift=_spread(relative[case]),
        )
        for case in running
    }
    thresholds = {
        case.id: Threshold(time=times.get(case), facts=figures, model=models.digest(case))
        for case, figures in measured.items()
    }
    return thresholds, {case.id: some.reason for case, some in without.items()}


def _counts(
    name: str, figure: float, found: Facts, thresholds: Thresholds, here: Mapping[str, str]
) -> bool:
    """Whether what was found on this machine can be held to a threshold's figure."""
    if name in PORTABLE or name.startswith(RECALL):
        return True
    if not thresholds.comparable(here):
        return False
    if name != "peak_bytes" or thresholds.same_machine(here) or isinstance(found, Missing):
        return True
    return found.get(name, 0.0) > PEAK_ELSEWHERE * figure


def _check(thresholds: Thresholds, cases: Sequence[Case], models: RecallModels) -> None:
    """Raises: ThresholdsError: a threshold is of a trained model that is not there."""
    for case in cases:
        known = thresholds.cases.get(case.id)
        if known is not None and known.model and known.model != models.digest(case):
            raise ThresholdsError(
                f"{models.place(case).name} is not the trained model {known.model} that the "
                f"threshold of {case.id} is about: commit it, or calibrate again"
            )


def _relative(
    side: Side, cases: Sequence[Case], inputs: Path, log: Path, *, seed: int, end: float = math.inf
) -> Iterator[tuple[Case, tuple[float, float] | OutputError]]:
    """Each case's time over dense attention's, and seconds of that, in one fresh process."""
    order = random.Random(seed)
    with WorkerClient(side, inputs, log, end) as worker:
        for case in order.sample(list(cases), len(cases)):
            sides = {"dense": replace(case, attention=REFERENCE), "case": case}
            text = content()
            for name, one in sides.items():
                worker.request("prepare", case=asdict(one), name=name, seed=text)
            found = balanced((worker, "dense"), (worker, "case"), ROUNDS, order)
            try:
                for name in sides:
                    worker.verify(name)
            except OutputError as error:
                yield case, error
            else:
                yield case, (math.exp(found.log_ratio), median(found.base))
            for name in sides:
                worker.request("release", name=name)


def _spread(logs: Sequence[float]) -> float:
    """Standard deviation that one disturbed value in five does not move, and never nothing."""
    low, high = np.quantile(logs, (0.25, 0.75))
    return max(float(high - low) / 1.349, TYPICAL / 2)
