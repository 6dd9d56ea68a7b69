"""Time of a forward pass, and of forward and backward, beside dense attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from time import perf_counter

import torch

from danon.attention.registry import REFERENCE
from danon.bench.call_suite import CallSuite, Figures, refuse_if
from danon.bench.cost_forecast import TIMING_CALLS
from danon.bench.profile import Profile
from danon.bench.suite import SuiteContext, register
from danon.bench.timed_workload import TimedAttention
from danon.bench.verification import Correctness
from danon.bench.workload import Workload
from danon.measure.other_load import SLACK_CORES, CpuReading, contended_cores
from danon.measure.roofline import copy_rate, matmul_rate, matmul_rate_of
from danon.measure.statistics import FEWEST_ROUNDS
from danon.measure.timing import measure_pair, measure_single
from danon.runs.case import CONTENDED_CORES, Case, CaseResult
from danon.runs.suite_info import Metric

__all__ = ["Speed"]

RATE_S = 0.5
"""A rate that a figure exceeds is measured again for so long."""
DENSE_AND_OWN = 1.5
"""Seconds of a round over those of dense attention, roughly, for the time left."""
SHORTEST_S = 1.0
"""Seconds of the rounds of a short case, roughly."""
BACKWARD_FLOPS = 3.5
"""Operations of forward and backward over those of forward: seven matrix products, not two."""


@register
class Speed(CallSuite):
    """Times an attention and dense attention alternately."""

    name = "speed"
    description = "Time of a call beside dense attention's, measured alternately."
    order = 10
    grid_of = ""
    timed = True
    measured_for = ("scaling",)
    times_calls = True
    metrics = (
        Metric(
            "speedup",
            "times faster than dense attention",
            unit="x",
            better="higher",
            listed=False,
            charted=True,
        ),
        Metric(
            "time_s",
            "median seconds of a call",
            unit="s",
            better="lower",
            listed=False,
            charted=True,
        ),
        Metric(
            "useful_flops_per_s",
            "floating-point operations that the visible pairs need, a second",
            unit="FLOP/s",
            better="higher",
            listed=False,
            charted=True,
        ),
        Metric(
            "roofline_fraction",
            "useful FLOP/s as a fraction of the matmul rate of this run",
            better="higher",
            listed=False,
            charted=True,
        ),
        Metric(
            "matmul_flops_per_s",
            "rate of large matrix products in this run",
            unit="FLOP/s",
            listed=False,
            charted=True,
        ),
        Metric(
            "error_vs_dense",
            "relative error of the output against dense attention in float64",
            better="lower",
            listed=False,
            charted=True,
        ),
        Metric(
            "time_ratio",
            "time over that of dense attention in the same rounds",
            better="lower",
            listed=False,
        ),
        Metric(
            "reference_time_s",
            "median seconds of dense attention in the same rounds",
            unit="s",
            listed=False,
        ),
    )

    def __init__(self, context: SuiteContext) -> None:
        super().__init__(context)
        self._rates: dict[tuple[str, str], float] = {}  # by device and dtype

    @classmethod
    def seconds(cls, profile: Profile, case: Case) -> float:
        """Return the expected seconds of a case: its rounds, and its check."""
        check_s = super().seconds(profile, case) - 0.2  # four dense calls
        rounds_s = FEWEST_ROUNDS * DENSE_AND_OWN * check_s / 4
        most_s = max(profile.seconds, profile.first_rounds_s)
        return min(max(min(rounds_s, most_s), SHORTEST_S) + check_s, profile.cap(cls.name))

    def figures(self, workload: Workload, correctness: Correctness) -> Figures:
        """Time the call beside dense attention's, and check calls that were timed."""
        case, device, profile = workload.case, workload.device, self.profile
        candidate = TimedAttention(workload, self.context.verifier.tolerance(workload))
        start = perf_counter()
        metrics = {"error_vs_dense": correctness.error_vs_dense}
        dense = None if case.attention == REFERENCE else self._dense(case)
        if dense is not None and dense.case.length == case.length:
            reference = TimedAttention(Workload(dense.case), None)
            pair = measure_pair(
                candidate.call,
                reference.call,
                device,
                budget_s=profile.seconds,
                width=profile.width,
                first_rounds_s=profile.first_rounds_s,
                seed=case.length,
            )
            samples = {"candidate_s": list(pair.candidate), "reference_s": list(pair.reference)}
            metrics |= pair.metrics()
        else:
            single = measure_single(
                candidate.call, device, budget_s=profile.seconds, width=profile.width
            )
            samples = {"candidate_s": list(single.samples)}
            metrics["conclusive"] = float(single.conclusive)
        refuse_if(candidate.fault(perf_counter() - start))
        seconds = metrics["time_s"] = median(samples["candidate_s"])
        if case.attention == REFERENCE:
            metrics |= dict.fromkeys(("time_ratio", "time_ratio_low", "time_ratio_high"), 1.0)
            metrics |= {"speedup": 1.0, "reference_time_s": seconds}
        elif dense is not None and dense.case.length != case.length:
            growth = (case.length / dense.case.length) ** 2
            ratio = seconds / (dense.metrics["time_s"] * growth)
            metrics |= {"time_ratio_extrapolated": ratio, "speedup_extrapolated": 1 / ratio}
            metrics["extrapolated_from_length"] = float(dense.case.length)
        metrics |= self._flops(workload, seconds)
        refuse_if(_faster_than_the_machine(workload, metrics))
        return metrics, samples

    def _dense(self, case: Case) -> CaseResult | None:
        """Return dense attention at this length, else at the longest affordable one, else None."""
        dense_case = replace(case, attention=REFERENCE)
        lengths = [dense_case.length]
        while (
            shorter := self.shorter(self.profile, replace(dense_case, length=lengths[-1]))
        ) is not None:
            lengths.append(shorter.length)
        for length in lengths:
            dense = self.context.result(replace(dense_case, length=length))
            if dense.status != "measured":
                continue
            pair_s = TIMING_CALLS * dense.metrics["time_s"]
            if length < case.length or pair_s <= self.profile.cap(self.name):
                return dense
        return None

    def _flops(self, workload: Workload, seconds: float) -> dict[str, float]:
        """Return useful FLOP/s beside what matrix products reach in this run."""
        case = workload.case
        key = (case.device, case.dtype)
        if key not in self._rates:
            self._rates[key] = matmul_rate(workload.device, workload.q.dtype)
        rate = self._rates[key]
        pairs = workload.module.counted_pairs(workload.k)
        if pairs is None:
            return {"matmul_flops_per_s": rate}
        useful = 4 * case.head_dim * case.heads * pairs * case.batch / seconds
        if case.phase != "forward":
            useful *= BACKWARD_FLOPS
        return {
            "matmul_flops_per_s": rate,
            "useful_flops_per_s": useful,
            "roofline_fraction": useful / rate,
        }


