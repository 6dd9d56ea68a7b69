"""Two worker processes, one of each side, that take turns: what the gate replicates.

Memory layout and page placement give each process an offset of its own, so that rounds within one
pair of processes do not add up: a pair gives one figure a case, and only other pairs tell its
error.
"""

from __future__ import annotations

import math
import random
import secrets
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import danon
from danon.processes.interpreter import bundle
from danon.processes.request_server import EndedError, RefusedError, WorkerProcess
from danon.runs.case import Case

__all__ = [
    "DiedError",
    "ForeignError",
    "Measurement",
    "OutputError",
    "Side",
    "TimeOverError",
    "WorkerClient",
    "WorkerError",
    "balanced",
    "content",
    "measure_abba",
]

WORKER = Path(__file__).with_name("worker.py")
KEPT = {
    "MALLOC_MMAP_THRESHOLD_": str(2**25),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "MALLOC_TOP_PAD_": str(2**26),
}
"""Freed memory stays with the process (glibc; others do not know these): given back, its pages are
faulted in again in every call, in some processes twice as many as in others (docs/log.md)."""
SAMPLE_S = 0.02
"""A sample is calls that together take at least this."""


class WorkerError(RuntimeError):
    """A worker could not do what it was asked."""


class DiedError(WorkerError):
    """A worker does not answer any more."""


class ForeignError(WorkerError):
    """An attention is not the side's own: both sides would be the same code."""


class OutputError(WorkerError):
    """What a timed call returned is not what its inputs give."""


class TimeOverError(WorkerError):
    """The time that a comparison may take was over before the answer came."""


@dataclass(frozen=True)
class Side:
    """What is measured: a checkout.

    Attributes:
        name: base or head.
        root: its modules are imported from there.
        targets: ``file.py:Class`` attentions of the user, relative to ``root``.
        repository: folder that it is a commit of; None: itself.
    """

    name: str
    root: Path
    targets: tuple[str, ...] = ()
    repository: Path | None = None


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


class WorkerClient(WorkerProcess):
    """A process that measures one side; a context manager.

    Args:
        inputs: file that :mod:`danon.gate.worker` reads q, k and v from.
        log: gets what the process prints.
        end: of ``perf_counter``: the process is ended then, whatever it does.

    Raises:
        WorkerError: it does not start: the side cannot be imported, is not what is imported, or a
            target is not there.
    """

    def __init__(self, side: Side, inputs: Path, log: Path, end: float = math.inf) -> None:
        self.side = side
        self._expired = False
        self._timer: threading.Timer | None = None
        if (seconds := end - perf_counter()) <= 0:
            raise TimeOverError("the time was over")
        environment = KEPT | {
            "OMP_NUM_THREADS": "1",
            "ACCELERATE_USE_CPU": "true",
            "PYTHONUTF8": "1",
        }
        program, arguments = (str(WORKER),), (str(inputs),)
        super().__init__(program, arguments, cwd=side.root, environment=environment, log=log)
        try:
            if math.isfinite(end):
                wait = min(seconds, threading.TIMEOUT_MAX)
                self._timer = threading.Timer(wait, self._expire)
                self._timer.daemon = True
                self._timer.start()
            loaded = self.request(
                "load",
                targets=list(side.targets),
                repository=str(side.repository or side.root),
                library=str(Path(danon.__file__).resolve().parents[1]),
                bundle=str(bundle()),
            )
            self.prove()
        except BaseException:
            self.close()
            raise
        self.attentions: tuple[str, ...] = tuple(loaded["attentions"])
        self.left_out: dict[str, str] = loaded["left_out"]
        self._foreign: dict[str, str] = loaded["foreign"]

    def request(self, do: str, **arguments: Any) -> Any:
        """Ask, and wait for the answer.

        Raises:
            WorkerError: says what the worker said, or what it printed last.
        """
        try:
            return super().request(do, **arguments)
        except EndedError as error:
            if self._expired:
                raise TimeOverError("the time was over") from error
            raise DiedError(f"the worker of {self.side.name} died: {error}") from error
        except RefusedError as error:
            raise WorkerError(f"{self.side.name}: {error}") from error

    def own(self, attention: str) -> None:
        """Raise unless an attention is the side's own.

        Raises:
            ForeignError: it is not.
        """
        if (file := self._foreign.get(attention)) is not None:
            raise ForeignError(
                f"{self.side.name}: {attention} comes from {file}, not from the commit in "
                f"{self.side.root}: both sides would be the same code; name one of the repository, "
                "--attention file.py:Class"
            )

    def prove(self) -> None:
        """Raise unless all that the process has imported is the side's own, as far as it has it.

        Raises:
            ForeignError: it is not.
        """
        if reason := self.request("prove"):
            raise ForeignError(
                f"{self.side.name}: {reason}: both sides would be the same code; put the folder "
                "that it is to be imported from, in your repository, on PYTHONPATH"
            )

    def verify(self, name: str) -> None:
        """Compute again what one of the timed calls of a prepared case returned.

        Raises:
            OutputError: it is something else.
        """
        if reason := self.request("verify", name=name):
            raise OutputError(f"{self.side.name}: {reason}")

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        super().close()

    def _expire(self) -> None:
        self._expired = True
        self.kill()


