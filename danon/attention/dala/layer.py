"""DALA, dynamic adaptive long-range attention: a decayed window, a memory, a recurrent state."""

from __future__ import annotations

from collections.abc import Mapping
from operator import index
from typing import Any, Self

import torch
from torch import Tensor

from danon.attention.base import made_on, without_autocast
from danon.attention.dala.base import DALABase
from danon.attention.dala.oracle import oracle, shares
from danon.attention.dala.paths import Paths, paths_for_chunk, paths_for_sequence
from danon.attention.dala.sequence_parallel import imbalance_of_shard, paths_for_shard
from danon.attention.effective_matrix import EffectiveAttention
from danon.attention.keyed_draws import draw_by_example
from danon.attention.padding import on_shard, right_padded, rows_alone
from danon.attention.registry import register
from danon.attention.sequence_shard import SequenceShard
from danon.attention.sizing import SINKS, largest_within_budget
from danon.attention.stream_state import Span, StateTensor, span_of
from danon.attention.tensor_checks import refuse_meta, refuse_transforms
from danon.attention.union.op import observe_branches, union
from danon.attention.union.tiles import near_rects
from danon.config import AttentionConfig, DALAConfig
from danon.tuned.search_space import Categorical, Float, Space

__all__ = ["DALA"]


@register("dala")
class DALA(DALABase):
    """Dynamic adaptive long-range attention (specification 2).

    Tokens after the first ``global_tokens`` fall into periods. A query sees, under one softmax:

    - near: the first tokens, its own period and the one before, the latter two with the bias
      -lambda |i-j| - |i-j|^2 / (2 w^2) (specification 2.2, 2.3). w goes by the head, and by the
      content of the period before: see :class:`~danon.attention.dala.window.WindowNetwork`;
    - memory: of the tokens older than that, the ``memory_size`` most important ones whose
      sigmoid(s) passes the threshold, s = MLP(key + PE); ties to the more recent. Their logits get
      log sigmoid(s), so the score learns;
    - state: one entry made of a gated state h that takes one step per period over the period's
      mean key and value (specification 2.2), up to the period before the near window.

    The router gives each query a distribution over the three paths, whose logarithm is the bias of
    the path. In training, :meth:`auxiliary_loss` keeps it from forgetting a path
    (:func:`~danon.attention.dala.modules.load_balance`). Bidirectional: the periods on both sides
    are near, the memory is chosen from both sides, and a second state runs backwards with the same
    weights. O(N) time.
    """

    oracle_kind = "definition"

    @classmethod
    def build(cls, shape: AttentionConfig, **settings: Any) -> Self:
        """Build from a shape, and from fields of :class:`~danon.config.DALAConfig`.

        Args:
            shape: widths, heads and causality.
            **settings: fields that differ from the defaults.
        """
        return cls(DALAConfig(**shape.shared() | settings))

    @classmethod
    def search_space(cls) -> Space:
        """Return the ranges of a study; ``window_max`` stands for the window itself."""

        def settings(choice: Mapping[str, Any]) -> dict[str, Any]:
            fields = dict(choice)
            return fields | {"window": fields.pop("window_max")}

        return Space(
            {
                "block_size": Categorical((32, 64, 128, 256)),
                "state_update_frequency": Categorical((2, 4, 8, 12, 16)),
                "memory_size": Categorical((64, 128, 256, 512, 1024, 2048)),
                "importance_threshold": Categorical((0.0, 0.5)),
                "global_tokens": Categorical((0, 4, 16, 64, 256)),
                "window_max": Categorical((64, 128, 256, 512, 1024, 2048)),
                "decay_rate": Float(1e-6, 1e-3, log=True),
                "adaptive_window": Categorical((True, False)),
                "use_adaptive_router": Categorical((True, False)),
                "router_iterations": Categorical((0, 1, 2, 3)),
            },
            {
                "block_size": 64,
                "state_update_frequency": 12,
                "memory_size": 512,
                "importance_threshold": 0.5,
                "global_tokens": 64,
                "window_max": 512,
                "decay_rate": 1e-4,
                "adaptive_window": True,
                "use_adaptive_router": True,
                "router_iterations": 2,
            },
            settings,
        )

    @classmethod
    def with_budget(cls, shape: AttentionConfig, entries: int) -> Self:
        """Build one with a memory as large as a period.

        It takes what scores highest, without a threshold: below that no score could ever learn.
        """

        def config(window: int) -> DALAConfig:
            return DALAConfig(
                **shape.shared(),
                block_size=window,
                state_update_frequency=1,
                memory_size=window,
                global_tokens=SINKS,
                importance_threshold=0.0,
            )

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
        real = None if mask is None else mask.repeat_interleave(c.kv_heads, 0)
        seen = None if c.is_causal else real  # causal queries do not see the padding behind them
        if self.training and c.attention_dropout:
            drawn = draw_by_example(self.draw_key, B, N, q.device)
            keep = drawn >= c.attention_dropout
            keep = keep.repeat_interleave(c.kv_heads, 0)
            seen = keep if seen is None else keep & seen
        q_, k_, v_ = (x.reshape(-1, N, D).contiguous() for x in (q, k, v))
        paths = paths_for_sequence(self, q_, k_, v_, seen)
        balanced = self.wants_auxiliary and c.load_balance_weight and paths.shifts
        total = None if self.head_share is None else self.head_share.total
        lost = c.load_balance_weight * paths.imbalance(real, total) if balanced else None
        self.set_auxiliary_loss(lost)
        return self._attend(q_, paths).view(B, H, N, D)

    @on_shard
    @without_autocast
    def attend_shard(self, q: Tensor, k: Tensor, v: Tensor, shard: SequenceShard) -> Tensor:
        """Attend with a part of a sequence; see :meth:`BaseAttention.attend_shard`."""
        paths = paths_for_shard(self, q, k, v, shard)
        self.set_auxiliary_loss(imbalance_of_shard(self, paths, shard))
        return self._attend(paths.q, paths).view(q.shape)

    def _attend(self, q: Tensor, paths: Paths) -> Tensor:
        c, scale = self.cfg, self.cfg.head_dim**-0.5
        out, lse = union(
            q,
            paths.sources,
            paths.calls(decayed=True),
            (*paths.shifts, paths.inverse_squares()),
            scale=scale,
            kernel=c.kernel,
        )
        if c.decay == "literal":
            # softmax(e) * gamma = softmax(e + log gamma) * exp(lse with decay - lse without).
            with observe_branches(None):
                _, plain = union(
                    q,
                    paths.sources,
                    paths.calls(decayed=False),
                    paths.shifts,
                    scale=scale,
                    kernel=c.kernel,
                )
            out = out * (lse - plain).exp()[..., None].to(out.dtype)
        return out

    def init_parts(self, empty: Tensor) -> Mapping[str, StateTensor]:
        """Return the parts of an empty state; see :meth:`StreamingAttention.init_parts`."""
        X, _, D = empty.shape
        wide = torch.promote_types(empty.dtype, torch.float32)
        slots = empty.new_zeros(X, self.cfg.memory_size, D)
        return {
            **{name: Span.of(empty) for name in ("sink_k", "sink_v", "k", "v")},
            "score": Span.of(empty[..., 0].to(wide)),
            "memory_k": slots,
            "memory_v": slots,
            "memory_score": torch.full(
                slots.shape[:2], -torch.inf, dtype=wide, device=empty.device
            ),
            "state": torch.zeros(X, 2, 2 * D, dtype=wide, device=empty.device),
            "mean": torch.zeros(X, 1, 2 * D, dtype=wide, device=empty.device),
        }

    def step_parts(
        self, q: Tensor, k: Tensor, v: Tensor, start: int, parts: Mapping[str, StateTensor]
    ) -> tuple[Tensor, Mapping[str, StateTensor]]:
        """Attend with the next tokens; see :meth:`StreamingAttention.step_parts`."""
        g, P, stop = self.cfg.global_tokens, self.cfg.period, start + k.shape[1]
        after = dict(parts)
        sinks = max(0, min(g, stop) - start)
        new = {"k": k, "v": v, "score": self.importance(k[:, sinks:], start + sinks)}
        for name in ("k", "v"):
            after[f"sink_{name}"] = span_of(after, f"sink_{name}").append(new[name][:, :sinks])
            new[name] = new[name][:, sinks:]
        for name, x in new.items():
            after[name] = span_of(after, name).append(x)
        out = self._attend(q, paths_for_chunk(self, q, start, after))
        for name in new:
            after[name] = span_of(after, name).since(max(0, (stop - g) // P - 1) * P)
        return out, after

    def visible_pairs(self, length: int) -> int:
        """Count the most pairs there can be: a full memory in every period."""
        c, g = self.cfg, self.cfg.global_tokens
        starts = range(0, max(0, length - g), c.period)
        older = [max(0, start - c.period) for start in starts]
        later = [max(0, length - g - start - 2 * c.period) for start in starts]
        if c.is_causal:
            later = [0] * len(later)
        full = [min(c.memory_size, a + b) for a, b in zip(older, later, strict=True)]
        return int(self._pairs(length, full))

    @torch.no_grad()
    def counted_pairs(self, k: Tensor) -> float:
        """Count pairs with the memories chosen from these keys."""
        N, D = k.shape[-2:]
        if N - self.cfg.global_tokens <= 2 * self.cfg.period:  # nothing is outside the near window
            return self.visible_pairs(N)
        kept = self.choose_memory(k.reshape(-1, N, D), None)[2].sum(-1).double().mean(-1)
        return self._pairs(N, kept.tolist())

    def _pairs(self, length: int, memory: list[int] | list[float]) -> float:
        """Count pairs when each period remembers so many tokens."""
        c, g = self.cfg, self.cfg.global_tokens
        near = near_rects(length, c.period, g, c.is_causal)
        pairs: float = sum(r.pairs for part in near for r in part)
        for p, remembered in enumerate(memory):
            rows = min(c.period, length - g - p * c.period)
            rows += g if p == 0 else 0  # the first tokens see what the first period sees
            past, future = p > 1, not c.is_causal and p + 2 < len(memory)
            pairs += rows * (remembered + past + future)
        return pairs

    @rows_alone
    def oracle(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None) -> Tensor:
        """Compute the definition, one period and head at a time, in float64.

        Which tokens are remembered is decided by the importance scores as the network gives them,
        in its own precision: a choice is either the same or another, never nearly the same.
        """
        with made_on(q.device):
            return oracle(self, q, k, v, rows)

    @torch.no_grad()
    def effective_attention(
        self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor
    ) -> EffectiveAttention:
        """Return weights of near and remembered tokens; the state entry's is on none of them.

        Held fixed, since they read values: the state, and what it and they do to width and router.
        """
        with made_on(q.device):
            weights, _, seen = shares(self, q, k, v, rows)
        return EffectiveAttention(weights[..., : k.shape[2]], seen)
