"""UCSA's far entries: kernel calls over tree nodes and over tokens of the leaves chosen."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from danon.attention.ucsa.pooling_error import Verdict, classify_nodes
from danon.attention.ucsa.selection import (
    VOTE_EVERY,
    TreeSelection,
    choose_leaves,
    descend,
    far_leaves,
    tree_depth,
)
from danon.attention.ucsa.tree import Bounds, Far, Tree
from danon.attention.union.plan import BranchCall, VisibilityMask
from danon.attention.union.tiles import Rows, Tiles, constant
from danon.config import UCSAConfig

__all__ = ["FarCalls", "blocks_of", "budget_of", "depth_of", "far_bounds", "first_far_block"]

SELECT_TOGETHER = 64
"""Blocks of queries that choose in one go; bounds the temporaries of the selection."""


def blocks_of(c: UCSAConfig, length: int) -> int:
    """Count the blocks of queries past the global tokens."""
    return math.ceil(max(0, length - c.global_tokens) / c.query_block)


def far_bounds(c: UCSAConfig, block: int, length: int) -> tuple[int, int, int]:
    """Return :func:`far_leaves` of a block of queries."""
    return far_leaves(c, block * c.query_block // c.local_window_size, length)


def first_far_block(c: UCSAConfig, length: int) -> int:
    """Return the first block of queries with anything outside its near window."""
    per = c.local_window_size // c.query_block
    if c.is_causal:
        return 2 * per
    a, z, n = far_bounds(c, 0, length)
    return 0 if z < n else 2 * per


def depth_of(c: UCSAConfig, bounds: tuple[int, int, int]) -> int:
    """Return the level that a block of queries starts from."""
    return tree_depth(c, bounds[0] if c.is_causal else bounds[2])


def budget_of(c: UCSAConfig, bounds: Bounds, extra: float = 0.0) -> list[int]:
    """Return the leaves each query may refine, by the share of those far from it.

    At most ``sparsity_factor`` of them and ``selected_blocks``, which together are s_min; and
    ``extra`` of them on top, s_0 * exp(-lambda t), which no number bounds but the candidates': a
    share within ``selected_blocks`` would anneal nothing on a long input.
    """
    far = [a + n - z for a, z, n in bounds]
    return [min(math.ceil(f * c.sparsity_factor), c.selected_blocks) + int(f * extra) for f in far]


class Budget(NamedTuple):
    """Leaves that each query of T blocks may refine.

    Attributes:
        each: (T, 1), or (T, G) where rows differ in length; int64.
        most: of each block, for its longest row.
    """

    each: Tensor
    most: list[int]


@constant
def _plan(
    c: UCSAConfig, first: int, last: int, length: int
) -> list[tuple[tuple[int, int, int], int]]:
    """Return bounds and depth of blocks [first, last)."""
    bounds = [far_bounds(c, t, length) for t in range(first, last)]
    return [(b, depth_of(c, b)) for b in bounds]


class FarCalls:
    """Far entries of queries [start, start + n): nodes in source 1, tokens in source 2.

    Source 1 holds the nodes of all levels one after the other, source 2 whole leaves of tokens.

    Args:
        c: configuration.
        q: the queries (X, n, D).
        tree: with X / heads of a group as its first dimension, G.
        lines: queries past the global tokens (X, m, D), from block ``base`` on: one in
            ``VOTE_EVERY`` of a block votes.
        real: how many tokens of each row there are (G,); None if all rows are full, or causal.
        start: place of the first query.
        base: see ``lines``.
        extra: see :func:`budget_of`.
    """

    def __init__(
        self,
        c: UCSAConfig,
        q: Tensor,
        tree: Tree,
        lines: Tensor,
        real: Tensor | None = None,
        start: int = 0,
        base: int = 0,
        extra: float = 0.0,
    ) -> None:
        """Keep queries and tree; :meth:`calls` chooses."""
        self.c, self.q, self.tree, self.start, self.base = c, q, tree, start, base
        self.extra = extra
        self.stop, self.groups = start + q.shape[1], tree.key[0].shape[0]
        self.lines = lines
        self.past_sinks = self.leaf_count = None
        if real is not None:
            self.past_sinks = (real - c.global_tokens).clamp_min(0)
            self.leaf_count = -(-self.past_sinks // c.leaf)
        self.ballot: tuple[Tensor, Tensor] | None = None

    def voters(self) -> tuple[Tensor, Tensor]:
        """Return queries (blocks, G, heads of the group * voters, D) and votes, zero for padding.

        The heads of a group choose together.
        """
        c, G, like = self.c, self.groups, self.tree.key[0]
        lines, heads = self.lines, self.lines.shape[0] // self.groups
        vote = like.new_ones(G, lines.shape[1])
        if self.past_sinks is not None:
            position = torch.arange(lines.shape[1], device=like.device)
            vote = (position < self.past_sinks[:, None]).to(like.dtype)
        rest = lines.shape[1] % c.query_block
        if rest and c.is_causal:  # a block that is not whole votes for none
            lines, vote = lines[:, :-rest], vote[:, :-rest]
        elif rest:
            lines = F.pad(lines, (0, 0, 0, c.query_block - rest))
            vote = F.pad(vote, (0, c.query_block - rest))
        vote = vote.unflatten(1, (-1, c.query_block))
        lines = lines.unflatten(1, (-1, c.query_block)).unflatten(0, (G, heads))
        vote = vote[..., ::VOTE_EVERY].transpose(0, 1)
        lines = lines[:, :, :, ::VOTE_EVERY].permute(2, 0, 1, 3, 4).flatten(2, 3)
        return lines.to(like.dtype), vote.repeat(1, 1, heads)

    def calls(self) -> list[BranchCall]:
        """Return all calls; what is chosen has no gradient."""
        with torch.no_grad():
            return self._calls()

    def _calls(self) -> list[BranchCall]:
        c, blocks = self.c, blocks_of(self.c, self.stop)
        t0 = max(
            first_far_block(c, self.stop), max(0, self.start - c.global_tokens) // c.query_block
        )
        first, plan = t0, _plan(c, t0, blocks, self.stop)
        calls: list[BranchCall] = []
        while t0 < blocks:
            depth = plan[t0 - first][1]
            t1, most = t0 + 1, min(blocks, t0 + self.together(t0))
            while t1 < most and plan[t1 - first][1] == depth:
                t1 += 1
            these = [bounds for bounds, _ in plan[t0 - first : t1 - first]]
            cut, budget = self.cut(t0, t1, these, depth), self.budget(these)
            far = Far.of(these, self.q.device, self.leaf_count)
            verdict = classify_nodes(c, self.tree, 0, cut.leaf, far)
            for rows, at in self._pieces(t0, t1):
                calls += self._piece(cut, budget, verdict, rows, t0, at)
            if t0 == 0 and not c.is_causal and c.global_tokens:
                # The first tokens see what block 0 sees.
                calls += self._piece(cut, budget, verdict, Tiles(0, 1, 1, c.global_tokens), 0, 0)
            t0 = t1
        return calls

    def budget(self, bounds: Bounds) -> Budget:
        """Return leaves that queries of blocks may refine."""
        each = budget_of(self.c, bounds, self.extra)
        if self.leaf_count is None:
            return Budget(torch.tensor(each, device=self.q.device)[:, None], each)
        far = Far.of(bounds, self.q.device, self.leaf_count).leaves.double()
        share = (far * self.c.sparsity_factor).ceil().clamp_max(self.c.selected_blocks)
        return Budget((share + (far * self.extra).floor()).long(), each)

    def together(self, t0: int) -> int:
        """Return blocks from ``t0`` on that may choose in one go."""
        return SELECT_TOGETHER

    def cut(self, t0: int, t1: int, bounds: Bounds, depth: int) -> TreeSelection:
        """Return the cut of blocks [t0, t1); each is chosen by the block before when causal."""
        before = self.base + (1 if self.c.is_causal else 0)
        blocks = slice(t0 - before, t1 - before)
        if self.ballot is None:  # most steps of a stream ask for no vote
            self.ballot = self.voters()
        q, votes = (x[blocks] for x in self.ballot)
        scale = self.c.head_dim**-0.5
        return descend(self.c, self.tree, q, votes, bounds, depth, scale, self.leaf_count)

    def nodes(self, cut: TreeSelection) -> tuple[int, Rows | Tiles]:
        """Return source and keys of coarse nodes and candidates."""
        first = [0]
        for key in self.tree.key:
            first.append(first[-1] + key.shape[1])
        rows = [first[level] + self.tree.row(level, node) for level, node, _ in cut.coarse]
        return 1, Rows(torch.cat((*rows, self.tree.row(0, cut.leaf)), -1))

    def leaves(self, cut: TreeSelection) -> tuple[int, Rows, Tensor]:
        """Return source and keys of the candidates' tokens, and which may be chosen."""
        return 2, Rows(self.tree.row(0, cut.leaf), self.c.leaf), cut.leaf_on

    def chose(self, cut: TreeSelection, chosen: Tensor, first: int) -> None:
        """Hear what the queries of blocks from ``first`` on chose (T, G, C, candidates)."""

    def _pieces(self, t0: int, t1: int) -> Iterator[tuple[Tiles, int]]:
        """Yield rows of q that are queries of blocks [t0, t1), and the first block."""
        g, C = self.c.global_tokens, self.c.query_block
        at = t0
        while at < t1:
            first = max(self.start, g + at * C)
            last = min(self.stop, g + (at + 1) * C)
            count = min(t1 - at, (self.stop - first) // C) if last - first == C else 1
            yield Tiles(first - self.start, C, count, last - first), at - t0
            at += count

    def _piece(
        self, cut: TreeSelection, budget: Budget, verdict: Verdict, rows: Tiles, t0: int, at: int
    ) -> list[BranchCall]:
        """Return calls of ``rows``, which are the blocks of the cut from the ``at``-th on."""
        size, blocks = self.c.leaf, slice(at, at + rows.count)
        cut, repeat = cut.part(blocks), self.q.shape[0] // self.groups
        source, tokens, able = self.leaves(cut)
        choosing = rows.load(self.q, 0, rows.count).to(self.tree.key[0].dtype)
        choosing = choosing.unflatten(1, (self.groups, repeat)).flatten(2, 3)
        logits = self.tree.scores(0, cut.leaf, choosing, self.c.head_dim**-0.5)
        logits = logits.unflatten(2, (repeat, -1)).amax(2)
        if verdict.lossless is not None:
            able = able & ~verdict.lossless[blocks]
        most, limit = max(budget.most[blocks]), budget.each[blocks]
        if verdict.forced is None:
            chosen = choose_leaves(logits, able, limit, most)
        else:  # those of a large error first, the others with what is left of the budget
            forced = able & verdict.forced[blocks]
            left = (limit - forced.sum(-1)).clamp_min(0)
            chosen = choose_leaves(logits, forced, limit, most)
            chosen |= choose_leaves(logits, able & ~forced, left, most)
        self.chose(cut, chosen, t0 + at)
        where, nodes = self.nodes(cut)
        kept = cut.leaf_on[:, :, None] & ~chosen
        on = torch.cat([on for _, _, on in cut.coarse], -1) if cut.coarse else None
        calls = []
        if self.c.coarse_nodes:
            calls.append(
                BranchCall(
                    where, rows, nodes, bias=VisibilityMask(on, kept, repeat), branch="nodes"
                )
            )
        if most > 0:
            seen = VisibilityMask(None, chosen, repeat, size)
            calls.append(BranchCall(source, rows, tokens, bias=seen, branch="selected"))
        return calls
