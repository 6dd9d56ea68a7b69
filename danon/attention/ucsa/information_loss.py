"""UCSA's information loss (specification 3.1): what pooled nodes lose of keys and values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from danon.attention.kernels.base import HIDDEN
from danon.attention.keyed_draws import DrawKey, draw
from danon.attention.ucsa.tree import Tree
from danon.config import UCSAConfig

__all__ = ["Places", "drawn_places", "information_loss", "loss_at"]

LEAVES, QUERIES = 512, 64
"""Leaves and queries that the loss looks at, at most: its cost does not grow with N."""


class Places(NamedTuple):
    """Leaves (n,) past the global tokens and queries (n,) that the loss looks at, int64."""

    leaf: Tensor
    query: Tensor

    def tokens(self, c: UCSAConfig) -> Tensor:
        """Return the tokens of the leaves (leaves * leaf,); the last leaf may not be whole."""
        inside = torch.arange(c.leaf, device=self.leaf.device)
        return (self.leaf[:, None] * c.leaf + inside).flatten() + c.global_tokens


def drawn_places(c: UCSAConfig, length: int, device: torch.device, key: DrawKey | None) -> Places:
    """Draw the places that the loss of a sequence looks at.

    Args:
        c: the configuration.
        length: tokens N.
        device: of the result.
        key: see :func:`information_loss`.
    """
    leaves = math.ceil((length - c.global_tokens) / c.leaf)
    leaf = _drawn(leaves, LEAVES, device, key, 0)
    return Places(leaf, _drawn(length, QUERIES, device, key, 1))


def information_loss(
    c: UCSAConfig,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor | None,
    tree: Tree,
    values: Sequence[Tensor],
    key: DrawKey | None = None,
) -> Tensor:
    """Return L_info = ||X - X^||^2 + lambda KL(p_X || p_X^), the mean over the tree's levels.

    X are the tokens' keys and values, X^ has the node above in the place of each token.

    - ||X - X^||^2 is taken over the variance of X: the share of it that is lost, the mean over keys
      and values. In [0, 1] where nodes are plain means, and free of the scale of X, of N and of D.
    - p_X is the attention of a query over X, softmax(q.k / sqrt(d)) over the tokens under nodes
      that end before the query (all tokens when bidirectional); KL is in nats, the mean over the
      queries. p_X is the target: it has no gradient, or flat attention would look like a gain.
      Nodes that nobody sees (``coarse_nodes`` False) only say which leaves to look at: p_X^ is then
      by the scores that choose, ranges included, and both are summed over the tokens of a leaf, or
      keys would be drawn to be alike within it.

    The gradient goes to the pooling scores and, as attention can only be as good as keys and values
    are compressible, to k and v; not to q.

    Args:
        c: the configuration.
        q: (X, N, D), X = batch * query heads.
        k: (G, N, D), G = batch * key/value heads; v the same.
        v: (G, N, D).
        seen: which tokens are real (G, N); None if all.
        tree: nodes past the global tokens.
        values: (G, n, D) of each level.
        key: of what is drawn, the same for all examples of a training step.

    Returns:
        A scalar, float32 or wider, at least 0; 0 where every node equals its tokens.
    """
    places = drawn_places(c, k.shape[1], k.device, key)
    token = places.tokens(c).clamp_max(k.shape[1] - 1)
    tokens = k[:, token], v[:, token]
    return loss_at(c, places, k.shape[1], q[:, places.query], tokens, seen, tree, values)


def loss_at(
    c: UCSAConfig,
    places: Places,
    length: int,
    asked: Tensor,
    tokens: tuple[Tensor, Tensor],
    seen: Tensor | None,
    tree: Tree,
    values: Sequence[Tensor],
) -> Tensor:
    """Return the loss of :func:`information_loss` at given places.

    Args:
        c: the configuration.
        places: leaves and queries.
        length: tokens N.
        asked: these queries (X, n, D).
        tokens: keys and values (G, leaves * leaf, D) of the tokens of these leaves; the last one's
            where there is none.
        seen: as in :func:`information_loss`.
        tree: likewise.
        values: likewise.
    """
    (G, _, D), g, wide = tokens[0].shape, c.global_tokens, tree.key[0].dtype
    token, position = places.tokens(c), places.query
    real = (token < length).expand(G, -1)
    token = token.clamp_max(length - 1)
    if seen is not None:
        real = real & seen[:, token]
    ask = asked.detach().to(wide).reshape(G, -1, D)  # (G, heads of the group * queries, D)
    counted = torch.ones_like(position, dtype=torch.bool).expand(G, -1)
    counted = counted if seen is None else seen[:, position]
    counted = counted.repeat(1, ask.shape[1] // len(position))
    exact_k, exact_v = (x.to(wide) for x in tokens)
    exact = (ask @ exact_k.detach().transpose(1, 2)) * D**-0.5
    total = exact_k.new_zeros(())
    for level, (node_k, node_v) in enumerate(zip(tree.key, values, strict=True)):
        span = c.leaf * c.fanout**level
        above = (token - g) // span
        nodes = [x[:, above] for x in (node_k, node_v)]
        lost = [_lost(x, y, real) for x, y in zip((exact_k, exact_v), nodes, strict=True)]
        shown = real[:, None]
        if c.is_causal:
            ends = (above + 1) * span + g
            shown = shown & (ends <= position[:, None] + 1).repeat(ask.shape[1] // len(position), 1)
        coarse = ask @ nodes[0].transpose(1, 2)
        if not c.coarse_nodes:
            spread = tree.spread[level][:, above].to(wide)
            coarse = coarse + (ask.square() @ spread.transpose(1, 2)).sqrt()
        coarse = coarse * D**-0.5
        together = 1 if c.coarse_nodes else c.leaf
        far = _divergence(exact, coarse, shown.expand_as(exact), counted, together)
        total = total + (lost[0] + lost[1]) / 2 + c.information_kl * far
    return total / len(tree.key)


def _drawn(n: int, most: int, device: torch.device, key: DrawKey | None, kind: int) -> Tensor:
    """Draw one index from each of at most so many equal stretches of n, anew at each call.

    Fixed ones an even distance apart would never meet what happens at odd ones.
    Without a key they come from torch's own generator: what repeats a forward pass has to restore
    that, as gradient checkpointing does.
    """
    count = min(n, most)
    edge = torch.arange(count + 1, device=device) * n // count
    first, last = edge[:-1], edge[1:] - 1
    share = draw(key, count, device, kind)
    return (first + share * (last + 1 - first)).long().minimum(last)


def _lost(x: Tensor, node: Tensor, real: Tensor) -> Tensor:
    """Return the share of the variance of tokens x (G, M, D) that nodes lose: mean over G."""
    weight = real.to(x.dtype)[..., None]
    mean = (x * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp_min(1)
    variance = ((x - mean).square() * weight).sum((1, 2))
    # Where tokens differ by rounding alone, that share would be noise.
    least = 1e-6 * (x.detach().square() * weight).sum((1, 2))
    variance = variance.maximum(least).clamp_min(torch.finfo(x.dtype).tiny)
    return (((x - node).square() * weight).sum((1, 2)) / variance).mean()


def _divergence(
    exact: Tensor, coarse: Tensor, shown: Tensor, asked: Tensor, together: int
) -> Tensor:
    """Return the mean over G of the mean KL of softmaxes (G, Q, M), of queries asked (G, Q).

    Args:
        exact: logits of tokens.
        coarse: logits of the nodes above them.
        shown: bool, broadcastable to (G, Q, M).
        asked: bool (G, Q).
        together: so many neighbours of the M count as one.
    """
    log_p, log_q = (x.masked_fill(~shown, HIDDEN).log_softmax(-1) for x in (exact, coarse))
    if together > 1:
        log_p, log_q = (x.unflatten(-1, (-1, together)).logsumexp(-1) for x in (log_p, log_q))
        shown = shown.unflatten(-1, (-1, together)).any(-1)
    each = (log_p.exp() * (log_p - log_q)).masked_fill(~shown, 0.0).sum(-1).clamp_min(0)
    asked = asked & shown.any(-1)
    # The mean of means: a batch has the mean loss of its examples, however many queries they have.
    return ((each * asked).sum(-1) / asked.sum(-1).clamp_min(1)).mean()
