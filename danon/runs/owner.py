"""Which process a run belongs to, and whether that process still lives."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from filelock import FileLock, Timeout

__all__ = ["EVERYBODY", "Owner", "end", "is_held", "remove_unheld"]

EVERYBODY = 0o666
"""Mode of lock files: whoever asks whether one is held has to open it for writing."""
PROBE_S = 0.1  # another one that asks has the lock for less
TAKE_S = 1.0

_held: dict[Path, FileLock] = {}
"""Locks of this process, until it ends them or ends itself."""


@dataclass(frozen=True)
class Owner:
    """A process that holds a lock for as long as it lives.

    The kernel drops the lock however the process ends. A pid would not do: other containers have
    processes that cannot be seen here, and numbers are given again.

    Attributes:
        host: where it runs.
        pid: its number there, for people.
        lock: an absolute path.
    """

    host: str
    pid: int
    lock: Path

    @classmethod
    def current(cls, lock: Path) -> Self:
        """This process, as the holder of a lock file, which is made.

        Raises:
            OSError: another process holds it, or it cannot be written.
        """
        lock = lock.absolute()
        if lock not in _held:
            found = FileLock(lock, timeout=TAKE_S, mode=EVERYBODY, thread_local=False)
            try:
                found.acquire()
            except Timeout:
                reason = "another process runs this"
                raise OSError(errno.EBUSY, reason, str(lock.parent)) from None
            _held[lock] = found
        return cls(host=socket.gethostname(), pid=os.getpid(), lock=lock)


def end(lock: Path) -> None:
    """Give up a lock of this process; nothing happens if it holds none of that name."""
    found = _held.pop(lock.absolute(), None)
    if found is not None:
        found.release()


def is_held(lock: Path) -> bool:
    """Whether some process holds a lock file; True also if nobody can tell.

    Nobody can of a file that cannot be seen or opened: it may be another container's or user's.
    """
    try:
        if not lock.exists():
            return True
        with FileLock(lock, timeout=PROBE_S, mode=EVERYBODY):
            return False
    except OSError:  # Timeout is one
        return True


def remove_unheld(lock: Path) -> None:
    """Remove a lock file unless some process holds it.

    It goes while this process holds it: whoever waits for it then makes it anew, and nobody is
    left with a lock on a file that others cannot see.
    """
    with contextlib.suppress(OSError), FileLock(lock, timeout=PROBE_S, mode=EVERYBODY):
        lock.unlink()
