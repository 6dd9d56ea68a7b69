"""Errors in a line, for the rows of cases that raised."""

from __future__ import annotations

import inspect
import sysconfig
import traceback
from pathlib import Path

__all__ = ["libraries", "located", "message", "one_line"]

MAX_LENGTH = 300
"""Characters of a reason."""


def located(error: BaseException, kind: type | None = None) -> str:
    """Return type, message, file and line of an error.

    Args:
        error: that was raised.
        kind: a class whose own file is preferred to the files that it calls.
    """
    frames = traceback.extract_tb(error.__traceback__)
    source = None if kind is None else inspect.getsourcefile(kind)
    in_source = [frame for frame in frames if frame.filename == source]
    outside_libraries = [frame for frame in frames if not frame.filename.startswith(libraries())]
    candidates = in_source or outside_libraries or list(frames)
    if not candidates:
        return one_line(error)
    return f"{one_line(error)} ({Path(candidates[-1].filename).name}:{candidates[-1].lineno})"


def one_line(error: BaseException) -> str:
    """Return type and message on one line of at most MAX_LENGTH characters."""
    text = " ".join(f"{type(error).__name__}: {message(error)}".split()).removesuffix(":")
    return text if len(text) <= MAX_LENGTH else text[: MAX_LENGTH - 3] + "..."


def message(error: BaseException) -> str:
    """Return the message of an error, in characters that every file and terminal takes."""
    try:
        return str(error).encode(errors="backslashreplace").decode()
    except Exception:  # noqa: BLE001  of a class of the user's
        return "its message cannot be shown"


def libraries() -> tuple[str, ...]:
    """Return the folders of Python and of installed packages."""
    paths = sysconfig.get_paths()
    return tuple({paths[name] for name in ("stdlib", "purelib", "platlib")})
