"""The size of a batch follows a line through measured bytes, and never exceeds the limit."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from danon.training.batch_sizer import BatchSizer


def sizer(limit: float = 1e9, first: int = 32, most: int = 128, growth: float = 1.5) -> BatchSizer:
    return BatchSizer(first, most, growth, limit)


def sizes(made: BatchSizer, fixed: float, each: float, steps: int = 12) -> list[int]:
    """Return the sizes of steps that take ``fixed + each * size`` bytes."""
    seen = []
    for _ in range(steps):
        seen.append(made.size)
        made.measured(made.size, fixed + each * made.size)
        made.next_size()
    return seen


def test_size_grows_by_the_rate_up_to_the_largest() -> None:
    assert sizes(sizer(), 0, 1, 6) == [32, 48, 72, 108, 128, 128]
    assert sizes(sizer(growth=1.0), 0, 1, 3) == [32, 32, 32]
    assert sizes(sizer(first=1, growth=1.01), 0, 1, 4) == [1, 2, 3, 4]  # at least one more


def test_size_stays_without_a_measurement() -> None:
    made = sizer()
    assert [made.next_size(), made.next_size()] == [32, 32]
    assert made.predicted_bytes(32) is None
    assert made.bytes_per_example is None and made.fixed_bytes is None


def test_line_through_two_sizes() -> None:
    made = sizer()
    made.measured(10, 130)
    assert made.predicted_bytes(20) == 260  # all of it is taken to grow
    assert made.bytes_per_example is None and made.has_measured(10) and not made.has_measured(20)
    made.measured(20, 160)
    assert (made.fixed_bytes, made.bytes_per_example) == (100, 3)
    predicted = {5: 130, 10: 130, 15: 160, 20: 160, 21: 163, 120: 460}
    assert {n: made.predicted_bytes(n) for n in predicted} == predicted
    made.measured(10, 100)  # the largest of a size counts
    assert made.bytes_per_example == 3


@given(
    fixed=st.integers(0, 10**9),
    each=st.integers(1, 10**7),
    limit=st.integers(10**6, 10**10),
    growth=st.floats(1.0, 4.0),
    first=st.integers(1, 50),
    states=st.integers(0, 10**9),
    at_peak=st.booleans(),
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_size_is_the_largest_below_the_limit(
    fixed: int, each: int, limit: int, growth: float, first: int, states: int, at_peak: bool
) -> None:
    """Whatever the line is, and though the first step makes states that stay."""
    made = BatchSizer(first, 1000, growth, limit)
    for step in range(300):
        size = made.size
        needed = fixed + each * size
        if size > first:  # the first size is not ours to judge
            assert needed <= limit
        # States that stay may or may not be there at the moment of the peak.
        new = states if step == 0 else 0
        made.measured(size, needed + new if at_peak else max(needed, new), new)
        made.next_size()
    if fixed + each * first <= limit and growth > 1 and states == 0:
        best = min(1000, (limit - fixed) // each)
        assert best - 1 <= made.size <= best  # the slope is a float


def test_states_made_in_the_first_step_do_not_hide_the_slope() -> None:
    made = sizer(limit=10_000, first=10, most=1000, growth=2.0)
    made.measured(10, 1000, kept_bytes=900)  # 100 of examples, or the states alone
    assert made.next_size() == 20
    made.measured(20, 1000)  # 900 fixed, 100 of examples? or all of examples
    assert made.bytes_per_example == 90 and made.predicted_bytes(40) == 2800


def test_limit_that_comes_down_shrinks_the_size() -> None:
    limit = [1000.0]
    made = BatchSizer(10, 100, 2.0, lambda: limit[0])
    assert sizes(made, 0, 10, 3) == [10, 20, 40] and made.size == 80
    made.measured(80, 800)
    limit[0] = 250
    assert made.next_size() == 20 and made.limit_bytes == 250
    limit[0] = 1  # one example is the least
    assert made.next_size() == 1


def test_failed_size_is_not_reached_again() -> None:
    made = sizer()
    made.measured(32, 1)
    assert made.next_size() == 48
    assert made.failed(48) == 24
    assert sizes(made, 0, 1e-3, 4) == [24, 32, 32, 32]  # 48 / 1.5
    assert made.failed(2) == 1 and sizes(made, 0, 1e-3, 2) == [1, 1]
    constant = sizer(growth=1.0)
    assert constant.failed(32) == 16 and sizes(constant, 0, 1, 2) == [16, 16]
    with pytest.raises(ValueError, match="size = 1: must be an integer >= 2"):
        made.failed(1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0, 8, 1.5, 1), "initial_size = 0: must be an integer >= 1"),
        ((8, 4, 1.5, 1), "max_size = 4: must be an integer >= initial_size = 8"),
        ((8, 8.5, 1.5, 1), r"max_size = 8\.5: must be an integer >= initial_size"),
        ((8, 16, 0.9, 1), r"growth_rate = 0\.9: must be a number >= 1"),
        ((8, 16, float("nan"), 1), "growth_rate = nan: must be a number >= 1"),
        ((8, 16, 1.5, 0), "limit_bytes = 0: must be a number > 0"),
    ],
)
def test_wrong_values_are_refused(values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BatchSizer(*values)
