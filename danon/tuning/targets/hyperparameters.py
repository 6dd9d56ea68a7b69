"""What a study measures of one choice: settings of an attention beside its default ones."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from statistics import median
from typing import Any

import torch

from danon.attention import registry
from danon.attention.base import BaseAttention
from danon.bench.shapes import HEAD_DIM, HEADS, build_for, config_for
from danon.bench.timed_workload import TimedAttention
from danon.bench.verification import Verifier
from danon.bench.workload import Workload
from danon.config import AttentionConfig
from danon.evaluation.lookup_model import errors
from danon.measure.memory import peak_bytes
from danon.measure.timing import measure_pair
from danon.runs.case import Case
from danon.tuned.search_space import Space

__all__ = ["TIMING_S", "WIDTH", "HyperparameterTarget", "TuningTarget", "case_of"]

TIMING_S, WIDTH = 2.0, 0.02
"""Seconds of rounds beside the default settings, and the half width of an interval that will do."""


class TuningTarget(ABC):
    """Something with a space to choose from, and figures of a choice.

    Attributes:
        objectives: that its figures tell about.
        starts: choices to measure first, after the default.
    """

    space: Space
    objectives: tuple[str, ...]
    starts: tuple[Mapping[str, Any], ...] = ()

    @abstractmethod
    def steps(self, choice: Mapping[str, Any], seed: int) -> Iterator[dict[str, float]]:
        """Figures of a choice, cheap ones first; each step tells more of them.

        ``time_ratio`` (with ``_low`` and ``_high``), ``memory_ratio``: over those of the default;
        ``error`` from 0 to 1, and ``error_default``.

        Raises:
            ValueError: the choice cannot be built, or computes something else than it says.
        """

    def settings(self, choice: Mapping[str, Any]) -> dict[str, Any]:
        """What a choice stands for, in full: for a file."""
        return self.space.settings(choice)


def case_of(attention: str, length: int, dtype: str, device: str) -> Case:
    """What is timed of an attention.

    Raises:
        ValueError: it cannot run here.
    """
    case = Case(
        "speed", attention, length, dtype, "forward", device, heads=HEADS, head_dim=HEAD_DIM
    )
    if reason := registry.get(attention).unavailable(
        config_for(case),
        length=length,
        dtype=getattr(torch, dtype),
        device=torch.device(device),
        backward=False,
    ):
        raise ValueError(f"attention {attention!r} cannot run here: {reason}")
    return case


class HyperparameterTarget(TuningTarget):
    """Of an attention, at one length.

    Raises:
        ValueError: it has nothing to tune, or cannot run here.
    """

    objectives = ("speed", "memory", "quality")

    def __init__(self, attention: str, length: int, dtype: str, device: str) -> None:
        kind = registry.get(attention)
        space = kind.search_space()
        if space is None:
            raise ValueError(f"attention {attention!r} has nothing to tune (no search_space)")
        self.space, self._kind = space, kind
        self._case = case_of(attention, length, dtype, device)
        self._verifier = Verifier()
        self._usual: dict[int, float] = {}

    def steps(self, choice: Mapping[str, Any], seed: int) -> Iterator[dict[str, float]]:
        settings = self.space.settings(choice)
        # The verifier checks a case once: other settings are other cases.
        case = replace(self._case, task=json.dumps(settings, sort_keys=True))
        workload = Workload(case, self._built(config_for(case), settings).eval().to(case.device))
        candidate = TimedAttention(workload, self._verifier.tolerance(workload))
        peak = float(peak_bytes(candidate.call, workload.device))
        usual = self._default_peak
        reference = TimedAttention(Workload(self._case, self._default), None)
        pair = measure_pair(
            candidate.call,
            reference.call,
            workload.device,
            budget_s=TIMING_S,
            width=WIDTH,
            seed=seed,
        )
        if fault := candidate.fault(TIMING_S):
            raise ValueError(fault)
        yield {
            "peak_bytes": peak,
            "memory_ratio": peak / usual,
            "time_s": median(pair.candidate),
            "error_default": self._default_errors(seed),
            **pair.metrics(),
        }
        verdict = self._verifier.verdict(workload)
        if verdict.reason:
            raise ValueError(verdict.reason)
        error = errors(lambda shape: self._built(shape, settings), case.length, seed, case.device)
        yield {"error_vs_dense": verdict.error_vs_dense, "error": error}

    def _built(self, shape: AttentionConfig, settings: Mapping[str, Any]) -> BaseAttention:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self._kind.build(shape, **settings)

    def _default_errors(self, seed: int) -> float:
        if seed not in self._usual:
            case = self._case
            self._usual[seed] = errors(
                lambda shape: self._built(shape, {}), case.length, seed, case.device
            )
        return self._usual[seed]

    @cached_property
    def _default(self) -> BaseAttention:
        return build_for(self._case)

    @cached_property
    def _default_peak(self) -> float:
        workload = Workload(self._case, self._default)
        return float(peak_bytes(workload.call(), workload.device))
