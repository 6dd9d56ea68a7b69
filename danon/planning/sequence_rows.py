"""The rows that the last rank of a sequence computes: its queries see the keys of all ranks.

``attend_rows(attention, q[:, :, start:], k, v, start)`` is
``attention(q, k, v)[:, :, start:]``, for causal mechanisms of ours without padding.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from danon.attention.base import BaseAttention
from danon.attention.dala.layer import DALA
from danon.attention.dala.modules import period_means
from danon.attention.dala.paths import Paths
from danon.attention.hybrid.layer import SuperHybrid
from danon.attention.msra.layer import MSRA
from danon.attention.msra.levels import far_rects
from danon.attention.ucsa.far_entries import FarCalls, blocks_of, first_far_block
from danon.attention.ucsa.layer import UCSA
from danon.attention.ucsa.sources import pool_tree, union_sources
from danon.attention.union.op import BranchCall, Source, union
from danon.attention.union.tiles import NEAR, batch, near_rects
from danon.config import UCSAConfig

__all__ = ["attend_rows", "voters_before"]


def attend_rows(
    attention: BaseAttention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: int,
    before: Tensor | None = None,
) -> Tensor:
    """Attend with the last queries of sequences.

    Args:
        attention: causal, of ours.
        q: queries (B, H, n, D) of the tokens from ``start`` on.
        k: keys (B, G, start + n, D) of all tokens.
        v: values, likewise.
        start: place of the first query.
        before: queries (B, H, m, D) of the m = :func:`voters_before` tokens before ``start``, which
            choose for the first block of these; only UCSA asks for them. None: the result is right
            in shape alone.

    Returns:
        (B, H, n, D).

    Raises:
        ValueError: another attention.
    """
    if isinstance(attention, SuperHybrid):
        member = attention.members[attention.choice().name]
        assert isinstance(member, BaseAttention)
        return attend_rows(member, q, k, v, start, before)
    q_, k_, v_ = (x.reshape(-1, x.shape[2], x.shape[3]).contiguous() for x in (q, k, v))
    if isinstance(attention, MSRA):
        out = _msra(attention, q_, k_, v_, start)
    elif isinstance(attention, DALA):
        out = _dala(attention, q_, k_, v_, start)
    elif isinstance(attention, UCSA):
        if before is None:
            before = q.new_empty(*q.shape[:2], voters_before(attention.cfg, start), q.shape[3])
        lines = torch.cat((before, q), 2).reshape(q_.shape[0], -1, q.shape[3])
        out = _ucsa(attention, q_, k_, v_, start, lines)
    else:
        raise ValueError(f"{type(attention).__name__}: must be MSRA, DALA, UCSA or a hybrid")
    return out.view(q.shape)


def voters_before(config: UCSAConfig, start: int) -> int:
    """Return how many queries before ``start`` choose for later ones.

    Args:
        config: of UCSA.
        start: place of the first query.
    """
    first = config.global_tokens + _first_voters(config, start) * config.query_block
    return max(0, start - first)


def _first_voters(c: UCSAConfig, start: int) -> int:
    """Return the block before the one that ``start`` is in."""
    return max(0, max(0, start - c.global_tokens) // c.query_block - 1)


def _msra(m: MSRA, q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
    c = m.cfg
    levels = far_rects(k.shape[1], c.window, m.width, m.rate, c.global_tokens, True, start)
    sources = [Source(k, v), *m._nodes(k, v, None, len(levels))]
    return m.attend(q, start, sources, 0, [0] * len(sources))


def _dala(m: DALA, q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
    c, g = m.cfg, m.cfg.global_tokens
    first = max(0, start - g) // c.period
    keys, count = period_means(k[:, g:], None, c.period)
    means = torch.cat((keys, period_means(v[:, g:], None, c.period)[0]), -1)
    content = F.pad(means, (0, 0, 1, 0))[:, : max(1, means.shape[1])]
    paths = Paths(m, q, start, [Source(k, v)], content[:, first:])
    if means.shape[1] > 2:
        score, index, kept = m.choose_memory(k, None)
        paths.index, paths.kept = index[first:], kept[first:]
        memory = Source(k, v, F.logsigmoid(score))
        past = m.state.entries(*m.state(means, count))
        paths.sources += [memory, Source(past.k.to(k.dtype), past.v.to(k.dtype), past.bias)]
        paths.states = ((2, first - 2),)
        if c.use_adaptive_router:
            state = F.pad(past.k, (0, 0, 2, 0))[:, :-2]
            near = F.pad(means, (0, 0, 1, 0))[:, :-1, : q.shape[-1]]
            paths.route(near[:, first:], memory, state[:, first:])
    return m._attend(q, paths)


def _ucsa(m: UCSA, q: Tensor, k: Tensor, v: Tensor, start: int, lines: Tensor) -> Tensor:
    c, g, stop = m.cfg, m.cfg.global_tokens, k.shape[1]
    near = near_rects(stop, c.local_window_size, g, True, start)
    calls = [
        BranchCall(0, qt, kt, causal, branch=branch)
        for branch, part in zip(NEAR, near, strict=True)
        for qt, kt, causal in batch(part, start)
    ]
    tree = None
    if first_far_block(c, stop) < blocks_of(c, stop):
        tree = pool_tree(m._pooled(c), k, v, None)
        base = _first_voters(c, start)
        lines = lines[:, max(0, g - start) :]  # past the first tokens
        calls += FarCalls(c, q, tree[0], lines, None, start, base, m.extra_share).calls()
    sources = union_sources(c, k, v, None, tree)
    return union(q, sources, calls, scale=c.head_dim**-0.5, kernel=c.kernel)[0]
