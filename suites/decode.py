"""Time of one more token after a context, and bytes of the state, beside dense attention."""

from __future__ import annotations

from dataclasses import replace
from statistics import median
from time import perf_counter

from danon.attention import registry
from danon.attention.registry import REFERENCE
from danon.attention.streaming import StreamingAttention
from danon.bench.call_suite import over_cap, refuse_if, unavailable
from danon.bench.decode_workload import DecodeWorkload
from danon.bench.profile import Profile
from danon.bench.shapes import configuration
from danon.bench.suite import Suite, SuiteContext, register, row_without_figures
from danon.measure.live_tensors import LiveTensors, hidden_state
from danon.measure.threads import fewer_threads_beside_load
from danon.measure.timing import measure_pair, measure_single
from danon.runs.case import Case, CaseResult
from danon.runs.suite_info import Metric

__all__ = ["Decode"]

ROUNDS_S = 1.5
"""Seconds after which most intervals are narrow, roughly, for the time left."""
READ_S = 4e-5
"""Seconds to read a token of the context, roughly, for the time left."""
READ_BUDGET_FACTOR = 5
"""Reading the context may take this many times the seconds of a case."""


@register
class Decode(Suite):
    """Times the next token after a context, beside dense attention with its key-value cache."""

    name = "decode"
    description = "Time of one more token after a context, and bytes of the state."
    order = 30
    grid_of = ""
    timed = True
    metrics = (
        Metric("speedup", "times faster than dense", unit="x", better="higher", listed=False),
        Metric("time_s", "median seconds of a token", unit="s", better="lower", listed=False),
        Metric("state_bytes", "bytes of the state", unit="B", better="lower", listed=False),
        Metric(
            "error_vs_dense",
            "relative error of the output against dense attention in float64",
            better="lower",
            listed=False,
        ),
    )

    def __init__(self, context: SuiteContext) -> None:
        super().__init__(context)
        self._read: dict[tuple[str, str], tuple[int, float]] = {}  # tokens, seconds

    @classmethod
    def seconds(cls, profile: Profile, case: Case) -> float:
        """Return the expected seconds of a case: its rounds, and the context that is read."""
        rounds_s = min(profile.seconds, ROUNDS_S)
        return min(rounds_s + READ_S * case.length, profile.cap(cls.name))

    def measure(self, case: Case) -> CaseResult:
        """Read the context, then time the next token."""
        if reason := unavailable(case, backward=False, length=1):
            return row_without_figures(case, "unavailable", reason)
        if reason := self._too_long(case):
            return row_without_figures(case, "over budget", reason)
        attention = registry.get(case.attention)
        if not (issubclass(attention, StreamingAttention) and attention.streams):
            return row_without_figures(case, "unavailable", "has no streaming form")
        stream = DecodeWorkload(case)
        checked = stream.checked()
        correctness = self.context.verifier.verdict(checked)
        semantics = stream.module.description
        if correctness.reason:
            return replace(
                row_without_figures(case, "failed", correctness.reason),
                semantics=semantics,
                check=correctness.info,
            )
        metrics = self._read_context(stream)
        timed, samples = self._timed(stream)
        metrics |= timed
        with fewer_threads_beside_load(stream.device):
            fault = stream.fault(self.context.verifier.tolerance(checked)["output"])
        refuse_if(fault)
        metrics["time_s"] = median(samples["candidate_s"])
        config = configuration(case.attention, stream.module)
        return CaseResult(
            case, "measured", "", semantics, metrics, samples, correctness.info, config=config
        )

    def _too_long(self, case: Case) -> str:
        """Return the reason if the case is too long for the profile; else empty.

        Reading the context takes the time; it is linear in the length.
        """
        shorter = self.shorter(self.profile, case)
        if shorter is not None and self.context.result(shorter).status == "over budget":
            return f"{shorter.length} tokens are over budget already"
        length, seconds = self._read.get((case.attention, case.dtype), (1, 0.0))
        seconds = seconds * case.length / length
        cap_s = READ_BUDGET_FACTOR * self.profile.cap(self.name)
        return over_cap(seconds, length, cap_s) if seconds > cap_s else ""

    def _read_context(self, stream: DecodeWorkload) -> dict[str, float]:
        """Read the context, and measure the state after it."""
        case, before = stream.case, LiveTensors(stream.device)
        start = perf_counter()
        with fewer_threads_beside_load(stream.device):
            stream.read()
        self._read[case.attention, case.dtype] = case.length, perf_counter() - start
        hidden = hidden_state(before, stream.state)
        del before  # holds tensors
        refuse_if(hidden)
        with fewer_threads_beside_load(stream.device):
            metrics = {"error_vs_dense": stream.error_vs_dense()}
        once = stream.timed_call()
        once.before()
        once.run()  # a state may hold other things while it decodes
        return metrics | {"state_bytes": float(stream.state.nbytes)}

    def _timed(self, stream: DecodeWorkload) -> tuple[dict[str, float], dict[str, list[float]]]:
        """Time a token, and return metrics and samples."""
        case, budget, width = stream.case, self.profile.seconds, self.profile.width
        if case.attention == REFERENCE:
            single = measure_single(
                stream.timed_call(), stream.device, budget_s=budget, width=width
            )
            metrics = {
                "time_ratio": 1.0,
                "time_ratio_low": 1.0,
                "time_ratio_high": 1.0,
                "speedup": 1.0,
                "reference_time_s": median(single.samples),
                "conclusive": float(single.conclusive),
            }
            return metrics, {"candidate_s": list(single.samples)}
        dense = DecodeWorkload(replace(case, attention=REFERENCE), beside=stream)
        with fewer_threads_beside_load(stream.device):
            dense.read()
        pair = measure_pair(
            stream.timed_call(),
            dense.timed_call(),
            stream.device,
            budget_s=budget,
            width=width,
            first_rounds_s=self.profile.first_rounds_s,
            seed=case.length,
        )
        samples = {"candidate_s": list(pair.candidate), "reference_s": list(pair.reference)}
        return pair.metrics(), samples
