"""Time of a forward pass, and of forward and backward, beside dense attention."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from danon.bench.pytest_benchmark_adapter import CLOCK
from danon.runs.case import Case

pytestmark = pytest.mark.benchmark(timer=CLOCK)


def test_speed(case: Case, measure: Callable[[Case], None]) -> None:
    """Seconds and the ratio to dense attention, both interleaved; FLOP/s; error."""
    measure(case)
