"""The plan of a union of branches: sources, calls over them, and the calls in flat form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from danon.attention.kernels.base import hide
from danon.attention.union.tiles import Rows, Tiles

__all__ = [
    "SPARE",
    "BranchCall",
    "FlatPlan",
    "ScaledBias",
    "Source",
    "UnionInputs",
    "VisibilityMask",
]

SPARE = 8
"""Spare columns: the head dimension stays a multiple of eight. A :class:`ScaledBias` has six."""

ABSENT = -1
"""In place of the number of a tensor or shift that a call does not have."""


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
        """Return the bias of tiles [t0, t1): (t1 - t0, X, C, slots * size) of zeros and HIDDEN."""
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


@dataclass(frozen=True, eq=False)
class UnionInputs:
    """All that a union is computed from.

    Attributes:
        q: (X, N, D).
        shifts: (X, N) logit biases per query that calls refer to.
        flat: key, value and bias of one source after the other.
        calls: what is visible.
        scale: factor of q.k.
        kernel: a name of :mod:`danon.attention.kernels.table`, or ``auto``.
    """

    q: Tensor
    shifts: Sequence[Tensor]
    flat: Sequence[Tensor | None]
    calls: Sequence[BranchCall]
    scale: float
    kernel: str

    def source(self, call: BranchCall) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return key, value and key bias of a call's source."""
        k, v, bias = self.flat[3 * call.source : 3 * call.source + 3]
        assert k is not None and v is not None
        return k, v, bias


class FlatCall(NamedTuple):
    """A :class:`BranchCall` in integers; tensors by their number in the plan, ABSENT for none.

    Attributes:
        source: as in the call.
        causal: 0 or 1.
        shift: index into the shifts.
        q_start, q_step, q_count, q_length: the query tiles.
        k_rows: number of the row index of gathered keys.
        k_start, k_step, k_count, k_length: the key tiles; of gathered rows ``k_start`` is the size.
        bias: number of the bias, or of a mask's ``by_query``.
        bias_by_tile: number of a mask's ``by_tile``.
        bias_heads: of a mask; 0: the bias is a plain tensor.
        bias_size: of a mask.
        profile_scale: index into the shifts.
        profile_values, profile_r, profile_c: numbers of the values and of both factors.
    """

    source: int
    causal: int
    shift: int
    q_start: int
    q_step: int
    q_count: int
    q_length: int
    k_rows: int
    k_start: int
    k_step: int
    k_count: int
    k_length: int
    bias: int
    bias_by_tile: int
    bias_heads: int
    bias_size: int
    profile_scale: int
    profile_values: int
    profile_r: int
    profile_c: int

    @classmethod
    def of(cls, call: BranchCall, tensors: list[Tensor]) -> FlatCall:
        """Flatten a call; append its tensors to ``tensors``."""

        def put(x: Tensor | None) -> int:
            if x is None:
                return ABSENT
            tensors.append(x)
            return len(tensors) - 1

        q, k, mask, profile = call.q, call.k, call.bias, call.profile
        rows, keys = ABSENT, (0, 0, 0, 0)
        if isinstance(k, Rows):
            rows, keys = put(k.index), (k.size, 0, 0, 0)
        else:
            keys = (k.start, k.step, k.count, k.length)
        by_tile, heads, size = ABSENT, 0, 0
        if isinstance(mask, VisibilityMask):
            by_tile, heads, size = put(mask.by_tile), mask.heads, mask.size
            bias = put(mask.by_query)
        else:
            bias = put(mask)
        scale, values, r, c = ABSENT, ABSENT, ABSENT, ABSENT
        if profile is not None:
            scale = profile.scale
            values, r, c = (put(x) for x in (profile.values, *profile.factors()))
        return cls(
            source=call.source,
            causal=int(call.causal),
            shift=ABSENT if call.shift is None else call.shift,
            q_start=q.start,
            q_step=q.step,
            q_count=q.count,
            q_length=q.length,
            k_rows=rows,
            k_start=keys[0],
            k_step=keys[1],
            k_count=keys[2],
            k_length=keys[3],
            bias=bias,
            bias_by_tile=by_tile,
            bias_heads=heads,
            bias_size=size,
            profile_scale=scale,
            profile_values=values,
            profile_r=r,
            profile_c=c,
        )

    def call(self, tensors: Sequence[Tensor], offset: float) -> BranchCall:
        """Rebuild the call, without the name of its branch."""

        def get(number: int) -> Tensor | None:
            return None if number == ABSENT else tensors[number]

        keys: Tiles | Rows = Tiles(self.k_start, self.k_step, self.k_count, self.k_length)
        if self.k_rows != ABSENT:
            keys = Rows(tensors[self.k_rows], self.k_start)
        bias: Tensor | VisibilityMask | None = get(self.bias)
        if self.bias_heads:
            bias = VisibilityMask(
                get(self.bias_by_tile), tensors[self.bias], self.bias_heads, self.bias_size
            )
        profile = None
        if self.profile_scale != ABSENT:
            factors = tensors[self.profile_r], tensors[self.profile_c]
            profile = ScaledBias(self.profile_scale, tensors[self.profile_values], lambda: factors)
        return BranchCall(
            source=self.source,
            q=Tiles(self.q_start, self.q_step, self.q_count, self.q_length),
            k=keys,
            causal=bool(self.causal),
            bias=bias,
            offset=offset,
            shift=None if self.shift == ABSENT else self.shift,
            profile=profile,
        )


@dataclass(frozen=True, eq=False)
class FlatPlan:
    """Calls and scale as an operator of PyTorch takes them: tensors, integers and floats.

    Names of branches are left out.

    Attributes:
        tensors: row numbers and biases.
        integers: a :class:`FlatCall` for each call, one after the other.
        floats: the scale, then an offset for each call.
    """

    tensors: list[Tensor]
    integers: list[int]
    floats: list[float]

    @classmethod
    def of(cls, calls: Sequence[BranchCall], scale: float) -> FlatPlan:
        """Flatten calls."""
        plan = cls([], [], [scale])
        for call in calls:
            plan.integers.extend(FlatCall.of(call, plan.tensors))
            plan.floats.append(call.offset)
        return plan

    @property
    def scale(self) -> float:
        """Factor of q.k."""
        return self.floats[0]

    def calls(self) -> list[BranchCall]:
        """Rebuild the calls."""
        width = len(FlatCall._fields)
        return [
            FlatCall(*self.integers[width * i : width * (i + 1)]).call(self.tensors, offset)
            for i, offset in enumerate(self.floats[1:])
        ]
