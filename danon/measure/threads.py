"""The choice of the number of threads: beside another program, fewer are faster.

A small operation ends with the slowest of its threads. Beside another program one of them often
waits for a core while the others spin. On two cores, a training step with two threads then takes
2 to 8 times as long as on a quiet machine. With one thread it takes no longer
(docs/measurement.md).

- :func:`threads_for_timing`: one number for all timings of a bench, part of the machine's
  fingerprint.
- :func:`fewer_threads_beside_load`: work that is not timed chooses every few seconds.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic, perf_counter

import torch
from torch.nn import functional as F

__all__ = ["CHOSEN_BY_USER", "fastest_threads", "fewer_threads_beside_load", "threads_for_timing"]

ROUNDS = 12
REPEATS = 15
GAIN = 0.8
"""More threads are chosen if the time falls to this share: they may be delayed later."""
TOKENS, WIDTH = 2048, 64
"""Sizes of the timed operations: those of the small models that the suites train."""
BENCH_ROUNDS = 100
"""Rounds of a trial for a whole bench: two threads may be lucky for a tenth of a second."""
CHOSEN_BY_USER = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Variables of the environment by which a user sets the number of threads."""
TRIAL_HOLDS_S = 10.0
"""Seconds that the result of a trial holds for: other programs come and go."""
_trials: dict[int, tuple[float, int]] = {}
"""Largest number of threads -> time of the last trial, and its result."""


@contextmanager
def fewer_threads_beside_load(device: torch.device) -> Iterator[int]:
    """Compute work that is not timed with the number of threads that is fastest just now.

    Args:
        device: where the work runs; threads are chosen on a CPU only.

    Yields:
        The number of threads.
    """
    most = torch.get_num_threads()
    threads = _lately_fastest(most) if device.type == "cpu" else most
    torch.set_num_threads(threads)
    try:
        yield threads
    finally:
        torch.set_num_threads(most)


def threads_for_timing() -> int:
    """Choose the number of threads that a bench which begins now times with.

    Returns:
        All threads of this process where the user has set their number, else the result of
        :func:`fastest_threads` with more rounds.
    """
    if any(name in os.environ for name in CHOSEN_BY_USER):
        return torch.get_num_threads()
    return fastest_threads(BENCH_ROUNDS)


def _lately_fastest(most: int) -> int:
    if most not in _trials or monotonic() - _trials[most][0] > TRIAL_HOLDS_S:
        _trials[most] = monotonic(), fastest_threads()
    return _trials[most][1]


def fastest_threads(rounds: int = ROUNDS) -> int:
    """Time small operations with all threads of this process, half of them, and so on to one.

    Args:
        rounds: of the trial; twelve take about 0.1 s.

    Returns:
        The number that took the least time in all, or a smaller one that took about the same.
    """
    most = torch.get_num_threads()
    spent = dict.fromkeys(_halves(most), 0.0)
    if len(spent) == 1:
        return most
    x, w = torch.ones(TOKENS, WIDTH), torch.ones(WIDTH, WIDTH) / WIDTH
    try:
        with torch.inference_mode():
            for _ in range(rounds):
                for threads in spent:
                    torch.set_num_threads(threads)
                    y = F.gelu(x @ w)  # its threads are there before the clock starts
                    start = perf_counter()
                    for _ in range(REPEATS):
                        y = F.gelu(y @ w)
                    spent[threads] += perf_counter() - start
    finally:
        torch.set_num_threads(most)
    chosen = 1
    for threads in sorted(spent):
        if spent[threads] < GAIN * spent[chosen]:
            chosen = threads
    return chosen


def _halves(most: int) -> Iterator[int]:
    while most > 1:
        yield most
        most //= 2
    yield 1
