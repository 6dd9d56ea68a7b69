"""The process on a machine of the cluster that runs jobs, one at a time."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from typing import Any, Protocol

__all__ = ["Job", "NodeActor", "Place"]

Place = dict[str, str]
"""``host`` and ``node`` of a measurement."""
THREADS = "OMP_NUM_THREADS"


class Job(Protocol):
    """A job: made where the command runs, run on a machine of the cluster."""

    def events(self, place: Place) -> Iterator[Any]:
        """Run the job, and yield events for the dispatcher that gave it.

        Args:
            place: the machine.
        """
        ...

    def stop(self) -> None:
        """End the job soon; called from another thread, before or while it runs."""
        ...


class NodeActor:
    """A Ray actor that runs jobs.

    Args:
        folder: folder of the command, which becomes the current one where it exists.
        node: id of the node that the actor is on.
    """

    def __init__(self, folder: str, node: str) -> None:
        with contextlib.suppress(OSError):
            os.chdir(folder)
        _forget_threads_of_ray()
        self._place = {"host": socket.gethostname(), "node": node}
        self._job: Job | None = None
        self._number = self._stopped = 0

    def ready(self) -> int:
        """Return the niceness of this process; Ray's default is 15."""
        return os.nice(0)

    def run_job(self, number: int, job: Job) -> Iterator[Any]:
        """Run a job and yield its events.

        Args:
            number: number of the job, counted from 1.
            job: the job.
        """
        self._number, self._job = number, job
        if number <= self._stopped:
            job.stop()
        yield from job.events(self._place)

    def stop(self, number: int) -> None:
        """Stop a job, which may arrive later than this call.

        Args:
            number: number of the job; later jobs are not stopped.
        """
        self._stopped = number
        if self._job is not None and self._number <= number:
            self._job.stop()


def _forget_threads_of_ray() -> None:
    """Remove the number of threads that Ray has set, so that torch decides as it does elsewhere.

    Ray sets the variable in this process where the process that started it has none.
    """
    import psutil

    with contextlib.suppress(psutil.Error):
        if THREADS not in psutil.Process(os.getppid()).environ():
            os.environ.pop(THREADS, None)
