"""Interleaved timing on a clock that the test sets, and on a real one."""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable

import pytest
import torch

from danon.measure import timing
from danon.measure.statistics import FEWEST_ROUNDS
from danon.measure.timing import measure_pair, measure_single

CPU = torch.device("cpu")


class FakeMachine:
    """A clock that moves only when work is done: by seconds of work times a disturbance."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, noise: float = 0.0) -> None:
        self.now, self.noise, self.draw = 0.0, noise, random.Random(0)
        self.slowdown = lambda now: 1.0
        self.calls: list[str] = []
        monkeypatch.setattr(timing, "perf_counter", lambda: self.now)

    def work(self, name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            self.calls.append(name)
            disturbance = self.slowdown(self.now) * math.exp(self.draw.gauss(0, self.noise))
            self.now += seconds * disturbance

        return run


class TestPaired:
    def test_slowdown_of_the_candidate(self, monkeypatch: pytest.MonkeyPatch) -> None:
        machine = FakeMachine(monkeypatch, noise=0.05)
        found = measure_pair(
            machine.work("a", 0.03), machine.work("b", 0.02), CPU, budget_s=20, width=0.02
        )
        assert found.conclusive
        assert found.ratio.low <= 1.5 <= found.ratio.high
        assert found.ratio.high / found.ratio.low < 1.1

    def test_equal_sides(self, monkeypatch: pytest.MonkeyPatch) -> None:
        machine = FakeMachine(monkeypatch, noise=0.05)
        found = measure_pair(
            machine.work("a", 0.02), machine.work("b", 0.02), CPU, budget_s=20, width=0.02
        )
        assert found.ratio.low <= 1.0 <= found.ratio.high
        assert found.ratio.value == pytest.approx(1.0, abs=0.05)

    def test_disturbance_of_both_sides(self, monkeypatch: pytest.MonkeyPatch) -> None:
        machine = FakeMachine(monkeypatch)
        machine.slowdown = lambda now: 1.0 if now < 0.3 else 5.0
        found = measure_pair(
            machine.work("a", 0.03), machine.work("b", 0.02), CPU, budget_s=5, width=0.02
        )
        assert max(found.reference) > 4 * min(found.reference)
        assert found.ratio.value == pytest.approx(1.5, rel=1e-6)

    def test_random_order_within_rounds(self, monkeypatch: pytest.MonkeyPatch) -> None:
        machine = FakeMachine(monkeypatch, noise=0.3)
        measure_pair(machine.work("a", 0.03), machine.work("b", 0.03), CPU, budget_s=3, width=0.02)
        rounds = machine.calls[2:]  # after the warm-up
        first = rounds[::2]
        assert {"a", "b"} == set(first)
        assert sorted(rounds[:2]) == ["a", "b"]

    def test_repeats_of_short_calls(self, monkeypatch: pytest.MonkeyPatch) -> None:
        machine = FakeMachine(monkeypatch)
        found = measure_pair(
            machine.work("a", 1e-3),
            machine.work("b", 1e-4),
            CPU,
            budget_s=1,
            width=0.02,
            sample_s=0.02,
        )
        rounds = len(found.candidate)
        assert rounds >= FEWEST_ROUNDS
        assert machine.calls.count("a") == pytest.approx(20 * rounds, abs=22)
        assert machine.calls.count("b") == pytest.approx(200 * rounds, abs=202)
        assert found.ratio.value == pytest.approx(10)

    @pytest.mark.parametrize(("pair_s", "rounds"), [(4.0, 2), (0.8, 3)])
    def test_calls_slower_than_the_budget(
        self, monkeypatch: pytest.MonkeyPatch, pair_s: float, rounds: int
    ) -> None:
        machine = FakeMachine(monkeypatch)
        side = machine.work("a", pair_s / 2)
        found = measure_pair(side, side, CPU, budget_s=1, width=0.02)
        assert len(found.candidate) == len(found.reference) == rounds
        assert not found.conclusive

    @pytest.mark.parametrize(
        ("seconds", "disturbed", "rounds", "conclusive"),
        [(0.5, False, 8, True), (0.5, True, 12, True), (1.2, False, 2, False)],
    )
    def test_first_rounds_beyond_the_budget(
        self,
        monkeypatch: pytest.MonkeyPatch,
        seconds: float,
        disturbed: bool,
        rounds: int,
        conclusive: bool,
    ) -> None:
        machine = FakeMachine(monkeypatch)
        # The third round of both sides, beside which the candidate alone is slower.
        machine.slowdown = lambda now: 1.5 if disturbed and 2.4 < now < 2.9 else 1.0
        found = measure_pair(
            machine.work("a", seconds),
            machine.work("b", seconds),
            CPU,
            budget_s=1,
            width=0.02,
            first_rounds_s=18,
        )
        assert (len(found.candidate), found.conclusive) == (rounds, conclusive)
        assert found.ratio.value == pytest.approx(1.0)

    def test_noise_that_the_budget_cannot_average(self, monkeypatch: pytest.MonkeyPatch) -> None:
        machine = FakeMachine(monkeypatch, noise=0.5)
        found = measure_pair(
            machine.work("a", 0.02), machine.work("b", 0.02), CPU, budget_s=0.5, width=0.02
        )
        assert not found.conclusive
        assert found.ratio.low < 1.0 < found.ratio.high

    def test_real_clock(self) -> None:
        collecting = gc.isenabled()
        found = measure_pair(
            lambda: time.sleep(0.009), lambda: time.sleep(0.006), CPU, budget_s=0.4, width=0.02
        )
        assert 1.3 < found.ratio.value < 1.7
        assert gc.isenabled() == collecting

    def test_single_function(self, monkeypatch: pytest.MonkeyPatch) -> None:
        machine = FakeMachine(monkeypatch, noise=0.02)
        found = measure_single(machine.work("a", 0.05), CPU, budget_s=20, width=0.02)
        assert found.conclusive
        assert found.time.low <= 0.05 <= found.time.high

    def test_invalid_budget_or_device(self) -> None:
        with pytest.raises(ValueError, match="device = meta: must be cpu or cuda"):
            measure_single(lambda: None, torch.device("meta"), budget_s=1, width=0.02)
        with pytest.raises(ValueError, match="budget_s = 0: must be positive"):
            measure_single(lambda: None, CPU, budget_s=0, width=0.02)
