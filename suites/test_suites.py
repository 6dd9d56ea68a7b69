"""The cases of every suite, as tests of pytest-benchmark."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from danon.bench.pytest_benchmark_adapter import CLOCK
from danon.runs.case import Case

pytestmark = pytest.mark.benchmark(timer=CLOCK)


def test_suite(case: Case, measure: Callable[[Case], None]) -> None:
    """Measure a case by its suite."""
    measure(case)
