"""DALA on a part of a sequence: keys and values of the past come, all choices are made here."""

from __future__ import annotations

import math

from torch import Tensor

from danon.attention.dala.base import DALABase
from danon.attention.dala.paths import Paths, paths_for_sequence
from danon.attention.keyed_draws import draw_by_example
from danon.attention.sequence_shard import SequenceShard

__all__ = ["imbalance_of_shard", "paths_for_shard"]


def paths_for_shard(m: DALABase, q: Tensor, k: Tensor, v: Tensor, shard: SequenceShard) -> Paths:
    """Return the paths of the queries of a part of a sequence.

    Args:
        m: parameters and configuration, causal.
        q: queries of the part (B, H, n, D).
        k: keys of the part (B, G, n, D).
        v: values of the part (B, G, n, D).
        shard: which tokens these are, and the way to the others.
    """
    c, seen = m.cfg, None
    k, v = shard.fetch((k, v), shard.up_to_own_end)
    q_, k_, v_ = (x.reshape(-1, *x.shape[2:]).contiguous() for x in (q, k, v))
    if m.training and c.attention_dropout:
        drawn = draw_by_example(shard.draw_key(m), len(q), shard.length, q.device)
        keep = drawn[:, : shard.stop] >= c.attention_dropout
        seen = keep.repeat_interleave(c.kv_heads, 0)
    return paths_for_sequence(m, q_, k_, v_, seen, shard.start)


def imbalance_of_shard(m: DALABase, paths: Paths, shard: SequenceShard) -> Tensor | None:
    """Return the weighted load-balance loss of the whole sequence; None where there is none.

    Args:
        m: parameters and configuration.
        paths: of the queries of the part.
        shard: of :func:`paths_for_shard`.
    """
    c = m.cfg
    routed = c.use_adaptive_router and math.ceil((shard.length - c.global_tokens) / c.period) > 2
    if not (m.wants_auxiliary and c.load_balance_weight and routed):
        return None
    real = shard.real(shard.start, shard.stop, paths.q.device)
    real = None if real is None else real.repeat_interleave(c.kv_heads, 0)
    return c.load_balance_weight * paths.imbalance(real, shard.total)
