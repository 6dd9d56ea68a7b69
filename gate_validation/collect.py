"""Measure rounds of the gate: the same code on both sides, or a head that was slowed down."""

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

import torch

from danon.gate.paired_processes import Measurement, measure_abba
from danon.gate.worker_client import OutputError, Side, WorkerError
from danon.gate.workspace import Workspace
from danon.measure.fingerprint import fingerprint
from danon.processes.interpreter import python_command
from danon.runs.case import Case
from gate_validation.fault_injection import inject, slow_down
from gate_validation.rounds import Round, append, read

__all__ = ["PROGRAMS", "ROUNDS", "collect", "copy_checkout", "next_slowdown"]

ROUNDS = {
    "quiet": {0.0: 300, 0.03: 36, 0.05: 60, 0.10: 60, 0.20: 36},
    "busy core": {0.0: 75},
    "memory traffic": {0.0: 75, 0.05: 36, 0.10: 36},
}
"""Number of rounds to collect, by load and slowdown.

Screening takes three rounds of the same code for each run of the gate.
"""
# They end with the process that started them, however that ends.
_SPIN = "import os; parent = os.getppid()\nwhile os.getppid() == parent: pass"
_COPY = (
    "import os; import numpy as np; parent, a = os.getppid(), np.ones(2**25)\n"
    "while os.getppid() == parent: a.copy()"  # 256 MiB each way
)
PROGRAMS = {"quiet": "", "busy core": _SPIN, "memory traffic": _COPY}
"""Python code that runs beside the measurements, by load."""


def collect(
    workspace: Workspace, cases: Sequence[Case], path: Path, *, load: str, end: float
) -> int:
    """Measure rounds until the time is over, and add them to a file.

    Args:
        workspace: its head is a checkout of danon.
        cases: to measure; those of recall are passed over.
        path: of the file. Its rounds count towards :data:`ROUNDS`.
        load: a key of :data:`PROGRAMS`.
        end: value of ``perf_counter`` after which no round begins.

    Returns:
        The number of rounds that were added.

    Raises:
        WorkerError: A worker died, a case does not run, or the load has ended.
    """
    count = 0
    timed = [case for case in cases if not case.task]
    machine = fingerprint(torch.device("cpu"))["cpu"]
    base, commit = Side("base", workspace.head.root), workspace.head.commit
    with _running(PROGRAMS[load]) as is_running:
        while perf_counter() < end:
            earlier = [r for r in read(path) if (r.load, r.machine) == (load, machine)]
            same_commit = [r for r in earlier if r.commit == commit]  # others may be slower
            counts = Counter(r.slowdown for r in earlier)
            slowdown = next_slowdown(counts, ROUNDS[load]) if same_commit else 0.0
            head = _head(base.root, slowdown, same_commit)
            start = perf_counter()
            measured = dict[str, Measurement]()
            seed = len(earlier)
            for case, pair in measure_abba(workspace, (base, head), timed, seed=seed):
                if isinstance(pair, OutputError):
                    raise pair
                measured[case.id] = pair
                stage = f"{slowdown:.0%} slower, {load}, round {seed + 1}"
                workspace.progress(stage, len(measured), len(timed))
            when, seconds = dt.datetime.now(dt.UTC).isoformat("T", "seconds"), perf_counter()
            if not is_running():
                raise WorkerError(f"the load {load!r} has ended: this round does not count")
            append(path, Round(slowdown, load, commit, machine, when, seconds - start, measured))
            count += 1
    return count


def next_slowdown(counts: Mapping[float, int], targets: Mapping[float, int]) -> float:
    """Return the slowdown of which the smallest part is measured; of equal ones the smallest.

    Args:
        counts: measured rounds by slowdown.
        targets: rounds to collect by slowdown.
    """
    return min(
        targets, key=lambda slowdown: (counts.get(slowdown, 0) / targets[slowdown], slowdown)
    )


def _head(root: Path, slowdown: float, earlier: Sequence[Round]) -> Side:
    """Return the checkout, or a copy whose attentions take more time than in earlier rounds."""
    if not slowdown:
        return Side("head", root)
    slower = copy_checkout(root, "slower")
    seconds: dict[str, list[float]] = {}
    for one in earlier:
        for name, measured in one.measured.items():
            seconds.setdefault(name, []).extend(measured.base)
    extra = {name: slowdown * median(samples) for name, samples in seconds.items()}
    inject(slower, slow_down, extra=extra)
    return Side("head", slower)


def copy_checkout(root: Path, name: str) -> Path:
    """Copy a checkout to a folder beside it, which is emptied before.

    Args:
        root: the checkout.
        name: of the new folder.
    """
    copy = root.with_name(name)
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(root, copy)
    return copy


@contextlib.contextmanager
def _running(program: str) -> Iterator[Callable[[], bool]]:
    """Run a program during the block; yield a function that says if it still runs."""
    if not program:
        yield lambda: True
        return
    process = subprocess.Popen(python_command("-c", program), start_new_session=True)
    try:
        yield lambda: process.poll() is None
    finally:
        process.kill()
        process.wait()
