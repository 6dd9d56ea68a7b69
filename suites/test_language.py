"""How well a byte-level language model, trained from scratch, predicts text it has not seen."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from danon.bench.pytest_benchmark_adapter import CLOCK
from danon.runs.case import Case

pytestmark = pytest.mark.benchmark(timer=CLOCK)


def test_language(case: Case, measure: Callable[[Case], None]) -> None:
    """Bits per byte; the time in pytest-benchmark's table is that of the training."""
    measure(case)
