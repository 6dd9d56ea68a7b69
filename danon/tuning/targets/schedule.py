"""Studies of a schedule: how an attention is run, not what it computes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from danon.attention import registry
from danon.attention.base import BaseAttention
from danon.attention.kernels import table
from danon.attention.streaming import StreamingAttention
from danon.bench.shapes import build_for, config_for
from danon.bench.timed_workload import TimedAttention
from danon.bench.verification import Verifier
from danon.bench.workload import Workload
from danon.measure.memory import peak_bytes
from danon.runs.case import Case
from danon.tuned.search_space import Categorical, Range, Space
from danon.tuning import measured_case
from danon.tuning.measured_case import measure_beside, speed_case
from danon.tuning.target import TuningTarget, register

__all__ = ["ScheduleTarget"]

WHOLE = 0
"""The chunk that is the whole sequence: no streaming."""


@register("schedule")
class ScheduleTarget(TuningTarget):
    """Batch, threads, chunks of a stream, compiler and kernel of an attention's forward pass.

    Time is that of a token: a batch of eight may take eight times as long.
    """

    description = "sequences in a batch, threads, chunks of the stream, `torch.compile`, kernel"
    reference = "one sequence at once"
    error_meaning = "none: each choice is checked against the float64 definition"
    objectives = ("speed", "memory")

    def __init__(self, attention: str, length: int, dtype: str, device: str) -> None:
        self._case = speed_case(attention, length, dtype, device)
        self._cls = registry.get(attention)
        self._threads = torch.get_num_threads()
        ranges: dict[str, Range] = {
            "batch": Categorical((1, 2, 4, 8)),
            "compile": Categorical(("none", "default", "max-autotune")),
            "kernel": Categorical(("auto", *_usable_kernels(self._case))),
        }
        default: dict[str, Any] = {"batch": 1, "compile": "none", "kernel": "auto"}
        if device == "cpu" and self._threads > 1:
            counts = {2**n for n in range(self._threads.bit_length())} | {self._threads}
            ranges["threads"] = Categorical(tuple(n for n in sorted(counts) if n <= self._threads))
            default["threads"] = self._threads
        chunks = tuple(n for n in (512, 1024, 2048, 4096, 8192) if n < length)
        if chunks and issubclass(self._cls, StreamingAttention) and self._cls.streams:
            ranges["chunk"] = Categorical((WHOLE, *chunks))
            default["chunk"] = WHOLE
        self.space = Space(ranges, default)
        self._verifier = Verifier()

    def steps(self, choice: Mapping[str, Any], seed: int) -> Iterator[dict[str, float]]:
        """Yield figures of a choice; see :meth:`TuningTarget.steps`."""
        torch.compiler.reset()
        case = replace(
            self._case, batch=choice["batch"], task=json.dumps(dict(choice), sort_keys=True)
        )
        shape = replace(config_for(case), kernel=choice["kernel"])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = self._cls.build(shape).eval().to(case.device)
        workload = _ScheduledWorkload(case, module, choice)
        default_workload = Workload(self._case, build_for(self._case))
        try:
            verdict = self._verifier.verdict(workload)
            if verdict.reason:
                raise ValueError(verdict.reason)
            peak, default_peak = (
                peak_bytes(each.call(), each.device) for each in (workload, default_workload)
            )
            candidate = TimedAttention(workload, self._verifier.tolerance(workload))
            reference = TimedAttention(default_workload, None).call
            default = replace(reference, run=_with_threads(reference.run, self._threads))
            pair = measure_beside(candidate.call, default, workload.device, seed)
            if fault := candidate.fault(measured_case.TIMING_S):
                raise ValueError(fault)
        finally:
            torch.set_num_threads(self._threads)
        figures = pair.metrics()
        for name in ("time_ratio", "time_ratio_low", "time_ratio_high"):
            figures[name] /= case.batch
        yield {
            **figures,
            "peak_bytes": float(peak),
            "memory_ratio": peak / default_peak,
            "speedup": 1 / figures["time_ratio"],
            "tokens_per_s": case.batch * case.length / median(pair.candidate),
        }


class _ScheduledWorkload(Workload):
    """A workload that runs as a choice says."""

    def __init__(self, case: Case, module: BaseAttention, choice: Mapping[str, Any]) -> None:
        super().__init__(case, module)
        self._threads = choice.get("threads", torch.get_num_threads())
        chunk = choice.get("chunk", WHOLE)
        forward = _in_chunks(module, chunk) if chunk else module
        mode = choice["compile"]
        self._scheduled: Callable[..., Tensor] = (
            forward if mode == "none" else torch.compile(forward, mode=mode)
        )

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        torch.set_num_threads(self._threads)
        return self._scheduled(q, k, v)


def _in_chunks(module: BaseAttention, chunk: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    assert isinstance(module, StreamingAttention)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        state = module.init_state(q.shape[0], dtype=q.dtype, device=q.device)
        outputs = []
        for parts in zip(*(x.split(chunk, 2) for x in (q, k, v)), strict=True):
            out, state = module.step(*parts, state)
            outputs.append(out)
        return torch.cat(outputs, 2)

    return run


def _with_threads(call: Callable[[], object], threads: int) -> Callable[[], object]:
    def run() -> object:
        torch.set_num_threads(threads)
        return call()

    return run


def _usable_kernels(case: Case) -> Iterator[str]:
    """Yield the kernels that take the calls of a case, with a bias and without."""
    device, dtype = torch.device(case.device), getattr(torch, case.dtype)
    for name in table.names():
        try:
            for bias in (False, True):
                table.resolve(name, device, dtype, case.head_dim, bias)
        except ValueError:
            continue
        yield name
