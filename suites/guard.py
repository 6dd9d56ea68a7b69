"""A limit on this process's memory: a hungry case fails alone instead of taking the machine."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

__all__ = ["is_out_of_memory", "limit_memory"]

SHARE = 0.8
_CGROUP = Path("/sys/fs/cgroup")


def limit_memory() -> int | None:
    """Let this process allocate four fifths of what is free now; returns that limit in bytes.

    None where the system has no such limit (Windows).
    """
    if sys.platform == "win32":
        return None
    import resource

    import psutil

    free = int(psutil.virtual_memory().available)
    limit, used = _CGROUP / "memory.max", _CGROUP / "memory.current"
    if limit.is_file() and used.is_file() and (most := limit.read_text().strip()) != "max":
        free = min(free, int(most) - int(used.read_text()))
    share = int(SHARE * free)
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard != resource.RLIM_INFINITY:
        share = min(share, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (share, hard))
    return share


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on the CPU or on a GPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
