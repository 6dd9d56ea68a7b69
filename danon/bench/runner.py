"""Measures each case once: can it run, is it affordable, is it right, and how fast."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from statistics import median
from time import perf_counter
from typing import Protocol

import torch

from danon.attention import registry
from danon.attention.base import BaseAttention
from danon.attention.registry import REFERENCE
from danon.attention.streaming import StreamingAttention
from danon.bench.bounds import bounds
from danon.bench.cost_forecast import (
    CHECK_CALLS,
    GRADIENT_CALLS,
    SELF_CALLS,
    TIMING_CALLS,
    CostForecaster,
)
from danon.bench.decode_workload import DecodeWorkload
from danon.bench.eligibility import UnmeasuredError
from danon.bench.isolation import Isolation
from danon.bench.profile import Profile
from danon.bench.shapes import config_for, configuration
from danon.bench.timed_workload import TimedAttention
from danon.bench.verification import Correctness, Verifier
from danon.bench.workload import Workload
from danon.measure.background_work import BackgroundWork
from danon.measure.integrity import Integrity
from danon.measure.live_tensors import LiveTensors, hidden_state
from danon.measure.memory import CallMemory, hidden_memory, saved_bytes
from danon.measure.roofline import copy_rate, matmul_rate, matmul_rate_of
from danon.measure.statistics import fit_exponent
from danon.measure.threads import fewer_threads_beside_load
from danon.measure.timing import measure_pair, measure_single
from danon.runs.case import Case, CaseResult, Status

__all__ = ["CaseRunner", "ModelEvaluator"]

BACKWARD_FLOPS = 3.5
"""Forward and backward, in forwards: seven matrix products instead of two."""
FEWEST_LENGTHS = 3
READ_BUDGET_FACTOR = 5
"""What is decoded after a context may wait so many times a case's time for it to be read."""


class ModelEvaluator(Protocol):
    """Measures what an attention is worth in a model."""

    def result(self, case: Case) -> CaseResult:
        """Raises: UnmeasuredError: there are no figures; says why."""
        ...


class CaseRunner:
    """Measures every case at most once in a session.

    Args:
        profile: decides lengths, budgets and caps.
        on_begin: hears a case that is about to be measured.
        on_result: hears its outcome, as soon as there is one.
        known: outcomes of an interrupted session, which are not measured again.
        evaluators: measure cases that have a task, by the task or else its suite.
        isolation: makes rows of what cases raise; None: one that tells nobody.
        integrity: of what measures; None: it is not watched.
    """

    def __init__(
        self,
        profile: Profile,
        on_begin: Callable[[Case], object],
        on_result: Callable[[CaseResult], object],
        known: Iterable[CaseResult] = (),
        evaluators: Mapping[str, ModelEvaluator] | None = None,
        isolation: Isolation | None = None,
        integrity: Integrity | None = None,
    ) -> None:
        self._profile, self._integrity = profile, integrity
        self._isolation = isolation or Isolation()
        # Found once, and still there: what an attention has left running, by its name.
        self._left_running: dict[str, str] = {}
        self._on_begin, self._on_result = on_begin, on_result
        self._results = {result.case: result for result in known}
        self._verifier = Verifier()
        self._evaluators = dict(evaluators or {})
        self._rates: dict[tuple[str, str], float] = {}
        self._costs = CostForecaster()
        self._reading: dict[tuple[str, str], tuple[int, float]] = {}  # tokens, seconds
        for result in self._results.values():
            if result.samples and not result.case.task:
                self._costs.add(result.case, min(result.samples["candidate_s"]))

    def result(self, case: Case) -> CaseResult:
        """The outcome of a case, measured now if it is not known yet."""
        if case not in self._results:
            self._on_begin(case)
            self._results[case] = result = self._isolation.outcome(case, self._watched)
            self._on_result(result)
        return self._results[case]

    def _evaluator(self, case: Case) -> ModelEvaluator:
        for name in (case.task, case.suite):
            if name in self._evaluators:
                return self._evaluators[name]
        known = ", ".join(self._evaluators) or "none"
        raise ValueError(f"nothing evaluates task {case.task!r} of {case.suite}; known: {known}")

    def samples(self, result: CaseResult) -> list[float]:
        """Seconds per call behind a result; of a scaling case those of its longest length."""
        if result.case.suite != "scaling":
            return result.samples["candidate_s"]
        speed = self._over_lengths(result.case, "speed")
        return [r for r in speed if r.status == "measured"][-1].samples["candidate_s"]

    def _watched(self, case: Case) -> CaseResult:
        """The outcome, unless the attention did what no figure of it can be believed after."""
        before = BackgroundWork.now()
        result = self._outcome(case)
        if not case.task and (left := BackgroundWork.now().since(before)):
            self._left_running.setdefault(case.attention, left)
        reasons = (
            [f"leaves {self._left_running[case.attention]}"]
            if case.attention in self._left_running
            else []
        )
        if self._integrity is not None and (names := self._integrity.replaced()):
            self._integrity.restore()
            reasons.append(f"replaces {', '.join(names[:3])}, which measures it")
        if not reasons or result.status != "measured":
            return result
        return replace(
            _without(case, "failed", "; ".join(reasons)),
            semantics=result.semantics,
            check=result.check,
        )

    def _outcome(self, case: Case) -> CaseResult:
        try:
            if case.task:
                return self._evaluator(case).result(case)
            if case.suite == "scaling":
                return self._scaling(case)
            if reason := self._unavailable(case, backward=case.phase == "forward+backward"):
                return _without(case, "unavailable", reason)
            if reason := self._too_long(case):
                return _without(case, "over budget", reason)
            if case.suite == "decode":
                return self._decode(case)
            workload = Workload(case)
            verdict = self._verifier.verdict(workload)
            if verdict.reason:
                self._costs.add(case, verdict.seconds / (CHECK_CALLS + SELF_CALLS))
                return replace(
                    _without(case, "failed", verdict.reason),
                    semantics=workload.module.description,
                    check=verdict.info,
                )
            if reason := self._slow_backward(workload, verdict):
                return replace(_without(case, "over budget", reason), check=verdict.info)
            suites = {"speed": self._speed, "memory": self._memory, "bounds": self._bounds}
            metrics, samples = suites[case.suite](workload, verdict)
            self._costs.add(case, min(samples["candidate_s"]))
            module = workload.module
            return CaseResult(
                case,
                "measured",
                "",
                module.description,
                metrics,
                samples,
                verdict.info,
                config=configuration(case.attention, module),
            )
        except UnmeasuredError as reason:
            return _without(case, reason.status, str(reason))

    def _unavailable(self, case: Case, *, backward: bool) -> str | None:
        return registry.get(case.attention).unavailable(
            config_for(case),
            length=1 if case.suite == "decode" else case.length,
            dtype=getattr(torch, case.dtype),
            device=torch.device(case.device),
            backward=backward,
        )

    def _too_long(self, case: Case) -> str:
        """Why the profile cannot afford the case; empty if it can."""
        shorter = self._profile.shorter(case)
        if shorter is not None and self.result(shorter).status == "over budget":
            return f"{shorter.length} tokens are over budget already"
        cap = self._profile.cap_s
        if case.suite == "decode":  # reading the context is what takes time: linear
            length, seconds = self._reading.get((case.attention, case.dtype), (1, 0.0))
            seconds, cap = seconds * case.length / length, READ_BUDGET_FACTOR * cap
            return _over(seconds, length, cap) if seconds > cap else ""
        calls = TIMING_CALLS + CHECK_CALLS + (0 if _defined(case) else SELF_CALLS)
        if case.suite == "bounds":
            calls, cap = 1, self._profile.bounds_cap_s
        forecast = self._costs.forecast(case, calls)
        if forecast is None or forecast.seconds <= cap:
            return ""
        return _over(forecast.seconds, forecast.length, cap)

    def _slow_backward(self, workload: Workload, verdict: Correctness) -> str:
        """Why the backward pass that the suite bounds makes of a float64 copy is not affordable."""
        case, cap = workload.case, self._profile.bounds_cap_s
        if case.suite != "bounds" or _defined(case):
            return ""
        seconds = GRADIENT_CALLS * verdict.seconds / (CHECK_CALLS + SELF_CALLS)
        return _over(seconds, case.length, cap) if seconds > cap else ""

    def _speed(
        self, workload: Workload, verdict: Correctness
    ) -> tuple[dict[str, float], dict[str, list[float]]]:
        case, device = workload.case, workload.device
        budget, width = self._profile.seconds, self._profile.width
        candidate = TimedAttention(workload, self._verifier.tolerance(workload))
        start = perf_counter()
        metrics = {"error_vs_dense": verdict.error_vs_dense}
        dense = None if case.attention == REFERENCE else self._dense(case, verdict)
        if dense is not None and dense.case.length == case.length:
            reference = TimedAttention(Workload(dense.case), None)
            pair = measure_pair(
                candidate.call,
                reference.call,
                device,
                budget_s=budget,
                width=width,
                seed=case.length,
            )
            samples = {"candidate_s": list(pair.candidate), "reference_s": list(pair.reference)}
            metrics |= pair.metrics()
        else:
            single = measure_single(candidate.call, device, budget_s=budget, width=width)
            samples = {"candidate_s": list(single.samples)}
            metrics["conclusive"] = float(single.conclusive)
        _refuse(candidate.fault(perf_counter() - start))
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
        _refuse(self._faster_than_the_machine(workload, metrics))
        return metrics, samples

    def _dense(self, case: Case, verdict: Correctness) -> CaseResult | None:
        """Dense attention at this length, or the longest affordable one; None if there is none."""
        here = replace(case, attention=REFERENCE)
        lengths = [here.length]
        while (shorter := self._profile.shorter(replace(here, length=lengths[-1]))) is not None:
            lengths.append(shorter.length)
        for length in lengths:
            dense = self.result(replace(here, length=length))
            if dense.status != "measured":
                continue
            pair_s = TIMING_CALLS * dense.metrics["time_s"]
            if length < case.length or pair_s <= self._profile.cap_s:
                return dense
        return None

    def _flops(self, workload: Workload, seconds: float) -> dict[str, float]:
        """Useful FLOP/s beside what matrix products reach in this run."""
        case = workload.case
        kind = (case.device, case.dtype)
        if kind not in self._rates:
            self._rates[kind] = matmul_rate(workload.device, workload.q.dtype)
        rate = self._rates[kind]
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

    def _faster_than_the_machine(self, workload: Workload, metrics: dict[str, float]) -> str:
        """Why the figures cannot be; empty if they can."""
        useful, rate = metrics.get("useful_flops_per_s", 0.0), metrics["matmul_flops_per_s"]
        if useful > rate:  # the machine may have been busy when that was measured
            flops = useful * metrics["time_s"]
            rate = max(rate, matmul_rate_of(flops, workload.device, workload.q.dtype))
        if useful > rate:
            return (
                f"{useful / 1e9:.3g} GFLOP/s by its visible_pairs: this machine's matrix products "
                f"reach {rate / 1e9:.3g}"
            )
        # A query is read and an output written, whatever is computed.
        moved = 2 * workload.q.nbytes / metrics["time_s"]
        if moved > (rate := copy_rate(workload.q)):
            return (
                f"{moved / 1e9:.3g} GB/s if it only reads q and writes its output: this machine "
                f"copies {rate / 1e9:.3g}"
            )
        return ""

    def _memory(
        self, workload: Workload, verdict: Correctness
    ) -> tuple[dict[str, float], dict[str, list[float]]]:
        case, device = workload.case, workload.device
        timed = TimedAttention(workload, self._verifier.tolerance(workload))
        memory = CallMemory.of(timed.call, device, timed.returned)
        _refuse(timed.fault(0.0))
        _refuse(hidden_memory(timed.call, memory, (workload.q, workload.k, workload.v)))
        metrics = {"peak_bytes": float(memory.peak)}
        if self._unavailable(case, backward=True) is None:
            leaves = workload.leaves()
            kept = saved_bytes(
                lambda: workload.attend(*leaves), [*leaves, *workload.parameters.values()], device
            )
            metrics["saved_bytes"] = float(kept)
        return metrics, {"candidate_s": [memory.seconds]}

    def _bounds(
        self, workload: Workload, verdict: Correctness
    ) -> tuple[dict[str, float], dict[str, list[float]]]:
        start = perf_counter()
        with fewer_threads_beside_load(workload.device):
            metrics = bounds(workload)
        return metrics, {"candidate_s": [perf_counter() - start]}

    def _decode(self, case: Case) -> CaseResult:
        """One more token, again and again, beside dense attention with its cache of keys."""
        kind = registry.get(case.attention)
        if not (issubclass(kind, StreamingAttention) and kind.streams):
            return _without(case, "unavailable", "has no streaming form")
        stream = DecodeWorkload(case)
        checked = stream.checked()
        verdict = self._verifier.verdict(checked)
        semantics = stream.module.description
        config = configuration(case.attention, stream.module)
        if verdict.reason:
            return replace(
                _without(case, "failed", verdict.reason), semantics=semantics, check=verdict.info
            )
        before = LiveTensors(stream.device)
        start = perf_counter()
        with fewer_threads_beside_load(stream.device):
            stream.read()
        self._reading[case.attention, case.dtype] = case.length, perf_counter() - start
        hidden = hidden_state(before, stream.state)
        del before  # holds tensors
        _refuse(hidden)
        with fewer_threads_beside_load(stream.device):
            metrics = {"error_vs_dense": stream.error_vs_dense()}
        once = stream.timed_call()
        once.before()
        once.run()  # a state may hold other things while it decodes
        metrics["state_bytes"] = float(stream.state.nbytes)
        budget, width = self._profile.seconds, self._profile.width
        if case.attention == REFERENCE:
            single = measure_single(
                stream.timed_call(), stream.device, budget_s=budget, width=width
            )
            samples = {"candidate_s": list(single.samples)}
            seconds = median(single.samples)
            metrics |= {
                "time_ratio": 1.0,
                "time_ratio_low": 1.0,
                "time_ratio_high": 1.0,
                "speedup": 1.0,
                "reference_time_s": seconds,
                "conclusive": float(single.conclusive),
            }
        else:
            dense = DecodeWorkload(replace(case, attention=REFERENCE), beside=stream)
            with fewer_threads_beside_load(stream.device):
                dense.read()
            pair = measure_pair(
                stream.timed_call(),
                dense.timed_call(),
                stream.device,
                budget_s=budget,
                width=width,
                seed=case.length,
            )
            samples = {"candidate_s": list(pair.candidate), "reference_s": list(pair.reference)}
            metrics |= pair.metrics()
        with fewer_threads_beside_load(stream.device):
            fault = stream.fault(self._verifier.tolerance(checked)["output"])
        _refuse(fault)
        metrics["time_s"] = median(samples["candidate_s"])
        return CaseResult(
            case, "measured", "", semantics, metrics, samples, verdict.info, config=config
        )

    def _over_lengths(self, case: Case, suite: str) -> list[CaseResult]:
        """Results of the lengths that a scaling case spans, short to long."""
        lengths = self._profile.scaling_lengths(case)
        return [self.result(replace(case, suite=suite, length=n)) for n in lengths]

    def _scaling(self, case: Case) -> CaseResult:
        metrics: dict[str, float] = {}
        config: dict[str, object] = {}
        semantics = ""
        for suite, metric, name in (
            ("speed", "time_s", "time"),
            ("memory", "peak_bytes", "memory"),
        ):
            results = self._over_lengths(case, suite)
            for status in ("failed", "unavailable", "over budget"):
                found = [r for r in results if r.status == status]
                measured = [r for r in results if r.status == "measured"]
                if found and (status == "failed" or len(measured) < FEWEST_LENGTHS):
                    reason = found[0].reason
                    if len(found) < len(results):
                        reason = f"{suite} at {found[0].case.length} tokens: {reason}"
                    return _without(case, status, reason)
            semantics, config = measured[0].semantics, measured[0].config
            values = [r.metrics[metric] for r in measured]
            if min(values) > 0:  # nothing allocated: no exponent
                fit = fit_exponent([r.case.length for r in measured], values)
                metrics |= {
                    f"{name}_exponent": fit.value,
                    f"{name}_exponent_low": fit.low,
                    f"{name}_exponent_high": fit.high,
                }
        return CaseResult(case, "measured", "", semantics, metrics, config=config)


def _defined(case: Case) -> bool:
    """Whether its oracle is a definition, not the attention itself in float64."""
    return registry.get(case.attention).oracle is not BaseAttention.oracle


def _over(seconds: float, length: int, cap: float) -> str:
    return (
        f"estimated {seconds:.0f} s at least, going by {length} tokens; "
        f"the profile allows {cap:.0f} s a case"
    )


def _refuse(reason: str) -> None:
    """Raises: UnmeasuredError: there is a reason not to believe a figure."""
    if reason:
        raise UnmeasuredError("failed", reason)


def _without(case: Case, status: Status, reason: str) -> CaseResult:
    """A row without figures."""
    return CaseResult(case, status, reason, registry.get(case.attention).description)
