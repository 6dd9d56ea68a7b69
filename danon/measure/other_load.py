"""CPU time that other programs take while a case is measured."""

from __future__ import annotations

import os
from dataclasses import dataclass
from time import perf_counter
from typing import Self

__all__ = ["SLACK_CORES", "CpuReading", "contended_cores"]

IDLE = ("idle", "iowait", "guest", "guest_nice")
"""Fields of psutil's CPU times that are no work, or are counted in another field."""
SLACK_CORES, LEAST_S = 0.25, 0.5
"""Fewer cores, or fewer seconds, are what any system does besides."""


@dataclass(frozen=True)
class CpuReading:
    """CPU seconds up to one moment.

    Attributes:
        wall_s: the clock.
        all_s: of all programs, on the CPUs that this process may use.
        own_s: of this process, its ended children, and the command that started it.
    """

    wall_s: float
    all_s: float
    own_s: float

    @classmethod
    def now(cls) -> Self:
        """Read the CPU times."""
        import psutil

        cpus = psutil.cpu_times(percpu=True)
        busy = sum(
            sum(value for name, value in cpus[number]._asdict().items() if name not in IDLE)
            for number in _usable(len(cpus))
        )
        own = 0.0
        for identifier in (os.getpid(), os.getppid()):
            try:
                times = psutil.Process(identifier).cpu_times()
            except psutil.Error:  # the command has ended
                continue
            # Of ended children only this process's are its own: the command's are earlier ones.
            children = identifier == os.getpid()
            own += times.user + times.system
            own += (times.children_user + times.children_system) * children
        return cls(perf_counter(), busy, own)


def contended_cores(
    before: CpuReading, after: CpuReading, threads: int, least_s: float = LEAST_S
) -> float:
    """Return the cores that others took from a measurement; 0 if there were enough for all.

    Args:
        before: reading at its begin.
        after: reading at its end.
        threads: that the measurement uses.
        least_s: fewer seconds of others do not count.
    """
    elapsed_s = after.wall_s - before.wall_s
    others_s = (after.all_s - before.all_s) - (after.own_s - before.own_s)
    if elapsed_s <= 0 or others_s < least_s:
        return 0.0
    cores = others_s / elapsed_s
    free = len(_usable(os.cpu_count() or 1)) - threads
    return cores if cores > max(free, 0) + SLACK_CORES else 0.0


def _usable(count: int) -> set[int]:
    """Return the numbers of the CPUs that this process may use, of so many."""
    if hasattr(os, "sched_getaffinity"):
        return {number for number in os.sched_getaffinity(0) if number < count}
    return {*range(count)}
