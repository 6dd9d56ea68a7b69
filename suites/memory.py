"""Bytes of a call beyond its inputs and output, and those kept for the backward pass."""

from __future__ import annotations

from danon.bench.call_suite import CallSuite, Figures, refuse_if, unavailable
from danon.bench.suite import register
from danon.bench.timed_workload import TimedAttention
from danon.bench.verification import Correctness
from danon.bench.workload import Workload
from danon.measure.memory import CallMemory, hidden_memory, saved_bytes
from danon.runs.suite_info import Metric

__all__ = ["Memory"]


@register
class Memory(CallSuite):
    """Measures the bytes of one call."""

    name = "memory"
    description = "Peak bytes of a call beyond inputs and output, and bytes kept for backward."
    order = 20
    grid_of = ""
    measured_for = ("scaling",)
    times_calls = True
    metrics = (
        Metric(
            "peak_bytes",
            "most bytes allocated at once, beyond inputs and output",
            unit="B",
            better="lower",
            listed=False,
            charted=True,
        ),
        Metric(
            "saved_bytes",
            "bytes kept for the backward pass",
            unit="B",
            better="lower",
            listed=False,
        ),
    )

    def figures(self, workload: Workload, correctness: Correctness) -> Figures:
        """Measure the peak bytes of a call, and the bytes that its graph keeps."""
        device = workload.device
        timed = TimedAttention(workload, self.context.verifier.tolerance(workload))
        memory = CallMemory.of(timed.call, device, timed.returned)
        refuse_if(timed.fault(0.0))
        refuse_if(hidden_memory(timed.call, memory, (workload.q, workload.k, workload.v)))
        metrics = {"peak_bytes": float(memory.peak)}
        if unavailable(workload.case, backward=True) is None:
            leaves = workload.leaves()
            saved = saved_bytes(
                lambda: workload.attend(*leaves), [*leaves, *workload.parameters.values()], device
            )
            metrics["saved_bytes"] = float(saved)
        return metrics, {"candidate_s": [memory.seconds]}