def _faster_than_the_machine(workload: Workload, metrics: dict[str, float]) -> str:
    """Return the reason if the figures are impossible on this machine; else empty."""
    useful, rate = metrics.get("useful_flops_per_s", 0.0), metrics["matmul_flops_per_s"]
    flops, device, dtype = useful * metrics["time_s"], workload.device, workload.q.dtype
    if useful > rate:  # the machine may have been busy when that was measured
        rate = max(rate, _best_rate(lambda: matmul_rate_of(flops, device, dtype), device, metrics))
    if useful > rate:
        return (
            f"{useful / 1e9:.3g} GFLOP/s by its visible_pairs: this machine's matrix products "
            f"reach {rate / 1e9:.3g}"
        )
    # A query is read and an output written, whatever is computed.
    moved = 2 * workload.q.nbytes / metrics["time_s"]
    if moved > (rate := copy_rate(workload.q)):
        rate = _best_rate(lambda: copy_rate(workload.q), device, metrics)
    if moved > rate:
        return (
            f"{moved / 1e9:.3g} GB/s if it only reads q and writes its output: this machine "
            f"copies {rate / 1e9:.3g}"
        )
    return ""


def _best_rate(
    measure: Callable[[], float], device: torch.device, metrics: dict[str, float]
) -> float:
    """Measure a rate of the machine for a while.

    Where other programs take its cores meanwhile, nothing says what is impossible: the rate is
    infinite, and the metrics of the case say why they are in doubt.
    """
    before, rate = CpuReading.now(), 0.0
    after = before
    while after.wall_s - before.wall_s < RATE_S:
        rate, after = max(rate, measure()), CpuReading.now()
    threads = torch.get_num_threads()
    cores = contended_cores(before, after, threads, least_s=RATE_S * SLACK_CORES)
    if cores and device.type == "cpu":
        metrics[CONTENDED_CORES] = cores
        return math.inf
    return rate
