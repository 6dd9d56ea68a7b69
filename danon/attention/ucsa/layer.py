"""UCSA, unified compressed sparse attention: an adaptive cut through a tree of pooled nodes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from operator import index
from typing import Any, Self

import torch
from torch import Tensor, nn

from danon.attention.base import made_on, without_autocast
from danon.attention.effective_matrix import EffectiveAttention, pooling_loss
from danon.attention.head_share import HeadShare, narrowed
from danon.attention.padding import each_alone, on_shard, right_padded, rows_alone
from danon.attention.pooling import ImportancePool
from danon.attention.registry import register
from danon.attention.sequence_shard import SequenceShard
from danon.attention.sizing import SINKS, largest_within_budget
from danon.attention.stream_state import StateTensor
from danon.attention.streaming import StreamingAttention
from danon.attention.tensor_checks import refuse_meta, refuse_transforms
from danon.attention.ucsa.far_entries import (
    FarCalls,
    blocks_of,
    budget_of,
    depth_of,
    far_bounds,
    first_far_block,
)
from danon.attention.ucsa.information_loss import information_loss
from danon.attention.ucsa.oracle import oracle, seen, undecided
from danon.attention.ucsa.recovery import may_be_non_finite, recover, recover_stream
from danon.attention.ucsa.sequence_parallel import information_loss_of_shard, rows_of_shard
from danon.attention.ucsa.sources import PooledUCSA, pool_tree, union_sources
from danon.attention.ucsa.streaming import init_parts, step_parts
from danon.attention.union.op import BranchCall, Source, observe_branches, union
from danon.attention.union.tiles import NEAR, batch, near_rects
from danon.config import AttentionConfig, UCSAConfig
from danon.tuned.search_space import Categorical, Float, Space

__all__ = ["UCSA", "anneal"]


def anneal(model: nn.Module, step: int) -> int:
    """Set t of the sparsity annealing in every UCSA of a model: call it after an optimizer step.

    t is what the training loop says, since only the loop knows it: forward passes are no steps
    where gradients are accumulated, and gradient checkpointing must repeat them with the same t.
    It is part of the ``state_dict``. Evaluation does not look at it: it refines the final share.

    Args:
        model: any module.
        step: optimizer steps done, at least 0.

    Returns:
        How many modules anneal.

    Raises:
        ValueError: step below 0.
    """
    if step < 0:
        raise ValueError(f"step = {step}: must be at least 0")
    annealed = [m for m in model.modules() if isinstance(m, UCSA) and m.cfg.sparsity_start]
    for module in annealed:
        module.anneal_step.fill_(step)
    return len(annealed)


ALL_LEAVES, LARGEST_LEAF = 512, 16
"""Candidates of a sized UCSA, and tokens of a leaf, at most: the smaller, the better it chooses."""


@register("ucsa")
class UCSA(StreamingAttention):
    """Unified compressed sparse attention (specification 3).

    A query sees, under one softmax: the first ``global_tokens`` tokens; its own block of
    ``local_window_size`` tokens and the block before; and everything else exactly once, through a
    cut of a tree whose leaves pool ``leaf`` tokens and whose nodes pool ``fanout`` nodes:

    - Queries come in blocks of ``query_block``. The block *before* (its own block when
      bidirectional) narrows the tree: from the finest level with at most ``candidate_blocks``
      nodes down, the nodes with the largest softmax mass are replaced by their children; the
      others stay as coarse entries. A node that reaches into the near window is always split.
      Every fourth query of that block votes.
    - Of the ``candidate_blocks`` leaves left, each query refines its own best ``selected_blocks``
      to single tokens; the others stay as leaf entries.

    Coarse entries carry log(mass); without ``coarse_nodes`` they only guide the choice. O(N log N)
    selection with a small constant, O(N) attention. With candidates and budget for all leaves the
    result is exact attention.

    A node whose tokens have the same keys (error below ``error_tolerance``) is never refined; with
    ``error_alpha`` one of a large error is refined before others (:mod:`~.pooling_error`).

    In training more may be refined, less and less (specification 3.2; see :func:`anneal`), and
    :meth:`auxiliary_loss` is the information loss (specification 3.1; :mod:`~.information_loss`).

    Learned: the pooling scores. Selection itself has no gradient.

    Attributes:
        recovered: outputs, of one head and token each, that were not finite and were computed again
            in float64 (:mod:`danon.attention.ucsa.recovery`).
        anneal_step: t of the annealing, int64; only with ``sparsity_start``.
    """

    oracle_kind = "definition"
    anneal_step: Tensor

    def __init__(self, config: UCSAConfig) -> None:
        """Build the pools.

        Args:
            config: the configuration.
        """
        super().__init__()
        self.setup_attention(config)
        self.cfg = config
        self.description = (
            f"window {config.local_window_size} + {config.selected_blocks} selected blocks of "
            f"{config.leaf}{' + tree cut' * config.coarse_nodes} + {config.global_tokens} sinks"
        )
        self.leaf_pool = ImportancePool(config.head_dim, config.leaf, 1)
        self.tree_pool = ImportancePool(config.head_dim, config.fanout, 1)
        self.recovered = 0
        if config.sparsity_start:
            self.register_buffer("anneal_step", torch.zeros((), dtype=torch.int64))

    @classmethod
    def build(cls, shape: AttentionConfig, **settings: Any) -> Self:
        """Build from a shape, and from fields of :class:`~danon.config.UCSAConfig`.

        Args:
            shape: widths, heads and causality.
            **settings: fields that differ from the defaults.
        """
        return cls(UCSAConfig(**shape.shared() | settings))

    @classmethod
    def search_space(cls) -> Space:
        """Return the ranges of a study; ``local_blocks`` is the window in query blocks."""

        def settings(choice: Mapping[str, Any]) -> dict[str, Any]:
            fields = dict(choice)
            fields["local_window_size"] = fields["query_block"] * fields.pop("local_blocks")
            return fields | {"leaf_size": fields.pop("leaf")}

        return Space(
            {
                "query_block": Categorical((64, 128, 256, 512)),
                "local_blocks": Categorical((1, 2, 4)),
                "leaf": Categorical((2, 4, 8, 16, 32)),
                "compression_ratio": Categorical((0.5, 0.25, 0.125)),
                "candidate_blocks": Categorical((16, 32, 64, 128, 256, 512)),
                "selected_blocks": Categorical((4, 8, 16, 32, 64)),
                "global_tokens": Categorical((0, 4, 16, 64, 256)),
                "coarse_nodes": Categorical((True, False)),
                "sparsity_factor": Float(0.01, 1.0, log=True),
                "error_tolerance": Categorical((0.0, 0.001, 0.01, 0.1)),
            },
            {
                "query_block": 256,
                "local_blocks": 1,
                "leaf": 16,
                "compression_ratio": 0.25,
                "candidate_blocks": 32,
                "selected_blocks": 16,
                "global_tokens": 64,
                "coarse_nodes": True,
                "sparsity_factor": 1.0,
                "error_tolerance": 0.001,
            },
            settings,
        )

    @classmethod
    def with_budget(cls, shape: AttentionConfig, entries: int) -> Self:
        """Build one with a small window, and as many refined leaves as there is room for.

        Each query chooses among all leaves, at least up to 512 of them, by nodes that it does not
        see. The divergence in the information loss teaches them to choose; more of it than this
        costs text: docs/log.md.
        """
        length = shape.max_sequence_length
        leaf = 2
        while leaf < LARGEST_LEAF and length > leaf * ALL_LEAVES:
            leaf *= 2
        block = leaf * max(1, entries // (8 * leaf))
        candidates = min(ALL_LEAVES, max(8, math.ceil(length / leaf)))

        def config(refined: int) -> UCSAConfig:
            return UCSAConfig(
                **shape.shared(),
                local_window_size=block,
                query_block=block,
                leaf_size=leaf,
                candidate_blocks=candidates,
                coarse_nodes=False,
                selected_blocks=max(1, refined // leaf),
                global_tokens=SINKS,
                max_cache_size=max(length, block),
                information_weight=0.001,
                information_kl=30.0,
            )

        return largest_within_budget(lambda n: cls(config(n)), length, entries)

    @right_padded
    @without_autocast
    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend with every query; see :meth:`BaseAttention.forward`."""
        c = self.cfg
        refuse_transforms()
        refuse_meta("q", q)
        B, H, N, D = q.shape
        N = index(N)  # a compiler, too, makes its plan for this length
        q_, k_, v_ = (x.reshape(-1, N, D).contiguous() for x in (q, k, v))
        real = None if mask is None else mask.repeat_interleave(c.kv_heads, 0)
        seen = None if c.is_causal else real  # causal queries do not see the padding behind them
        near = near_rects(N, c.local_window_size, c.global_tokens, c.is_causal)
        calls = [
            BranchCall(0, qt, kt, causal, branch=branch)
            for branch, part in zip(NEAR, near, strict=True)
            for qt, kt, causal in batch(part)
        ]
        tree = None
        if first_far_block(c, N) < blocks_of(c, N):
            tree = pool_tree(self._pooled(c), k_, v_, real)
            lines, lengths = q_[:, c.global_tokens :], None if seen is None else seen.sum(1)
            calls += FarCalls(c, q_, tree[0], lines, lengths, extra=self.extra_share).calls()

        def attend(q: Tensor, sources: list[Source]) -> Tensor:
            return union(q, sources, calls, scale=D**-0.5, kernel=c.kernel)[0].view(B, H, N, D)

        def again(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.reshape(-1, N, D).contiguous() for x in (q, k, v))
            wide = (
                None if tree is None else pool_tree(self._pooled(c), k.double(), v.double(), real)
            )
            with observe_branches(None):
                return attend(q, union_sources(c, k, v, seen, wide))

        out, lost = attend(q_, union_sources(c, k_, v_, seen, tree)), None
        if may_be_non_finite(out):
            out, count = recover((q, k, v), mask, out, again, self.oracle, causal=c.is_causal)
            self.recovered += count
        elif tree is not None and c.information_weight and self.wants_auxiliary:
            lost = information_loss(c, q_, k_, v_, real, *tree, self.draw_key)
            if self.head_share is not None:
                lost = self.head_share.total(lost / self.head_share.parts)
            lost = c.information_weight * lost
        self.set_auxiliary_loss(lost)
        return out

    @on_shard
    @without_autocast
    def attend_shard(self, q: Tensor, k: Tensor, v: Tensor, shard: SequenceShard) -> Tensor:
        """Attend with a part of a sequence; see :meth:`BaseAttention.attend_shard`."""
        c = self.cfg
        rows = rows_of_shard(self._pooled(c), q, k, v, shard)
        out, lost = rows.output(), None
        if c.information_weight and self.wants_auxiliary:
            lost = information_loss_of_shard(rows, out, shard.draw_key(self))
        self.set_auxiliary_loss(None if lost is None else c.information_weight * lost)
        if may_be_non_finite(out):
            out, count = rows.recovered(out, self.oracle)
            self.recovered += count
        return out

    def take_heads(self, share: HeadShare) -> None:
        """Compute only some of the heads; see :meth:`BaseAttention.take_heads`."""
        self.config = self.cfg = narrowed(self.cfg, share.parts)
        self.head_share = share

    @property
    def extra_share(self) -> float:
        """s_0 * exp(-lambda t) of specification 3.2: what training refines on top."""
        c = self.cfg
        if not (self.training and c.sparsity_start):
            return 0.0
        return c.sparsity_start * math.exp(-c.sparsity_decay * int(self.anneal_step))

    def _pooled(self, config: UCSAConfig) -> PooledUCSA:
        """Return configuration and pools, for functions beside this class."""
        return PooledUCSA(config, self.leaf_pool, self.tree_pool, self.extra_share)

    def init_parts(self, empty: Tensor) -> Mapping[str, StateTensor]:
        """Return the parts of an empty state; see :meth:`StreamingAttention.init_parts`."""
        return init_parts(self.cfg, empty)

    def step_parts(
        self, q: Tensor, k: Tensor, v: Tensor, start: int, parts: Mapping[str, StateTensor]
    ) -> tuple[Tensor, Mapping[str, StateTensor]]:
        """Attend with the next tokens; see :meth:`StreamingAttention.step_parts`."""

        def read(
            config: UCSAConfig,
            qkv: tuple[Tensor, Tensor, Tensor],
            first: int,
            parts: Mapping[str, StateTensor],
        ) -> tuple[Tensor, Mapping[str, StateTensor]]:
            return step_parts(self._pooled(config), qkv, start + first, parts)

        out, after = read(self.cfg, (q, k, v), 0, parts)
        if may_be_non_finite(out):
            exact = replace(self.cfg, kernel="dense")  # it takes float64 anywhere
            out, after, count = recover_stream((q, k, v), parts, out, after, partial(read, exact))
            self.recovered += count
        return out, after

    def visible_pairs(self, length: int) -> int | None:
        """Count pairs seen, not pairs computed: a query is masked from its neighbours' selection.

        The most there can be: what is lossless is not refined.
        """
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
            chosen = min(nodes, budget_of(c, [(a, z, n)], self.extra_share)[0])
            entries = (entries + nodes - chosen) * c.coarse_nodes + chosen * c.leaf
            rows = min(c.query_block, length - c.global_tokens - t * c.query_block)
            pairs += rows * entries
        return pairs

    @rows_alone
    def oracle(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None) -> Tensor:
        """Compute the definition, one block of queries at a time, in float64."""
        with made_on(q.device):
            return oracle(self, q, k, v, rows)

    def undecided_rows(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rows: Tensor
    ) -> Tensor:
        """Return bool (R,): rows whose selection is decided by less than rounding."""
        with made_on(q.device):
            if mask is None:
                return undecided(self, q, k, v, rows)
            close = torch.zeros(len(rows), dtype=torch.bool)
            for alone, places, among_rows in each_alone(q, k, v, mask, rows):
                if len(places):
                    close[among_rows] |= undecided(self, *alone, places)
            return close

    def effective_attention(
        self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor
    ) -> EffectiveAttention:
        """Return the matrix: window and refined leaves seen as themselves, the rest as nodes."""
        c = self.cfg
        with made_on(q.device):
            exact, levels = seen(self, q, k, v, rows)
        weights = super().effective_attention(q, k, v, rows).weights
        pooled = None
        if c.coarse_nodes:  # without them what is not refined is not seen at all
            pooled = pooling_loss(k, v, levels, rows, c.global_tokens, c.is_causal)
        return EffectiveAttention(
            weights, exact.repeat_interleave(q.shape[1] // k.shape[1], 1), pooled
        )
