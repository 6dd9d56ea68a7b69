"""UCSA on a part of a sequence: every process pools its own leaves, and fetches those of the past.

Also come the near tokens, the tokens of all leaves that may be refined, and, without a gradient,
the queries of the block before the part, which narrow the tree for its first block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from danon.attention.keyed_draws import DrawKey
from danon.attention.sequence_shard import Range, SequenceShard
from danon.attention.ucsa.far_entries import FarCalls, blocks_of, far_bounds, first_far_block
from danon.attention.ucsa.information_loss import drawn_places, loss_at
from danon.attention.ucsa.recovery import may_be_non_finite, recover
from danon.attention.ucsa.selection import TreeSelection, tree_depth
from danon.attention.ucsa.sources import (
    Nodes,
    PooledUCSA,
    leaves_of,
    node_source,
    pool_tree,
    tree_over,
)
from danon.attention.ucsa.tree import Tree
from danon.attention.union.op import BranchCall, Source, observe_branches, union
from danon.attention.union.tiles import NEAR, Rows, batch, near_rects
from danon.config import UCSAConfig

__all__ = ["ShardRows", "information_loss_of_shard", "rows_of_shard"]

Oracle = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor], Tensor]
TOKENS, NODES, LEAVES, SINKS = range(4)
"""Sources of the union."""


@dataclass(frozen=True)
class Layout:
    """Which tokens a process needs.

    Attributes:
        sinks: first tokens.
        near: the first token of the near windows, or 0.
        leaves: leaves past the first tokens that some query may refine.
    """

    sinks: int
    near: int
    leaves: int

    @classmethod
    def of(cls, c: UCSAConfig, start: int, stop: int) -> Layout:
        """Return what queries [start, stop) need.

        Args:
            c: the configuration.
            start: place of the first query.
            stop: place after the last one.
        """
        g, window = c.global_tokens, c.local_window_size
        near = g + (max(0, start - g) // window - 1) * window
        last = blocks_of(c, stop) - 1
        far = far_bounds(c, last, stop)[0] if last >= first_far_block(c, stop) else 0
        return cls(g if near > g else 0, near if near > g else 0, far)


@dataclass(frozen=True, eq=False)
class ShardRows:
    """The outputs of the queries of a part, and what they are computed from.

    Attributes:
        pooled: configuration and pools.
        shard: which tokens these are.
        layout: which other tokens they need.
        q: queries of the part (B, H, n, D).
        before: the last queries before the part (B, H, m, D).
        near: keys and values of the first tokens and of the near ones (B, G, ., D).
        far: keys and values of the leaves that may be refined (B, G, ., D).
        tree: nodes and their values; None: all is near.
        calls: what the queries see.
    """

    pooled: PooledUCSA
    shard: SequenceShard
    layout: Layout
    q: Tensor
    before: Tensor
    near: tuple[Tensor, Tensor]
    far: tuple[Tensor, Tensor]
    tree: tuple[Tree, list[Tensor]] | None
    calls: list[BranchCall]

    def output(self) -> Tensor:
        """Return the outputs (B, H, n, D)."""
        return self._attend(self.q, self.near, self.far, self.tree)

    def recovered(self, out: Tensor, oracle: Oracle) -> tuple[Tensor, int]:
        """Return outputs with finite rows where there can be, and how many were replaced.

        Args:
            out: of :meth:`output`.
            oracle: as of :func:`~danon.attention.ucsa.recovery.recover`.
        """
        start, stop, g = self.shard.start, self.shard.stop, self.pooled.config.global_tokens
        k, v = self.near
        if self.layout.near:
            beyond = g + g + self.layout.leaves * self.pooled.config.leaf - self.layout.near
            k, v = (
                torch.cat((near[:, :, :g], far, near[:, :, beyond:]), 2)
                for near, far in zip(self.near, self.far, strict=True)
            )
        known = torch.cat((self.before, self.q), 2)
        q = F.pad(known, (0, 0, stop - known.shape[2], 0))  # older ones have no say in these rows
        mask = self.shard.real(0, stop, q.device)
        padded = F.pad(out, (0, 0, start, 0))
        result, count = recover((q, k, v), mask, padded, self._again, oracle, causal=True)
        return result[:, :, start:], count

    def _again(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the output (B, H, N, D) for the choices made, zeros before the part."""
        c, tree, kv = self.pooled.config, None, (k, v)
        if self.tree is not None:
            real = _by_head(self.shard.real(0, self.shard.stop, q.device), k.shape[1])
            wide_k, wide_v = (x.flatten(0, 1).double() for x in kv)
            tree = pool_tree(self.pooled, wide_k, wide_v, real)
        g, near, end = self.layout.sinks, self.layout.near, self.layout.leaves * c.leaf
        k_near, v_near = (torch.cat((x[:, :, :g], x[:, :, near:]), 2) for x in kv)
        k_far, v_far = (x[:, :, c.global_tokens : c.global_tokens + end] for x in kv)
        with observe_branches(None):
            out = self._attend(q[:, :, self.shard.start :], (k_near, v_near), (k_far, v_far), tree)
        return F.pad(out, (0, 0, self.shard.start, 0))

    def _attend(
        self,
        q: Tensor,
        near: tuple[Tensor, Tensor],
        far: tuple[Tensor, Tensor],
        tree: tuple[Tree, list[Tensor]] | None,
    ) -> Tensor:
        c, g = self.pooled.config, self.layout.sinks
        tokens = [x.flatten(0, 1) for x in near]
        sources = [Source(*(x[:, g:].contiguous() for x in tokens))]
        if tree is not None:
            sources.append(node_source(tree, q.dtype))
            sources.append(Source(*(x.flatten(0, 1).contiguous() for x in far)))
        if g:
            sources.append(Source(*(x[:, :g].contiguous() for x in tokens)))
        q_, scale = q.flatten(0, 1).contiguous(), c.head_dim**-0.5
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
    layout = Layout.of(c, start, stop)
    k_near, v_near = shard.fetch((k, v), partial(_near, c))
    (before,) = shard.fetch((q.detach(),), partial(_voting, c))
    far, tree, calls = (k[:, :, :0], v[:, :, :0]), None, _near_calls(c, shard, layout)
    if first_far_block(c, shard.length) < blocks_of(c, shard.length):  # for somebody
        leaves = _leaves(pooled, (k_near, v_near), layout, shard)
        k_far, v_far = shard.fetch((k, v), partial(_refined, c))
        far = k_far, v_far
        if layout.leaves:
            levels = tree_depth(c, leaves.key.shape[1]) + 1
            tree = tree_over(pooled, leaves, levels, shard.lengths is not None)
            base, first = _first_voter(c, start)
            lines = torch.cat((before, q.detach()), 2).flatten(0, 1)[:, max(0, first - start) :]
            q_, extra = q.flatten(0, 1).contiguous(), pooled.extra_share
            calls_of = _WholeLeaves(c, q_, tree[0], lines, None, start, base, extra)
            calls_of.rows = layout.leaves
            calls += calls_of.calls()
    near = k_near, v_near
    return ShardRows(pooled, shard, layout, q, before, near, far, tree, calls)


