"""The peak memory of a call, and the bytes that autograd saves for the backward pass.

The peak lacks memory that PyTorch's allocator does not see, and memory that a call keeps for the
next one to work in. :func:`hidden_memory` finds both.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol, Self, cast

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "CallMemory",
    "hidden_memory",
    "peak_bytes",
    "saved_bytes",
    "traced_bytes",
    "traced_peak",
]

Call = Callable[[], object]
CPU = torch.device("cpu")


class TimedCall(Protocol):
    """As in :mod:`danon.measure.timing`; the gate loads this file alone, by its path."""

    @property
    def run(self) -> Call:
        """The function that is measured."""

    @property
    def before(self) -> Callable[[], object]:
        """Brings the inputs of the next call."""

    @property
    def after(self) -> Callable[[object], object]:
        """Takes the result of a call."""


UNSEEN_BYTES = 64 * 2**20
UNSEEN_FACTOR = 8
"""A process may grow by this multiple of the traced peak and UNSEEN_BYTES more.

The C library keeps freed memory: an honest backward pass was seen to take 3.6 times its peak.
"""
SCRATCH_SHARE = 0.1
"""Share of the inputs' bytes that a call may write into memory that was there before."""


@dataclass(frozen=True)
class CallMemory:
    """The memory of one call.

    Attributes:
        peak: in bytes, as in :func:`peak_bytes`.
        seconds: duration of the call, while it was watched.
        visible: the peak and all that the call returns, in bytes.
        grown: largest growth of the process's resident memory, in bytes; 0 where the system or the
            device does not show it. Blocks that the C library kept from an earlier call are not
            part of it.
        compiled: the call ran code of torch.compile; None: not known.
    """

    peak: int
    seconds: float
    visible: int
    grown: int
    compiled: bool | None

    @classmethod
    def of(
        cls,
        fn: Call | TimedCall,
        device: torch.device,
        returned: Callable[[Any], object] = lambda x: x,
    ) -> Self:
        """Measure a call; arguments and errors as in :func:`peak_bytes`.

        Args:
            fn: returns a tensor, or nested sequences or mappings of tensors.
            device: cpu or cuda.
            returned: selects the part of the result that is not counted; by default all of it.
        """
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"device = {device}: must be cpu or cuda")
        run = cast("Call", getattr(fn, "run", fn))
        before, after = getattr(fn, "before", _nothing), getattr(fn, "after", _nothing)
        before()
        run()
        before()
        if device.type == "cuda":
            grown, compiled = 0, None
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            live = torch.cuda.memory_allocated(device)
            start = perf_counter()
            result = run()
            torch.cuda.synchronize(device)
            seconds = perf_counter() - start
            peak = torch.cuda.max_memory_allocated(device) - live
            peak = max(peak - _size(returned(result)), 0)
        else:
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
                resident = _ResidentPeak.begin()  # a first profile takes 70 MiB to begin
                start = perf_counter()
                result = run()
                seconds = perf_counter() - start
                grown = 0 if resident is None else resident.grown()
            compiled = any(x.name.startswith(_COMPILED) for x in trace.events() or ())
            peak = _peak(_memory_events(trace), set(_storages(_tensors(returned(result)))))
        after(result)
        return cls(peak, seconds, peak + _size(result), grown, compiled)


def peak_bytes(
    fn: Call | TimedCall, device: torch.device, returned: Callable[[Any], object] = lambda x: x
) -> int:
    """Measure the most bytes live at once during ``fn()``.

    Memory that was live before and the result do not count. The first call warms up (caches that
    stay are not part of the peak); the second is measured.

    - CPU: every allocation and release of PyTorch's allocator, native kernels included, in
      requested bytes: the same on every repetition.
    - CUDA: the allocator's peak, less the size of the result.

    Args:
        fn: returns a tensor, or nested sequences or mappings of tensors.
        device: cpu or cuda.
        returned: selects the part of the result that is not counted; by default all of it.

    Returns:
        The peak in bytes.

    Raises:
        ValueError: another device.
    """
    return CallMemory.of(fn, device, returned).peak


_COMPILED = "Torch-Compiled Region"
"""Begins the names of the events that compiled code leaves in a trace."""


def _nothing(*_: object) -> None:
    """Do nothing around a plain function."""


def hidden_memory(call: TimedCall, memory: CallMemory, inputs: Sequence[Tensor]) -> str:
    """Return why the peak is not all that a call needs, in one line; empty if it is.

    Growth of the process beyond the traced peak was not allocated by PyTorch in this thread. One
    more call shows how much is written into memory that was kept from the call before. Code of
    torch.compile cannot be watched so.

    Args:
        call: is called once more.
        memory: of the call.
        inputs: q, k, v of the call.
    """
    if memory.grown > UNSEEN_FACTOR * memory.visible + UNSEEN_BYTES:
        return (
            f"takes {memory.grown / 2**20:,.0f} MiB of the process, of which PyTorch's allocator "
            f"knows {memory.visible / 2**20:,.0f} MiB"
        )
    compiled = _runs_compiled_code(call) if memory.compiled is None else memory.compiled
    if compiled:  # a mode would make it compile anew, without its kernels
        return ""
    call.before()
    with _Writes() as writes:
        call.run()
    if writes.bytes > SCRATCH_SHARE * _size(inputs):
        return (
            f"works in {writes.bytes / 2**20:,.1f} MiB that it keeps between calls, which its peak "
            "does not show"
        )
    return ""


