"""Measure the case of an attention for any kind of study, beside the default choice."""

from __future__ import annotations

import torch

from danon.attention import registry
from danon.bench.shapes import HEAD_DIM, HEADS, config_for
from danon.measure.timing import Paired, Side, measure_pair
from danon.runs.case import Case

__all__ = ["TIMING_S", "measure_beside", "speed_case"]

TIMING_S = 2.0
"""Seconds of timing rounds beside the default choice."""
HALF_WIDTH = 0.02
"""Half width of the interval of a time ratio at which timing stops early."""


def speed_case(attention: str, length: int, dtype: str, device: str) -> Case:
    """Return the case in which an attention's forward pass is timed.

    Args:
        attention: registered name.
        length: tokens.
        dtype: type of the numbers.
        device: ``cpu`` or ``cuda``.

    Raises:
        ValueError: the attention cannot run here.
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


def measure_beside(candidate: Side, default: Side, device: torch.device, seed: int) -> Paired:
    """Measure the time of a choice, interleaved with the default choice.

    Args:
        candidate: call of the choice.
        default: call of the default choice.
        device: where both run.
        seed: seed of the order of the rounds.
    """
    return measure_pair(candidate, default, device, budget_s=TIMING_S, width=HALF_WIDTH, seed=seed)
