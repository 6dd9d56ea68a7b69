"""Time of a forward pass, and of forward and backward, beside dense attention."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from danon.measure.case import Case
from suites.replay import CLOCK

pytestmark = pytest.mark.benchmark(timer=CLOCK)


def test_speed(case: Case, measure: Callable[[Case], None]) -> None:
    """Seconds and the ratio to dense attention, both interleaved; FLOP/s; error."""
    measure(case)
