"""UCSA's choice: the cut through the tree of nodes that each block of queries sees.

Positions are leaves past the global tokens; a node of level l spans fanout^l of them. Slots stand
in a fixed order, the more recent first, which is what decides between equal scores.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from danon.config import UCSAConfig

__all__ = ["Cut", "Tree", "choose_leaves", "descend", "far_leaves", "tree_depth"]

REFINE_FIRST = 1e30
"""Score of a node that reaches into the near window: it must be split."""


@dataclass(frozen=True)
class Tree:
    """Node keys of all levels, level 0 (leaves) first, concatenated: (X, nodes, D) float32."""

    key: Tensor
    log_mass: Tensor
    start: tuple[int, ...]
    count: tuple[int, ...]


@dataclass(frozen=True)
class Cut:
    """What blocks of queries see of the tree.

    Attributes:
        coarse: node numbers in the tree of unrefined nodes (T, X, slots).
        coarse_on: which of them are real.
        leaf: leaf numbers of the candidates (T, X, candidates).
        leaf_on: which of them are real.
    """

    coarse: Tensor
    coarse_on: Tensor
    leaf: Tensor
    leaf_on: Tensor


def far_leaves(config: UCSAConfig, block: int, length: int) -> tuple[int, int, int]:
    """(a, z, n): leaves [0, a) and [z, n) are outside the near window of local block ``block``."""
    n = math.ceil(max(0, length - config.global_tokens) / config.leaf)
    per = config.local_window_size // config.leaf
    a = min(n, max(0, (block - 1) * per))
    return a, n if config.is_causal else min(n, (block + 2) * per), n


def tree_depth(config: UCSAConfig, leaves: int) -> int:
    """The lowest level that has at most ``candidate_blocks`` nodes over so many leaves."""
    depth = 0
    while math.ceil(leaves / config.fanout**depth) > config.candidate_blocks:
        depth += 1
    return depth


def descend(
    config: UCSAConfig, tree: Tree, q: Tensor, weight: Tensor, bounds: Tensor, depth: int,
    scale: float,
) -> Cut:  # fmt: skip
    """Refine from level ``depth`` down to the leaves, for T blocks of queries at once.

    Args:
        q: the queries that choose (T, X, Q, D) float32; all heads of a key/value group in Q.
        weight: their votes (T, X, Q); zero for padding.
        bounds: (T, 3) int64: a, z and n of :func:`far_leaves`.
        depth: :func:`tree_depth` of these blocks.
    """
    T, X, _, D = q.shape
    f, refine = config.fanout, config.candidate_blocks // config.fanout
    a, z, n = (bounds[:, i, None, None] for i in range(3))
    top = math.ceil(
        int(bounds[:, 2].max() if not config.is_causal else bounds[:, 0].max()) / f**depth
    )
    node = torch.arange(top - 1, -1, -1, device=q.device).expand(T, X, top)
    on = torch.ones_like(node, dtype=torch.bool)
    coarse, coarse_on = [], []
    for level in range(depth, -1, -1):
        first, last = node * f**level, (node + 1) * f**level
        on = on & (first < n) & ~((first >= a) & (last.minimum(n) <= z))
        if level == 0:
            break
        split = on & (last > a) & (first < z)  # reaches into the near window
        number = tree.start[level] + node.clamp_max(tree.count[level] - 1)
        # A node that is split anyway has no part in the vote: its key holds tokens of the near
        # window and, when causal, tokens later than the query.
        votes = _votes(tree, number, on & ~split, q, weight, scale)
        votes = torch.where(split, REFINE_FIRST, torch.where(on, votes, -1.0))
        order = votes.sort(dim=-1, descending=True, stable=True).indices
        chosen, rest = order[..., :refine], order[..., refine:]
        coarse.append(number.gather(-1, rest))
        coarse_on.append(on.gather(-1, rest))
        child = torch.arange(f - 1, -1, -1, device=q.device)
        node = (node.gather(-1, chosen)[..., None] * f + child).flatten(2)
        on = on.gather(-1, chosen)[..., None].expand(*chosen.shape, f).flatten(2)
    none = node[..., :0]
    return Cut(
        torch.cat([none, *coarse], -1), torch.cat([none.bool(), *coarse_on], -1),
        node.clamp_max(max(0, tree.count[0] - 1)), on,
    )  # fmt: skip


def _votes(
    tree: Tree, number: Tensor, on: Tensor, q: Tensor, weight: Tensor, scale: float
) -> Tensor:
    """Softmax mass that the choosing queries give each node (T, X, slots)."""
    logits = q @ _gather(tree.key, number).transpose(-1, -2) * scale
    logits = logits + _gather(tree.log_mass, number)[:, :, None]
    logits = logits.masked_fill(~on[:, :, None], torch.finfo(logits.dtype).min)
    return (logits.softmax(-1) * weight[..., None]).sum(2)


def choose_leaves(
    tree: Tree, cut: Cut, q: Tensor, budget: Tensor, heads: int, scale: float
) -> Tensor:  # fmt: skip
    """Each query's own leaves, shared by the heads of its group (seed 3.2).

    P(z = 1) = sigmoid(q.k / sqrt(d) + b) with b the leaf's log(mass), the best of any head; the
    sigmoid is monotone, so its argument is compared. Equals at the edge are all chosen.

    Args:
        q: queries (T, X, heads * C, D) float32.
        budget: leaves each query of block t may refine (T,) int64, at least 0.

    Returns:
        (T, X, C, candidates) bool.
    """
    logits: Tensor = q @ _gather(tree.key, cut.leaf).transpose(-1, -2) * scale
    logits = logits.unflatten(2, (heads, -1)).amax(2) + _gather(tree.log_mass, cut.leaf)[:, :, None]
    logits = logits.masked_fill(~cut.leaf_on[:, :, None], -torch.inf)
    slots = logits.shape[-1]
    most = min(int(budget.max()), slots)
    if most == 0:
        return torch.zeros_like(logits, dtype=torch.bool)
    best = logits.topk(most, dim=-1).values
    edge = (budget.clamp(1, most) - 1)[:, None, None, None].expand(*best.shape[:-1], 1)
    chosen = logits >= best.gather(-1, edge)
    chosen = chosen & cut.leaf_on[:, :, None]
    return chosen & (budget > 0)[:, None, None, None]


def _gather(x: Tensor, number: Tensor) -> Tensor:
    """Rows of x (X, n, ...) by number (T, X, k) -> (T, X, k, ...)."""
    X, n = x.shape[:2]
    head = torch.arange(X, device=x.device)[:, None] * n
    rows = x.reshape(X * n, *x.shape[2:]).index_select(0, (number + head).flatten())
    out: Tensor = rows.view(*number.shape, *x.shape[2:])
    return out
