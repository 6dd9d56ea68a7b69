"""DALA on a part of a sequence: what the past comes to is what a stream remembers of it.

From the processes before come the near tokens, the mean of every period, and of each process the
tokens that are the most important of its own. The state is computed from the means, and the memory
chosen from those tokens, by every process for itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from danon.attention.dala.base import DALABase
from danon.attention.dala.modules import period_means
from danon.attention.dala.paths import Paths, paths_for_chunk, paths_for_sequence
from danon.attention.keyed_draws import draw_by_example
from danon.attention.sequence_shard import Range, SequenceShard
from danon.attention.stream_state import Span, StateTensor

__all__ = ["imbalance_of_shard", "near_tokens", "paths_for_shard", "remembered_edges"]


def paths_for_shard(m: DALABase, q: Tensor, k: Tensor, v: Tensor, shard: SequenceShard) -> Paths:
    """Return the paths of the queries of a part of a sequence.

    Args:
        m: parameters and configuration, causal.
        q: queries of the part (B, H, n, D).
        k: keys of the part (B, G, n, D).
        v: values of the part (B, G, n, D).
        shard: which tokens these are, and the way to the others.
    """
    q_ = q.flatten(0, 1).contiguous()
    if (m.training and m.cfg.attention_dropout) or not _reaches_far(m, shard.length):
        return _paths_of_all_keys(m, q_, k, v, shard)
    g, start = m.cfg.global_tokens, shard.start
    rows = [x.flatten(0, 1) for x in shard.fetch((k, v), partial(near_tokens, m))]
    first = near_tokens(m, start, shard.stop)[-1][0]
    sinks = [x[:, : min(g, shard.stop)] for x in rows]
    tokens = [x[:, g:] for x in rows]
    at = max(g, first)
    score = m.importance(tokens[0], at)
    parts: dict[str, StateTensor] = {
        "sink_k": Span.of(sinks[0]),
        "sink_v": Span.of(sinks[1]),
        "k": Span.of(tokens[0], at - g),
        "v": Span.of(tokens[1], at - g),
        "score": Span.of(score, at - g),
    }
    parts |= _memory(m, tokens, score, at, shard, k.shape[:2])
    parts |= _state(m, tokens, at, shard, k.shape[:2])
    return paths_for_chunk(m, q_, start, parts)


def _paths_of_all_keys(m: DALABase, q: Tensor, k: Tensor, v: Tensor, shard: SequenceShard) -> Paths:
    """Return the paths over all keys: a stream has no dropout, and few keys are no matter."""
    c, batch, keep = m.cfg, len(k), None
    k, v = shard.fetch((k, v), shard.up_to_own_end)
    if m.training and c.attention_dropout:
        drawn = draw_by_example(shard.draw_key(m), batch, shard.length, q.device)
        keep = (drawn[:, : shard.stop] >= c.attention_dropout).repeat_interleave(c.kv_heads, 0)
    k_, v_ = (x.flatten(0, 1).contiguous() for x in (k, v))
    return paths_for_sequence(m, q, k_, v_, keep, shard.start)


def _reaches_far(m: DALABase, length: int) -> bool:
    """Return True if a query of so long a sequence sees anything outside its near window."""
    return math.ceil((length - m.cfg.global_tokens) / m.cfg.period) > 2


def first_period(m: DALABase, place: int) -> int:
    """Return the period of a token."""
    return max(0, place - m.cfg.global_tokens) // m.cfg.period


def near_tokens(m: DALABase, start: int, stop: int) -> Sequence[Range]:
    """Return the tokens that queries [start, stop) see with a decay, and the first ones.

    Args:
        m: configuration.
        start: place of the first query.
        stop: place after the last one.
    """
    g, first = m.cfg.global_tokens, (first_period(m, start) - 1) * m.cfg.period
    return ((0, stop),) if first <= 0 else ((0, g), (g + first, stop))


# Memory


def remembered_edges(m: DALABase, edges: Sequence[int], owner: int) -> list[int]:
    """Return places up to which a process chooses among its tokens, for those behind it.

    A process remembers at its first query what lies before the near window of that. So each asks
    for the tokens up to a place; most ask for all, and get the same.

    Args:
        m: configuration.
        edges: process r has tokens [edges[r], edges[r + 1]).
        owner: the process that chooses.
    """
    ends = set()
    for reader in range(owner + 1, len(edges) - 1):
        end = m.cfg.global_tokens + (first_period(m, edges[reader]) - 1) * m.cfg.period
        ends.add(min(end, edges[owner + 1]))
    return sorted(end for end in ends if end > max(m.cfg.global_tokens, edges[owner]))


def _memory(
    m: DALABase,
    tokens: Sequence[Tensor],
    score: Tensor,
    at: int,
    shard: SequenceShard,
    heads: Sequence[int],
) -> dict[str, StateTensor]:
    """Return the parts of a state that hold what the first query of a part remembers.

    Args:
        m: parameters and configuration.
        tokens: keys and values (X, n, D) past the first tokens, from place ``at`` on.
        score: their scores (X, n).
        at: see ``tokens``.
        shard: which tokens the queries are.
        heads: batch and key/value heads.
    """
    c, size, (X, _, D) = m.cfg, m.cfg.memory_size, tokens[0].shape
    by_owner = [remembered_edges(m, shard.edges, r) for r in range(len(shard.edges) - 1)]
    own = [x[:, max(0, shard.start - at) :] for x in (*tokens, score)]
    chosen = [_best(m, own, end - max(at, shard.start)) for end in by_owner[shard.rank]] or [
        [x[:, :0] for x in own]
    ]
    k, v, best = (torch.cat(x, 1).unflatten(0, tuple(heads)) for x in zip(*chosen, strict=True))
    edges = [0]
    for ends in by_owner:
        edges.append(edges[-1] + size * len(ends))

    def wanted(start: int, stop: int) -> Sequence[Range]:
        end = c.global_tokens + (first_period(m, start) - 1) * c.period
        ranges = []
        for owner in range(shard.edges.index(start) - 1, -1, -1):  # the more recent first
            mine = min(end, shard.edges[owner + 1])
            if mine in by_owner[owner]:
                number = by_owner[owner].index(mine)
                ranges.append((edges[owner] + size * number, edges[owner] + size * (number + 1)))
        return ranges

    k, v = (x.flatten(0, 1) for x in shard.fetch((k, v), wanted, edges))
    best = shard.fetch((best,), wanted, edges)[0].flatten(0, 1)
    short = size - best.shape[1]
    if short > 0:
        k, v = (F.pad(x, (0, 0, 0, short)) for x in (k, v))
        best = F.pad(best, (0, short), value=-torch.inf)
    order = best.detach().sort(dim=1, descending=True, stable=True).indices[:, :size]
    index = order[..., None].expand(X, size, D)
    return {
        "memory_k": k.gather(1, index),
        "memory_v": v.gather(1, index),
        "memory_score": best.gather(1, order),
    }


def _best(m: DALABase, tokens: Sequence[Tensor], count: int) -> list[Tensor]:
    """Return the most important ones (X, memory_size, ...) of the first tokens, the best first.

    Args:
        m: configuration.
        tokens: keys, values and scores (X, n, ...).
        count: choose among so many.

    Returns:
        Keys, values and scores; -inf for the score where there are not so many, or they do not pass
        the threshold. Equal scores: the more recent first.
    """
    size, (k, v, score) = m.cfg.memory_size, tokens
    choice = m.keepable(score.detach()[:, :count]).flip(-1)
    best, order = (x[:, :size] for x in choice.sort(dim=1, descending=True, stable=True))
    order = count - 1 - order
    index = order[..., None].expand(-1, -1, k.shape[-1])
    picked = torch.where(best > -torch.inf, score.gather(1, order), -torch.inf)
    short = size - order.shape[1]
    return [
        F.pad(k.gather(1, index), (0, 0, 0, short)),
        F.pad(v.gather(1, index), (0, 0, 0, short)),
        F.pad(picked, (0, short), value=-torch.inf),
    ]


# State


def _state(
    m: DALABase, tokens: Sequence[Tensor], at: int, shard: SequenceShard, heads: Sequence[int]
) -> dict[str, StateTensor]:
    """Return the parts of a state that hold the gated state and the mean before a part.

    Args:
        m: parameters and configuration.
        tokens: keys and values (X, n, D) past the first tokens, from place ``at`` on.
        at: see ``tokens``.
        shard: which tokens the queries are.
        heads: batch and key/value heads.
    """
    g, period = m.cfg.global_tokens, m.cfg.period
    edges = [first_period(m, edge) for edge in shard.edges]
    first, following = edges[shard.rank], edges[shard.rank + 1]
    own = slice(g + first * period - at, g + following * period - at)
    wide = torch.promote_types(tokens[0].dtype, torch.float32)
    # Even where no period ends the means hang on the tokens: gradients of others' pass by here.
    means = torch.cat([x[:, :0] for x in tokens], -1).to(wide)
    if first < following:
        means = torch.cat([period_means(x[:, own], None, period)[0] for x in tokens], -1)
    (rows,) = shard.fetch(
        (means.unflatten(0, tuple(heads)),), lambda start, _: ((0, first_period(m, start)),), edges
    )
    before = rows.flatten(0, 1)
    state = before.new_zeros(len(before), 2, before.shape[-1])
    if first:
        states, _ = m.state(before, torch.ones_like(before[..., 0]))
        state = torch.cat((state, states), 1)[:, -2:]
    mean = torch.cat((torch.zeros_like(state[:, :1]), before), 1)[:, -1:]
    return {"state": state, "mean": mean}


def imbalance_of_shard(m: DALABase, paths: Paths, shard: SequenceShard) -> Tensor | None:
    """Return the weighted load-balance loss of the whole sequence; None where there is none.

    Args:
        m: parameters and configuration.
        paths: of the queries of the part.
        shard: of :func:`paths_for_shard`.
    """
    c = m.cfg
    routed = c.use_adaptive_router and _reaches_far(m, shard.length)
    if not (m.wants_auxiliary and c.load_balance_weight and routed):
        return None
    real = shard.real(shard.start, shard.stop, paths.q.device)
    real = None if real is None else real.repeat_interleave(c.kv_heads, 0)
    return c.load_balance_weight * paths.imbalance(real, shard.total)
