"""Lock files: one process of a machine at a time.

    with hold_lock(folder / ".lock", ValueError(f"{folder} is in use"), timeout_s=10):
        ...

The kernel drops a lock however its process ends.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from filelock import BaseFileLock

__all__ = ["acquire_lock", "hold_lock"]

EVERYBODY = 0o666
"""Mode of lock files of several users: whoever asks whether one is held opens it for writing."""


def acquire_lock(
    path: Path,
    busy: Exception | None = None,
    *,
    timeout_s: float = 0.0,
    for_everybody: bool = False,
) -> BaseFileLock:
    """Acquire a lock file, which is made; any thread may release it.

    Args:
        path: of the lock file, in a folder that exists.
        busy: raised if another process holds the lock; by default an ``OSError``.
        timeout_s: seconds to wait for another process.
        for_everybody: other users may hold the lock too.

    Raises:
        ImportError: the package filelock is not installed.
        OSError: the file cannot be opened, or without ``busy``: another process holds it.
    """
    try:
        from filelock import FileLock, Timeout
    except ImportError as error:
        raise ImportError(
            "lock files need the package filelock: pip install 'danon[bench]'"
        ) from error
    if for_everybody:
        lock = FileLock(path, timeout=timeout_s, thread_local=False, mode=EVERYBODY)
    else:
        lock = FileLock(path, timeout=timeout_s, thread_local=False)
    try:
        lock.acquire()
    except Timeout as error:
        held = OSError(errno.EBUSY, "another process holds the lock", str(path))
        raise (busy or held) from error
    return lock


@contextlib.contextmanager
def hold_lock(
    path: Path,
    busy: Exception | None = None,
    *,
    timeout_s: float = 0.0,
    for_everybody: bool = False,
    unwritable: Callable[[OSError], Exception] | None = None,
) -> Iterator[None]:
    """Hold a lock file inside the block.

    Args:
        path: of the lock file, in a folder that exists.
        busy: raised if another process holds the lock; by default an ``OSError``.
        timeout_s: seconds to wait for another process.
        for_everybody: other users may hold the lock too.
        unwritable: makes the error to raise from that of the system if the file cannot be opened.

    Raises:
        OSError: the file cannot be opened, or without ``busy``: another process holds it.
    """
    try:
        lock = acquire_lock(path, busy, timeout_s=timeout_s, for_everybody=for_everybody)
    except OSError as error:
        if unwritable is None or error is busy:
            raise
        raise unwritable(error) from error
    try:
        yield
    finally:
        lock.release()