def _runs_compiled_code(call: TimedCall) -> bool:
    """Return whether a call runs code of torch.compile."""
    call.before()
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        call.run()
    return any(event.name.startswith(_COMPILED) for event in trace.events() or ())


class _ResidentPeak:
    """Growth of this process's resident memory since now, at its largest."""

    def __init__(self) -> None:
        self._before = self._status("VmRSS")

    @classmethod
    def begin(cls) -> Self | None:
        """Reset the peak; return None where the system has none, or forbids it."""
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        except OSError:  # not Linux, or a container without the right to
            return None
        return cls()

    def grown(self) -> int:
        return self._status("VmHWM") - self._before

    @staticmethod
    def _status(name: str) -> int:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(x.split()[1]) * 1024 for x in lines if x.startswith(f"{name}:"))


class _Writes(TorchDispatchMode):
    """A mode that counts the bytes of written storages which were made before it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._made: list[Tensor] = []  # holds them, so that no address is used twice
        self._written: dict[int, int] = {}

    @property
    def bytes(self) -> int:
        made = _storages(self._made)
        return sum(size for at, size in self._written.items() if at not in made)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        schema = func._schema
        given = dict(zip((x.name for x in schema.arguments), args, strict=False)) | kwargs
        written = [
            given[x.name]
            for x in schema.arguments
            if x.alias_info is not None and x.alias_info.is_write and x.name in given
        ]
        self._written |= _storages(_tensors(written))
        if not any(x.alias_info is not None for x in schema.returns):
            self._made += [x.detach() for x in _tensors(out)]
        return out


def saved_bytes(fn: Call, exclude: Iterable[Tensor], device: torch.device = CPU) -> int:
    """Measure the bytes that ``fn()``, a forward pass, keeps for its backward pass.

    They are the tensors that autograd saves, and all other memory that lives as long as the result:
    a function may keep tensors on its context. Every storage counts once and whole, however many
    views of it are saved. The result counts if it is saved. Call ``fn`` once before: caches that a
    first call makes and keeps would count.

    Args:
        fn: the forward pass; returns a tensor, or nested sequences or mappings of tensors.
        exclude: tensors that live anyway: inputs and parameters.
        device: cpu or cuda.

    Returns:
        The saved bytes.
    """
    saved: list[Tensor] = []  # holds them, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    cuda = device.type == "cuda"
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        if cuda:
            before = torch.cuda.memory_allocated(device)
            result = fn()
            grown = torch.cuda.memory_allocated(device) - before
        else:
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
                result = fn()
    excluded, kept, returned = (_storages(x) for x in (exclude, saved, _tensors(result)))
    kept = {at: size for at, size in kept.items() if at not in excluded}
    uncounted = {at: size for at, size in returned.items() if at not in kept}
    if cuda:
        return max(sum(kept.values()), grown - sum(uncounted.values()))
    live = _live(_memory_events(trace))
    return sum((live | kept).values()) - sum(live[at] for at in live.keys() & uncounted.keys())


def traced_peak(trace: profile) -> int:
    """Return the most bytes live at once in a finished trace of the CPU.

    Args:
        trace: made with ``profile_memory=True``.
    """
    return _peak(_memory_events(trace), set())


def traced_bytes(trace: profile) -> tuple[int, int]:
    """Return the most bytes live at once in a finished trace of the CPU, and those live at its end.

    Args:
        trace: made with ``profile_memory=True``.
    """
    events = _memory_events(trace)
    return _peak(events, set()), sum(_live(events).values())


def _memory_events(trace: profile) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        trace.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    memory = [e for e in events if e["name"] == "[memory]" and e["args"]["Device Type"] == 0]
    return sorted(memory, key=lambda e: (e["ts"], e["args"]["Ev Idx"]))


def _peak(events: Sequence[dict[str, Any]], results: set[int]) -> int:
    """Return the most bytes live at once, without the storages at the addresses of results."""
    births = {e["args"]["Addr"]: i for i, e in enumerate(events) if e["args"]["Bytes"] > 0}
    skipped = {births[at] for at in results & births.keys()}  # an address may have been used before
    live: dict[int, int] = {}
    now = peak = 0
    for i, event in enumerate(events):
        if i not in skipped:
            now += _step(live, event)
            peak = max(peak, now)
    return peak


def _live(events: Sequence[dict[str, Any]]) -> dict[int, int]:
    """Map the addresses of allocated and not released memory to bytes."""
    live: dict[int, int] = {}
    for event in events:
        _step(live, event)
    return live


def _step(live: dict[int, int], event: dict[str, Any]) -> int:
    """Apply an event to the live memory and return its growth in bytes.

    The release of memory that was live before the call does not count.
    """
    at, size = event["args"]["Addr"], event["args"]["Bytes"]
    if size > 0:
        live[at] = size
        return int(size)
    return -live.pop(at, 0)


def _tensors(result: object) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, dict):
        yield from _tensors(list(result.values()))
    elif isinstance(result, list | tuple):
        for item in result:
            yield from _tensors(item)


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Map the address of every storage under the tensors to its bytes."""
    return {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}


def _size(result: object) -> int:
    """Return the bytes of all storages under a result."""
    return sum(_storages(_tensors(result)).values())
