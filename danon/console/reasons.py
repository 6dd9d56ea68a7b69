"""Errors in a line, for the rows of cases that raised."""

from __future__ import annotations

import inspect
import sysconfig
import traceback
from pathlib import Path

__all__ = ["libraries", "located", "message", "one_line"]

LONGEST = 300
"""Characters."""


def located(error: BaseException, kind: type | None = None) -> str:
    """Type, message, and the file and line that it comes from.

    Args:
        kind: a class whose own file is preferred to what it calls.
    """
    frames = traceback.extract_tb(error.__traceback__)
    own = None if kind is None else inspect.getsourcefile(kind)
    mine = [frame for frame in frames if frame.filename == own]
    others = [frame for frame in frames if not frame.filename.startswith(libraries())]
    places = mine or others or list(frames)
    if not places:
        return one_line(error)
    return f"{one_line(error)} ({Path(places[-1].filename).name}:{places[-1].lineno})"


def one_line(error: BaseException) -> str:
    """Type and message, on one line of bearable length."""
    text = " ".join(f"{type(error).__name__}: {message(error)}".split()).removesuffix(":")
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


def message(error: BaseException) -> str:
    """What an error says, in characters that every file and terminal takes."""
    try:
        return str(error).encode(errors="backslashreplace").decode()
    except Exception:  # noqa: BLE001  of a class of the user's
        return "its message cannot be shown"


def libraries() -> tuple[str, ...]:
    """Folders of Python and of installed packages."""
    paths = sysconfig.get_paths()
    return tuple({paths[name] for name in ("stdlib", "purelib", "platlib")})
