"""The nodes of MSRA's levels that queries see."""

from __future__ import annotations

import math
from functools import lru_cache

from danon.attention.union.tiles import Rect, constant

__all__ = ["far_rects"]


@constant
def far_rects(
    length: int, window: int, width: int, rate: int, sinks: int, causal: bool, start: int = 0
) -> tuple[tuple[list[Rect], list[Rect]], ...]:
    """Return the nodes of each level l = 1, 2, ... that queries see: (past, future) rectangles.

    With W_0 = window, W_l = width * rate^l and B_l(i) = (i - sinks) // W_l, level l covers the past
    tokens from (B_l - 1) W_l up to (B_{l-1} - 1) W_{l-1}, and the future ones from (B_{l-1} + 2)
    W_{l-1} up to (B_l + 2) W_l. Rectangles have keys in nodes of that level, which start at token
    ``sinks``. ``start`` is the first query of interest; not 0 only when causal.
    """
    return _far_rects(length, window, width, rate, sinks, causal, start)


@lru_cache(maxsize=64)
def _far_rects(
    length: int, window: int, width: int, rate: int, sinks: int, causal: bool, start: int
) -> tuple[tuple[list[Rect], list[Rect]], ...]:
    g = min(sinks, length)
    levels = []
    inner, node = window, rate  # W_{l-1}; the tokens of a node of level l
    while (length - g) > 2 * inner:
        past, future = [], []
        nodes, outer = math.ceil((length - g) / node), width * node
        for b_in in range(max(0, start - g) // inner, math.ceil((length - g) / inner)):
            q0 = 0 if b_in == 0 and not causal else g + b_in * inner
            rows = max(q0, start), min(g + (b_in + 1) * inner, length)
            b_out = b_in * inner // outer
            past.append(Rect(*rows, max(0, (b_out - 1) * width), (b_in - 1) * inner // node))
            if not causal:
                last = min(nodes, (b_out + 2) * width)
                future.append(Rect(*rows, (b_in + 2) * inner // node, last))
        levels.append((past, future))
        inner, node = outer, node * rate
    return tuple(levels)
