"""MSRA on a part of a sequence: keys and values of the past come, and are pooled here."""

from __future__ import annotations

from torch import Tensor

from danon.attention.msra.base import MSRABase
from danon.attention.msra.levels import far_rects
from danon.attention.sequence_shard import SequenceShard
from danon.attention.union.op import Source

__all__ = ["attend_shard"]


def attend_shard(m: MSRABase, q: Tensor, k: Tensor, v: Tensor, shard: SequenceShard) -> Tensor:
    """Return the output (B, H, n, D) of the queries of a part; see ``BaseAttention.attend_shard``.

    Args:
        m: parameters and configuration, causal.
        q: queries of the part (B, H, n, D).
        k: keys of the part (B, G, n, D).
        v: values of the part (B, G, n, D).
        shard: which tokens these are, and the way to the others.
    """
    c = m.cfg
    k, v = shard.fetch((k, v), shard.up_to_own_end)
    q_, k_, v_ = (x.reshape(-1, *x.shape[2:]).contiguous() for x in (q, k, v))
    levels = far_rects(shard.stop, c.window, m.width, m.rate, c.global_tokens, True, shard.start)
    sources = [Source(k_, v_), *m._nodes(k_, v_, None, len(levels))]
    return m.attend(q_, shard.start, sources, 0, [0] * len(sources)).view(q.shape)
