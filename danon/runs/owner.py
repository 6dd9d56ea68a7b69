"""The process that a run belongs to, and the lock by which others see that it lives."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from danon.runs.locks import acquire_lock, hold_lock

if TYPE_CHECKING:
    from filelock import BaseFileLock

__all__ = ["Owner", "end", "is_held", "remove_unheld"]

PROBE_S = 0.1  # another process that only probes holds the lock for less
ACQUIRE_S = 1.0

_held: dict[Path, BaseFileLock] = {}
"""Locks of this process, until it ends them or ends itself."""


@dataclass(frozen=True)
class Owner:
    """A process that holds a lock for as long as it lives.

    The kernel drops the lock however the process ends. A pid would not do: processes of other
    containers cannot be seen, and pids are given again.

    Attributes:
        host: of the process.
        pid: its number on the host, for people.
        lock: an absolute path.
    """

    host: str
    pid: int
    lock: Path

    @classmethod
    def current(cls, lock: Path) -> Self:
        """Make this process the holder of a lock file, which is made.

        Args:
            lock: path of the file.

        Raises:
            OSError: another process holds it, or it cannot be written.
        """
        lock = lock.absolute()
        if lock not in _held:
            busy = OSError(errno.EBUSY, "another process runs this", str(lock.parent))
            _held[lock] = acquire_lock(lock, busy, timeout_s=ACQUIRE_S, for_everybody=True)
        return cls(host=socket.gethostname(), pid=os.getpid(), lock=lock)


def end(lock: Path) -> None:
    """Release a lock of this process; do nothing if it holds none of that name.

    Args:
        lock: path of the file.
    """
    held = _held.pop(lock.absolute(), None)
    if held is not None:
        held.release()


def is_held(lock: Path) -> bool:
    """Return whether some process holds a lock file.

    A file that cannot be seen or opened counts as held: it may be another container's or user's.

    Args:
        lock: path of the file.
    """
    try:
        if not lock.exists():
            return True
        with hold_lock(lock, timeout_s=PROBE_S, for_everybody=True):
            return False
    except OSError:
        return True


def remove_unheld(lock: Path) -> None:
    """Remove a lock file unless some process holds it.

    It is removed while this process holds it. A waiting process then makes it anew, and no process
    is left with a lock on a file that others cannot see.
    """
    with contextlib.suppress(OSError), hold_lock(lock, timeout_s=PROBE_S, for_everybody=True):
        lock.unlink()
