"""Intervals of medians and exponents."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from danon.measure.statistics import (
    FEWEST_ROUNDS,
    MISSED_PER_LOOK,
    fit_exponent,
    median_interval,
    next_look,
    samples_outside,
)

SPIKY_MEDIAN = 0.0043
"""Median of the noise with spikes below, from ten million draws."""


class TestMedianInterval:
    def test_equal_samples(self) -> None:
        found = median_interval([2.0] * 9)
        assert (found.low, found.value, found.high) == (2.0, 2.0, 2.0)

    def test_range_of_few_samples(self) -> None:
        found = median_interval([3.0, 1.0, 2.0])
        assert (found.low, found.value, found.high) == (1.0, 2.0, 3.0)

    def test_interval_is_deterministic(self) -> None:
        samples = np.random.default_rng(0).normal(size=20).tolist()
        assert median_interval(samples) == median_interval(samples)

    def test_coverage_at_every_stopping_point(self) -> None:
        """Exact: how many of n samples lie below the median is binomial for every distribution."""
        looks = [next_look(0)]
        while looks[-1] < 400:
            looks.append(next_look(looks[-1]))
        below = np.array([1.0])  # chance of each count, of those not missed at a look before
        missed = worst = 0.0
        for size in range(1, 400):
            below = np.convolve(below, (0.5, 0.5))
            if size < FEWEST_ROUNDS:
                continue
            ends = samples_outside(size) + 1
            now = below[:ends].sum() + below[len(below) - ends :].sum()
            worst = max(worst, missed + now)
            if size in looks:
                missed += now
                below[:ends] = below[len(below) - ends :] = 0.0
        assert 0.045 < worst < 0.051
        fixed = [
            2 * sum(math.comb(n, i) for i in range(samples_outside(n) + 1)) / 2**n
            for n in (8, 12, 100, 1000)
        ]
        assert max(fixed) <= MISSED_PER_LOOK

    def test_order_statistics_against_scipy(self) -> None:
        for size in range(1, 2000, 7):
            expected = stats.binom.ppf(MISSED_PER_LOOK / 2, size, 0.5) - 1
            assert samples_outside(size) == max(expected, 0), size

    @pytest.mark.parametrize("kind", ["normal", "heavy tails", "spikes"])
    def test_coverage_in_simulated_timings(self, kind: str) -> None:
        draw = np.random.default_rng(5)
        covered = []
        for _ in range(1500):
            noise = draw.normal(0, 0.05, 120)
            middle = 0.0
            if kind == "heavy tails":
                noise = 0.03 * draw.standard_t(2, 120)
            if kind == "spikes":
                noise = draw.exponential(0.5, 120) * (draw.random(120) < 0.15) + 0.4 * noise
                middle = SPIKY_MEDIAN
            last, size = int(draw.integers(FEWEST_ROUNDS, 120)), FEWEST_ROUNDS
            while True:
                found = median_interval(noise[:size].tolist())
                if size == last or (found.high - found.low) / 2 <= 0.02:
                    break
                size = min(next_look(size), last)
            covered.append(found.low <= middle <= found.high)
        assert np.mean(covered) >= 0.945

    @pytest.mark.parametrize("samples", [[], [1.0, math.nan]])
    def test_empty_or_nan_samples(self, samples: list[float]) -> None:
        with pytest.raises(ValueError, match="must be finite and at least one"):
            median_interval(samples)


class TestExponent:
    def test_exact_power_law(self) -> None:
        found = fit_exponent([1, 2, 4, 8], [3 * n**1.5 for n in (1, 2, 4, 8)])
        assert found.value == pytest.approx(1.5)
        assert found.high - found.low == pytest.approx(0, abs=1e-9)

    def test_coverage_with_noise(self) -> None:
        draw, lengths = np.random.default_rng(2), np.array([1024, 2048, 4096, 8192, 16384])
        hits = 0
        for _ in range(300):
            found = fit_exponent(lengths, lengths**2.0 * np.exp(draw.normal(0, 0.1, 5)))
            hits += found.low <= 2.0 <= found.high
        assert 0.91 <= hits / 300 <= 0.99

    def test_interval_of_points_off_one_power_law(self) -> None:
        straight = fit_exponent([1, 2, 4, 8], [1, 2, 4, 8])
        bent = fit_exponent([1, 2, 4, 8], [1, 1.1, 2, 8])
        assert bent.high - bent.low > 1 > straight.high - straight.low

    @pytest.mark.parametrize(
        ("lengths", "values", "message"),
        [([1, 2], [1, 2], "needs three"), ([1, 2, 3], [1, 0, 2], "positive and finite")],
    )
    def test_invalid_points(self, lengths: list[float], values: list[float], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            fit_exponent(lengths, values)
