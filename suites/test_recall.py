"""Whether a model finds again what its context said once: trained, then asked."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from danon.bench.pytest_benchmark_adapter import CLOCK
from danon.runs.case import Case

pytestmark = pytest.mark.benchmark(timer=CLOCK)


def test_recall(case: Case, measure: Callable[[Case], None]) -> None:
    """Share of right answers at a length; the time in pytest-benchmark's table is the training."""
    measure(case)
