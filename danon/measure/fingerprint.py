"""The machine that measures: absolute times are never compared across fingerprints."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import torch

__all__ = ["fingerprint"]

_ID_LENGTH = 12


def fingerprint(device: torch.device) -> dict[str, str]:
    """Describe everything about machine and runtime that moves a time.

    Args:
        device: cpu or cuda.

    Returns:
        Its facts as text, and ``id``, a short hash of them.
    """
    facts = {
        "cpu": _cpu_model(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "memory_gib": str(_memory_gib()),
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu_capability": _cpu_capability(),
        "device": device.type,
    }
    if (
        limit := _cpu_limit()
    ) is not None:  # without a limit no entry: older records stay comparable
        facts["cpu_limit"] = f"{limit:g}"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["gpu"] = properties.name
        facts["gpu_memory_gib"] = str(round(properties.total_memory / 2**30))
        facts["cuda"] = str(torch.version.cuda)
        facts["driver"] = _nvidia_driver()
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return {"id": digest[:_ID_LENGTH], **facts}


def _cpu_model() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine() or "unknown"


def _cpu_capability() -> str:
    """Return torch's name of the vector units, and AMX, which torch does not name."""
    matrix = ", AMX" if "amx_tile" in _cpuinfo("flags").split() else ""
    return torch.backends.cpu.get_cpu_capability() + matrix


def _cpuinfo(entry: str) -> str:
    """Return an entry of the first processor; empty if there is none."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    return next((x.partition(":")[2].strip() for x in lines if x.startswith(entry)), "")


def _cpu_limit() -> float | None:
    """Return how many processors this process may use, None if all that there are.

    Fewer by its affinity (cpuset, taskset), or a share of their time by a control group's quota.
    """
    count = os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else count
    limit = min([float(allowed), *_quotas(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))])
    return limit if limit < count else None


def _quotas(membership: Path, mount: Path) -> Iterator[float]:
    """Yield the processors that each control group above this process may use.

    Args:
        membership: file with a line ``id:controllers:/path`` for each hierarchy of groups.
        mount: folder of the hierarchies; inside a container its own group is the root of them.
    """
    if not membership.is_file():
        return
    for line in membership.read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        hierarchy = mount / controllers if controllers else mount
        group = hierarchy / path.lstrip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(hierarchy):
                break
            yield from _quota(folder)


def _quota(folder: Path) -> Iterator[float]:
    """Yield the processors that one control group may use, if it is limited."""
    try:
        if (both := folder / "cpu.max").is_file():  # version 2
            quota, period = both.read_text(encoding="utf-8").split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text(encoding="utf-8").strip()
            period = (folder / "cpu.cfs_period_us").read_text(encoding="utf-8").strip()
    except OSError:
        return
    if quota not in ("max", "-1"):
        yield int(quota) / int(period)


def _memory_gib() -> int:
    if "SC_PHYS_PAGES" in os.sysconf_names:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30)
    return 0


def _nvidia_driver() -> str:
    version = Path("/proc/driver/nvidia/version")
    if not version.is_file():
        return "unknown"
    words = version.read_text(encoding="utf-8").split()
    return next((word for word in words if word[0].isdigit() and "." in word), "unknown")
