"""Measurement of a running model: seconds, bytes, and the distribution of its attention."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypedDict

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from danon.attention.union.op import observe_branches
from danon.measure.memory import traced_peak

__all__ = ["PerformanceStats", "get_performance_stats", "performance_monitor"]


class PerformanceStats(TypedDict):
    """Figures of a ``performance_monitor``.

    Attributes:
        computation_time: seconds: ``total`` from embedding to final norm, ``layers`` and, of those,
            ``attention`` between the two projections, one number a layer; ``passes`` through the
            model.
        memory_usage: ``peak_bytes`` live at once, beyond what was there before; ``model_bytes`` of
            parameters and buffers.
        attention_distribution: for each layer the share of softmax mass by branch, averaged over
            heads and queries: ``near``, ``memory``, ... The branches of a hybrid are named by their
            mechanism as well, ``msra.near``, and weighted as in the blend. Sums to one; empty
            for an attention that is not a union of branches.
    """

    computation_time: dict[str, Any]
    memory_usage: dict[str, int]
    attention_distribution: list[dict[str, float]]


class MonitoredModel(Protocol):
    """Protocol of a model that can be monitored.

    Attributes:
        embed: the first thing that every pass goes through.
        layers: blocks with ``norm1``, ``qkv``, ``out`` and ``down``, in the order of a pass.
        norm: the last thing that every pass goes through.
        performance: takes the figures.
    """

    performance: PerformanceStats | None

    @property
    def embed(self) -> nn.Embedding: ...

    @property
    def layers(self) -> nn.ModuleList: ...

    @property
    def norm(self) -> nn.Module: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def buffers(self) -> Iterator[Tensor]: ...


@contextlib.contextmanager
def performance_monitor(model: MonitoredModel) -> Iterator[None]:
    """Measure the forward passes, steps and generations of a model inside the ``with``.

    Afterwards :func:`get_performance_stats` has the figures. For a few passes at a time: on a CPU
    the peak comes from PyTorch's profiler, which keeps a record of every operation, slows small
    ones down by some percent, and cannot run inside another profiler. A compiled model has no
    distribution.
    """
    device = model.embed.weight.device
    clock, shares = _Clock(device), _Shares(len(model.layers))
    with contextlib.ExitStack() as stack:
        peak = stack.enter_context(_peak(device))
        hooks = stack.enter_context(contextlib.ExitStack())
        for hook in _time_hooks(model, clock, shares):
            hooks.callback(hook.remove)
        hooks.enter_context(observe_branches(shares.watch))
        yield
    spans = clock.seconds()
    depth = range(len(model.layers))
    tensors = [*model.parameters(), *model.buffers()]
    model.performance = PerformanceStats(
        computation_time={
            "total": spans["model"],
            "layers": [spans[f"layer {i}"] for i in depth],
            "attention": [spans[f"attention {i}"] for i in depth],
            "passes": clock.count["model"],
        },
        memory_usage={"peak_bytes": peak[0], "model_bytes": sum(x.nbytes for x in tensors)},
        attention_distribution=[shares.of(i) for i in depth],
    )


def get_performance_stats(model: MonitoredModel) -> PerformanceStats:
    """Return the figures of the last ``performance_monitor`` that ended without an error.

    Raises:
        ValueError: there was none, or the model did not run inside it.
    """
    if model.performance is None:
        raise ValueError("nothing measured yet: run the model inside `with performance_monitor()`")
    if not model.performance["computation_time"]["passes"]:
        raise ValueError("the model did not run inside its performance_monitor")
    return model.performance


class _Clock:
    """Sums of time spans by name; on CUDA they are measured on the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.open: dict[str, Any] = {}
        self.spans: list[tuple[str, Any, Any]] = []
        self.count: defaultdict[str, int] = defaultdict(int)

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def start(self, name: str) -> None:
        self.open[name] = self._now()

    def stop(self, name: str) -> None:
        if name in self.open:  # the monitor may begin in the middle of a pass
            self.spans.append((name, self.open.pop(name), self._now()))
            self.count[name] += 1

    def seconds(self) -> defaultdict[str, float]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        total: defaultdict[str, float] = defaultdict(float)
        for name, start, stop in self.spans:
            cuda = self.device.type == "cuda"
            total[name] += start.elapsed_time(stop) / 1000 if cuda else stop - start
        return total


class _Shares:
    """Softmax mass by layer and branch, and the number of (query, head) pairs it is of."""

    def __init__(self, depth: int) -> None:
        self.mass: list[dict[str, Tensor]] = [{} for _ in range(depth)]
        self.layer = 0

    def watch(self, branches: Sequence[str], mass: Tensor) -> None:
        """Add the mass (branches, batch * heads, N) of the layer that runs now."""
        sums = self.mass[self.layer]
        for name, total in zip(branches, mass.sum((1, 2)).double(), strict=True):
            sums[name] = sums[name] + total if name in sums else total

    def of(self, layer: int) -> dict[str, float]:
        sums = {name: float(total) for name, total in self.mass[layer].items()}
        whole = sum(sums.values())
        return {name: total / whole for name, total in sums.items()} if whole else {}


def _time_hooks(model: MonitoredModel, clock: _Clock, shares: _Shares) -> Iterator[Any]:
    """Yield hooks on the parts of the model that every pass goes through, whole or in chunks."""

    def before(module: nn.Module, name: str) -> Any:
        return module.register_forward_pre_hook(lambda *_: clock.start(name))

    def after(module: nn.Module, name: str) -> Any:
        return module.register_forward_hook(lambda *_: clock.stop(name))

    yield before(model.embed, "model")
    yield after(model.norm, "model")
    for i, layer in enumerate(model.layers):
        block: Any = layer

        def attend(*_: object, i: int = i) -> None:
            shares.layer = i
            clock.start(f"attention {i}")

        yield before(block.norm1, f"layer {i}")
        yield block.qkv.register_forward_hook(attend)
        yield block.out.register_forward_pre_hook(lambda *_, i=i: clock.stop(f"attention {i}"))
        yield after(block.down, f"layer {i}")


@contextlib.contextmanager
def _peak(device: torch.device) -> Iterator[list[int]]:
    """Yield a list that holds the most bytes live at once, at the end."""
    peak: list[int] = []
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        peak.append(torch.cuda.max_memory_allocated(device) - before)
        return
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        yield peak
    peak.append(traced_peak(trace))
