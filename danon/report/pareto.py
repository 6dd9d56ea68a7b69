"""The Pareto front of points whose coordinates are to be small."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

__all__ = ["pareto_front"]

_Name = TypeVar("_Name")


def pareto_front(points: Mapping[_Name, Sequence[float]]) -> list[_Name]:
    """Return the points that no other one dominates, in their order.

    A point dominates another one if it is as small in all coordinates, and smaller in one. Equal
    points do not dominate each other.

    Args:
        points: name -> coordinates, as many for every point.

    Example:
        >>> pareto_front({"a": (1.0, 3.0), "b": (2.0, 2.0), "c": (2.0, 4.0)})
        ['a', 'b']
    """
    return [
        name
        for name, point in points.items()
        if not any(_dominates(other, point) for other in points.values())
    ]


def _dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    pairs = list(zip(one, other, strict=True))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)
