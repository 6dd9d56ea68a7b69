"""Files of JSON lines that only grow.

A line counts once its newline is on disk, so a process that is killed while it writes leaves a torn
line at the end, which no reader counts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from danon.runs.files import errors_naming

__all__ = ["append_json", "append_line", "drop_torn_line", "read_json_lines", "read_lines"]


def append_line(path: Path, line: str) -> None:
    """Add a line; it is on disk when this returns.

    Args:
        path: of the file; its last line is whole.
        line: without a newline.
    """
    with errors_naming(path), path.open("ab") as file:
        file.write(line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def append_json(path: Path, values: Mapping[str, Any]) -> None:
    """Add an object as a line, and remove a torn one before it.

    Args:
        path: of the file; its folders are made.
        values: plain data.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    drop_torn_line(path)
    append_line(path, json.dumps(values))


def read_lines(path: Path) -> tuple[list[bytes], bytes]:
    """Return the whole lines of a file and its torn last line; both are empty without a file."""
    if not path.exists():
        return [], b""
    *lines, torn = path.read_bytes().split(b"\n")
    return lines, torn


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file; none without a file.

    Raises:
        ValueError: a whole line is not JSON; the message names it.
    """
    objects = []
    for number, line in enumerate(read_lines(path)[0], start=1):
        try:
            objects.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not JSON: {error}") from error
    return objects


def drop_torn_line(path: Path) -> bytes:
    """Remove a torn last line and return it; empty if there was none."""
    torn = read_lines(path)[1]
    if torn:
        os.truncate(path, path.stat().st_size - len(torn))
    return torn
