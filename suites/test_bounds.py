"""How far each attention is from dense attention's matrix: the bounds of specification 5."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from danon.bench.pytest_benchmark_adapter import CLOCK
from danon.runs.case import Case

pytestmark = pytest.mark.benchmark(timer=CLOCK)


def test_bounds(case: Case, measure: Callable[[Case], None]) -> None:
    """Distances and masses on sampled rows; the seconds are those of the whole case."""
    measure(case)
