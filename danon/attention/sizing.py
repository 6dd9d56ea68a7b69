"""The size of a mechanism for a given number of entries a query: see ``with_budget``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from danon.attention.base import BaseAttention

__all__ = ["SINKS", "largest_within_budget"]

SINKS = 4
"""First tokens that stay visible in an attention that is sized."""

STEP = 8
"""Tokens; sizes are multiples of it."""

_Kind = TypeVar("_Kind", bound=BaseAttention)


def largest_within_budget(make: Callable[[int], _Kind], length: int, entries: int) -> _Kind:
    """Build the largest of a family whose queries see at most so many entries on average.

    Args:
        make: builds the one of a size of 8, 16, 24 ... tokens; visible pairs grow with it, by and
            large.
        length: tokens N over which the average is taken.
        entries: at most so many; the smallest one may exceed them.
    """
    largest, most = make(STEP), 0
    for size in range(STEP, length + 1, STEP):
        larger = make(size)
        pairs = larger.visible_pairs(length)
        if pairs is None or pairs > 2 * entries * length:  # pairs do not grow evenly
            break
        if most <= pairs <= entries * length:
            largest, most = larger, pairs
    return largest
