"""Which process a run belongs to, and whether that process still lives."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from typing import Self

__all__ = ["Owner"]

CLOCK_SLACK_S = 5.0  # a process's start time is derived from the boot time, which drifts


@dataclass(frozen=True)
class Owner:
    """A process, told apart from a later one with the same pid by when it started.

    Attributes:
        started: seconds since the epoch.
    """

    host: str
    pid: int
    started: float

    @classmethod
    def current(cls) -> Self:
        import psutil

        pid = os.getpid()
        return cls(host=socket.gethostname(), pid=pid, started=psutil.Process(pid).create_time())

    def gone(self) -> bool:
        """True only when it ran on this host and no longer does; elsewhere nobody can tell."""
        import psutil

        if self.host != socket.gethostname():
            return False
        try:
            process = psutil.Process(self.pid)
            if process.status() == psutil.STATUS_ZOMBIE:
                return True
            return bool(abs(process.create_time() - self.started) > CLOCK_SLACK_S)
        except psutil.NoSuchProcess:
            return True
