"""MSRA, multi-scale recursive attention: recent past exact, older past in ever coarser nodes."""

from __future__ import annotations

from collections.abc import Mapping
from operator import index
from typing import Any, Self

import torch
from torch import Tensor

from danon.attention.base import made_on, without_autocast
from danon.attention.effective_matrix import EffectiveAttention, Level, pooling_loss
from danon.attention.kernels.base import hide
from danon.attention.msra import streaming
from danon.attention.msra.base import MSRABase
from danon.attention.msra.levels import far_rects
from danon.attention.msra.oracle import entries, oracle
from danon.attention.msra.sequence_parallel import attend_shard
from danon.attention.padding import on_shard, right_padded, rows_alone
from danon.attention.registry import register
from danon.attention.sequence_shard import SequenceShard
from danon.attention.sizing import SINKS, largest_within_budget
from danon.attention.stream_state import StateTensor
from danon.attention.tensor_checks import refuse_meta, refuse_transforms
from danon.attention.union.op import Source
from danon.attention.union.tiles import near_rects
from danon.config import AttentionConfig, MSRAConfig
from danon.tuned.search_space import Categorical, Float, Space

__all__ = ["MSRA"]


@register("msra")
class MSRA(MSRABase):
    """Multi-scale recursive attention (specification 1).

    A query sees, under one softmax: the first ``global_tokens`` tokens; its own block of ``window``
    tokens and the block before; and nodes of level l = 1, 2, ... that partition everything older,
    each the learned mean of ``rate`` nodes of the level below; of each level at most twice
    :attr:`~danon.config.MSRAConfig.level_width` (three times when bidirectional). A node's logit
    carries log(mass), so equal tokens under it make it exact. O(N log N) time.

    Learned: the pooling scores, the gain of the level's positional encoding on node keys (starts
    at zero), and per query and level the scale weight log w_l = log softmax_l(beta_l) with
    beta_l = v^T tanh(W_h q + W_x e_l + b), v starting at zero.
    """

    oracle_kind = "definition"

    @classmethod
    def build(cls, shape: AttentionConfig, **settings: Any) -> Self:
        """Build from a shape, and from fields of :class:`~danon.config.MSRAConfig`.

        Args:
            shape: widths, heads and causality.
            **settings: fields that differ from the defaults.
        """
        return cls(MSRAConfig(**shape.shared() | settings))

    @classmethod
    def search_space(cls) -> Space:
        """Return the ranges of a study; ``compression_factor`` stands for the rate itself."""

        def settings(choice: Mapping[str, Any]) -> dict[str, Any]:
            fields = dict(choice)
            return fields | {"rate": fields.pop("compression_factor")}

        return Space(
            {
                "window": Categorical((128, 256, 512, 1024, 2048, 4096)),
                "compression_factor": Categorical((2, 4, 8, 16)),
                "num_levels": Categorical((1, 2, 3, 4)),
                "global_tokens": Categorical((0, 4, 16, 64, 256)),
                "feature_fusion": Categorical(("adaptive", "uniform")),
                "calibration_factor": Float(0.0, 1.0),
            },
            {
                "window": 1024,
                "compression_factor": 16,
                "num_levels": 3,
                "global_tokens": 64,
                "feature_fusion": "adaptive",
                "calibration_factor": 0.0,
            },
            settings,
        )

    @classmethod
    def with_budget(cls, shape: AttentionConfig, entries: int) -> Self:
        """Build one of rate 8 with the largest window within the budget."""

        def config(window: int) -> MSRAConfig:
            return MSRAConfig(**shape.shared(), window=window, rate=8, global_tokens=SINKS)

        return largest_within_budget(lambda w: cls(config(w)), shape.max_sequence_length, entries)

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
        # Causal queries do not see the padding, which is behind them.
        seen = None if mask is None or c.is_causal else mask.repeat_interleave(c.kv_heads, 0)
        bias = None if seen is None else hide(seen)
        levels = far_rects(N, c.window, self.width, self.rate, c.global_tokens, c.is_causal)
        sources = [Source(k_, v_, bias), *self._nodes(k_, v_, seen, len(levels))]
        out = self.attend(q_, 0, sources, 0, [0] * len(sources))
        return out.view(B, H, N, D)

    @on_shard
    @without_autocast
    def attend_shard(self, q: Tensor, k: Tensor, v: Tensor, shard: SequenceShard) -> Tensor:
        """Attend with a part of a sequence; see :meth:`BaseAttention.attend_shard`."""
        return attend_shard(self, q, k, v, shard)

    def init_parts(self, empty: Tensor) -> Mapping[str, StateTensor]:
        """Return the parts of an empty state; see :meth:`StreamingAttention.init_parts`."""
        return streaming.init_parts(empty)

    def step_parts(
        self, q: Tensor, k: Tensor, v: Tensor, start: int, parts: Mapping[str, StateTensor]
    ) -> tuple[Tensor, Mapping[str, StateTensor]]:
        """Attend with the next tokens; see :meth:`StreamingAttention.step_parts`."""
        return streaming.step_parts(self, q, k, v, start, parts)

    def visible_pairs(self, length: int) -> int:
        """Count near tokens and visible nodes of all queries."""
        c = self.cfg
        near = near_rects(length, c.window, c.global_tokens, c.is_causal)
        far = far_rects(length, c.window, self.width, self.rate, c.global_tokens, c.is_causal)
        parts = [*near, *(side for sides in far for side in sides)]
        return sum(r.pairs for part in parts for r in part if r.k1 > r.k0)

    @rows_alone
    def oracle(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None) -> Tensor:
        """Compute the definition, dense and in float64."""
        with made_on(q.device):
            return oracle(self, q, k, v, rows)

    def effective_attention(
        self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor
    ) -> EffectiveAttention:
        """Return the matrix: near tokens are seen as themselves, older ones through nodes."""
        c = self.cfg
        with torch.no_grad(), q.device:
            keys, values, _, _, visible = entries(self, k, v, rows)
        nodes = zip(keys[1:], values[1:], visible[1:], strict=True)
        levels = [Level(x, y, self.rate**n, seen) for n, (x, y, seen) in enumerate(nodes, 1)]
        weights = super().effective_attention(q, k, v, rows).weights
        return EffectiveAttention(
            weights,
            visible[0].expand_as(weights),
            pooling_loss(k, v, levels, rows, c.global_tokens, c.is_causal),
        )
