"""Several runs of one code as one side of a comparison.

    results = pool_runs([RecordedRun.read(a), RecordedRun.read(b), RecordedRun.read(c)])

Two runs of the same code differ by more than their intervals. The mean of several differs by less,
and a single disturbed run weighs less in it.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

from danon.report.run_noise import interval_width, standard_error
from danon.runs.case import CONTENDED_CORES, CaseResult

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from danon.runs.case import Case
    from danon.runs.journal import RecordedRun

__all__ = ["Pooled", "pool_runs", "rounds_of"]


@dataclass(frozen=True)
class Pooled:
    """A case in the runs of one side.

    Attributes:
        result: mean of the runs.
        members: results of the runs that count.
    """

    result: CaseResult
    members: tuple[CaseResult, ...]


def pool_runs(runs: Sequence[RecordedRun]) -> dict[Case, Pooled]:
    """Return one result of each case, and those that it is the mean of.

    A figure with an interval is the geometric mean of the runs, with the error within them. Any
    other figure is that of the first run. Runs in which other programs took the cores of a case
    count only if there is no other, and so do runs that did not measure it.

    Args:
        runs: at least one, of one machine and code.
    """
    cases = dict.fromkeys(result.case for run in runs for result in run.results)
    by_run = [{result.case: result for result in run.results} for run in runs]
    return {case: _pooled([found[case] for found in by_run if case in found]) for case in cases}


def rounds_of(result: CaseResult) -> int:
    """Return the number of samples behind a result: rounds, or trainings."""
    return round(result.metrics.get("seeds", len(result.samples.get("candidate_s", ()))))


def _pooled(results: Sequence[CaseResult]) -> Pooled:
    chosen = [result for result in results if result.status == "measured"] or list(results)
    chosen = [result for result in chosen if CONTENDED_CORES not in result.metrics] or chosen
    first = chosen[0]
    if len(chosen) == 1 or first.status != "measured":
        return Pooled(first, (first,))
    metrics = {**first.metrics, **dict(_means(chosen))}
    times = [x for result in chosen for x in result.samples.get("candidate_s", ())]
    samples = {**first.samples, "candidate_s": times} if times else first.samples
    if "seeds" in metrics:
        metrics["seeds"] = float(sum(map(rounds_of, chosen)))
    return Pooled(dataclasses.replace(first, metrics=metrics, samples=samples), tuple(chosen))


def _means(results: Sequence[CaseResult]) -> Iterator[tuple[str, float]]:
    """Yield the means of the metrics that have an interval in every run, and their ends."""
    shared = set.intersection(*(set(result.metrics) for result in results))
    rounds = sum(map(rounds_of, results))
    for name in sorted(shared):
        ends = f"{name}_low", f"{name}_high"
        if not shared.issuperset(ends) or any(x.metrics[ends[0]] <= 0 for x in results):
            continue
        logs = [math.log(result.metrics[name]) for result in results]
        within = [
            standard_error(x.metrics[ends[0]], x.metrics[ends[1]], rounds_of(x)) for x in results
        ]
        error = math.hypot(*within) / len(logs)
        mean, half = statistics.fmean(logs), interval_width(error, rounds) / 2
        yield name, math.exp(mean)
        yield ends[0], math.exp(mean - half)
        yield ends[1], math.exp(mean + half)
