"""Files and folders that are replaced as a whole, and errors that name their file."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

__all__ = ["UNWRITABLE", "errors_naming", "recover_folders", "replace_file", "replace_folder"]

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

ASIDE = ".old"
"""End of the hidden name of a folder that makes room for another one."""


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


def replace_folder(path: Path, fill: Callable[[Path], object]) -> None:
    """Put a new folder in the place of an old one, whole or not at all.

    The new folder is filled beside the old one and synchronised to the disk before it is moved.

    Args:
        path: of the folder; its parents are made.
        fill: writes the files into the folder that it is given.

    Raises:
        OSError: no room or no permission; the old folder is still there.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    aside = path.with_name(f".{path.name}{ASIDE}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        fill(partial)
        for file in sorted(partial.rglob("*")):
            if file.is_file():
                _sync(file)
        if path.exists():
            shutil.rmtree(aside, ignore_errors=True)
            path.replace(aside)
        partial.replace(path)
        _sync(path.parent)
        shutil.rmtree(aside, ignore_errors=True)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def recover_folders(parent: Path, pattern: str) -> None:
    """Clean up after processes that were killed in :func:`replace_folder`.

    Half-written folders are removed. A folder that was moved aside is put back if no new one took
    its place.

    Args:
        parent: of the folders; no other process replaces folders in it now.
        pattern: of the names of the folders, as of ``Path.glob``.
    """
    for hidden in parent.glob(f".{pattern}.*"):
        path = parent / hidden.stem.removeprefix(".")
        if hidden.suffix == ASIDE and not path.exists():
            hidden.replace(path)  # killed between the two moves
        else:
            shutil.rmtree(hidden, ignore_errors=True)


def _sync(path: Path) -> None:
    """Write a file or folder through to the disk; some systems cannot do it for folders."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def errors_naming(path: Path) -> Iterator[None]:
    """Name a file in the errors of the block: those of a full disk do not."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        del error.filename2  # None would be shown as a second name
        raise
