"""CPU time of other programs during a measurement."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from danon.measure import other_load
from danon.measure.other_load import CpuReading, contended_cores

BEFORE = CpuReading(0.0, 100.0, 10.0)


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(other_load, "_usable", lambda count: {0, 1})


@pytest.mark.usefixtures("two_cores")
@pytest.mark.parametrize(
    ("all_s", "own_s", "threads", "cores"),
    [
        (20.0, 20.0, 2, 0.0),  # alone
        (20.0, 18.5, 2, 0.0),  # a little beside
        (20.0, 11.0, 2, 0.9),  # a busy core beside two threads
        (20.0, 10.0, 1, 0.0),  # a busy core beside one thread: there is one for each
        (20.0, 4.0, 1, 1.6),
    ],
)
def test_cores_that_others_take(all_s: float, own_s: float, threads: int, cores: float) -> None:
    after = CpuReading(10.0, 100.0 + all_s, 10.0 + own_s)
    assert contended_cores(BEFORE, after, threads) == pytest.approx(cores)


@pytest.mark.usefixtures("two_cores")
def test_short_disturbance() -> None:
    assert contended_cores(BEFORE, CpuReading(0.5, 100.9, 10.5), 2) == 0.0, "0.4 s in all"


def test_busy_program_is_seen_and_own_work_is_not() -> None:
    before = CpuReading.now()
    end = time.perf_counter() + 1.0
    while time.perf_counter() < end:
        pass
    worked = CpuReading.now()
    assert worked.own_s - before.own_s > 0.3
    loop = "import time\nend = time.time() + 60\nwhile time.time() < end: pass"
    # In a session of its own it is nobody's child that is counted: it has not ended.
    with subprocess.Popen([sys.executable, "-c", loop], start_new_session=True) as busy:
        try:
            before = CpuReading.now()
            time.sleep(2.0)
            after = CpuReading.now()
        finally:
            busy.kill()
    others_s = (after.all_s - before.all_s) - (after.own_s - before.own_s)
    assert others_s > 0.5
    assert contended_cores(before, after, os.cpu_count() or 1) > 0.25
