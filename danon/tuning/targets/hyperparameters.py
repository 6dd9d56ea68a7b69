"""Studies of hyperparameters: settings of an attention, beside its default ones."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from statistics import median
from typing import Any

import torch

from danon.attention import registry
from danon.attention.base import BaseAttention
from danon.bench.shapes import build_for, config_for
from danon.bench.timed_workload import TimedAttention
from danon.bench.verification import Verifier
from danon.bench.workload import Workload
from danon.config import AttentionConfig
from danon.evaluation.lookup_model import errors
from danon.measure.memory import peak_bytes
from danon.tuning import measured_case
from danon.tuning.measured_case import measure_beside, speed_case
from danon.tuning.target import TuningTarget, register

__all__ = ["HyperparameterTarget"]


@register("hyperparameters")
class HyperparameterTarget(TuningTarget):
    """Settings of an attention at one length, from its ``search_space()``."""

    description = "the settings of an attention"
    reference = "its default settings"
    error_meaning = "lookups, with the attention in a small trained model; nothing is trained"
    objectives = ("speed", "memory", "quality")

    def __init__(self, attention: str, length: int, dtype: str, device: str) -> None:
        cls = registry.get(attention)
        space = cls.search_space()
        if space is None:
            raise ValueError(f"attention {attention!r} has nothing to tune (no search_space)")
        self.space, self._cls = space, cls
        self._case = speed_case(attention, length, dtype, device)
        self._verifier = Verifier()
        self._default_errors: dict[int, float] = {}  # by seed

    def steps(self, choice: Mapping[str, Any], seed: int) -> Iterator[dict[str, float]]:
        """Yield figures of a choice; see :meth:`TuningTarget.steps`."""
        settings = self.space.settings(choice)
        # The verifier checks a case once: other settings are other cases.
        case = replace(self._case, task=json.dumps(settings, sort_keys=True))
        workload = Workload(case, self._build(config_for(case), settings).eval().to(case.device))
        candidate = TimedAttention(workload, self._verifier.tolerance(workload))
        peak = float(peak_bytes(candidate.call, workload.device))
        default_peak = self._default_peak
        reference = TimedAttention(Workload(self._case, self._default), None)
        pair = measure_beside(candidate.call, reference.call, workload.device, seed)
        if fault := candidate.fault(measured_case.TIMING_S):
            raise ValueError(fault)
        yield {
            "peak_bytes": peak,
            "memory_ratio": peak / default_peak,
            "time_s": median(pair.candidate),
            "error_default": self._default_error(seed),
            **pair.metrics(),
        }
        verdict = self._verifier.verdict(workload)
        if verdict.reason:
            raise ValueError(verdict.reason)
        error = errors(lambda shape: self._build(shape, settings), case.length, seed, case.device)
        yield {"error_vs_dense": verdict.error_vs_dense, "error": error}

    def _build(self, shape: AttentionConfig, settings: Mapping[str, Any]) -> BaseAttention:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self._cls.build(shape, **settings)

    def _default_error(self, seed: int) -> float:
        if seed not in self._default_errors:
            case = self._case
            self._default_errors[seed] = errors(
                lambda shape: self._build(shape, {}), case.length, seed, case.device
            )
        return self._default_errors[seed]

    @cached_property
    def _default(self) -> BaseAttention:
        return build_for(self._case)

    @cached_property
    def _default_peak(self) -> float:
        workload = Workload(self._case, self._default)
        return float(peak_bytes(workload.call(), workload.device))
