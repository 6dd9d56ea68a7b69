"""What an attention costs a model that was trained with dense attention."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from danon.bench.pytest_benchmark_adapter import CLOCK
from danon.runs.case import Case

pytestmark = pytest.mark.benchmark(timer=CLOCK)


def test_pretrained(case: Case, measure: Callable[[Case], None]) -> None:
    """Perplexity, or numbers found again; the time in the table is the model's forward pass."""
    measure(case)
