"""The gate's end of a worker process, and what can go wrong with one."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import danon
from danon.processes.interpreter import bundle
from danon.processes.request_server import EndedError, RefusedError, WorkerProcess

__all__ = [
    "DiedError",
    "ForeignError",
    "OutputError",
    "Side",
    "TimeOverError",
    "WorkerClient",
    "WorkerError",
]

WORKER = Path(__file__).with_name("worker.py")
MALLOC_SETTINGS = {
    "MALLOC_MMAP_THRESHOLD_": str(2**25),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "MALLOC_TOP_PAD_": str(2**26),
}
"""Environment that keeps freed memory with the process (glibc; other allocators ignore it).

Pages given back are faulted in again in every call, in some processes twice as many as in others
(docs/log.md).
"""


class WorkerError(RuntimeError):
    """A worker could not do what it was asked."""


class DiedError(WorkerError):
    """A worker does not answer any more."""


class ForeignError(WorkerError):
    """Imported code is not of the side's commit: both sides would measure the same code."""


class OutputError(WorkerError):
    """A timed call returned something else than its inputs give."""


class TimeOverError(WorkerError):
    """The time limit of the comparison passed before the answer came."""


@dataclass(frozen=True)
class Side:
    """One side of a comparison: a checkout to measure.

    Attributes:
        name: ``base`` or ``head``.
        root: folder that its modules are imported from.
        targets: ``file.py:Class`` attentions of the user, relative to ``root``.
        repository: folder that ``root`` is a commit of; None if that is ``root`` itself.
    """

    name: str
    root: Path
    targets: tuple[str, ...] = ()
    repository: Path | None = None


class WorkerClient(WorkerProcess):
    """A process that measures one side; a context manager.

    Attributes:
        side: the side that it measures.
        attentions: registered names that the side has.
        left_out: by name, why a target or an attention of an installed package is missing.

    Args:
        side: the side to import.
        inputs: file that :mod:`danon.gate.worker` reads q, k and v from.
        log: file that gets what the process prints.
        end: value of ``perf_counter`` at which the process is killed.

    Raises:
        WorkerError: The process does not start: the side cannot be imported, other code was
            imported in its place, or a target is no attention.
    """

    def __init__(self, side: Side, inputs: Path, log: Path, end: float = math.inf) -> None:
        self.side = side
        self._expired = False
        self._timer: threading.Timer | None = None
        if (seconds := end - perf_counter()) <= 0:
            raise TimeOverError("the time was over")
        environment = MALLOC_SETTINGS | {
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
            self.check_imports()
        except BaseException:
            self.close()
            raise
        self.attentions: tuple[str, ...] = tuple(loaded["attentions"])
        self.left_out: dict[str, str] = loaded["left_out"]
        self._foreign: dict[str, str] = loaded["foreign"]

    def request(self, do: str, **arguments: Any) -> Any:
        """Send a request and wait for the answer.

        Args:
            do: name of a method of :class:`danon.gate.worker.Worker`.
            arguments: its arguments, which JSON can hold.

        Returns:
            What the method returned.

        Raises:
            WorkerError: The method raised; the message is the worker's.
            DiedError: The process ended; the message is what it printed last.
            TimeOverError: The process was killed at the time limit.
        """
        try:
            return super().request(do, **arguments)
        except EndedError as error:
            if self._expired:
                raise TimeOverError("the time was over") from error
            raise DiedError(f"the worker of {self.side.name} died: {error}") from error
        except RefusedError as error:
            raise WorkerError(f"{self.side.name}: {error}") from error

    def check_attention(self, attention: str) -> None:
        """Check that an attention is the side's own code.

        Args:
            attention: its registered name.

        Raises:
            ForeignError: It is not.
        """
        if (file := self._foreign.get(attention)) is not None:
            raise ForeignError(
                f"{self.side.name}: {attention} comes from {file}, not from the commit in "
                f"{self.side.root}: both sides would be the same code; name one of the repository, "
                "--attention file.py:Class"
            )

    def check_imports(self) -> None:
        """Check that every imported module which the side has was loaded from the side.

        Raises:
            ForeignError: One was not.
        """
        if reason := self.request("misplaced_module"):
            raise ForeignError(
                f"{self.side.name}: {reason}: both sides would be the same code; put the folder "
                "that it is to be imported from, in your repository, on PYTHONPATH"
            )

    def verify(self, name: str) -> None:
        """Compute again what one of the timed calls of a prepared case returned.

        Args:
            name: name that the case was prepared under.

        Raises:
            OutputError: The second result differs.
        """
        if reason := self.request("verify", name=name):
            raise OutputError(f"{self.side.name}: {reason}")

    def close(self) -> None:
        """End the process and its timer."""
        if self._timer is not None:
            self._timer.cancel()
        super().close()

    def _expire(self) -> None:
        self._expired = True
        self.kill()
