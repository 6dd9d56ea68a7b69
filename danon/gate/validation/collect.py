"""Measuring rounds of the gate: the same code on both sides, or a head that was slowed down."""

from __future__ import annotations

import contextlib
import datetime as dt
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter

from danon.gate.against_commit import ROUNDS
from danon.gate.paired_processes import Measurement, OutputError, Side, WorkerError, measure_abba
from danon.gate.sequential_test import Say
from danon.gate.validation.fault_injection import plant, slow_down
from danon.gate.validation.rounds import Round, append, read
from danon.processes.interpreter import python_command
from danon.runs.case import Case

__all__ = ["PROGRAMS", "WANTED", "collect", "copied", "following"]

WANTED = {
    "quiet": {0.0: 300, 0.03: 36, 0.05: 60, 0.10: 60, 0.20: 36},
    "busy core": {0.0: 75},
    "memory traffic": {0.0: 75, 0.05: 36, 0.10: 36},
}
"""Rounds by load and slowdown; screening takes three of the same code for each run of the gate."""
# They end with who started them, however that ends.
_SPIN = "import os; parent = os.getppid()\nwhile os.getppid() == parent: pass"
_COPY = (
    "import os; import numpy as np; parent, a = os.getppid(), np.ones(2**25)\n"
    "while os.getppid() == parent: a.copy()"  # 256 MiB each way
)
PROGRAMS = {"quiet": "", "busy core": _SPIN, "memory traffic": _COPY}


def collect(
    side: Side,
    commit: str,
    cases: Sequence[Case],
    inputs: Path,
    log: Path,
    place: Path,
    *,
    load: str,
    machine: str,
    end: float,
    say: Say,
) -> int:
    """Measure rounds until the time is over, and add them to a file.

    Args:
        side: the checkout, a copy of danon.
        place: the file, which says what is there already.
        end: of ``perf_counter``: no round begins later.
        load: of :data:`PROGRAMS`: runs beside the measurements.

    Returns:
        How many rounds were added.

    Raises:
        WorkerError: a worker died, a case does not run, or the load has ended.
    """
    count = 0
    timed = [case for case in cases if not case.task]
    with _beside(PROGRAMS[load]) as still:
        while perf_counter() < end:
            known = [r for r in read(place) if (r.load, r.machine) == (load, machine)]
            ours = [r for r in known if r.commit == commit]  # others may be slower or faster
            done = Counter(r.slowdown for r in known)
            slowdown = following(done, WANTED[load]) if ours else 0.0
            head = _head(side, slowdown, ours)
            start = perf_counter()
            found = dict[str, Measurement]()
            seed = len(known)
            base = Side("base", side.root)
            for case, one in measure_abba(base, head, timed, inputs, log, rounds=ROUNDS, seed=seed):
                if isinstance(one, OutputError):
                    raise one
                found[case.id] = one
                say(f"{slowdown:.0%} slower, {load}, round {seed + 1}", len(found), len(timed))
            when, seconds = dt.datetime.now(dt.UTC).isoformat("T", "seconds"), perf_counter()
            if not still():
                raise WorkerError(f"the load {load!r} has ended: this round is none")
            append(place, Round(slowdown, load, commit, machine, when, seconds - start, found))
            count += 1
    return count


def following(done: Mapping[float, int], wanted: Mapping[float, int]) -> float:
    """The slowdown of which the smallest part is done; first of all, none."""
    return min(wanted, key=lambda slowdown: (done.get(slowdown, 0) / wanted[slowdown], slowdown))


def _head(side: Side, slowdown: float, known: Sequence[Round]) -> Side:
    """The checkout, or a copy whose attentions take so much more time than they took before."""
    if not slowdown:
        return Side("head", side.root)
    root = copied(side.root, "slower")
    seconds: dict[str, list[float]] = {}
    for some in known:
        for name, measured in some.measured.items():
            seconds.setdefault(name, []).extend(measured.base)
    extra = {name: slowdown * median(some) for name, some in seconds.items()}
    plant(root, slow_down, extra=extra)
    return Side("head", root)


def copied(root: Path, name: str) -> Path:
    """A checkout again, beside it, as it was before anything was planted in it."""
    place = root.with_name(name)
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(root, place)
    return place


@contextlib.contextmanager
def _beside(program: str) -> Iterator[Callable[[], bool]]:
    """While a program runs, if there is one; says whether it still does."""
    if not program:
        yield lambda: True
        return
    running = subprocess.Popen(python_command("-c", program), start_new_session=True)
    try:
        yield lambda: running.poll() is None
    finally:
        running.kill()
        running.wait()
