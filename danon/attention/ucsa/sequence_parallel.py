"""UCSA on a part of a sequence: keys and values of the past come, the tree is made here.

The queries of a block of the past narrow the tree for the block after it: so the last ones before
the part come, too, without a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from danon.attention.keyed_draws import DrawKey
from danon.attention.sequence_shard import Range, SequenceShard
from danon.attention.ucsa.far_entries import FarCalls, blocks_of, first_far_block
from danon.attention.ucsa.information_loss import drawn_places, loss_at
from danon.attention.ucsa.recovery import may_be_non_finite, recover
from danon.attention.ucsa.sources import PooledUCSA, pool_tree, union_sources
from danon.attention.ucsa.tree import Tree
from danon.attention.union.op import BranchCall, observe_branches, union
from danon.attention.union.tiles import NEAR, batch, near_rects
from danon.config import UCSAConfig

__all__ = ["ShardRows", "information_loss_of_shard", "rows_of_shard"]

Oracle = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class ShardRows:
    """The outputs of the queries of a part, and what they are computed from.

    Attributes:
        pooled: configuration and pools.
        shard: which tokens these are.
        q: queries of the part (B, H, n, D).
        before: the last queries before the part (B, H, m, D).
        k: keys of all tokens up to the last of the part (B, G, N, D).
        v: values likewise.
        tree: nodes and their values; None: all is near.
        calls: what the queries see.
    """

    pooled: PooledUCSA
    shard: SequenceShard
    q: Tensor
    before: Tensor
    k: Tensor
    v: Tensor
    tree: tuple[Tree, list[Tensor]] | None
    calls: list[BranchCall]

    @property
    def real(self) -> Tensor | None:
        """Which of the keys are of real tokens (B * G, N); None: all."""
        real = self.shard.real(0, self.shard.stop, self.q.device)
        return None if real is None else real.repeat_interleave(self.k.shape[1], 0)

    def output(self) -> Tensor:
        """Return the outputs (B, H, n, D)."""
        return self._attend(self.q, self.k, self.v, self.tree)

    def recovered(self, out: Tensor, oracle: Oracle) -> tuple[Tensor, int]:
        """Return outputs with finite rows where there can be, and how many were replaced.

        Args:
            out: of :meth:`output`.
            oracle: as of :func:`~danon.attention.ucsa.recovery.recover`.
        """
        start, stop = self.shard.start, self.shard.stop
        known = torch.cat((self.before, self.q), 2)
        q = F.pad(known, (0, 0, stop - known.shape[2], 0))  # older ones have no say in these rows
        mask = self.shard.real(0, stop, q.device)
        padded = F.pad(out, (0, 0, start, 0))
        qkv = q, self.k, self.v
        result, count = recover(qkv, mask, padded, self._again, oracle, causal=True)
        return result[:, :, start:], count

    def _again(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the output (B, H, N, D) for the choices made, zeros before the part."""
        tree = None
        if self.tree is not None:
            wide_k, wide_v = (x.flatten(0, 1).double() for x in (k, v))
            tree = pool_tree(self.pooled, wide_k, wide_v, self.real)
        with observe_branches(None):
            out = self._attend(q[:, :, self.shard.start :], k, v, tree)
        return F.pad(out, (0, 0, self.shard.start, 0))

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, tree: tuple[Tree, list[Tensor]] | None
    ) -> Tensor:
        c = self.pooled.config
        q_, k_, v_ = (x.flatten(0, 1).contiguous() for x in (q, k, v))
        sources = union_sources(c, k_, v_, None, tree)
        scale = c.head_dim**-0.5
        return union(q_, sources, self.calls, scale=scale, kernel=c.kernel)[0].view(q.shape)


def rows_of_shard(
    pooled: PooledUCSA, q: Tensor, k: Tensor, v: Tensor, shard: SequenceShard
) -> ShardRows:
    """Return what the queries of a part of a sequence see.

    Args:
        pooled: configuration, causal, and pools.
        q: queries of the part (B, H, n, D).
        k: keys of the part (B, G, n, D).
        v: values of the part (B, G, n, D).
        shard: which tokens these are, and the way to the others.
    """
    c, start, stop = pooled.config, shard.start, shard.stop
    k, v = shard.fetch((k, v), shard.up_to_own_end)
    (before,) = shard.fetch((q.detach(),), partial(_voting, c))
    near = near_rects(stop, c.local_window_size, c.global_tokens, True, start)
    calls = [
        BranchCall(0, qt, kt, causal, branch=branch)
        for branch, part in zip(NEAR, near, strict=True)
        for qt, kt, causal in batch(part, start)
    ]
    rows = ShardRows(pooled, shard, q, before, k, v, None, calls)
    if first_far_block(c, stop) >= blocks_of(c, stop):
        return rows
    tree = pool_tree(pooled, k.flatten(0, 1), v.flatten(0, 1), rows.real)
    base, first = _first_voter(c, start)
    lines = torch.cat((before, q.detach()), 2).flatten(0, 1)[:, max(0, first - start) :]
    q_ = q.flatten(0, 1).contiguous()
    calls += FarCalls(c, q_, tree[0], lines, None, start, base, pooled.extra_share).calls()
    return ShardRows(pooled, shard, q, before, k, v, tree, calls)


def _first_voter(c: UCSAConfig, start: int) -> tuple[int, int]:
    """Return the block that votes for the block of query ``start``, and its first query."""
    block = max(0, max(0, start - c.global_tokens) // c.query_block - 1)
    return block, c.global_tokens + block * c.query_block


def _voting(c: UCSAConfig, start: int, stop: int) -> Sequence[Range]:
    """Want the queries that vote for those of [start, stop) and are not among them."""
    return ((min(_first_voter(c, start)[1], start), start),)


def information_loss_of_shard(rows: ShardRows, out: Tensor, key: DrawKey) -> Tensor | None:
    """Return the information loss of the whole sequence, on every process.

    The last process, which has all keys, computes it: its cost does not grow with the length.

    Args:
        rows: of the part.
        out: their outputs.
        key: of the places it looks at.

    Returns:
        A scalar; None where there is no tree, or an output anywhere is not finite.
    """
    c, shard = rows.pooled.config, rows.shard
    if first_far_block(c, shard.length) >= blocks_of(c, shard.length):
        return None
    places = drawn_places(c, shard.length, out.device, key)
    asked = places.query.tolist()

    def all_on_the_last(start: int, stop: int) -> Sequence[Range]:
        return [(place, place + 1) for place in asked] if stop == shard.length else ()

    (q,) = shard.fetch((rows.q.detach(),), all_on_the_last)
    wide = torch.promote_types(out.dtype, torch.float32)
    lost = torch.zeros((), dtype=wide, device=out.device)
    if shard.last:
        assert rows.tree is not None
        k, v = rows.k.flatten(0, 1), rows.v.flatten(0, 1)
        lost = loss_at(c, places, q.flatten(0, 1), k, v, rows.real, *rows.tree)
    unusual = torch.full_like(lost, may_be_non_finite(out))
    lost, unusual = shard.total(torch.stack((lost, unusual))).unbind()
    return None if bool(unusual) else lost
