"""Files that are whole on disk, or as they were before."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["UNWRITABLE", "replace_file"]

UNWRITABLE = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EEXIST,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EIO,
    errno.ENAMETOOLONG,
    errno.ESTALE,
    errno.EBUSY,
}
"""What is wrong with a disk or a folder; other errors of the system are defects."""


def replace_file(path: Path, content: bytes) -> None:
    """Write a whole file so that a reader, or a kill, sees the old one or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with _named(path):
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors name the file, which those of a full disk do not."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise
