"""The process on a machine of the cluster that does what it is given, one job at a time."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from typing import Any, Protocol

__all__ = ["Job", "NodeActor", "Place"]

Place = dict[str, str]
"""``host`` and ``node``: where something was measured."""
THREADS = "OMP_NUM_THREADS"


class Job(Protocol):
    """Made where the command runs, done on a machine of the cluster."""

    def events(self, place: Place) -> Iterator[Any]:
        """Do it; what is yielded is heard by who gave the job."""
        ...

    def stop(self) -> None:
        """Come to an end soon; from another thread, before or while it is done."""
        ...


class NodeActor:
    """A Ray actor.

    Args:
        folder: of the command, where files are looked for; the own one where it is missing.
        node: id of the node that it is on.
    """

    def __init__(self, folder: str, node: str) -> None:
        with contextlib.suppress(OSError):
            os.chdir(folder)
        _own_threads()
        self._place = {"host": socket.gethostname(), "node": node}
        self._job: Job | None = None
        self._number = self._stopped = 0

    def ready(self) -> int:
        """Returns: niceness, at which all is measured; Ray's own choice is 15."""
        return os.nice(0)

    def do(self, number: int, job: Job) -> Iterator[Any]:
        """Args: number: of the job, counted from 1."""
        self._number, self._job = number, job
        if number <= self._stopped:
            job.stop()
        yield from job.events(self._place)

    def stop(self, number: int) -> None:
        """Stop a job, which may come only after this; not the one after it."""
        self._stopped = number
        if self._job is not None and self._number <= number:
            self._job.stop()


def _own_threads() -> None:
    """Let torch decide as it does elsewhere: Ray sets threads for whom the machine has not.

    Ray's process has them set, and the one that started it does not.
    """
    import psutil

    with contextlib.suppress(psutil.Error):
        if THREADS not in psutil.Process(os.getppid()).environ():
            os.environ.pop(THREADS, None)
