"""UCSA's choice: the cut through the tree of nodes that each block of queries sees.

Positions are leaves past the global tokens; a node of level l spans fanout^l of them. Slots stand
in a fixed order, the more recent first, which is what decides between equal scores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from danon.attention.tiles import Rows
from danon.config import UCSAConfig

__all__ = ["Cut", "Tree", "choose_leaves", "descend", "far_leaves", "tree_depth"]

REFINE_FIRST = 1e30
"""Score of a node that reaches into the near window: it must be split."""


@dataclass(frozen=True)
class Tree:
    """Nodes by level; level 0 are the leaves.

    Attributes:
        key: (X, n, D) float32 or wider, of each level.
        log_mass: (X, n) of each level.
        first: the node in row 0 of each level.
        keep: nodes of a level that a bounded state holds on to, the last ones; None for all.
    """

    key: Sequence[Tensor]
    log_mass: Sequence[Tensor]
    first: Sequence[int]
    keep: int | None = None

    def row(self, level: int, node: Tensor) -> Tensor:
        """Rows of nodes; a node that does not exist, or not yet, gets some other's."""
        rows = self.key[level].shape[1]
        return (node - self.first[level]).clamp(0, max(0, rows - 1))

    def gather(self, level: int, node: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (T, X, k, D) and log(mass) (T, X, k) of nodes (T, X, k)."""
        rows = Rows(self.row(level, node))
        key, mass = self.key[level], self.log_mass[level]
        return rows.load(key, 0, rows.count), rows.load(mass, 0, rows.count)

    def oldest(self, level: int, far: Tensor, fanout: int) -> Tensor:
        """The oldest node held of a level when ``far`` leaves are far; it begins a parent."""
        if self.keep is None:
            return torch.zeros_like(far)
        last = (far // fanout**level - self.keep).clamp_min(0)
        first: Tensor = -(-last // fanout) * fanout
        return first


@dataclass(frozen=True)
class Cut:
    """What blocks of queries see of the tree.

    Attributes:
        coarse: (level, nodes (T, X, slots), which of them are real) of unrefined nodes.
        leaf: leaf numbers of the candidates (T, X, candidates).
        leaf_on: which of them are real.
    """

    coarse: tuple[tuple[int, Tensor, Tensor], ...]
    leaf: Tensor
    leaf_on: Tensor

    def part(self, some: slice) -> Cut:
        """The cut of some of the blocks."""
        coarse = tuple((level, node[some], on[some]) for level, node, on in self.coarse)
        return Cut(coarse, self.leaf[some], self.leaf_on[some])


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
    coarse = []
    for level in range(depth, -1, -1):
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
            votes = torch.where(able, votes, -1.0)
        order = votes.sort(dim=-1, descending=True, stable=True).indices
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
    return Cut(tuple(coarse), node, on)


def _votes(
    tree: Tree, level: int, node: Tensor, on: Tensor, q: Tensor, weight: Tensor, scale: float
) -> Tensor:
    """Softmax mass that the choosing queries give each node (T, X, slots)."""
    key, log_mass = tree.gather(level, node)
    logits = q @ key.transpose(-1, -2) * scale + log_mass[:, :, None]
    logits = logits.masked_fill(~on[:, :, None], torch.finfo(logits.dtype).min)
    return (logits.softmax(-1) * weight[..., None]).sum(2)


def choose_leaves(
    key: Tensor, log_mass: Tensor, on: Tensor, q: Tensor, budget: Tensor, heads: int, scale: float
) -> Tensor:
    """Each query's own leaves, shared by the heads of its group (seed 3.2).

    P(z = 1) = sigmoid(q.k / sqrt(d) + b) with b the leaf's log(mass), the best of any head; the
    sigmoid is monotone, so its argument is compared. Equals at the edge are all chosen.

    Args:
        key: of the candidates (T, X, candidates, D) float32.
        log_mass: (T, X, candidates).
        on: bool (T, X, candidates): which may be chosen.
        q: queries (T, X, heads * C, D) float32.
        budget: leaves each query of block t may refine (T,) int64, at least 0.

    Returns:
        (T, X, C, candidates) bool.
    """
    logits: Tensor = q @ key.transpose(-1, -2) * scale
    logits = logits.unflatten(2, (heads, -1)).amax(2) + log_mass[:, :, None]
    logits = logits.masked_fill(~on[:, :, None], -torch.inf)
    slots = logits.shape[-1]
    most = min(int(budget.max()), slots)
    if most == 0:
        return torch.zeros_like(logits, dtype=torch.bool)
    best = logits.topk(most, dim=-1).values
    edge = (budget.clamp(1, most) - 1)[:, None, None, None].expand(*best.shape[:-1], 1)
    chosen = logits >= best.gather(-1, edge)
    chosen = chosen & on[:, :, None]
    return chosen & (budget > 0)[:, None, None, None]
