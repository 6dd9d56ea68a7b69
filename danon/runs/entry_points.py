"""Entry points that installed packages add to danon, and the packages that they come from."""

from __future__ import annotations

import importlib.metadata
from importlib.metadata import EntryPoint

__all__ = ["entry_points", "package_of"]


def entry_points(group: str) -> tuple[EntryPoint, ...]:
    """Return the entry points of a group, in the order of the path that imports go by.

    Args:
        group: for example ``danon.attentions``.
    """
    unique = {(point.name, point.value): point for point in _all(group)}
    return tuple(unique.values())


def package_of(point: EntryPoint) -> str:
    """Return name and version of the package that an entry point comes from."""
    if point.dist is None:
        return "unknown"
    return f"{point.dist.name} {point.dist.version}"


def _all(group: str) -> importlib.metadata.EntryPoints:
    return importlib.metadata.entry_points(group=group)
