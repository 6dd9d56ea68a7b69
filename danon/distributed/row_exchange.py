"""Rows of tensors that travel between processes, and their gradients, which travel back.

    plan = RowPlan(edges=(0, 5, 10), wanted=([(0, 5)], [(0, 10)]), rank=1)
    k, v = fetch_rows((k, v), plan, group)     # process 1 gets process 0's rows beside its own

The gradient of a row is the sum of those of all processes that fetched it. Messages go from process
to process, and hold no row twice: for causal attention half of what an all-gather would move.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from danon.attention.sequence_shard import Range
from danon.distributed.process_group import Group

__all__ = ["Piece", "RowPlan", "fetch_rows"]


class Piece(NamedTuple):
    """Rows [a, z) of a process's own tensor, which are rows from ``place`` on of the result."""

    a: int
    z: int
    place: int


@dataclass(frozen=True)
class RowPlan:
    """Which rows each process has and wants.

    Attributes:
        edges: process r has rows [edges[r], edges[r + 1]).
        wanted: rows that each process wants, in the order of its result.
        rank: of this process.
    """

    edges: Sequence[int]
    wanted: Sequence[Sequence[Range]]
    rank: int

    def pieces(self, owner: int, reader: int) -> list[Piece]:
        """Return what a process gets of another one's rows.

        Args:
            owner: has the rows.
            reader: wants them.
        """
        first, last = self.edges[owner], self.edges[owner + 1]
        pieces, place = [], 0
        for a, z in self.wanted[reader]:
            low, high = max(a, first), min(z, last)
            if low < high:
                pieces.append(Piece(low - first, high - first, place + low - a))
            place += z - a
        return pieces

    @property
    def count(self) -> int:
        """Rows of this process's result."""
        return sum(z - a for a, z in self.wanted[self.rank])

    @property
    def sent(self) -> int:
        """Rows that this process sends to others, forward; backward it receives as many."""
        others = (reader for reader in range(len(self.wanted)) if reader != self.rank)
        return sum(z - a for reader in others for a, z, _ in self.pieces(self.rank, reader))


def fetch_rows(tensors: Sequence[Tensor], plan: RowPlan, group: Group) -> tuple[Tensor, ...]:
    """Return the rows that a process wants of tensors that are spread over the processes.

    Args:
        tensors: each (B, heads, rows, ...) of one dtype, with this process's rows.
        plan: who has and wants which rows.
        group: the processes.

    Returns:
        Each (B, heads, wanted rows, ...), contiguous.
    """
    if group.size == 1 and list(plan.wanted[0]) == [(0, plan.edges[1])]:
        return tuple(tensors)
    return tuple(_Fetch.apply(plan, group, *tensors))  # type: ignore[no-untyped-call]


class _Fetch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: RowPlan, group: Group, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.plan, ctx.group = plan, group
        me, others = plan.rank, [r for r in range(group.size) if r != plan.rank]
        outs = [x.new_empty(*x.shape[:2], plan.count, *x.shape[3:]) for x in tensors]
        _copy(tensors, outs, plan.pieces(me, me))
        packed: dict[tuple[tuple[int, int], ...], Tensor] = {}
        sends = {}
        for r in others:
            rows = tuple((p.a, p.z) for p in plan.pieces(me, r))
            if rows not in packed:  # as a rule, all want the same
                packed[rows] = _packed(tensors, [slice(*x) for x in rows])
            sends[r] = packed[rows]
        receives = {r: _room(outs, plan.pieces(r, me)) for r in others}
        _exchange(sends, receives, group)
        for r, message in receives.items():
            pieces = [slice(p.place, p.place + p.z - p.a) for p in plan.pieces(r, me)]
            _unpack(message, outs, pieces, add=False)
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        plan, group = ctx.plan, ctx.group
        me, others = plan.rank, [r for r in range(group.size) if r != plan.rank]
        own = plan.edges[me + 1] - plan.edges[me]
        outs = [x.new_zeros(*x.shape[:2], own, *x.shape[3:]) for x in grads]
        for a, z, place in plan.pieces(me, me):
            for x, out in zip(grads, outs, strict=True):
                out[:, :, a:z] += x[:, :, place : place + z - a]
        sends = {}
        for r in others:
            places = [slice(p.place, p.place + p.z - p.a) for p in plan.pieces(r, me)]
            sends[r] = _packed(grads, places)
        receives = {r: _room(outs, plan.pieces(me, r)) for r in others}
        _exchange(sends, receives, group)
        for r, message in receives.items():  # in the order of the ranks: always the same sum
            _unpack(message, outs, _rows(plan.pieces(me, r)), add=True)
        return None, None, *outs


def _rows(pieces: Sequence[Piece]) -> list[slice]:
    return [slice(p.a, p.z) for p in pieces]


def _copy(tensors: Sequence[Tensor], outs: Sequence[Tensor], pieces: Sequence[Piece]) -> None:
    """Copy pieces of tensors to their places."""
    for a, z, place in pieces:
        for x, out in zip(tensors, outs, strict=True):
            out[:, :, place : place + z - a] = x[:, :, a:z]


def _packed(tensors: Sequence[Tensor], pieces: Sequence[slice]) -> Tensor:
    """Return pieces of all tensors as one message."""
    parts = [x[:, :, rows].flatten() for rows in pieces for x in tensors]
    return torch.cat(parts) if parts else tensors[0].new_empty(0)


def _room(tensors: Sequence[Tensor], pieces: Sequence[Piece]) -> Tensor:
    """Return an empty message of pieces of tensors like these."""
    width = sum(math.prod((*x.shape[:2], *x.shape[3:])) for x in tensors)
    return tensors[0].new_empty(width * sum(p.z - p.a for p in pieces))


def _unpack(message: Tensor, tensors: Sequence[Tensor], pieces: Sequence[slice], add: bool) -> None:
    """Write or add what a message holds to pieces of tensors."""
    at = 0
    for rows in pieces:
        for x in tensors:
            piece = x[:, :, rows]
            part = message[at : at + piece.numel()].view(piece.shape)
            if add:
                piece += part
            else:
                piece.copy_(part)
            at += piece.numel()


def _exchange(sends: dict[int, Tensor], receives: dict[int, Tensor], group: Group) -> None:
    """Send and receive messages; empty ones stay where they are."""
    operations = []
    for kind, messages in ((dist.isend, sends), (dist.irecv, receives)):
        for r, message in messages.items():
            if message.numel():
                peer = {"group_peer": r}
                operations.append(dist.P2POp(kind, message, group=group.handle, **peer))
    group.traffic.rows_bytes += sum(x.nbytes for x in sends.values())
    group.traffic.messages += sum(x.numel() > 0 for x in sends.values())
    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()
