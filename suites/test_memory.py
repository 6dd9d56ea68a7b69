"""Peak bytes of a pass beyond inputs and output, and what autograd keeps for the backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from danon.bench.pytest_benchmark_adapter import CLOCK
from danon.runs.case import Case

pytestmark = pytest.mark.benchmark(timer=CLOCK)


def test_memory(case: Case, measure: Callable[[Case], None]) -> None:
    """Bytes; the time in pytest-benchmark's table is that of a single call."""
    measure(case)