class _WholeLeaves(FarCalls):
    """Far entries over a source of tokens that ends with the leaves that some query may refine."""

    rows: int = 1

    def leaves(self, cut: TreeSelection) -> tuple[int, Rows, Tensor]:
        row = self.tree.row(0, cut.leaf).clamp_max(self.rows - 1)
        return LEAVES, Rows(row, self.c.leaf), cut.leaf_on


def _near_calls(c: UCSAConfig, shard: SequenceShard, layout: Layout) -> list[BranchCall]:
    """Return what queries of a part see of the first tokens and of their near windows."""
    near = near_rects(shard.stop, c.local_window_size, c.global_tokens, True, shard.start)
    calls = []
    for part, rects in enumerate(near):
        source, first = TOKENS, layout.near
        if part == 0 and layout.sinks:
            source, first = SINKS, 0
        calls += [
            BranchCall(source, qt, kt, causal, branch=NEAR[part])
            for qt, kt, causal in batch(rects, shard.start, first)
        ]
    return calls


def _near(c: UCSAConfig, start: int, stop: int) -> Sequence[Range]:
    """Want the first tokens and those of the near windows; leaves that end here begin in them."""
    layout = Layout.of(c, start, stop)
    return ((0, layout.sinks), (layout.near, stop)) if layout.sinks else ((layout.near, stop),)


def _refined(c: UCSAConfig, start: int, stop: int) -> Sequence[Range]:
    """Want the tokens of all leaves that a query of [start, stop) may refine."""
    g = c.global_tokens
    return ((g, g + Layout.of(c, start, stop).leaves * c.leaf),)


def _first_voter(c: UCSAConfig, start: int) -> tuple[int, int]:
    """Return the block that votes for the block of query ``start``, and its first query."""
    block = max(0, max(0, start - c.global_tokens) // c.query_block - 1)
    return block, c.global_tokens + block * c.query_block


def _voting(c: UCSAConfig, start: int, stop: int) -> Sequence[Range]:
    """Want the queries that vote for those of [start, stop) and are not among them."""
    return ((min(_first_voter(c, start)[1], start), start),)


def _by_head(real: Tensor | None, heads: int) -> Tensor | None:
    """Return a mask (B, N) for each key/value head (B * G, N)."""
    return None if real is None else real.repeat_interleave(heads, 0)


def _leaves(
    pooled: PooledUCSA, near: tuple[Tensor, Tensor], layout: Layout, shard: SequenceShard
) -> Nodes:
    """Return all leaves up to the last whole one of a part; on the last process all there are.

    Args:
        pooled: configuration and pools.
        near: as in :class:`ShardRows`.
        layout: of the part.
        shard: which tokens it has.
    """
    c, g, (B, G) = pooled.config, pooled.config.global_tokens, near[0].shape[:2]
    edges = [max(0, edge - g) // c.leaf for edge in shard.edges]
    edges[-1] = math.ceil(max(0, shard.length - g) / c.leaf)
    a, z = (g + edge * c.leaf for edge in edges[shard.rank : shard.rank + 2])
    z = max(a, min(z, shard.stop))
    own = slice(layout.sinks + a - layout.near, layout.sinks + z - layout.near)
    k, v = (x[:, :, own].flatten(0, 1) for x in near)
    made = leaves_of(pooled, k, v, _by_head(shard.real(a, z, k.device), G))

    def up_to_own(start: int, stop: int) -> Sequence[Range]:
        return ((0, edges[shard.edges.index(stop)]),)

    def fetched(*nodes: Tensor) -> list[Tensor]:
        rows = [x.unflatten(0, (B, G)) for x in nodes]
        return [x.flatten(0, 1) for x in shard.fetch(rows, up_to_own, edges)]

    key, value = fetched(made.key, made.value)
    fixed = [made.top, made.bottom, made.mass, *([] if made.square is None else [made.square])]
    top, bottom, mass, *square = fetched(*(x.detach() for x in fixed))
    return Nodes(key, value, mass, top, bottom, square[0] if square else None)


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
        token = places.tokens(c).clamp_max(shard.length - 1)
        k, v = (_taken(rows, x, token) for x in range(2))
        real = _by_head(shard.real(0, shard.length, out.device), k.shape[0] // len(q))
        # One process has to keep for the backward pass what is not spread: so it keeps none of it.
        lost = checkpoint(
            loss_at,
            *(c, places, shard.length, q.flatten(0, 1), (k, v), real, *rows.tree),
            use_reentrant=False,
            preserve_rng_state=False,
        )
    unusual = torch.full_like(lost, may_be_non_finite(out))
    lost, unusual = shard.total(torch.stack((lost, unusual))).unbind()
    return None if bool(unusual) else lost


def _taken(rows: ShardRows, which: int, token: Tensor) -> Tensor:
    """Return keys (0) or values (1) of tokens (n,) past the first ones: (B * G, n, D)."""
    g, layout = rows.pooled.config.global_tokens, rows.layout
    near, far = (x[which].flatten(0, 1) for x in (rows.near, rows.far))
    beside = near[:, (token - layout.near + layout.sinks).clamp_min(0)]
    behind = far[:, (token - g).clamp_max(far.shape[1] - 1)]
    return torch.where((token - g < far.shape[1])[:, None], behind, beside)
