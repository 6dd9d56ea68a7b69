"""One measurement at a time on a machine: two at once would be in each other's times."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from filelock import FileLock

__all__ = ["device_lock"]


def device_lock(device: str) -> FileLock:
    """Return the lock that is held while a case or a trial is measured on a device, by this user.

    Args:
        device: cpu or cuda.
    """
    return FileLock(Path(tempfile.gettempdir()) / f"danon-{os.getuid()}-{device}.lock")
