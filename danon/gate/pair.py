"""Two worker processes, one of each side, that take turns: what the gate replicates.

Memory layout and page placement give each process an offset of its own, so that rounds within one
pair of processes do not add up: a pair gives one figure a case, and only other pairs tell its
error.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from danon.bench.interpreter import python_environment
from danon.bench.server import EndedError, RefusedError, Server
from danon.measure.case import Case

__all__ = ["DiedError", "Measurement", "Side", "Worker", "WorkerError", "balanced", "pair"]

WORKER = Path(__file__).with_name("worker.py")
KEPT = {
    "MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "MALLOC_TOP_PAD_": str(2**26),
}  # fmt: skip
"""Freed memory stays with the process (glibc; others do not know these): given back, its pages are
faulted in again in every call, in some processes twice as many as in others (docs/log.md)."""
SAMPLE_S = 0.02
"""A sample is calls that together take at least this."""


class WorkerError(RuntimeError):
    """A worker could not do what it was asked."""


class DiedError(WorkerError):
    """A worker does not answer any more."""


@dataclass(frozen=True)
class Side:
    """What is measured: a checkout.

    Attributes:
        name: base or head.
        root: is first on the Python path.
        targets: ``file.py:Class`` attentions of the user, relative to ``root``.
    """

    name: str
    root: Path
    targets: tuple[str, ...] = ()


@dataclass(frozen=True)
class Measurement:
    """Of one case in one pair.

    Attributes:
        log_ratio: median over rounds of log(head / base), CPU time of a call.
        base: seconds of a call in each sample; so is ``head``.
    """

    log_ratio: float
    base: tuple[float, ...]
    head: tuple[float, ...]


class Worker(Server):
    """A process that measures one side; a context manager.

    Args:
        inputs: file that :mod:`danon.gate.worker` reads q, k and v from.
        log: gets what the process prints.

    Raises:
        WorkerError: it does not start: the side cannot be imported, or a target is not there.
    """

    def __init__(self, side: Side, inputs: Path, log: Path) -> None:
        self.side = side
        # Baselines, dense attention first, come with danon, which a user's repository has not.
        environment = python_environment(
            side.root, OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true", **KEPT
        )
        program, arguments = (str(WORKER),), (str(inputs),)
        super().__init__(program, arguments, cwd=side.root, environment=environment, log=log)
        try:
            self.attentions = tuple(self.request("load", targets=list(side.targets)))
        except BaseException:
            self.close()
            raise

    def request(self, do: str, **arguments: Any) -> Any:
        """Ask, and wait for the answer.

        Raises:
            WorkerError: says what the worker said, or what it printed last.
        """
        try:
            return super().request(do, **arguments)
        except EndedError as error:
            raise DiedError(f"the worker of {self.side.name} died: {error}") from error
        except RefusedError as error:
            raise WorkerError(f"{self.side.name}: {error}") from error


def pair(
    base: Side, head: Side, cases: Sequence[Case], inputs: Path, log: Path, *, rounds: int,
    seed: int,
) -> Iterator[tuple[Case, Measurement]]:  # fmt: skip
    """Measure each case in two fresh processes.

    Args:
        rounds: of four samples each, base head head base or the other way round.
        seed: of the order of processes and sides.

    Raises:
        WorkerError: a worker died, or a case does not run.
    """
    order = random.Random(seed)
    sides = (base, head) if order.random() < 0.5 else (head, base)  # who is placed first
    with Worker(sides[0], inputs, log) as one, Worker(sides[1], inputs, log) as other:
        workers = {one.side.name: one, other.side.name: other}
        for case in order.sample(list(cases), len(cases)):
            yield case, _measured(case, workers[base.name], workers[head.name], rounds, order)


def _measured(
    case: Case, base: Worker, head: Worker, rounds: int, order: random.Random
) -> Measurement:
    # Drawn, too: who is first in something waits longer for its first sample.
    for worker in order.sample((base, head), 2):
        worker.request("prepare", case=asdict(case), name=case.id)
    found = balanced((base, case.id), (head, case.id), rounds, order)
    for worker in (base, head):
        worker.request("release", name=case.id)
    return found


def balanced(
    base: tuple[Worker, str], head: tuple[Worker, str], rounds: int, order: random.Random
) -> Measurement:
    """Two prepared cases, each of a worker, by turns."""
    calls = {
        side: math.ceil(SAMPLE_S / side[0].request("time", name=side[1], calls=1))
        for side in order.sample((base, head), 2)
    }
    if base[1] == head[1]:  # the same work: the same number of calls
        calls = dict.fromkeys(calls, max(calls.values()))
    ratios: list[float] = []
    seconds: dict[tuple[Worker, str], list[float]] = {base: [], head: []}
    for _ in range(rounds):
        a, b = (base, head) if order.random() < 0.5 else (head, base)
        for side in (a, b, b, a):
            worker, name = side
            seconds[side].append(worker.request("time", name=name, calls=calls[side]))
        ratios.append(math.log(sum(seconds[head][-2:]) / sum(seconds[base][-2:])))
    return Measurement(median(ratios), tuple(seconds[base]), tuple(seconds[head]))
