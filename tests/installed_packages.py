"""Packages that look installed: a folder with their metadata and modules, for PYTHONPATH."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

__all__ = ["environment", "install"]


def install(folder: Path, name: str, group: str, points: Mapping[str, str]) -> None:
    """Make a package of version 1.0 with entry points of a group.

    Args:
        folder: where the package is installed.
        name: of the package.
        group: of the entry points.
        points: values of the entry points by name.
    """
    place = folder / f"{name}-1.0.dist-info"
    place.mkdir(parents=True)
    (place / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = [f"{point} = {value}" for point, value in points.items()]
    (place / "entry_points.txt").write_text("\n".join([f"[{group}]", *lines, ""]))


def environment(*folders: Path, **changes: str) -> dict[str, str]:
    """Return the environment of a process that finds modules and packages in these folders."""
    path = os.pathsep.join(map(str, folders))
    return {**os.environ, "PYTHONPATH": path, **changes}
