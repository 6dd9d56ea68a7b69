"""Checks of an attention before it goes into a model, and its costs there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from statistics import median
from time import perf_counter
from typing import Any

import torch

from danon.attention import registry
from danon.attention.base import BaseAttention
from danon.attention.registry import REFERENCE
from danon.bench.shapes import claims_causal
from danon.bench.suite import UnmeasuredError
from danon.bench.timed_workload import TimedAttention
from danon.bench.verification import Verifier
from danon.bench.workload import Workload
from danon.config import AttentionConfig
from danon.data.qkv import text_qkv
from danon.measure.causality import check_causal
from danon.measure.memory import peak_bytes
from danon.measure.threads import fewer_threads_beside_load
from danon.measure.timing import measure_pair
from danon.runs.case import Case

__all__ = ["PROBE", "attention_costs", "check_eligible"]

PROBE = 256
"""Most tokens of the correctness check of an attention."""
SHARE = 0.25
"""Share of a case's time budget that goes into timing the attention of a model."""


def check_eligible(
    case: Case, shape: AttentionConfig, entries: int | None, probe: int, verifier: Verifier
) -> tuple[BaseAttention, dict[str, Any]]:
    """Build the attention of a case in the size of its model, and check it.

    Args:
        case: attention, dtype and device.
        shape: configuration of the model; the attention is sized for its longest input.
        entries: about the most entries that a query sees on average; None: the default settings.
        probe: most tokens of the check.
        verifier: verifier of the session.

    Returns:
        The attention in evaluation mode, and the record of its check.

    Raises:
        UnmeasuredError: it cannot run here, has no such size, is wrong, or sees later tokens.
    """
    attention, length = registry.get(case.attention), shape.max_sequence_length
    backward = case.phase == "training"
    reason = attention.unavailable(
        shape,
        length=length,
        dtype=getattr(torch, case.dtype),
        device=torch.device(case.device),
        backward=backward,
    )
    if reason:
        raise UnmeasuredError("unavailable", reason)
    try:
        module = (
            attention.build(shape) if entries is None else attention.with_budget(shape, entries)
        )
    except NotImplementedError as error:
        raise UnmeasuredError("unavailable", str(error)) from error
    module = module.eval().to(case.device)
    if not claims_causal(module):
        raise UnmeasuredError("unavailable", "sees later tokens, which it would have to predict")
    # The verifier checks a case once: other sizes are other cases.
    checked = replace(
        case,
        length=min(probe, length),
        phase="forward+backward" if backward else "forward",
        task=f"{entries or 'all'} of {length}",
    )
    correctness = verifier.verdict(Workload(checked, module))
    whole = (x.to(case.device) for x in text_qkv(1, case.heads, length, case.head_dim))
    with fewer_threads_beside_load(torch.device(case.device)):
        reason = correctness.reason or check_causal(module, *whole)
    if reason:
        raise UnmeasuredError("failed", reason)
    return module, correctness.info


def attention_costs(
    case: Case,
    module: BaseAttention,
    dense: Callable[[], BaseAttention],
    verifier: Verifier,
    *,
    seconds: float,
    width: float,
) -> dict[str, float]:
    """Measure memory and pairs of the attention alone, and its time beside dense attention's.

    Args:
        case: attention, length in tokens, dtype and device.
        module: the attention, in the size of its model.
        dense: builds dense attention in that size.
        verifier: source of the tolerance of timed calls.
        seconds: time budget of a case.
        width: half width of a narrow interval, in logarithms.

    Returns:
        ``peak_bytes``, ``pairs_share`` and, unless it is dense attention, ``time_s`` and the
        metrics of the pair.

    Raises:
        UnmeasuredError: a timed call was wrong.
    """
    alone = replace(case, phase="forward", task="")
    workload = Workload(alone, module)
    candidate = TimedAttention(workload, verifier.tolerance(workload))
    metrics = {"peak_bytes": float(peak_bytes(candidate.call, workload.device))}
    if (pairs := module.visible_pairs(case.length)) is not None:
        metrics["pairs_share"] = pairs / (case.length * (case.length + 1) / 2)
    if case.attention != REFERENCE:
        start = perf_counter()
        pair = measure_pair(
            candidate.call,
            TimedAttention(Workload(alone, dense()), None).call,
            workload.device,
            budget_s=seconds * SHARE,
            width=width,
            seed=case.length,
        )
        if fault := candidate.fault(perf_counter() - start):
            raise UnmeasuredError("failed", fault)
        metrics |= pair.metrics() | {"time_s": median(pair.candidate)}
    return metrics
