"""Exponents of time and peak memory in the length, fitted over what the others measured."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from danon.bench.pytest_benchmark_adapter import CLOCK
from danon.runs.case import Case

pytestmark = pytest.mark.benchmark(timer=CLOCK)


def test_scaling(case: Case, measure: Callable[[Case], None]) -> None:
    """Two exponents; the time in pytest-benchmark's table is that of the longest length."""
    measure(case)
