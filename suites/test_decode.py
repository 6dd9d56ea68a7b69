"""Time of one more token after a context, and the bytes that remember it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from danon.bench.pytest_benchmark_adapter import CLOCK
from danon.runs.case import Case

pytestmark = pytest.mark.benchmark(timer=CLOCK)


def test_decode(case: Case, measure: Callable[[Case], None]) -> None:
    """Seconds a token and the ratio to dense attention with a key cache; state bytes; error."""
    measure(case)
