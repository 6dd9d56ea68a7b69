"""Tiles of queries and keys of a kernel call: strided views and gathered rows.

A mechanism describes what is visible as rectangles (query range x key range). :func:`batch` turns
them into few batched kernel calls over views, without copying a key.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

__all__ = ["NEAR", "Rect", "Rows", "Tiles", "batch", "constant", "near_rects"]

TALLEST = 8192
"""Queries of one tile, at most."""
_F = TypeVar("_F", bound=Callable[..., object])


def constant(function: _F) -> _F:
    """Mark a function of plain values: a compiler runs it and keeps the result; a decorator."""
    # As torch.compiler.assume_constant_result does, which first imports the compiler: 2 seconds.
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


class Rect(NamedTuple):
    """Queries [q0, q1) see keys [k0, k1); ``causal`` only up to their own place in the square."""

    q0: int
    q1: int
    k0: int
    k1: int
    causal: bool = False

    @property
    def pairs(self) -> int:
        """(query, key) pairs."""
        n = self.q1 - self.q0
        return n * (n + 1) // 2 if self.causal else n * (self.k1 - self.k0)


NEAR = ("sinks", "near", "near", "near")
"""Branches of what :func:`near_rects` returns."""


@dataclass(frozen=True)
class Tiles:
    """``count`` ranges of ``length`` rows, the t-th from ``start + t * step``: one strided view."""

    start: int
    step: int
    count: int
    length: int

    def load(self, x: Tensor, t0: int, t1: int) -> Tensor:
        """View tiles [t0, t1) of x (X, N, ...) as (t1 - t0, X, length, ...)."""
        s, first = x.stride(), self.start + t0 * self.step
        last = first + (t1 - t0 - 1) * self.step + self.length
        if first < 0 or last > x.shape[1]:  # as_strided would read what lies beside x
            raise IndexError(f"rows {first} to {last}: there are {x.shape[1]}")
        x = x.narrow(1, first, x.shape[1] - first) if first else x
        return x.as_strided(
            (t1 - t0, x.shape[0], self.length, *x.shape[2:]), (self.step * s[1], s[0], s[1], *s[2:])
        )

    def places(self, device: torch.device) -> Tensor:
        """Return row numbers of all tiles (1, count, length), alike for every X."""
        tile = torch.arange(self.count, device=device) * self.step + self.start
        return (tile[:, None] + torch.arange(self.length, device=device))[None]

    def add_to(self, x: Tensor, tiles: Tensor, t0: int, t1: int) -> None:
        """Add tiles (t1 - t0, X, length, ...) onto x: the adjoint of :meth:`load`."""
        if t1 - t0 > 1 and self.step == 0:
            tiles, t1 = tiles.sum(0, keepdim=True), t0 + 1
        # Tiles that overlap are cut into pieces no longer than the step, which do not.
        piece = self.length if t1 - t0 == 1 else min(self.step, self.length)
        for cut in range(0, self.length, piece):
            part = Tiles(self.start + cut, self.step, self.count, min(piece, self.length - cut))
            part.load(x, t0, t1).add_(tiles[:, :, cut : cut + part.length])


@dataclass(frozen=True, eq=False)
class Rows:
    """Gathered groups of rows: ``index`` (count, X, groups) int64, each ``size`` rows long.

    Rows of the tensors they are taken from are contiguous, and X apart by whole groups.
    """

    index: Tensor
    size: int = 1

    @property
    def count(self) -> int:
        """Number of tiles."""
        return self.index.shape[0]

    @property
    def length(self) -> int:
        """Rows of a tile."""
        return self.index.shape[2] * self.size

    def places(self, device: torch.device) -> Tensor:
        """Return row numbers of all tiles (X, count, length)."""
        inside = torch.arange(self.size, device=device)
        return (self.index[..., None] * self.size + inside).flatten(2).transpose(0, 1)

    def _flat(self, x: Tensor, t0: int, t1: int) -> tuple[Tensor, Tensor]:
        """Return x as rows of whole groups, and the row numbers of tiles [t0, t1)."""
        X, groups = x.shape[0], x.shape[1] // self.size
        width = self.size * x.stride(1)
        apart, rest = divmod(x.stride(0), width)
        if rest and X > 1:
            raise ValueError(f"rows are {x.stride(0)} apart: must be a multiple of {width}")
        rows = x.as_strided(((X - 1) * apart + groups, width), (width, 1))
        head = torch.arange(X, device=x.device)[:, None] * apart
        return rows, (self.index[t0:t1] + head).flatten()

    def load(self, x: Tensor, t0: int, t1: int) -> Tensor:
        """Gather tiles [t0, t1) of x (X, N, ...) to (t1 - t0, X, length, ...)."""
        rows, index = self._flat(x, t0, t1)
        return rows.index_select(0, index).view(t1 - t0, x.shape[0], self.length, *x.shape[2:])

    def add_to(self, x: Tensor, tiles: Tensor, t0: int, t1: int) -> None:
        """Add tiles onto x, which must be contiguous: the adjoint of :meth:`load`."""
        rows, index = self._flat(x, t0, t1)
        rows.index_add_(0, index, tiles.reshape(index.numel(), -1).to(x.dtype))


@constant
def batch(
    rects: Iterable[Rect], q_from: int = 0, k_from: int = 0
) -> list[tuple[Tiles, Tiles, bool]]:
    """Batch rectangles of equal size and regular spacing into (query tiles, key tiles, causal).

    Args:
        rects: rectangles of one branch.
        q_from: the query that stands in row 0 of the tensor of queries.
        k_from: the key that stands in row 0 of the tensor of keys.
    """
    by_size: dict[tuple[int, int, bool], list[Rect]] = {}
    for r in _cut(rects):
        if r.q1 > r.q0 and r.k1 > r.k0:
            by_size.setdefault((r.q1 - r.q0, r.k1 - r.k0, r.causal), []).append(r)
    calls = []
    for (q_len, k_len, causal), group in by_size.items():
        group.sort()
        first = 0
        while first < len(group):
            last, step = first, (q_len, k_len)
            if first + 1 < len(group):
                step = _gap(group[first], group[first + 1])
                while last + 1 < len(group) and _gap(group[last], group[last + 1]) == step:
                    last += 1
            count = last - first + 1
            calls.append(
                (
                    Tiles(group[first].q0 - q_from, step[0], count, q_len),
                    Tiles(group[first].k0 - k_from, step[1], count, k_len),
                    causal,
                )
            )
            first = last + 1
    return calls


def _cut(rects: Iterable[Rect]) -> Iterator[Rect]:
    """Cut tall rectangles in pieces, so that what a kernel call returns stays small."""
    for r in rects:
        if r.causal:  # a square on the diagonal is one piece
            yield r
            continue
        for q0 in range(r.q0, r.q1, TALLEST):
            yield r._replace(q0=q0, q1=min(q0 + TALLEST, r.q1))


def _gap(a: Rect, b: Rect) -> tuple[int, int]:
    return b.q0 - a.q0, b.k0 - a.k0


@constant
def near_rects(
    length: int, window: int, sinks: int, causal: bool, start: int = 0
) -> Sequence[list[Rect]]:
    """Return what all three mechanisms show at full resolution: sinks and the near blocks.

    The first ``sinks`` tokens are visible to all. The rest is cut into blocks of ``window``
    tokens; a query sees its own block and the one before (both neighbours when bidirectional).
    In the bidirectional case the sink queries see what block 0 sees.

    Args:
        length: tokens.
        window: tokens of a block.
        sinks: first tokens that all queries see.
        causal: queries see no later token.
        start: the first query of interest; not 0 only when causal.

    Returns:
        [sink rectangles, own block, block before, block after]; a query is at most once in each.
    """
    g = min(sinks, length)
    blocks = math.ceil((length - g) / window)

    def span(b: int) -> tuple[int, int]:
        return g + b * window, min(g + (b + 1) * window, length)

    def rows(b: int) -> tuple[int, int]:
        return (0 if b == 0 and not causal else span(b)[0]), span(b)[1]

    own, before, after = [], [], []
    for b in range(max(0, start - g) // window, blocks):
        own += _from(Rect(*rows(b), *span(b), causal), start)
        if b > 0:
            before += _from(Rect(*rows(b), *span(b - 1)), start)
        if not causal and b + 1 < blocks:
            after.append(Rect(*rows(b), *span(b + 1)))
    sink = [Rect(0, g, 0, g, True), Rect(g, length, 0, g)] if causal else [Rect(0, length, 0, g)]
    return [r for all_ in sink for r in _from(all_, start)], own, before, after


def _from(r: Rect, start: int) -> list[Rect]:
    """Return what queries from ``start`` on see of a rectangle."""
    if r.q0 >= start:
        return [r]
    if r.q1 <= start:
        return []
    if not r.causal:
        return [r._replace(q0=start)]
    if r.q1 - start == 1:  # one token: it sees all up to itself
        return [Rect(start, r.q1, r.k0, r.k1)]
    middle = r.k0 + start - r.q0
    return [Rect(start, r.q1, r.k0, middle), Rect(start, r.q1, middle, r.k1, True)]
