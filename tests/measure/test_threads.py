"""The number of threads of a bench: the fastest one beside what else runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from danon.measure import threads
from danon.measure.threads import fastest_threads, fewer_threads_beside_load, threads_for_timing

SetClock = Callable[[dict[int, float]], None]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[SetClock]:
    """Let a trial take so many seconds with each number of threads; the most are four."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    threads._trials.clear()

    def set_clock(seconds: dict[int, float]) -> None:
        now = 0.0

        def read() -> float:
            nonlocal now
            now += seconds[torch.get_num_threads()]
            return now

        monkeypatch.setattr(threads, "perf_counter", read)

    yield set_clock
    assert torch.get_num_threads() == 4, "as it was"
    torch.set_num_threads(before)
    threads._trials.clear()


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ({1: 1.0, 2: 0.55, 4: 0.3}, 4),
        ({1: 1.0, 2: 0.55, 4: 1.5}, 2),
        ({1: 1.0, 2: 2.5, 4: 3.5}, 1),
        ({1: 1.0, 2: 0.9, 4: 0.85}, 1),  # not worth it
        ({1: 1.0, 2: 1.2, 4: 0.5}, 4),
    ],
)
def test_fastest_number_of_threads(clock: SetClock, seconds: dict[int, float], chosen: int) -> None:
    clock(seconds)
    assert fastest_threads() == chosen
    with fewer_threads_beside_load(torch.device("cpu")) as found:
        assert found == torch.get_num_threads() == chosen
    with fewer_threads_beside_load(torch.device("cuda")) as found:
        assert found == torch.get_num_threads() == 4


def test_result_of_a_trial_expires(clock: SetClock, monkeypatch: pytest.MonkeyPatch) -> None:
    clock({1: 1.0, 2: 2.0, 4: 2.0})
    now = 100.0
    monkeypatch.setattr(threads, "monotonic", lambda: now)
    found = []
    for seconds in (0.0, threads.TRIAL_HOLDS_S - 1, 2.0):
        now += seconds
        with fewer_threads_beside_load(torch.device("cpu")) as threads_now:
            found.append(threads_now)
        clock({1: 1.0, 2: 0.5, 4: 0.3})
    assert found == [1, 1, 4]


def test_threads_after_an_error(clock: SetClock) -> None:
    clock({1: 1.0, 2: 2.0, 4: 2.0})
    with pytest.raises(ValueError, match="mine"), fewer_threads_beside_load(torch.device("cpu")):
        raise ValueError("mine")


def test_no_trial_with_one_thread(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(threads, "perf_counter")
    assert fastest_threads() == 1


def test_real_trial() -> None:
    assert fastest_threads() in range(1, torch.get_num_threads() + 1)


class TestTiming:
    def test_longer_trial_for_a_bench(
        self, clock: SetClock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in threads.CHOSEN_BY_USER:
            monkeypatch.delenv(name, raising=False)
        clock({1: 1.0, 2: 1.2, 4: 1.5})
        assert threads_for_timing() == 1
        monkeypatch.setattr(threads, "fastest_threads", lambda rounds: rounds)
        assert threads_for_timing() >= 5 * threads.ROUNDS

    def test_number_of_threads_set_by_the_user(
        self, clock: SetClock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delattr(threads, "fastest_threads")
        monkeypatch.setenv("OMP_NUM_THREADS", "4")
        assert threads_for_timing() == 4
