"""The memory of a step of a training that goes on between two calls.

    meter = StepMeter(torch.device("cuda"))
    meter.start()
    loss = model(batch)
    loss.backward()
    memory = meter.stop()  # memory.peak bytes at most, of which memory.kept stay

The step is no function here, as in :mod:`danon.measure.memory`, and is not repeated.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from danon.measure.memory import traced_bytes
from danon.measure.memory_limit import free_bytes

__all__ = ["StepMemory", "StepMeter"]


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a step, beyond those that were live before it.

    Attributes:
        peak: most bytes live at once.
        kept: bytes that are still live after it, such as an optimizer's new states.
    """

    peak: int
    kept: int


class StepMeter:
    """A measurement of one step at a time.

    On a GPU the allocator counts, which costs nothing; its statistics of the peak begin anew. On a
    CPU a trace is made, which slows the step down by a quarter or so; the first one also takes a
    moment and some 70 MiB to begin.

    Args:
        device: cpu or cuda.

    Attributes:
        costly: True if a measurement slows the step down.

    Raises:
        ValueError: another device.
    """

    def __init__(self, device: torch.device) -> None:
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"device = {device}: must be cpu or cuda")
        self.device = device
        self.costly = device.type == "cpu"
        self._trace: profile | None = None
        self._before: int | None = None

    def start(self) -> None:
        """Begin a step."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        elif not torch._C._autograd._profiler_enabled():  # there can be one trace at a time
            self._trace = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self._trace.start()

    def stop(self) -> StepMemory | None:
        """End the step and return its memory; None without a start, or beside another trace."""
        if self._before is not None:
            before, self._before = self._before, None
            peak = torch.cuda.max_memory_allocated(self.device) - before
            return StepMemory(peak, max(0, torch.cuda.memory_allocated(self.device) - before))
        if self._trace is None:
            return None
        trace, self._trace = self._trace, None
        trace.stop()
        return StepMemory(*traced_bytes(trace))

    def free_bytes(self) -> int:
        """Return the bytes that a step could still get on the device."""
        if self.device.type == "cpu":
            return free_bytes()
        cached = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return torch.cuda.mem_get_info(self.device)[0] + cached
