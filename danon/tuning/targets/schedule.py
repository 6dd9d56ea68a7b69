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
from danon.measure.timing import measure_pair
from danon.runs.case import Case
from danon.tuned.search_space import Categorical, Range, Space
from danon.tuning.targets.hyperparameters import TIMING_S, WIDTH, TuningTarget, case_of

__all__ = ["ScheduleTarget"]

WHOLE = 0
"""A chunk that is the whole sequence: no streaming."""


class ScheduleTarget(TuningTarget):
    """Batch, threads, chunks of a stream, compiler and kernel of an attention's forward pass.

    Time is that of a token: a batch of eight may take eight times as long.

    Raises:
        ValueError: it cannot run here.
    """

    objectives = ("speed", "memory")

    def __init__(self, attention: str, length: int, dtype: str, device: str) -> None:
        self._case = case_of(attention, length, dtype, device)
        self._kind = registry.get(attention)
        self._threads = torch.get_num_threads()
        ranges: dict[str, Range] = {
            "batch": Categorical((1, 2, 4, 8)),
            "compile": Categorical(("none", "default", "max-autotune")),
            "kernel": Categorical(("auto", *_able(self._case))),
        }
        default: dict[str, Any] = {"batch": 1, "compile": "none", "kernel": "auto"}
        if device == "cpu" and self._threads > 1:
            counts = {2**n for n in range(self._threads.bit_length())} | {self._threads}
            ranges["threads"] = Categorical(tuple(n for n in sorted(counts) if n <= self._threads))
            default["threads"] = self._threads
        chunks = tuple(n for n in (512, 1024, 2048, 4096, 8192) if n < length)
        if chunks and issubclass(self._kind, StreamingAttention) and self._kind.streams:
            ranges["chunk"] = Categorical((WHOLE, *chunks))
            default["chunk"] = WHOLE
        self.space = Space(ranges, default)
        self._verifier = Verifier()

    def steps(self, choice: Mapping[str, Any], seed: int) -> Iterator[dict[str, float]]:
        torch.compiler.reset()
        case = replace(
            self._case, batch=choice["batch"], task=json.dumps(dict(choice), sort_keys=True)
        )
        shape = replace(config_for(case), kernel=choice["kernel"])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = self._kind.build(shape).eval().to(case.device)
        workload = _Scheduled(case, module, choice)
        usual = Workload(self._case, build_for(self._case))
        try:
            verdict = self._verifier.verdict(workload)
            if verdict.reason:
                raise ValueError(verdict.reason)
            peak, before = (peak_bytes(some.call(), some.device) for some in (workload, usual))
            candidate = TimedAttention(workload, self._verifier.tolerance(workload))
            reference = TimedAttention(usual, None).call
            pair = measure_pair(
                candidate.call,
                replace(reference, run=_with_threads(reference.run, self._threads)),
                workload.device,
                budget_s=TIMING_S,
                width=WIDTH,
                seed=seed,
            )
            if fault := candidate.fault(TIMING_S):
                raise ValueError(fault)
        finally:
            torch.set_num_threads(self._threads)
        found = pair.metrics()
        for name in ("time_ratio", "time_ratio_low", "time_ratio_high"):
            found[name] /= case.batch
        yield {
            **found,
            "peak_bytes": float(peak),
            "memory_ratio": peak / before,
            "speedup": 1 / found["time_ratio"],
            "tokens_per_s": case.batch * case.length / median(pair.candidate),
        }


class _Scheduled(Workload):
    """Run as a choice says."""

    def __init__(self, case: Case, module: BaseAttention, choice: Mapping[str, Any]) -> None:
        super().__init__(case, module)
        self._threads = choice.get("threads", torch.get_num_threads())
        form = _in_chunks(module, choice["chunk"]) if choice.get("chunk", WHOLE) else module
        self._form: Callable[..., Tensor] = (
            form if choice["compile"] == "none" else torch.compile(form, mode=choice["compile"])
        )

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        torch.set_num_threads(self._threads)
        return self._form(q, k, v)


def _in_chunks(module: BaseAttention, chunk: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    assert isinstance(module, StreamingAttention)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        state = module.init_state(q.shape[0], dtype=q.dtype, device=q.device)
        found = []
        for parts in zip(*(x.split(chunk, 2) for x in (q, k, v)), strict=True):
            out, state = module.step(*parts, state)
            found.append(out)
        return torch.cat(found, 2)

    return run


def _with_threads(call: Callable[[], object], threads: int) -> Callable[[], object]:
    def run() -> object:
        torch.set_num_threads(threads)
        return call()

    return run


def _able(case: Case) -> Iterator[str]:
    """Kernels that take the calls of a case, with a bias and without."""
    place, dtype = torch.device(case.device), getattr(torch, case.dtype)
    for name in table.names():
        try:
            for bias in (False, True):
                table.resolve(name, place, dtype, case.head_dim, bias)
        except ValueError:
            continue
        yield name
