"""Peak bytes of a pass beyond inputs and output, and what autograd keeps for the backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from danon.measure.case import Case
from suites.replay import CLOCK

pytestmark = pytest.mark.benchmark(timer=CLOCK)


def test_memory(case: Case, measure: Callable[[Case], None]) -> None:
    """Bytes; the time in pytest-benchmark's table is that of a single call."""
    measure(case)
