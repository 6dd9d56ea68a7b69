"""Bytes: the peak of a call, and what autograd keeps until the backward pass."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

__all__ = ["peak_bytes", "saved_bytes", "traced_peak"]


def peak_bytes(fn: Callable[[], object], device: torch.device) -> int:
    """Most bytes live at once during ``fn()``, beyond what was live before and what it returns.

    The first call warms up (caches that stay are not part of the peak); the second is measured.
    CPU: every allocation and release that goes through PyTorch's allocator, native kernels
    included, in requested bytes: the same on every repetition. CUDA: the allocator's peak, less
    the size of what is returned.

    Args:
        fn: returns a tensor, or nested sequences or mappings of tensors.
        device: cpu or cuda.

    Raises:
        ValueError: another device.
    """
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device = {device}: must be cpu or cuda")
    fn()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = fn()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
        return max(peak - sum(_storages(_tensors(result)).values()), 0)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        result = fn()
    return _peak(_memory_events(trace), set(_storages(_tensors(result))))


def saved_bytes(fn: Callable[[], object], exclude: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps from ``fn()``, a forward pass, for its backward pass.

    Every storage counts once and whole, however many views of it are saved.

    Args:
        fn: the forward pass.
        exclude: tensors that live anyway: inputs and parameters.
    """
    kept: list[Tensor] = []  # holds them, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = fn()
    known = _storages(exclude)
    total = sum(size for at, size in _storages(kept).items() if at not in known)
    del result
    return total


def traced_peak(trace: profile) -> int:
    """Most bytes live at once in a finished trace of the CPU (``profile_memory=True``)."""
    return _peak(_memory_events(trace), set())


def _memory_events(trace: profile) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        trace.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    memory = [e for e in events if e["name"] == "[memory]" and e["args"]["Device Type"] == 0]
    return sorted(memory, key=lambda e: (e["ts"], e["args"]["Ev Idx"]))


def _peak(events: Sequence[dict[str, Any]], results: set[int]) -> int:
    """Most bytes live at once, without the storages at the addresses of the results."""
    births = {e["args"]["Addr"]: i for i, e in enumerate(events) if e["args"]["Bytes"] > 0}
    skipped = {births[at] for at in results & births.keys()}  # an address may have been used before
    live: dict[int, int] = {}
    now = peak = 0
    for i, event in enumerate(events):
        at, size = event["args"]["Addr"], event["args"]["Bytes"]
        if i in skipped:
            continue
        if size > 0:
            live[at] = size
            now += size
            peak = max(peak, now)
        else:  # the release of what was live before the call is not the call's
            now -= live.pop(at, 0)
    return peak


def _tensors(result: object) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, dict):
        yield from _tensors(list(result.values()))
    elif isinstance(result, list | tuple):
        for item in result:
            yield from _tensors(item)


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Address to bytes of every storage under the tensors."""
    return {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}