def measure_abba(
    base: Side,
    head: Side,
    cases: Sequence[Case],
    inputs: Path,
    log: Path,
    *,
    rounds: int,
    seed: int,
    end: float = math.inf,
) -> Iterator[tuple[Case, Measurement | OutputError]]:
    """Measure each case in two fresh processes.

    Args:
        rounds: of four samples each, base head head base or the other way round.
        seed: of the order of processes and sides.
        end: of ``perf_counter``, when both processes are ended.

    Yields:
        Each case with what was measured, or with why that is not to be believed.

    Raises:
        WorkerError: a worker died, a case does not run, or the time was over.
    """
    order = random.Random(seed)
    sides = (base, head) if order.random() < 0.5 else (head, base)  # who is placed first
    with (
        WorkerClient(sides[0], inputs, log, end) as one,
        WorkerClient(sides[1], inputs, log, end) as other,
    ):
        workers = {one.side.name: one, other.side.name: other}
        for case in order.sample(list(cases), len(cases)):
            try:
                yield case, _measured(case, workers[base.name], workers[head.name], rounds, order)
            except OutputError as error:
                yield case, error


def _measured(
    case: Case, base: WorkerClient, head: WorkerClient, rounds: int, order: random.Random
) -> Measurement:
    # Drawn, too: who is first in something waits longer for its first sample.
    seed = content()
    for worker in order.sample((base, head), 2):
        worker.request("prepare", case=asdict(case), name=case.id, seed=seed)
    found = balanced((base, case.id), (head, case.id), rounds, order)
    for worker in (base, head):
        worker.verify(case.id)
        worker.request("release", name=case.id)
    return found


def content() -> int:
    """Draw a seed of inputs: nobody who has seen other inputs knows these."""
    return secrets.randbits(32)


def balanced(
    base: tuple[WorkerClient, str],
    head: tuple[WorkerClient, str],
    rounds: int,
    order: random.Random,
) -> Measurement:
    """Two prepared cases, each of a worker, by turns."""
    calls = {
        side: math.ceil(SAMPLE_S / side[0].request("time", name=side[1], calls=1))
        for side in order.sample((base, head), 2)
    }
    if base[1] == head[1]:  # the same work: the same number of calls
        calls = dict.fromkeys(calls, max(calls.values()))
    ratios: list[float] = []
    seconds: dict[tuple[WorkerClient, str], list[float]] = {base: [], head: []}
    for _ in range(rounds):
        a, b = (base, head) if order.random() < 0.5 else (head, base)
        for side in (a, b, b, a):
            worker, name = side
            seconds[side].append(worker.request("time", name=name, calls=calls[side]))
        ratios.append(math.log(sum(seconds[head][-2:]) / sum(seconds[base][-2:])))
    return Measurement(median(ratios), tuple(seconds[base]), tuple(seconds[head]))
