"""UCSA, unified compressed sparse attention: an adaptive cut through a tree of pooled nodes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from danon.attention.base import check_inputs, without_autocast
from danon.attention.kernels import HIDDEN
from danon.attention.oracles.ucsa import oracle, undecided
from danon.attention.pooling import ImportancePool
from danon.attention.registry import register
from danon.attention.stream import Part, StreamingAttention
from danon.attention.tiles import NEAR, batch, near_rects
from danon.attention.ucsa_far import (
    FarCalls,
    blocks_of,
    budget_of,
    depth_of,
    far_bounds,
    first_far_block,
)
from danon.attention.ucsa_select import Tree, tree_depth
from danon.attention.ucsa_stream import advance, begin
from danon.attention.union import Call, Source, union
from danon.config import AttentionConfig, UCSAConfig

__all__ = ["UCSA"]


@register("ucsa")
class UCSA(StreamingAttention):
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
        near = near_rects(N, c.local_window_size, c.global_tokens, c.is_causal)
        calls = [
            Call(0, qt, kt, causal, branch=branch)
            for branch, part in zip(NEAR, near, strict=True)
            for qt, kt, causal in batch(part)
        ]
        if first_far_block(c, N) < blocks_of(c, N):
            tree, node_v = self._tree(k_, v_, seen)
            key, log_mass = torch.cat(tuple(tree.key), 1), torch.cat(tuple(tree.log_mass), 1)
            sources.append(Source(key.to(q.dtype), node_v.to(q.dtype), log_mass))
            sources.append(self._leaf_tokens(k_, v_, seen))
            vote = None if seen is None else seen[:, c.global_tokens :]
            calls += FarCalls(c, q_, tree, q_[:, c.global_tokens :], vote).calls()
        out, _ = union(q_, sources, calls, scale=D**-0.5, kernel=c.kernel)
        return out.view(B, H, N, D)

    def begin(self, empty: Tensor) -> Mapping[str, Part]:
        return begin(self.cfg, empty)

    def advance(
        self, q: Tensor, k: Tensor, v: Tensor, start: int, parts: Mapping[str, Part]
    ) -> tuple[Tensor, Mapping[str, Part]]:
        return advance(self.cfg, self.leaf_pool, self.tree_pool, (q, k, v), start, parts)

    def _tree(self, k: Tensor, v: Tensor, seen: Tensor | None) -> tuple[Tree, Tensor]:
        """The nodes of all levels that any block needs, and their values."""
        c, g = self.cfg, self.cfg.global_tokens
        wide = torch.promote_types(k.dtype, torch.float32)
        k, v = k[:, g:], v[:, g:]
        mass: Tensor | None = torch.ones(k.shape[:2], dtype=wide, device=k.device)
        if seen is not None:
            mass = seen[:, g:].to(wide)
        keys, values, log_masses = [], [], []
        pool = self.leaf_pool
        for _ in range(tree_depth(c, math.ceil(k.shape[1] / c.leaf)) + 1):
            weight, mass = pool.weights(k, v, 0, mass)
            k, v = pool.reduce(weight, k), pool.reduce(weight, v)
            assert mass is not None
            keys.append(k)
            values.append(v)
            log_masses.append(torch.where(mass > 0, mass.clamp_min(1).log(), HIDDEN))
            pool = self.tree_pool
        return Tree(keys, log_masses, [0] * len(keys)), torch.cat(values, 1)

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

    def visible_pairs(self, length: int) -> int | None:
        """Pairs seen, not pairs computed: a query is masked from what its neighbours selected."""
        c, f = self.cfg, self.cfg.fanout
        if not c.is_causal:
            return None  # depends on where the near window cuts the tree
        near = near_rects(length, c.local_window_size, c.global_tokens, True)
        pairs = sum(r.pairs for part in near for r in part)
        for t in range(first_far_block(c, length), blocks_of(c, length)):
            a, z, n = far_bounds(c, t, length)
            depth = depth_of(c, (a, z, n))
            nodes, entries = math.ceil(a / f**depth), 0
            for level in range(depth, 0, -1):
                refined = min(nodes, c.candidate_blocks // f)
                entries += nodes - refined
                beyond = math.ceil(a / f**level) * f - math.ceil(a / f ** (level - 1))
                nodes = refined * f - beyond
            chosen = min(nodes, int(budget_of(c, torch.tensor([[a, z, n]]))))
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
