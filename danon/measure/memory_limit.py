"""A limit on this process's memory: a case that needs too much fails alone."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch

from danon.console.reasons import message

__all__ = ["SHARE", "free_bytes", "limit_memory", "out_of_memory"]

SHARE = 0.8
"""Share of the free memory that a measurement or a training may take."""
_CGROUP = Path("/sys/fs/cgroup")


def limit_memory() -> int | None:
    """Let this process allocate four fifths of the memory that is free now.

    Returns:
        The limit in bytes; None where the system has no such limit (Windows).
    """
    if sys.platform == "win32":
        return None
    import resource

    share = int(SHARE * free_bytes())
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard != resource.RLIM_INFINITY:
        share = min(share, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (share, hard))
    return share


def free_bytes() -> int:
    """Return the bytes of memory that this process could still get.

    Raises:
        ImportError: the system has no /proc/meminfo, and psutil is not installed.
    """
    table = Path("/proc/meminfo")
    if table.is_file():
        found = re.search(
            r"^MemAvailable:\s+(\d+) kB$", table.read_text(encoding="ascii"), re.MULTILINE
        )
        assert found is not None
        free = int(found[1]) * 1024
    else:
        try:
            import psutil
        except ImportError as error:
            raise ImportError(
                "the free memory of this system needs psutil: pip install 'danon[bench]'"
            ) from error
        free = int(psutil.virtual_memory().available)
    limit, used = _CGROUP / "memory.max", _CGROUP / "memory.current"
    if (
        limit.is_file()
        and used.is_file()
        and (most := limit.read_text(encoding="utf-8").strip()) != "max"
    ):
        free = min(free, int(most) - int(used.read_text(encoding="utf-8")))
    return free


def out_of_memory(error: BaseException) -> str:
    """Describe the allocation on the CPU or a GPU that failed; empty for other errors.

    Args:
        error: raised by a case.
    """
    text = message(error)
    if not isinstance(error, MemoryError | torch.OutOfMemoryError) and not (
        isinstance(error, RuntimeError) and "can't allocate memory" in text
    ):
        return ""
    asked = re.search(r"allocate (?:(\d+) bytes|([\d.]+ [KMGT]iB))", text)
    if asked is None:
        return "out of memory"
    more = asked[2] or f"{int(asked[1]) / 2**20:,.0f} MiB"
    return f"out of memory: {more} more was too much"
