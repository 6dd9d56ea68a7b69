"""How far each attention is from dense attention's matrix: the bounds of the seed's section 5."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from danon.measure.case import Case
from suites.replay import CLOCK

pytestmark = pytest.mark.benchmark(timer=CLOCK)


def test_bounds(case: Case, measure: Callable[[Case], None]) -> None:
    """Distances and masses on sampled rows; the seconds are those of the whole case."""
    measure(case)
