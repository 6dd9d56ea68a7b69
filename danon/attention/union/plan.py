"""What a union of branches computes: sources, calls over them, and both in a plain form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from danon.attention.kernels.base import hide
from danon.attention.union.tiles import Rows, Tiles

__all__ = ["SPARE", "BranchCall", "FlatPlan", "ScaledBias", "Source", "VisibilityMask"]

SPARE = 8
"""Spare columns: the head dimension stays a multiple of eight. A :class:`ScaledBias` has six."""

WIDTH = 20
"""Numbers of a call in a plan."""


@dataclass(frozen=True)
class Source:
    """Keys and values (X, n, D) that calls draw from; X = batch * key/value heads.

    ``bias`` (X, n) float is added to the logit of each key; HIDDEN removes it.
    """

    k: Tensor
    v: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True, eq=False)
class VisibilityMask:
    """The bias that hides what is not seen, made for some tiles at a time: the whole is large.

    Attributes:
        by_tile: bool (T, G, n): the first n slots, alike for all queries of a tile; or None.
        by_query: bool (T, G, C, m): the other slots.
        heads: query heads for each of the G.
        size: keys of a slot.
    """

    by_tile: Tensor | None
    by_query: Tensor
    heads: int
    size: int = 1

    def __call__(self, t0: int, t1: int) -> Tensor:
        """Tiles [t0, t1) as (t1 - t0, X, C, slots * size) of zeros and HIDDEN."""
        seen = self.by_query[t0:t1]
        if self.by_tile is not None:
            whole = self.by_tile[t0:t1, :, None].expand(-1, -1, seen.shape[2], -1)
            seen = torch.cat((whole, seen), -1)
        bias = hide(seen).repeat_interleave(self.heads, 1)
        return bias if self.size == 1 else bias.repeat_interleave(self.size, -1)


@dataclass(frozen=True, eq=False)
class ScaledBias:
    """A bias that each query scales: s_i f(c, l), differentiable in s.

    Attributes:
        scale: index into the shifts, of s (X, N).
        values: f (C, L), shared by all tiles; not differentiated.
        factors: returns r (C, M) and c (L, M) with f = r c^T, M <= SPARE - 2. A column of c has
            the precision of the queries: entries up to 1, and no large terms that cancel.
        lines: the call's bias and f by c - l, from 1 - L to C - 1, (2, C + L - 1), if the call is
            not causal, both go by c - l only, and s is one number in each tile. Saves time.
    """

    scale: int
    values: Tensor
    factors: Callable[[], tuple[Tensor, Tensor]]
    lines: Tensor | None = None


@dataclass(frozen=True, eq=False)
class BranchCall:
    """One batched kernel call: query tiles see key tiles of a source.

    Attributes:
        source: index into the sources.
        q: query tiles; a query may appear in many calls, once in each.
        k: key tiles or gathered rows; as many as query tiles.
        causal: query c of a tile sees keys up to c only (tiles of equal length).
        bias: not differentiated. A tensor (1|T, 1|X, 1|C, L), or what makes it for some tiles.
        offset: constant added to every logit of the call.
        shift: index into the shifts, or None.
        profile: added to the bias, or None.
        branch: what it shows, for those who observe: ``near``, ``memory`` ...
    """

    source: int
    q: Tiles
    k: Tiles | Rows
    causal: bool = False
    bias: Tensor | VisibilityMask | None = None
    offset: float = 0.0
    shift: int | None = None
    profile: ScaledBias | None = None
    branch: str = "entries"


class FlatPlan(NamedTuple):
    """Calls in what an operator of PyTorch takes: numbers and tensors. Branches are left out.

    Attributes:
        tensors: row numbers and biases.
        plan: for each call its source, causal, shift, q, rows, k, bias and profile; tensors by
            their number, -1 for none.
        offsets: one for each call.
    """

    tensors: list[Tensor]
    plan: list[int]
    offsets: list[float]

    @classmethod
    def of(cls, calls: Sequence[BranchCall]) -> FlatPlan:
        """Pack."""
        packed = cls([], [], [])
        for call in calls:
            packed._add(call)
        return packed

    def _add(self, call: BranchCall) -> None:
        q, k, bias = call.q, call.k, call.bias
        shift = -1 if call.shift is None else call.shift
        self.plan.extend((call.source, int(call.causal), shift))
        self.plan.extend((q.start, q.step, q.count, q.length))
        if isinstance(k, Rows):
            self.plan.extend((self._put(k.index), k.size, 0, 0, 0))
        else:
            self.plan.extend((-1, k.start, k.step, k.count, k.length))
        if isinstance(bias, VisibilityMask):
            by_tile = self._put(bias.by_tile)
            self.plan.extend((self._put(bias.by_query), by_tile, bias.heads, bias.size))
        else:
            self.plan.extend((self._put(bias), -1, 0, 0))
        self.plan.extend(self._profile(call.profile))
        self.offsets.append(call.offset)

    def _profile(self, profile: ScaledBias | None) -> tuple[int, ...]:
        if profile is None:
            return -1, -1, -1, -1
        numbers = (self._put(x) for x in (profile.values, *profile.factors()))
        return profile.scale, *numbers

    def _put(self, x: Tensor | None) -> int:
        if x is None:
            return -1
        self.tensors.append(x)
        return len(self.tensors) - 1

    def calls(self) -> list[BranchCall]:
        """Unpack."""
        calls = []
        for i, offset in enumerate(self.offsets):
            source, causal, shift, *rest = self.plan[WIDTH * i : WIDTH * (i + 1)]
            q, (rows, *k), rest = rest[:4], rest[4:9], rest[9:]
            (by, by_tile, heads, size), (scale, *made) = rest[:4], rest[4:]
            bias: Tensor | VisibilityMask | None = None if by < 0 else self.tensors[by]
            if isinstance(bias, Tensor) and heads:
                bias = VisibilityMask(
                    None if by_tile < 0 else self.tensors[by_tile], bias, heads, size
                )
            keys = Tiles(*k) if rows < 0 else Rows(self.tensors[rows], k[0])
            profile = None
            if scale >= 0:
                profile = _made_profile(scale, *(self.tensors[at] for at in made))
            calls.append(
                BranchCall(
                    source,
                    Tiles(*q),
                    keys,
                    bool(causal),
                    bias,
                    offset,
                    None if shift < 0 else shift,
                    profile,
                )
            )
        return calls


def _made_profile(scale: int, values: Tensor, r: Tensor, c: Tensor) -> ScaledBias:
    return ScaledBias(scale, values, lambda: (r, c))
