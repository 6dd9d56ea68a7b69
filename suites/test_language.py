"""How well a byte-level language model, trained from scratch, predicts text it has not seen."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from danon.measure.case import Case
from suites.replay import CLOCK

pytestmark = pytest.mark.benchmark(timer=CLOCK)


def test_language(case: Case, measure: Callable[[Case], None]) -> None:
    """Bits per byte; the time in pytest-benchmark's table is that of the training."""
    measure(case)
