"""UCSA's choice: the cut through the tree of nodes that each block of queries sees.

Positions are leaves past the global tokens; a node of level l spans fanout^l of them. Slots stand
in a fixed order, the more recent first, which is what decides between equal scores.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from danon.attention.ucsa.pooling_error import classify_nodes
from danon.attention.ucsa.tree import Bounds, Far, Tree
from danon.config import UCSAConfig

__all__ = ["VOTE_EVERY", "TreeSelection", "choose_leaves", "descend", "far_leaves", "tree_depth"]

VOTE_EVERY = 4
"""One query in so many of a block votes: the others would vote much alike (docs/log.md)."""

REFINE_FIRST = 1e30
"""Score of a node that reaches into the near window: it must be split."""


@dataclass(frozen=True)
class TreeSelection:
    """Nodes and leaves of the tree that blocks of queries see.

    Attributes:
        coarse: (level, nodes (T, X, slots), which of them are real) of unrefined nodes.
        leaf: leaf numbers of the candidates (T, X, candidates).
        leaf_on: which of them are real.
    """

    coarse: tuple[tuple[int, Tensor, Tensor], ...]
    leaf: Tensor
    leaf_on: Tensor

    def part(self, blocks: slice) -> TreeSelection:
        """Return the cut of some of the blocks."""
        coarse = tuple((level, node[blocks], on[blocks]) for level, node, on in self.coarse)
        return TreeSelection(coarse, self.leaf[blocks], self.leaf_on[blocks])


def far_leaves(config: UCSAConfig, block: int, length: int) -> tuple[int, int, int]:
    """Return (a, z, n): leaves [0, a) and [z, n) are outside the near window of ``block``."""
    n = math.ceil(max(0, length - config.global_tokens) / config.leaf)
    per = config.local_window_size // config.leaf
    a = min(n, max(0, (block - 1) * per))
    return a, n if config.is_causal else min(n, (block + 2) * per), n


def tree_depth(config: UCSAConfig, leaves: int) -> int:
    """Return the lowest level that has at most ``candidate_blocks`` nodes over so many leaves."""
    depth = 0
    while math.ceil(leaves / config.fanout**depth) > config.candidate_blocks:
        depth += 1
    return depth


def descend(
    config: UCSAConfig,
    tree: Tree,
    q: Tensor,
    weight: Tensor,
    bounds: Bounds,
    depth: int,
    scale: float,
    leaves: Tensor | None = None,
) -> TreeSelection:
    """Refine from level ``depth`` down to the leaves, for T blocks of queries at once.

    Args:
        config: the configuration.
        tree: its nodes.
        q: the queries that choose (T, X, Q, D) float32; all heads of a key/value group in Q.
        weight: their votes (T, X, Q); zero for padding.
        bounds: of these T blocks.
        depth: :func:`tree_depth` of these blocks.
        scale: factor of q.k.
        leaves: of each of the X rows, (X,), where not all are as long as the bounds say. Each row
            begins at the level that it would begin at alone. None when causal.
    """
    T, X, _, D = q.shape
    f, refine = config.fanout, config.candidate_blocks // config.fanout
    outside = Far.of(bounds, q.device, leaves)
    a, z, n = (x[..., None] for x in outside)
    most = max(b[0] if config.is_causal else b[2] for b in bounds)
    top = math.ceil(most / f**depth)
    node = torch.arange(top - 1, -1, -1, device=q.device).expand(T, X, top)
    on = torch.ones_like(node, dtype=torch.bool)
    if leaves is not None:
        wide = [-(-n // f**level) > config.candidate_blocks for level in range(depth)]
        first_level = torch.stack([torch.zeros_like(n), *wide]).sum(0)
        on = on & (first_level == depth)
    coarse = []
    for level in range(depth, -1, -1):
        if leaves is not None and level < depth:
            top = min(config.candidate_blocks, math.ceil(most / f**level))
            node, on = _join(node, on, top, first_level == level)
        first, last = node * f**level, (node + 1) * f**level
        on = on & (first < n) & ~((first >= a) & (last.minimum(n) <= z))
        if level == 0:
            break
        split = on & (last > a) & (first < z)  # reaches into the near window
        # A node that is split anyway has no part in the vote: its key holds tokens of the near
        # window and, when causal, tokens later than the query.
        votes = _votes(tree, level, node, on & ~split, q, weight, scale)
        votes = torch.where(split, REFINE_FIRST, torch.where(on, votes, -1.0))
        able = None
        if tree.keep is not None:  # the children of old nodes are gone
            able = node * f >= tree.oldest(level - 1, a, f)
        verdict = classify_nodes(config, tree, level, node, outside)
        if verdict.lossless is not None:
            rough = split | ~verdict.lossless
            able = rough if able is None else able & rough
        if able is not None:
            votes = torch.where(able, votes, -1.0)
        order = votes.sort(dim=-1, descending=True, stable=True).indices
        if verdict.forced is not None:
            rank = (split.long() * 2 + (verdict.forced & ~split & (votes >= 0))).gather(-1, order)
            order = order.gather(-1, rank.sort(dim=-1, descending=True, stable=True).indices)
        chosen, rest = order[..., :refine], order[..., refine:]
        coarse.append((level, node.gather(-1, rest), on.gather(-1, rest)))
        parent, on = node.gather(-1, chosen), on.gather(-1, chosen)
        if able is not None:
            able = able.gather(-1, chosen)
            coarse.append((level, parent, on & ~able))
            on = on & able
        child = torch.arange(f - 1, -1, -1, device=q.device)
        node = (parent[..., None] * f + child).flatten(2)
        on = on[..., None].expand(*chosen.shape, f).flatten(2)
    return TreeSelection(tuple(coarse), node, on)


def _join(node: Tensor, on: Tensor, top: int, now: Tensor) -> tuple[Tensor, Tensor]:
    """Join nodes (T, X, k), and which are real, with those below ``top`` in rows that begin now."""
    k = max(top, node.shape[-1])
    node, on = (F.pad(x, (0, k - x.shape[-1])) for x in (node, on))
    slot = torch.arange(k, device=node.device)
    first = (top - 1 - slot).clamp_min(0)
    return torch.where(now, first, node), torch.where(now, slot < top, on)


def _votes(
    tree: Tree, level: int, node: Tensor, on: Tensor, q: Tensor, weight: Tensor, scale: float
) -> Tensor:
    """Return the softmax mass that the choosing queries give each node (T, X, slots)."""
    logits = tree.scores(level, node, q, scale)
    logits = logits.masked_fill(~on[:, :, None], torch.finfo(logits.dtype).min)
    return (logits.softmax(-1) * weight[..., None]).sum(2)


def choose_leaves(logits: Tensor, on: Tensor, budget: Tensor, most: int) -> Tensor:
    """Choose each query's own leaves, shared by the heads of its group (specification 3.2).

    P(z = 1) = sigmoid(q.k / sqrt(d) + b) with b what :mod:`~.tree` adds, the best of any head;
    the sigmoid is monotone, so its argument is compared. Equals at the edge are all chosen.

    Args:
        logits: of the candidates (T, X, C, candidates).
        on: bool (T, X, candidates): which may be chosen.
        budget: leaves each query of block t may refine, (T, 1) or (T, X) int64, at least 0.
        most: the largest there can be.

    Returns:
        (T, X, C, candidates) bool.
    """
    logits = logits.masked_fill(~on[:, :, None], -torch.inf)
    slots = logits.shape[-1]
    most = min(most, slots)
    if most == 0:
        return torch.zeros_like(logits, dtype=torch.bool)
    best = logits.topk(most, dim=-1).values
    budget = budget[..., None, None]
    edge = (budget.clamp(1, most) - 1).expand(*best.shape[:-1], 1)
    chosen = logits >= best.gather(-1, edge)
    chosen = chosen & on[:, :, None]
    return chosen & (budget > 0)
