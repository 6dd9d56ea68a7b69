"""Files that are replaced as a whole, and errors that name their file."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["UNWRITABLE", "errors_naming", "replace_file"]

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
"""Errors of a disk or a folder; other errors of the system are defects of the program."""


def replace_file(path: Path, content: bytes) -> None:
    """Write a whole file so that a reader, or a kill, sees the old one or the new one.

    Args:
        path: of the file, in a folder that exists.
        content: of the new file.

    Raises:
        OSError: no room or no permission; the error names the file.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with errors_naming(path):
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def errors_naming(path: Path) -> Iterator[None]:
    """Name a file in the errors of the block: those of a full disk do not."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise
