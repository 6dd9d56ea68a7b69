"""UCSA, unified compressed sparse attention: an adaptive cut through a tree of pooled nodes."""

from __future__ import annotations

import math
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from danon.attention.base import BaseAttention, check_inputs, without_autocast
from danon.attention.kernels import HIDDEN
from danon.attention.oracles.ucsa import oracle, undecided
from danon.attention.pooling import ImportancePool
from danon.attention.registry import register
from danon.attention.tiles import Rows, Tiles, batch, near_rects
from danon.attention.ucsa_select import Cut, Tree, choose_leaves, descend, far_leaves, tree_depth
from danon.attention.union import Call, Source, union
from danon.config import AttentionConfig, UCSAConfig

__all__ = ["UCSA"]

SELECT_TOGETHER = 64
"""Blocks of queries that choose in one go; bounds the temporaries of the selection."""


@register("ucsa")
class UCSA(BaseAttention):
    """Unified compressed sparse attention (seed section 3).

    A query sees, under one softmax: the first ``global_tokens`` tokens; its own block of
    ``local_window_size`` tokens and the block before; and everything else exactly once, through a
    cut of a tree whose leaves pool ``leaf`` tokens and whose nodes pool ``fanout`` nodes:

    - Queries come in blocks of ``query_block``. The block *before* (its own block when
      bidirectional) narrows the tree: from the coarsest level with at most ``candidate_blocks``
      nodes down, the nodes with the largest softmax mass are replaced by their children; the
      others stay as coarse entries. A node that reaches into the near window is always split.
    - Of the ``candidate_blocks`` leaves left, each query refines its own best ``selected_blocks``
      to single tokens; the others stay as leaf entries.

    Coarse entries carry log(mass). O(N log N) selection with a small constant, O(N) attention.
    With candidates and budget for all leaves the result is exact attention.

    Learned: the pooling scores. Selection itself has no gradient.
    """

    oracle_kind = "definition"

    def __init__(self, config: UCSAConfig) -> None:
        super().__init__()
        self.setup_attention(config)
        self.cfg = config
        self.semantics = (
            f"window {config.local_window_size} + {config.selected_blocks} selected blocks of "
            f"{config.leaf} + tree cut + {config.global_tokens} sinks"
        )
        self.leaf_pool = ImportancePool(config.head_dim, config.leaf, 1)
        self.tree_pool = ImportancePool(config.head_dim, config.fanout, 1)

    @classmethod
    def build(cls, shape: AttentionConfig) -> Self:
        return cls(UCSAConfig(**shape.shared()))

    @without_autocast
    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        c = self.cfg
        check_inputs(c, q, k, v, mask)
        B, H, N, D = q.shape
        q_, k_, v_ = (x.reshape(-1, N, D).contiguous() for x in (q, k, v))
        seen = None if mask is None else (mask != 0).repeat_interleave(c.kv_heads, 0)
        bias = None if seen is None else torch.where(seen, 0.0, HIDDEN)
        sources = [Source(k_, v_, bias)]
        calls = [
            Call(0, qt, kt, causal)
            for part in near_rects(N, c.local_window_size, c.global_tokens, c.is_causal)
            for qt, kt, causal in batch(part)
        ]
        if self._first_far_block(N) < self._blocks(N):
            tree, node_v = self._tree(k_, v_, seen)
            dtype = q.dtype
            sources.append(Source(tree.key.to(dtype), node_v.to(dtype), tree.log_mass))
            sources.append(self._leaf_tokens(k_, v_, seen))
            calls += self._far_calls(q_, tree, seen)
        out, _ = union(q_, sources, calls, scale=D**-0.5, kernel=c.kernel)
        return out.view(B, H, N, D)

    def _blocks(self, length: int) -> int:
        """Blocks of queries past the global tokens."""
        return math.ceil(max(0, length - self.cfg.global_tokens) / self.cfg.query_block)

    def _bounds(self, block: int, length: int) -> tuple[int, int, int]:
        local = block * self.cfg.query_block // self.cfg.local_window_size
        return far_leaves(self.cfg, local, length)

    def _first_far_block(self, length: int) -> int:
        """The first block of queries with anything outside its near window."""
        per = self.cfg.local_window_size // self.cfg.query_block
        if self.cfg.is_causal:
            return 2 * per
        a, z, n = self._bounds(0, length)
        return 0 if z < n else 2 * per

    def _tree(self, k: Tensor, v: Tensor, seen: Tensor | None) -> tuple[Tree, Tensor]:
        """The nodes of all levels that any block needs, and their values."""
        c, g = self.cfg, self.cfg.global_tokens
        wide = torch.promote_types(k.dtype, torch.float32)
        k, v = k[:, g:], v[:, g:]
        mass: Tensor | None = torch.ones(k.shape[:2], dtype=wide, device=k.device)
        if seen is not None:
            mass = seen[:, g:].to(wide)
        keys, values, masses = [], [], []
        pool = self.leaf_pool
        for _ in range(tree_depth(c, math.ceil(k.shape[1] / c.leaf)) + 1):
            weight, mass = pool.weights(k, v, 0, mass)
            k, v = pool.reduce(weight, k), pool.reduce(weight, v)
            assert mass is not None
            keys.append(k)
            values.append(v)
            masses.append(mass)
            pool = self.tree_pool
        count = tuple(x.shape[1] for x in keys)
        start = tuple(sum(count[:i]) for i in range(len(count)))
        flat = torch.cat(masses, 1)
        log_mass = torch.where(flat > 0, flat.clamp_min(1).log(), HIDDEN)
        return Tree(torch.cat(keys, 1), log_mass, start, count), torch.cat(values, 1)

    def _leaf_tokens(self, k: Tensor, v: Tensor, seen: Tensor | None) -> Source:
        """Tokens past the global ones, filled up to whole leaves."""
        g = self.cfg.global_tokens
        n = k.shape[1] - g
        fill = -n % self.cfg.leaf
        bias = None
        if seen is not None or (fill and not self.cfg.is_causal):
            real = (
                seen[:, g:] if seen is not None else torch.ones_like(k[:, g:, 0], dtype=torch.bool)
            )
            bias = F.pad(torch.where(real, 0.0, HIDDEN), (0, fill), value=HIDDEN)
        k, v = (F.pad(x[:, g:], (0, 0, 0, fill)).contiguous() for x in (k, v))
        return Source(k, v, bias)

    @torch.no_grad()
    def _far_calls(self, q: Tensor, tree: Tree, seen: Tensor | None) -> list[Call]:
        """Calls over tree nodes (source 1) and over tokens of the candidates (source 2)."""
        c, g, C = self.cfg, self.cfg.global_tokens, self.cfg.query_block
        X, N, D = q.shape
        blocks, first = self._blocks(N), self._first_far_block(N)
        G = tree.key.shape[0]
        wide = tree.key.dtype
        tail = F.pad(q[:, g:].to(wide), (0, 0, 0, blocks * C - (N - g)))
        # (blocks, G, heads of the group * C, D): the heads of a group choose together.
        grouped = tail.view(G, X // G, blocks, C, D).permute(2, 0, 1, 3, 4).flatten(2, 3)
        vote = tail.new_ones(G, N - g) if seen is None else seen[:, g:].to(wide)
        vote = F.pad(vote, (0, blocks * C - (N - g))).view(G, blocks, C).transpose(0, 1)
        vote = vote.repeat(1, 1, X // G)
        before = 1 if c.is_causal else 0
        bounds = [self._bounds(t, N) for t in range(blocks)]
        calls: list[Call] = []
        t0 = first
        while t0 < blocks:
            depth = self._depth(bounds[t0])
            t1 = t0
            while t1 < min(blocks, t0 + SELECT_TOGETHER) and self._depth(bounds[t1]) == depth:
                t1 += 1
            these = torch.tensor(bounds[t0:t1], device=q.device)
            choosing = slice(t0 - before, t1 - before)
            cut = descend(c, tree, grouped[choosing], vote[choosing], these, depth, D**-0.5)
            budget = self._budget(these)
            chosen = choose_leaves(tree, cut, grouped[t0:t1], budget, X // G, D**-0.5)
            whole = t1 if t1 * C <= N - g else t1 - 1
            calls += self._calls(cut, chosen, Tiles(g + t0 * C, C, whole - t0, C), 0, X)
            if whole < t1:
                calls += self._calls(
                    cut, chosen, Tiles(g + whole * C, C, 1, N - g - whole * C), whole - t0, X
                )
            if t0 == 0 and not c.is_causal and g:  # the sink queries see what block 0 sees
                sinks = q[:, :g].to(wide).reshape(1, G, -1, D)
                one = Cut(*(x[:1] for x in (cut.coarse, cut.coarse_on, cut.leaf, cut.leaf_on)))
                chosen = choose_leaves(tree, one, sinks, budget[:1], X // G, D**-0.5)
                calls += self._calls(one, chosen, Tiles(0, g, 1, g), 0, X)
            t0 = t1
        return calls

    def _depth(self, bounds: tuple[int, int, int]) -> int:
        return tree_depth(self.cfg, bounds[0] if self.cfg.is_causal else bounds[2])

    def _budget(self, bounds: Tensor) -> Tensor:
        """Leaves each query may refine: at most ``sparsity_factor`` of those far from it."""
        far = bounds[:, 0] + bounds[:, 2] - bounds[:, 1]
        share = (far.double() * self.cfg.sparsity_factor).ceil().long()
        return share.clamp_max(self.cfg.selected_blocks)

    def _calls(self, cut: Cut, chosen: Tensor, rows: Tiles, at: int, heads: int) -> list[Call]:
        """Calls of ``rows``, which are the blocks of the cut from the ``at``-th on."""
        if rows.count == 0:
            return []
        some = slice(at, at + rows.count)
        leaf, leaf_on = cut.leaf[some], cut.leaf_on[some]
        chosen = chosen[some, :, : rows.length]
        coarse_on = cut.coarse_on[some, :, None].expand(-1, -1, rows.length, -1)
        nodes = Rows(torch.cat((cut.coarse[some], leaf), -1))
        repeat = heads // chosen.shape[1]
        size = self.cfg.leaf

        def node_bias(t0: int, t1: int) -> Tensor:
            kept = leaf_on[t0:t1, :, None] & ~chosen[t0:t1]
            on = torch.cat((coarse_on[t0:t1], kept), -1)
            return torch.where(on, 0.0, HIDDEN).repeat_interleave(repeat, 1)

        def token_bias(t0: int, t1: int) -> Tensor:
            on = torch.where(chosen[t0:t1], 0.0, HIDDEN).repeat_interleave(repeat, 1)
            return on.repeat_interleave(size, -1)

        calls = [Call(1, rows, nodes, bias=node_bias)]
        if bool(chosen.any()):
            calls.append(Call(2, rows, Rows(leaf, size), bias=token_bias))
        return calls

    def visible_pairs(self, length: int) -> int | None:
        """Pairs seen, not pairs computed: a query is masked from what its neighbours selected."""
        c, f = self.cfg, self.cfg.fanout
        if not c.is_causal:
            return None  # depends on where the near window cuts the tree
        near = near_rects(length, c.local_window_size, c.global_tokens, True)
        pairs = sum(r.pairs for part in near for r in part)
        for t in range(self._first_far_block(length), self._blocks(length)):
            a, z, n = self._bounds(t, length)
            depth = self._depth((a, z, n))
            nodes, entries = math.ceil(a / f**depth), 0
            for level in range(depth, 0, -1):
                refined = min(nodes, c.candidate_blocks // f)
                entries += nodes - refined
                beyond = math.ceil(a / f**level) * f - math.ceil(a / f ** (level - 1))
                nodes = refined * f - beyond
            chosen = min(nodes, int(self._budget(torch.tensor([[a, z, n]]))))
            entries += nodes - chosen + chosen * c.leaf
            rows = min(c.query_block, length - c.global_tokens - t * c.query_block)
            pairs += rows * entries
        return pairs

    def oracle(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The definition, one block of queries at a time, in float64."""
        with q.device:
            return oracle(self, q, k, v, mask, rows)

    def oracle_margin(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rows: Tensor
    ) -> Tensor:
        """(R,) bool: rows whose selection is decided by less than rounding."""
        with q.device:
            return undecided(self, q, k, v, mask, rows)
