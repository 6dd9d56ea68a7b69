"""Free memory, and the reason not to run a case that needs more."""

from __future__ import annotations

from pathlib import Path

import torch

__all__ = ["free_bytes", "memory_reason"]

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def free_bytes(device: torch.device) -> int:
    """Return the bytes that can still be allocated on the device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil  # lazy: comes with the bench extra

    available = int(psutil.virtual_memory().available)
    limit = _CGROUP_LIMIT.read_text(encoding="utf-8").strip() if _CGROUP_LIMIT.is_file() else "max"
    return available if limit == "max" else min(available, int(limit))


def memory_reason(need: int, length: int, device: torch.device) -> str | None:
    """Return the reason not to run a case; None if four fifths of the free memory hold it.

    Args:
        need: bytes of the case; 0 skips the check.
        length: tokens, for the message.
        device: device of the case.
    """
    if need == 0:
        return None
    free = free_bytes(device)
    if need <= 0.8 * free:
        return None
    return (
        f"needs about {need / 1e9:.1f} GB at length {length}, "
        f"{free / 1e9:.1f} GB are free on {device.type}"
    )
