"""MSRA on a part of a sequence: near tokens come, and all older ones as nodes of the first level.

Every process pools its own tokens. Nodes of the first level are 1 / rate of the tokens; the levels
above are made of them on every process that sees them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from danon.attention.msra.base import MSRABase
from danon.attention.msra.levels import far_rects
from danon.attention.sequence_shard import Range, SequenceShard
from danon.attention.union.op import Source

__all__ = ["attend_shard", "near_tokens", "node_edges"]


def attend_shard(m: MSRABase, q: Tensor, k: Tensor, v: Tensor, shard: SequenceShard) -> Tensor:
    """Return the output (B, H, n, D) of the queries of a part; see ``BaseAttention.attend_shard``.

    Args:
        m: parameters and configuration, causal.
        q: queries of the part (B, H, n, D).
        k: keys of the part (B, G, n, D).
        v: values of the part (B, G, n, D).
        shard: which tokens these are, and the way to the others.
    """
    c, g = m.cfg, m.cfg.global_tokens
    rows = [x.flatten(0, 1) for x in shard.fetch((k, v), partial(near_tokens, m))]
    first = near_tokens(m, shard.start, shard.stop)[-1][0]
    sinks = Source(*(x[:, :g] for x in rows)) if first else None
    tokens = [x[:, g:] for x in rows] if first else rows
    nodes: list[Source] = []
    if shard.length - g > 2 * c.window:  # something is far for somebody
        levels = far_rects(shard.stop, c.window, m.width, m.rate, g, True, shard.start)
        nodes = _nodes(m, tokens, first, len(levels), shard, k.shape[:2])
    sources = [Source(*tokens), *nodes]
    places = [first, *[0] * len(nodes)]
    if sinks is not None:
        sources.append(sinks)
        places.append(0)
    where = 0 if sinks is None else len(sources) - 1
    q_ = q.flatten(0, 1).contiguous()
    return m.attend(q_, shard.start, sources, where, places).view(q.shape)


def near_tokens(m: MSRABase, start: int, stop: int) -> Sequence[Range]:
    """Return the tokens that queries [start, stop) see, or that make nodes with them.

    Args:
        m: configuration.
        start: place of the first query.
        stop: place after the last one.
    """
    c, g = m.cfg, m.cfg.global_tokens
    first = g + (max(0, start - g) // c.window - 1) * c.window  # of the block before
    if first <= g:
        return ((0, stop),)
    return ((0, g), (first, stop))


def node_edges(m: MSRABase, edges: Sequence[int]) -> list[int]:
    """Return which nodes of the first level each process makes: those whose last token it has.

    Args:
        m: configuration.
        edges: process r has tokens [edges[r], edges[r + 1]).
    """
    return [max(0, edge - m.cfg.global_tokens) // m.rate for edge in edges]


def _nodes(
    m: MSRABase,
    tokens: Sequence[Tensor],
    first: int,
    depth: int,
    shard: SequenceShard,
    heads: Sequence[int],
) -> list[Source]:
    """Return the nodes of all levels that queries of a part see, from the first node on.

    Args:
        m: parameters and configuration.
        tokens: keys and values (X, n, D) of tokens from ``first`` on.
        first: place of the first of them.
        depth: how many levels there are.
        shard: which tokens the queries are.
        heads: batch and key/value heads.
    """
    dtype, g = tokens[0].dtype, m.cfg.global_tokens
    edges = node_edges(m, shard.edges)
    made = edges[shard.rank], edges[shard.rank + 1]
    own = slice(max(0, g + made[0] * m.rate - first), max(0, g + made[1] * m.rate - first))
    k, v = (x[:, own] for x in tokens)

    def pooled(k: Tensor, v: Tensor) -> list[Any]:
        means = m.parents(k, v, m.square(k), None, 0)[:3]
        return [x for x in means if x is not None]

    if m.cfg.memory_efficient and torch.is_grad_enabled():
        means = checkpoint(pooled, k, v, use_reentrant=False)
    else:
        means = pooled(k, v)
    means = shard.fetch(
        [x.unflatten(0, tuple(heads)) for x in means],
        lambda _, stop: ((0, node_edges(m, (stop,))[0]),),
        edges,
    )
    k, v, *rest = (x.flatten(0, 1) for x in means)
    square = rest[0] if rest else None
    nodes = []
    for level in range(depth):
        node = m.attended(k, square, level)
        nodes.append(Source(node.to(dtype), v.to(dtype)))
        if level + 1 < depth:
            k, v, square, _, _ = m.parents(k, v, square, None, level + 1)
    return nodes
