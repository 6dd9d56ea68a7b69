"""Figures faster than the machine, with and without other programs."""

from __future__ import annotations

import pytest
import torch

from danon.measure.other_load import CpuReading
from suites import speed
from suites.speed import _best_rate


@pytest.mark.parametrize(("others", "impossible"), [(0.0, True), (0.9, False)])
def test_rate_beside_other_programs(
    monkeypatch: pytest.MonkeyPatch, others: float, impossible: bool
) -> None:
    """An honest figure is no failed row because another program slowed the rate down."""
    threads, seconds = 2, iter(range(100))

    class Reading(CpuReading):
        @classmethod
        def now(cls) -> CpuReading:
            wall_s = float(next(seconds))
            return CpuReading(wall_s, (threads - 1 + others + 0.1) * wall_s, (threads - 1) * wall_s)

    monkeypatch.setattr(speed, "CpuReading", Reading)
    monkeypatch.setattr("danon.measure.other_load._usable", lambda count: {0, 1})
    monkeypatch.setattr(speed.torch, "get_num_threads", lambda: threads)
    metrics: dict[str, float] = {}
    rate = _best_rate(lambda: 86e9, torch.device("cpu"), metrics)
    assert (134e9 > rate) == impossible
    assert metrics == ({} if impossible else {"contended_cores": pytest.approx(1.0)})
